# SPDX-License-Identifier: Apache-2.0
"""`ctrbench predict`: the predictions of a finished run, as a file or as the MMCTR challenge's."""

from __future__ import annotations

import argparse
from pathlib import Path

from ctrbench.commands.arguments import add_run_arguments


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser("predict", help="write the predictions of a finished run")
    add_run_arguments(parser)
    parser.add_argument("--data", type=Path, help="raw CSV or Parquet rows to score instead of a split")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--output", type=Path, help="file to write, .csv or .parquet")
    where.add_argument("--submission", type=Path, help="folder for the MMCTR challenge's prediction.csv and its zip")
    parser.add_argument("--task", default="Task2", help="the submission's column: Task2 (default) or Task1&2")
    parser.set_defaults(action=_predict)


def _predict(arguments: argparse.Namespace) -> int:
    import logging

    from ctrbench.errors import ConfigError
    from ctrbench.predict import write_challenge_files, write_predictions

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if arguments.submission:
        if arguments.data:
            raise ConfigError("--submission: scores a split of the run's dataset, so --data does not go with it")
        folder, task = arguments.submission, arguments.task
        for path in write_challenge_files(arguments.run_dir, folder, arguments.split, task, arguments.gpu):
            print(path)
        return 0
    rows = write_predictions(arguments.run_dir, arguments.output, arguments.split, arguments.data, arguments.gpu)
    print(f"{rows} predictions: {arguments.output}")
    return 0
