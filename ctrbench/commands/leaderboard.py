# SPDX-License-Identifier: Apache-2.0
"""`ctrbench leaderboard`: tables, statistics and evidence of finished runs."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser("leaderboard", help="tables, statistics and evidence of finished runs")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="folder of run directories")
    parser.add_argument("--suite", help="only the runs of a suite; what is missing of it is said")
    parser.add_argument("--output", type=Path, help="folder for leaderboard.md, .csv, comparisons.csv and .html")
    parser.add_argument("--look-at", type=Path, metavar="RUN_DIR", help="run to look at closely on the page")
    parser.add_argument("--gpu", type=int, default=-1, help="GPU that evaluates that run; -1 is the CPU")
    parser.set_defaults(action=_leaderboard)


def _leaderboard(arguments: argparse.Namespace) -> int:
    import logging
    import shlex
    import sys

    from ctrbench.errors import ConfigError
    from ctrbench.leaderboard.collect import collect
    from ctrbench.leaderboard.table import explanations, to_markdown

    if arguments.look_at and not arguments.output:
        raise ConfigError("--look-at: shown on the page only: name its folder with --output")
    suite = None
    if arguments.suite:
        from ctrbench.suite import load_suite

        suite = load_suite(arguments.suite)
    board = collect(arguments.folder, suite, shlex.join(["ctrbench", *sys.argv[1:]]))
    print(to_markdown(board))
    if lines := explanations(board):
        print("", *lines, sep="\n")
    if arguments.output:
        from ctrbench.leaderboard.publish import write_board

        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        for path in write_board(board, arguments.output, arguments.look_at, arguments.gpu):
            print(path)
    return 0
