# SPDX-License-Identifier: Apache-2.0
"""`ctrbench build`: fit and encode a dataset before any experiment needs it, in many processes or on a Ray cluster."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser("build", help="fit and encode a dataset, also on a Ray cluster")
    parser.add_argument("dataset", help="a dataset_id")
    parser.add_argument("--config", type=Path, help="folder of dataset_config.yaml; default: the repository's config/")
    parser.add_argument(
        "--engine", default="local", metavar="local|ray", help="processes of this machine (default), or a Ray cluster"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="raw files worked on at once; default: 1, which reads them one after the other with all cores; with ray: "
        "the cores of this machine",
    )
    parser.add_argument("--address", help="of a running Ray cluster; default: RAY_ADDRESS, then a local cluster")
    parser.add_argument(
        "--task",
        nargs="+",
        choices=("binary_classification", "regression"),
        default=["binary_classification"],
        help="what experiments will do with it, one for each label; decides which labels are refused",
    )
    parser.add_argument("--fresh", action="store_true", help="build it again even if it is complete")
    parser.set_defaults(action=_build)


def _build(arguments: argparse.Namespace) -> int:
    import logging

    from ctrbench.config import load_dataset
    from ctrbench.engines import open_engine
    from ctrbench.fitting import num_cores
    from ctrbench.preprocess import build_dataset

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    dataset, root = load_dataset(arguments.dataset, arguments.config)
    workers = arguments.workers
    if workers is None:
        workers = num_cores() if arguments.engine == "ray" else 1
    with open_engine(arguments.engine, workers, arguments.address) as engine:
        task = arguments.task[0] if len(arguments.task) == 1 else arguments.task
        built = build_dataset(dataset, root=root, task=task, fresh=arguments.fresh, engine=engine)
    rows = ", ".join(f"{split} {rows:,}" for split, rows in built.num_rows.items())
    print(f"{built.path}: {rows} rows, data hash {built.data_hash[:12]}")
    return 0
