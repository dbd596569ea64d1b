# SPDX-License-Identifier: Apache-2.0
"""The console entry points: `ctrbench <command>`, whose commands are in `ctrbench.commands`, and the scripts that are called as
FuxiCTR's: run_expid.py of every model folder, benchmarks/run_param_tuner.py.

Bad input ends with one line per problem and exit status 2; a run that Ctrl-C or SIGTERM stopped with 130 or 143.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ctrbench import __version__
from ctrbench.commands import (
    bench,
    build,
    check,
    datasets,
    estimate,
    evaluate,
    export,
    inspect,
    interpret,
    leaderboard,
    predict,
    prepare,
    run,
    tune,
    verify,
)
from ctrbench.commands.arguments import add_experiment_arguments
from ctrbench.errors import CtrbenchError, TrainingError
from ctrbench.signals import TerminatedError

# In the order in which `ctrbench --help` lists them.
COMMANDS = (
    *(run, check, evaluate, predict, interpret, tune, bench, leaderboard, verify),
    *(datasets, prepare, build, estimate, export, inspect),
)


def main(argv: Sequence[str] | None = None) -> int:
    """`ctrbench <command>`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="ctrbench", description="Config-first benchmarks of CTR prediction.")
    parser.add_argument("--version", action="version", version=f"ctrbench {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    arguments = parser.parse_args(argv)
    return _guard(lambda: arguments.action(arguments))


def run_expid(zoo: Path, argv: Sequence[str] | None = None) -> int:
    """`run_expid.py` of the model folder `zoo`, with FuxiCTR's flags and defaults; returns the exit status."""
    parser = argparse.ArgumentParser(description=f"Run one experiment of {zoo.name}.")
    parser.add_argument("--version", action="version", version=f"ctrbench {__version__}")
    add_experiment_arguments(parser, expid_default=f"{zoo.name}_test")
    arguments = parser.parse_args(argv)
    arguments.zoo = zoo
    if arguments.config and not any(Path(arguments.config).glob("model_config*")) and (zoo / arguments.config).is_dir():
        arguments.config = zoo / arguments.config  # as FuxiCTR's scripts, which change into their own folder
    return _guard(lambda: run.run(arguments))


def run_param_tuner(argv: Sequence[str] | None = None) -> int:
    """`benchmarks/run_param_tuner.py`, with FuxiCTR's flags; returns the exit status."""
    parser = argparse.ArgumentParser(description="Run a hyperparameter sweep, as `ctrbench tune`.")
    parser.add_argument("--version", action="version", version=f"ctrbench {__version__}")
    tune.add_arguments(parser)
    arguments = parser.parse_args(argv)
    return _guard(lambda: tune.run(arguments))


def _guard(action: Callable[[], int]) -> int:
    try:
        status = action()
        sys.stdout.flush()  # a reader that has gone shows here, not when the interpreter ends
        return status
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except CtrbenchError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same command continues from the last checkpoint, if there is one", file=sys.stderr)
        return 130
    except TerminatedError:
        print("terminated: the same command continues from the last checkpoint, if there is one", file=sys.stderr)
        return 143
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
