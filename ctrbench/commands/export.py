# SPDX-License-Identifier: Apache-2.0
"""`ctrbench export`: a dataset in the files of stock FuxiCTR."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser("export", help="write a dataset in the files of stock FuxiCTR")
    parser.add_argument("dataset", help="a dataset_id, or a folder that holds a feature_map.json")
    parser.add_argument("--format", required=True, choices=("h5", "parquet", "npz"), dest="data_format")
    parser.add_argument(
        "--output", type=Path, required=True, help="data_root of the export; gets a folder <dataset_id>"
    )
    parser.add_argument(
        "--block-size", type=int, default=0, metavar="N", help="rows of a block; default: one file a split"
    )
    parser.add_argument("--config", type=Path, help="folder of dataset_config.yaml; default: the repository's config/")
    parser.set_defaults(action=_export)


def _export(arguments: argparse.Namespace) -> int:
    import logging

    from ctrbench.dataset_lookup import encoded_in, find_dataset
    from ctrbench.export import SECTION, export_dataset
    from ctrbench.preprocess import build_dataset

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("ctrbench.export").setLevel(logging.INFO)  # the splits as they are written
    found = find_dataset(arguments.dataset, arguments.config)
    encoded = found.encoded
    if encoded is None:
        assert found.dataset is not None
        encoded = encoded_in(build_dataset(found.dataset, root=found.root).path)
    target = export_dataset(encoded, arguments.data_format, arguments.output, arguments.block_size)
    print(f"{target}: ready for FuxiCTR; {target / SECTION} is its section of dataset_config.yaml")
    return 0
