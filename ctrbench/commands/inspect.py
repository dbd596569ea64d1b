# SPDX-License-Identifier: Apache-2.0
"""`ctrbench inspect`: what is in a dataset, and what in it may leak."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser("inspect", help="rows, fields and leakage of a dataset")
    parser.add_argument("dataset", help="a dataset_id, a folder, or a raw CSV or Parquet file")
    parser.add_argument("--output", type=Path, metavar="PAGE.html", help="write a page with plots too")
    parser.add_argument("--label", help="label column of raw files; default: label, click and the like")
    parser.add_argument("--sep", help="separator of raw CSV files; default: a comma")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--config", type=Path, help="folder of dataset_config.yaml; default: the repository's config/")
    parser.set_defaults(action=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    import json
    import logging

    from ctrbench.errors import ConfigError
    from ctrbench.inspection.opening import inspect_dataset
    from ctrbench.inspection.page import write_page
    from ctrbench.inspection.text import to_text

    if arguments.output and arguments.output.suffix != ".html":
        raise ConfigError(f"--output {arguments.output}: must end in .html")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    found = inspect_dataset(arguments.dataset, arguments.config, arguments.label, arguments.sep)
    print(json.dumps(found.to_dict(), ensure_ascii=False) if arguments.json else to_text(found))
    if arguments.output:
        write_page(arguments.output, found)
        if not arguments.json:
            print(f"\n{arguments.output}")
    return 0
