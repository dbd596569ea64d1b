# SPDX-License-Identifier: Apache-2.0
"""`ctrbench bench`: run what is missing of a suite of experiments."""

from __future__ import annotations

import argparse


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser("bench", help="run what is missing of a suite of experiments")
    parser.add_argument("suite", help="a name in config/suites/, or a file")
    parser.add_argument(
        "--gpu",
        type=int,
        nargs="+",
        default=[-1],
        help="a slot for each index, repeat one for several runs on one GPU; -1 is the CPU (default: -1)",
    )
    parser.add_argument("--fresh", action="store_true", help="run finished experiments again")
    parser.add_argument("--dry-run", action="store_true", help="list what is finished and what is to do, run nothing")
    parser.set_defaults(action=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    from ctrbench.suite import load_suite

    suite = load_suite(arguments.suite)
    if arguments.dry_run:
        from ctrbench.bench import describe

        print("\n".join(describe(suite)))
        return 0
    from ctrbench.tuner.slots import preload

    preload()  # workers load torch while this process does
    from ctrbench.bench import Bench
    from ctrbench.run import check_gpu

    for gpu in dict.fromkeys(arguments.gpu):
        check_gpu(gpu)
    return Bench(suite, arguments.gpu, arguments.fresh).run()
