# SPDX-License-Identifier: Apache-2.0
"""`ctrbench evaluate`: metrics of a finished run on one of its splits."""

from __future__ import annotations

import argparse

from ctrbench.commands.arguments import add_run_arguments


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser("evaluate", help="metrics of a finished run on one of its splits")
    add_run_arguments(parser)
    parser.add_argument("--metrics", nargs="+", help="metrics to compute; default: those of the configuration")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(action=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    import json
    import logging

    from ctrbench.metrics import parse_metrics
    from ctrbench.run import load_trained, open_batches

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    experiment, data, feature_map, trainer = load_trained(arguments.run_dir, arguments.gpu)
    metrics = parse_metrics(arguments.metrics or experiment.training.metrics, feature_map.group_id)
    batches = open_batches(experiment, data, feature_map, arguments.split, trainer)
    values = trainer.evaluate(batches, metrics)
    if arguments.json:
        print(json.dumps(values))
    else:
        print("\n".join(f"{name}: {value:.6f}" for name, value in values.items()))
    return 0
