# SPDX-License-Identifier: Apache-2.0
"""From ml-1m.zip to the leaderboard of MovieLens-1M: every model of the suite `ml_1m`, five seeds each.

    python benchmarks/reproduce_ml_1m.py --raw PATH/ml-1m.zip --gpu -1 -1

Runs what is missing in runs/ML_1M/, evaluates every run's weights again, and writes benchmarks/leaderboard/ML_1M/: tables,
comparisons, the page, and for each run its report, configuration, log and curve. About two hours on two CPU cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from ctrbench.bench import Bench
from ctrbench.evidence import WEIGHTS
from ctrbench.files import write_text
from ctrbench.leaderboard import gaps
from ctrbench.leaderboard.collect import collect
from ctrbench.leaderboard.publish import copy_evidence, moved_to, write_board
from ctrbench.leaderboard.records import Board, Status
from ctrbench.leaderboard.table import explanations, to_markdown
from ctrbench.leaderboard.verify import verify
from ctrbench.suite import load_suite
from ctrbench.tuner.slots import preload

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "benchmarks" / "leaderboard" / "ML_1M"
# What the mean over seeds must reach on the default split.
FLOOR = {"SDCNv3_ML_1M": 0.9035, "DCNv3_ML_1M": 0.9025}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw", type=Path, help="ml-1m.zip; not needed when data/raw/ML_1M is prepared")
    parser.add_argument("--gpu", type=int, nargs="+", default=[-1], help="a slot for each index; -1 is the CPU")
    parser.add_argument("--seeds", type=int, nargs="+", help="these of the suite's seeds only")
    parser.add_argument("--publish-only", action="store_true", help="run nothing, write what is finished")
    arguments = parser.parse_args()
    suite = load_suite("ml_1m", ROOT)
    all_seeds = suite.config.seeds
    if arguments.seeds:
        suite = dataclasses.replace(suite, config=suite.config.model_copy(update={"seeds": arguments.seeds}))
    if not arguments.publish_only:
        if not (ROOT / "data" / "raw" / "ML_1M" / "train.csv").is_file():
            if arguments.raw is None:
                parser.error("--raw PATH/ml-1m.zip is needed once, see data/README.md")
            script = ["data/prepare/ml_1m.py", "--raw", str(arguments.raw.resolve())]
            subprocess.run([sys.executable, *script], cwd=ROOT, check=True)
        preload()
        status = Bench(suite, arguments.gpu).run()
        if status == 130:
            return status
    board = collect(ROOT / "runs", suite)
    for run in (run for table in board.tables for row in table.rows for run in row.runs):
        if run.status is Status.RECORDED and run.verification is None:
            found = verify(run.folder, arguments.gpu[0])
            print(f"{run.folder.relative_to(ROOT)}: {'; '.join(found.problems) or 'proven'}", flush=True)
    command = ["python", "benchmarks/reproduce_ml_1m.py", "--raw", "PATH/ml-1m.zip", "--gpu", "-1", "-1"]
    if arguments.seeds:
        command += ["--seeds", *map(str, arguments.seeds)]
    title = "MovieLens-1M" + (f", {len(arguments.seeds)} of {len(all_seeds)} seeds" if arguments.seeds else "")
    publish(dataclasses.replace(collect(ROOT / "runs", suite), title=title, command=shlex.join(command)))
    return 0


def publish(board: Board) -> None:
    """Copy the evidence into the repository and write the tables and the page beside it."""
    copy_evidence(board, OUTPUT.parent)
    # Earlier seeds may have come from another machine, without their weights.
    here = [run for run in board.tables[0].rows[0].runs if (run.folder / WEIGHTS).is_file()]
    best = max(here, key=lambda run: run.report["best_value"], default=None)
    write_board(moved_to(board, OUTPUT.parent), OUTPUT, look_at=best.folder if best else None)
    (OUTPUT / "leaderboard.md").unlink()  # README.md has it
    write_text(OUTPUT / "README.md", page(board))
    print(page(board))


def page(board: Board) -> str:
    """The leaderboard with what it shows of the published gaps."""
    [table] = board.tables
    lines = [
        f"# {board.title}",
        "",
        f"Made by `{board.command}`. Each run's",
        "`report.json`, `config.yaml`, `train.log` and `metrics.jsonl` lie below this folder; [leaderboard.html](leaderboard.html)",
        "shows the same with curves and plots, [leaderboard.csv](leaderboard.csv) and [comparisons.csv](comparisons.csv) have all",
        "digits. Split: `data/prepare/ml_1m.py`, seed 2018; the best epoch is chosen on the validation split alone.",
        "",
        to_markdown(board),
        "",
        *explanations(board),
        "",
        "## Published gaps",
        "",
        "The best model of each publication against the others of the same table, here with the same seeds and split (paired",
        "t test, Holm's correction over these gaps):",
        "",
        gaps.to_markdown(table),
        "",
        "Machine and versions:",
        "",
        "```",
        *sorted({json.dumps(_machine(run.report), sort_keys=True) for row in table.rows for run in row.runs}),
        "```",
        "",
    ]
    return "\n".join(lines)


def _machine(report: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in report["environment"].items() if key != "git_commit"}


if __name__ == "__main__":
    sys.exit(main())
