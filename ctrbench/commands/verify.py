# SPDX-License-Identifier: Apache-2.0
"""`ctrbench verify`: evaluate stored weights again and compare with the reports."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser("verify", help="evaluate stored weights again and compare with the reports")
    parser.add_argument("folders", type=Path, nargs="+", help="run directories, or folders of them")
    parser.add_argument("--gpu", type=int, default=-1, help="GPU index; -1 is the CPU")
    parser.add_argument("--retrain", action="store_true", help="train anew instead of taking the stored weights")
    parser.set_defaults(action=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    import logging

    from ctrbench.files import shown_path
    from ctrbench.leaderboard.verify import find_runs, verify

    logging.getLogger().addHandler(logging.NullHandler())  # what a run that is trained anew says is of no interest
    is_proven = True
    for run_dir in find_runs(arguments.folders):
        found = verify(run_dir, arguments.gpu, arguments.retrain)
        shown = "; ".join(found.problems) or "proven: " + ", ".join(
            f"{split} {name} {value:.6f}" for split, values in found.metrics.items() for name, value in values.items()
        )
        is_proven &= not found.problems
        print(f"{shown_path(run_dir)}: {'UNPROVEN: ' if found.problems else ''}{shown}", flush=True)
    return 0 if is_proven else 1
