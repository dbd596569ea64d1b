# SPDX-License-Identifier: Apache-2.0
"""`ctrbench check`: validate configurations without running them."""

from __future__ import annotations

import argparse

from ctrbench.commands.arguments import add_experiment_arguments, locate


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser("check", help="validate configurations without running them")
    add_experiment_arguments(parser, expid_default=None)
    parser.set_defaults(action=_check)


def _check(arguments: argparse.Namespace) -> int:
    from ctrbench.config import load_experiment
    from ctrbench.errors import ConfigError, CtrbenchError
    from ctrbench.estimate import construct
    from ctrbench.validation import missing_data

    config_dir, zoo, expids = locate(arguments)
    problems: list[str] = []
    for expid in expids:
        try:
            experiment = load_experiment(
                config_dir, expid, zoo, arguments.overrides, arguments.seed, is_data_required=False
            )
            construct(experiment)
            missing = missing_data(experiment.dataset, experiment.root)
            print(f"{expid}: ok" + (f", but its data is missing: {', '.join(missing)}" if missing else ""))
        except CtrbenchError as error:
            problems += str(error).splitlines()
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return 0
