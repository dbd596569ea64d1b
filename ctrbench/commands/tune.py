# SPDX-License-Identifier: Apache-2.0
"""`ctrbench tune`: a hyperparameter sweep."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser("tune", help="run a hyperparameter sweep")
    add_arguments(parser)
    parser.set_defaults(action=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which sweep, where and how; also of `benchmarks/run_param_tuner.py`."""
    parser.add_argument("--config", type=Path, required=True, help="tuner file")
    parser.add_argument("--tag", help="run the trials whose expid contains it")
    parser.add_argument(
        "--gpu",
        type=int,
        nargs="+",
        default=[-1],
        help="a slot for each index, repeat one for several trials on one GPU; -1 is the CPU (default: -1)",
    )
    parser.add_argument("--zoo", type=Path, help="model folder; default: the one around base_config")
    parser.add_argument("--name", help="name of the sweep and of its folder; default: the tuner file's")
    parser.add_argument("--storage", metavar="URL", help="Optuna storage that machines share; default: a local file")
    parser.add_argument("--fresh", action="store_true", help="start over")
    parser.add_argument("--retry-failed", action="store_true", help="run failed trials once more")
    parser.add_argument("--dry-run", action="store_true", help="list and check the trials, run nothing")
    parser.add_argument(
        "--stale-after",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="silence after which another machine's trials are taken over (default: 120)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the sweep; returns the exit status."""
    from ctrbench.tuner.slots import preload

    if not arguments.dry_run:
        preload()  # workers load torch while this process does
    from ctrbench.tuner.tune import Options, tune

    return tune(
        Options(
            config=arguments.config,
            gpus=arguments.gpu,
            tag=arguments.tag,
            zoo=arguments.zoo,
            name=arguments.name,
            storage=arguments.storage,
            fresh=arguments.fresh,
            retry_failed=arguments.retry_failed,
            dry_run=arguments.dry_run,
            stale_seconds=arguments.stale_after,
        )
    )
