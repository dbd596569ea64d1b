# SPDX-License-Identifier: Apache-2.0
"""`ctrbench interpret`: plots of a finished run's field interactions and Self-Mask."""

from __future__ import annotations

import argparse
from pathlib import Path

from ctrbench.commands.arguments import add_run_arguments


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser("interpret", help="plot field interactions and Self-Mask activity of a finished run")
    add_run_arguments(parser)
    parser.add_argument("--rows", type=int, nargs="+", default=[0, 1, 2, 3], help="rows of the split to explain")
    parser.add_argument("--output", type=Path, help="folder of the plots; default: the run directory")
    parser.set_defaults(action=_interpret)


def _interpret(arguments: argparse.Namespace) -> int:
    import logging

    from ctrbench.interpret import plot_run

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for path in plot_run(arguments.run_dir, arguments.rows, arguments.split, arguments.output, arguments.gpu):
        print(path)
    return 0
