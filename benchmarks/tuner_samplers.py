# SPDX-License-Identifier: Apache-2.0
"""Grid, random search and TPE with pruning on MovieLens-1M: the best validation AUC for the same training.

    python benchmarks/tuner_samplers.py --raw PATH/ml-1m.zip --output benchmarks/tuner_samplers

SDCNv3 with its published settings but for the keys that are searched, on the first 60,000 rows of each split and for three
epochs, so that a trial takes seconds. An epoch costs the same in every trial, so training time is counted in epochs, which
a busy machine does not change: each method has what the grid's trials take. Two CPU slots; a repeat has its own seed of
training and of drawing. The grid lies around the published values, which the others have to find. Writes a
JSON file with every trial and a Markdown table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ctrbench.files import write_json, write_text
from ctrbench.tuner.definition import load_sweep
from ctrbench.tuner.records import TrialRecord
from ctrbench.tuner.sampling import make_pruner
from ctrbench.tuner.store import Store
from ctrbench.yamlfile import dump_yaml

ROOT = Path(__file__).resolve().parents[1]
FIXED = {"epochs": 3, "n_rows": 60_000, "num_deep_cross_layers": 2, "num_shallow_cross_layers": 2}
# The published values are among the middle ones.
GRID = {
    "learning_rate": [3.0e-4, 1.0e-3, 3.0e-3],
    "embedding_regularizer": [1.0e-3, 1.0e-2, 1.0e-1],
    "deep_net_dropout": [0.1, 0.3],
    "shallow_net_dropout": 0.1,
}
RANGES = {
    "learning_rate": {"low": 1.0e-4, "high": 1.0e-2, "log": True},
    "embedding_regularizer": {"low": 1.0e-4, "high": 1.0e-1, "log": True},
    "deep_net_dropout": {"low": 0.0, "high": 0.5},
    "shallow_net_dropout": {"low": 0.0, "high": 0.5},
}
METHODS: dict[str, dict[str, Any]] = {
    "grid": {"sampler": "grid", "tuner_space": GRID},
    "random": {"sampler": "random", "tuner_space": RANGES},
    "tpe with pruning": {
        "sampler": "tpe",
        "tuner_space": RANGES,
        "pruner": {"name": "successive_halving", "min_evaluations": 1, "reduction_factor": 3},
    },
}
GRID_SIZE = 18
EPOCHS = GRID_SIZE * FIXED["epochs"]


def run_sweep(folder: Path, method: str, repeat: int) -> list[dict[str, Any]]:
    """Run one method; its trials, in the order in which they ended, that `EPOCHS` epochs of training have room for.

    Args:
        folder: an empty one for its runs.
        method: a key of `METHODS`.
        repeat: number of the repeat.
    """
    settings = METHODS[method]
    common = {
        **FIXED,
        "seed": 2024 + repeat,
        "model_root": str(folder / "runs"),
        "data_root": str(folder.parent / "data"),
    }
    path = folder / "sweep.yaml"
    tuner = {
        "base_config": str(ROOT / "model_zoo" / "SDCNv3" / "config"),
        "base_expid": "SDCNv3_ML_1M",
        **settings,
        "sampler_seed": repeat,
        # Trials that are given up leave room for more.
        "num_trials": EPOCHS if "pruner" in settings else GRID_SIZE,
        "tuner_space": {**settings["tuner_space"], **common},
    }
    write_text(path, dump_yaml(tuner))
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "run_param_tuner.py"),
        "--config",
        str(path),
        "--gpu",
        "-1",
        "-1",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=(folder / "log").open("wb"))
    sweep = load_sweep(path)
    store = Store(sweep.name, sweep.folder, None, sweep.direction, make_pruner(sweep.config.pruner))
    records = store.records()
    store.close()
    records.sort(key=lambda record: record.finished or 0.0)
    totals = itertools.accumulate(len(record.curve) for record in records)
    return [_trial(record) for record, total in zip(records, totals, strict=True) if total <= EPOCHS]


def _trial(record: TrialRecord) -> dict[str, Any]:
    return {
        "expid": record.expid,
        "state": record.state,
        "objective": record.objective,
        "epochs": len(record.curve),
        "values": {key: record.values[key] for key in RANGES},
    }


def to_markdown(report: dict[str, Any]) -> str:
    """The table of a report."""
    lines = [
        f"| method | best validation AUC within {report['epochs']} epochs, by repeat | mean | trials to the end | given up |",
        "|---|---|---|---|---|",
    ]
    for method, sweeps in report["sweeps"].items():
        best = [max(trial["objective"] for trial in sweep if trial["state"] == "complete") for sweep in sweeps]
        counts = [[sum(t["state"] == state for t in sweep) for sweep in sweeps] for state in ("complete", "pruned")]
        cells = [", ".join(f"{value:.6f}" for value in best), f"{statistics.fmean(best):.6f}"]
        cells += [", ".join(map(str, numbers)) for numbers in counts]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw", type=Path, help="ml-1m.zip; not needed when data/raw/ML_1M is prepared")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True, help="files to write, without .json and .md")
    arguments = parser.parse_args()
    if not (ROOT / "data" / "raw" / "ML_1M" / "train.csv").is_file():
        if arguments.raw is None:
            parser.error("--raw PATH/ml-1m.zip is needed once, see data/README.md")
        script = ROOT / "data" / "prepare" / "ml_1m.py"
        subprocess.run([sys.executable, str(script), "--raw", str(arguments.raw.resolve())], check=True)
    report: dict[str, Any] = {
        "command": "python benchmarks/tuner_samplers.py --raw PATH/ml-1m.zip --output benchmarks/tuner_samplers",
        "date": time.strftime("%Y-%m-%d"),
        "epochs": EPOCHS,
        "slots": 2,
        "fixed": FIXED,
        "sweeps": {method: [] for method in METHODS},
    }
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(arguments.repeats):
            for number, method in enumerate(METHODS):
                folder = Path(scratch) / f"{repeat}_{number}"
                folder.mkdir()
                found = run_sweep(folder, method, repeat)
                report["sweeps"][method].append(found)
                best = max((t["objective"] for t in found if t["objective"] is not None), default=0.0)
                print(f"repeat {repeat}, {method}: {len(found)} trials, best {best:.6f}", file=sys.stderr, flush=True)
    write_json(arguments.output.with_suffix(".json"), report)
    about = (__doc__ or "").split("\n\n")[2].partition(" Writes")[0]
    write_text(
        arguments.output.with_suffix(".md"),
        f"# Samplers of the tuner\n\n{about}\n\n{to_markdown(report)}\n\nMade by `{report['command']}` on {report['date']}, "
        "two CPU slots of a shared machine.\n",
    )
    print(json.dumps({method: len(sweeps) for method, sweeps in report["sweeps"].items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
