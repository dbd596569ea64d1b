# SPDX-License-Identifier: Apache-2.0
"""`ctrbench estimate`: parameters, memory and time of an experiment, before it is run."""

from __future__ import annotations

import argparse
from pathlib import Path

from ctrbench.commands.arguments import locate


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser("estimate", help="parameters, memory and time of an experiment before it is run")
    parser.add_argument("--config", help="configuration folder; default: the model folder's own")
    parser.add_argument("--expid", required=True, help="experiment, a section of model_config.yaml")
    parser.add_argument("--gpu", type=int, default=-1, help="GPU index; -1 is the CPU")
    parser.add_argument("--zoo", type=Path, help="model folder; default: found by the experiment's name")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a configured value"
    )
    parser.set_defaults(action=_estimate)


def _estimate(arguments: argparse.Namespace) -> int:
    import logging

    from ctrbench.config import load_experiment
    from ctrbench.estimate import describe
    from ctrbench.run import check_gpu

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    config_dir, zoo, _ = locate(arguments)
    experiment = load_experiment(config_dir, arguments.expid, zoo, arguments.overrides, is_data_required=False)
    check_gpu(arguments.gpu)
    print("\n".join(describe(experiment, arguments.gpu)))
    return 0
