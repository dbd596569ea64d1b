# SPDX-License-Identifier: Apache-2.0
"""Rehearse the MMCTR challenge with QIN on generated files of its layout, and count how often R = 4 and R = 3 diverge.

    python benchmarks/qin_rehearsal.py --output benchmarks/qin_rehearsal

End to end: generate 200,000 rows over 91,717 items and 11,739 tags, prepare them with data/prepare/microlens_1m.py, train
QIN_MicroLens_1M_x1_R3 at full width for one epoch, evaluate with AUC and gAUC by user_id, write the submission.
Stability: ten seeds a setting at a narrower width (D = 16, B = 1024, one epoch), at the published learning rate and at
five times it. About a quarter of an hour on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SPLITS = ("train", "valid", "test")
NARROW = ("embedding_dim=16", "feature_specs=[{name: item_emb_d128, embedding_dim: 16}]", "batch_size=1024", "epochs=1")
LEARNING_RATES = (2e-3, 1e-2)


def call(*command: str, threads: int = 2) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Run a script of the repository; its seconds and what it said."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    return time.perf_counter() - started, done


def ctrbench(*arguments: str) -> tuple[str, ...]:
    return "-c", "import sys; from ctrbench.cli import main; sys.exit(main())", *arguments


def settings(folder: Path, *more: str) -> list[str]:
    """`--set` words that point the experiment to the rehearsal's files."""
    raw = folder / "prepared"
    values = [f"{split}_data={raw / split}.parquet" for split in SPLITS]
    values += [
        f"item_info={raw / 'item_info.parquet'}",
        f"data_root={folder / 'data'}",
        f"model_root={folder / 'runs'}",
    ]
    return [word for value in (*values, *more) for word in ("--set", value)]


def rehearse(folder: Path, rows: int) -> dict[str, Any]:
    """The whole path, each step's seconds, and the metrics."""
    shape = ("--rows", str(rows), "--items", "91717", "--tags", "11739")
    expid = "QIN_MicroLens_1M_x1_R3"
    run_dir = folder / "runs" / "MicroLens_1M_x1" / expid / "seed_20242025"
    train = ("model_zoo/QIN/run_expid.py", "--expid", expid, "--gpu", "-1", *settings(folder, "epochs=1", "verbose=0"))
    steps = {
        "generate": ("data/make_tiny.py", "--dataset", "tiny_mm", "--output", str(folder / "raw"), *shape),
        "prepare": ("data/prepare/microlens_1m.py", "--raw", str(folder / "raw"), "--output", str(folder / "prepared")),
        "build, train one epoch, validate": train,
        "evaluate": ctrbench("evaluate", str(run_dir), "--split", "valid", "--json"),
        "predict and write the submission": ctrbench(
            "predict", str(run_dir), "--submission", str(folder / "submission")
        ),
    }
    seconds: dict[str, float] = {}
    said = {}
    for name, command in steps.items():
        seconds[name], done = call(*command)
        print(f"  {name}: {seconds[name]:.1f} s", file=sys.stderr, flush=True)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr}")
        said[name] = done.stdout
    report = json.loads((run_dir / "report.json").read_text())
    with zipfile.ZipFile(folder / "submission" / f"{expid}.zip") as archive:
        lines = archive.read("prediction.csv").decode().splitlines()
    return {
        "expid": expid,
        "rows": report["rows"],
        "seconds": seconds,
        "metrics": json.loads(said["evaluate"].splitlines()[-1]),
        "train_rows_per_second": report["train_rows_per_second"],
        "peak_memory": report["peak_memory"],
        "parameters": report["parameters"],
        "submission": {"rows": len(lines) - 1, "header": lines[0]},
        "environment": report["environment"],
        "data_hash": report["data_hash"],
    }


def train_narrow(folder: Path, num_row: int, learning_rate: float, seed: int) -> dict[str, Any]:
    """One narrow run: its validation AUC, or the message with which it stopped."""
    more = (
        *NARROW,
        "verbose=0",
        f"learning_rate={learning_rate}",
        f"model_root={folder / f'r{num_row}_{learning_rate}'}",
    )
    command = ("model_zoo/QIN/run_expid.py", "--expid", "QIN_MicroLens_1M_x1", "--seed", str(seed), "--gpu", "-1")
    _, done = call(*command, *settings(folder, f"num_row={num_row}", *more), threads=1)
    result: dict[str, Any] = {"num_row": num_row, "learning_rate": learning_rate, "seed": seed}
    if done.returncode:
        return {**result, "status": done.returncode, "message": done.stderr.strip().splitlines()[-1]}
    words = next(line for line in done.stdout.splitlines() if line.startswith("valid")).split()
    return {**result, "status": 0, "valid_AUC": float(words[2])}


def count_divergence(folder: Path, seeds: int) -> list[dict[str, Any]]:
    """All narrow runs, two at a time."""
    jobs = [(r, lr, seed) for lr in LEARNING_RATES for r in (4, 3) for seed in range(1, seeds + 1)]
    first = train_narrow(folder, *jobs[0])  # alone: it builds the data
    with ThreadPoolExecutor(2) as pool:
        return [first, *pool.map(lambda job: train_narrow(folder, *job), jobs[1:])]


def to_markdown(report: dict[str, Any]) -> str:
    whole, runs = report["rehearsal"], report["stability"]
    rows = ", ".join(f"{split} {count:,}" for split, count in whole["rows"].items())
    lines = [
        "# QIN: rehearsal of the challenge",
        "",
        f"Made by `python benchmarks/qin_rehearsal.py`; {whole['environment']['device_name']}, 2 cores, torch "
        f"{whole['environment']['torch']}. Generated data ({rows}; 91,718 items): figures of one epoch on it say nothing "
        "of the real data.",
        "",
        "| step | s |",
        "|---|---|",
        *(f"| {name} | {seconds:.1f} |" for name, seconds in whole["seconds"].items()),
        "",
        f"`{whole['expid']}`, {whole['parameters']['total']:,} parameters, one epoch at "
        f"{whole['train_rows_per_second']:,.0f} rows/s, peak memory {whole['peak_memory']['host_bytes'] / 2**30:.1f} GiB: "
        + ", ".join(f"{name} {value:.4f}" for name, value in whole["metrics"].items())
        + f". Submission: {whole['submission']['rows']:,} rows, `{whole['submission']['header']}`.",
        "",
        "## How often training diverges",
        "",
        f"D = 16, B = 1024, one epoch, seeds 1 to {max(run['seed'] for run in runs)}. A run diverges when its loss or a "
        "prediction is no longer finite; it then stops with status 1 and says what to change.",
        "",
        "| learning rate | R | diverged | validation AUC of the others, lowest to highest |",
        "|---|---|---|---|",
    ]
    for learning_rate in LEARNING_RATES:
        for num_row in (4, 3):
            group = [r for r in runs if r["num_row"] == num_row and r["learning_rate"] == learning_rate]
            values = [r["valid_AUC"] for r in group if not r["status"]]
            span = f"{min(values):.4f} to {max(values):.4f}" if values else "-"
            lines.append(f"| {learning_rate:g} | {num_row} | {len(group) - len(values)} of {len(group)} | {span} |")
    messages = sorted({run["message"] for run in runs if run["status"]})
    lines += ["", "Said when diverging:", "", "```", *messages[:2], "```"] if messages else []
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--output", type=Path, help="JSON and Markdown files to write, without their endings")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        report = {"rehearsal": rehearse(folder, arguments.rows), "stability": count_divergence(folder, arguments.seeds)}
    text = to_markdown(report)
    print(text)
    if arguments.output:
        arguments.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
