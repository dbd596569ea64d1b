# SPDX-License-Identifier: Apache-2.0
"""`ctrbench run`: train, validate and test one experiment, with one seed or several."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from ctrbench.commands.arguments import add_experiment_arguments, locate


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser("run", help="train, validate and test one experiment")
    add_experiment_arguments(parser, expid_default=None)
    parser.add_argument("--seeds", type=int, nargs="+", help="run the experiment with all of these seeds at once")
    parser.add_argument(
        "--together",
        choices=("auto", "stack", "processes"),
        default="auto",
        help="how --seeds are run at once: in one process with stacked parameters (auto: on a GPU, and tiny models), or in "
        "a process for each core",
    )
    parser.set_defaults(action=run)


def run(arguments: argparse.Namespace) -> int:
    """Run it, and print its metrics; returns the exit status."""
    from ctrbench.config import load_experiment
    from ctrbench.errors import ConfigError, InterruptedRunError
    from ctrbench.signals import StopRequest

    config_dir, zoo, expids = locate(arguments)
    if len(expids) != 1 or not arguments.expid:
        raise ConfigError(f"--expid is needed; {config_dir} has {', '.join(expids)}")
    if getattr(arguments, "seeds", None):
        return _run_seeds(arguments, config_dir, zoo)
    experiment = load_experiment(config_dir, arguments.expid, zoo, arguments.overrides, arguments.seed)
    from ctrbench.run import Session
    from ctrbench.run import run as run_one

    command = shlex.join(["python", *sys.argv])
    with StopRequest() as stop:
        try:
            session = Session(should_stop=stop)
            report = run_one(experiment, arguments.gpu, arguments.fresh, command, session, arguments.profile)
        except InterruptedRunError as error:
            print(error, file=sys.stderr)
            return stop.status
    for split, values in report["metrics"].items():
        print(f"{split:5} " + "  ".join(f"{name} {value:.6f}" for name, value in values.items()))
    print(f"everything about this run: {experiment.run_dir}")
    return 0


def _run_seeds(arguments: argparse.Namespace, config_dir: Path, zoo: Path | None) -> int:
    from ctrbench.config import load_experiment
    from ctrbench.errors import ConfigError, CtrbenchError, TrainingError
    from ctrbench.seeds import run_seeds

    if arguments.seed is not None or arguments.profile:
        raise ConfigError("--seeds: several runs at once, so neither --seed nor --profile goes with it")
    experiments = [
        load_experiment(config_dir, arguments.expid, zoo, arguments.overrides, seed) for seed in arguments.seeds
    ]
    command = shlex.join(["python", *sys.argv])
    results = run_seeds(experiments, arguments.gpu, arguments.fresh, command, arguments.together)
    for seed, result in zip(arguments.seeds, results, strict=True):
        if isinstance(result, dict):
            for split, values in result["metrics"].items():
                shown = "  ".join(f"{name} {value:.6f}" for name, value in values.items())
                print(f"seed {seed}: {split:5} {shown}")
    print(f"everything about these runs: {experiments[0].run_dir.parent}")
    failures = [(seed, result) for seed, result in zip(arguments.seeds, results, strict=True)
                if isinstance(result, BaseException)]  # fmt: skip
    if failures:
        if not all(isinstance(error, CtrbenchError) for _, error in failures):
            raise next(error for _, error in failures if not isinstance(error, CtrbenchError))
        raise TrainingError("\nerror: ".join(f"seed {seed}: {error}" for seed, error in failures))
    return 0
