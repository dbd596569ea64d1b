# SPDX-License-Identifier: Apache-2.0
"""Time a sweep of 12 settings on 2 CPU slots against the autotuner of the installed FuxiCTR, in one run.

    python benchmarks/speed/tuner.py --output benchmarks/speed/results/tuner.json

Both run the same tuner file on tiny_ctr: SDCNv3_tiny, 3 epochs. FuxiCTR is its own `enumerate_params` and `grid_search`,
a process for each trial, which trains the same model class with FuxiCTR's loader and loop (fuxictr_expid.py). It gets its
data encoded before the clock starts, and runs twice: as installed, and with its fastest loader and a thread for each
trial, found by two trials side by side; ours encodes the CSV inside the clock. Time is that of the whole command. The
sides take turns, and medians count. Every repeat has a seed of its own: one seed moves the validation AUC of all trials
of a side by 0.01.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from measure import ROOT, describe, environment, markdown, spread, use_cores, write_report

DATASET_ID, EXPID, ZOO = "tiny_ctr", "SDCNv3_tiny", ROOT / "model_zoo" / "SDCNv3"
TRIAL_SCRIPT = Path(__file__).resolve().with_name("fuxictr_expid.py")
SPLITS = ("train", "valid", "test")
SLOTS = 2
FIRST_SEED = 2024
SPACE = {
    "learning_rate": [0.005, 0.01, 0.02],
    "embedding_regularizer": [0.01, 0.02],
    "deep_net_dropout": [0.1, 0.2],
    "epochs": 3,
}
SETTINGS = list(itertools.product(*(values for values in SPACE.values() if isinstance(values, list))))
# FuxiCTR's side: data_format, num_workers, OMP_NUM_THREADS (0: not set). Its parquet loader starts Ray in every trial.
CANDIDATES = [("npz", 0, 1), ("npz", 1, 1), ("npz", 3, 1)]
# With nothing set, each trial takes a thread for every core.
AS_INSTALLED = ("npz", 0, 0)


def raw_dataset(scratch: Path, data_format: str) -> dict[str, Any]:
    """The dataset as the repository configures it, on raw files of a format in `scratch`."""
    dataset = yaml.safe_load((ROOT / "config" / "dataset_config" / f"{DATASET_ID}.yaml").read_text())[DATASET_ID]
    files = {f"{split}_data": str(scratch / "raw" / f"{split}.{data_format}") for split in SPLITS}
    return {**dataset, **files, "data_format": data_format, "data_root": str(scratch / f"data_{data_format}")}


def encode_for_fuxictr(scratch: Path) -> None:
    """FuxiCTR's own encoding, from Parquet: its CSV reader fails on polars 2. Its npz files get the same columns."""
    import polars as pl
    from fuxictr.preprocess import FeatureProcessor, build_dataset

    settings = {**raw_dataset(scratch, "parquet"), "dataset_id": DATASET_ID}
    processor = FeatureProcessor(**settings)
    types = {name: {str: pl.String, float: pl.Float64}[kind] for name, kind in processor.dtype_dict.items()}
    for split in SPLITS:
        raw = scratch / "raw" / f"{split}.csv"
        pl.read_csv(raw, schema_overrides=types).write_parquet(raw.with_suffix(".parquet"))
    build_dataset(processor, **settings)
    for split in SPLITS:
        path = Path(processor.data_dir) / f"{split}.parquet"
        columns = {column.name: np.stack(column.to_list()) for column in pl.read_parquet(path)}
        np.savez(path.with_suffix(".npz"), **columns)


def write_sweep(folder: Path, dataset: dict[str, Any], extra: dict[str, Any]) -> Path:
    """Write a configuration folder and the tuner file in it.

    Args:
        folder: a new one.
        dataset: section of the dataset.
        extra: keys of the model's section beside the repository's.

    Returns:
        The tuner file.
    """
    sections = yaml.safe_load((ZOO / "config" / "model_config.yaml").read_text())
    model = {**sections["Base"], **sections[EXPID], "verbose": 0, "model_root": str(folder / "runs"), **extra}
    contents = {
        "dataset_config": {DATASET_ID: dataset},
        "model_config": {EXPID: model},
        "tuner": {"base_expid": EXPID, "tuner_space": SPACE},
    }
    folder.mkdir()
    for name, content in contents.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder / "tuner.yaml"


def write_fuxictr_sweep(
    scratch: Path, folder: Path, data_format: str, num_workers: int, seed: int = FIRST_SEED
) -> Path:
    """The tuner file of FuxiCTR's side, on encoded data of a format."""
    dataset = raw_dataset(scratch, "parquet")
    encoded = Path(dataset["data_root"]) / DATASET_ID
    files = {f"{split}_data": str(encoded / f"{split}.{data_format}") for split in SPLITS}
    dataset |= {**files, "data_format": data_format, "rebuild_dataset": False}
    return write_sweep(folder, dataset, {"seed": seed, "debug_mode": False, "num_workers": num_workers})


def start(command: list[str], log: Path, threads: int = 0) -> subprocess.Popen[bytes]:
    """Start a command that finds the `python` of this environment first; 0 threads leave their number to it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | {"PATH": path}
    if threads:
        variables["OMP_NUM_THREADS"] = str(threads)
    with log.open("wb") as stream:
        return subprocess.Popen(command, cwd=log.parent, env=variables, stdout=stream, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for a command.

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    if process.wait():
        raise RuntimeError(f"{process.args}: status {process.returncode}\n{log.read_text()[-3000:]}")


def autotune(tuner_file: Path) -> None:
    """FuxiCTR's sweep, in a process of its own."""
    from fuxictr.autotuner import enumerate_params, grid_search

    grid_search(enumerate_params(str(tuner_file)), [-1] * SLOTS, script=str(TRIAL_SCRIPT))


def pair_seconds(tuner_file: Path, threads: int) -> float:
    """Seconds until as many FuxiCTR trials as there are slots are done, side by side."""
    from fuxictr.autotuner import enumerate_params, load_experiment_ids

    with contextlib.redirect_stdout(sys.stderr):
        config = enumerate_params(str(tuner_file))
    started = time.perf_counter()
    running = []
    for expid in load_experiment_ids(config)[:SLOTS]:
        log = tuner_file.with_name(f"{expid}.log")
        command = [sys.executable, "-u", str(TRIAL_SCRIPT), "--config", config, "--expid", expid, "--gpu", "-1"]
        running.append((start(command, log, threads), log))
    for process, log in running:
        finish(process, log)
    return time.perf_counter() - started


def find_best_candidate(scratch: Path, repeats: int) -> tuple[tuple[str, int, int], dict[str, float]]:
    """FuxiCTR's fastest loader and threads, and the seconds of all of them; the slow ones are tried once."""
    seconds: dict[tuple[str, int, int], float] = {}
    for repeat, candidate in itertools.product(range(repeats), CANDIDATES):
        if seconds.get(candidate, 0) > 2 * min(seconds.values(), default=0):
            continue
        data_format, num_workers, threads = candidate
        folder = scratch / f"pair_{repeat}_{data_format}_{num_workers}_{threads}"
        taken = pair_seconds(write_fuxictr_sweep(scratch, folder, data_format, num_workers), threads)
        seconds[candidate] = min(taken, seconds.get(candidate, taken))
        print(f"  FuxiCTR, {name_candidate(candidate)}: {taken:.2f} s for {SLOTS} trials", file=sys.stderr, flush=True)
    return min(seconds, key=seconds.__getitem__), {name_candidate(c): s for c, s in seconds.items()}


def name_candidate(candidate: tuple[str, int, int]) -> str:
    data_format, num_workers, threads = candidate
    return f"{data_format}, {num_workers} workers, " + (f"{threads} threads" if threads else "threads not set")


def run_ctrbench(scratch: Path, folder: Path, seed: int) -> dict[str, Any]:
    """Our sweep, from nothing: the CSV is encoded inside the clock."""
    dataset = {**raw_dataset(scratch, "csv"), "data_root": str(folder / "data")}
    tuner_file = write_sweep(folder, dataset, {"seed": seed})
    program = str(Path(sys.executable).with_name("ctrbench"))
    slots = ["-1"] * SLOTS
    command = [program, "tune", "--config", str(tuner_file), "--zoo", str(ZOO), "--gpu", *slots]
    wall = timed(command, folder / "log")
    with (folder / "runs" / "sweeps" / tuner_file.stem / "results.csv").open(newline="") as stream:
        figures = summarize(wall, list(csv.DictReader(stream)), folder / "log")
    seconds = trials_window(tuner_file)
    overhead = (seconds * SLOTS - figures["training_seconds"]) / len(SETTINGS)
    return {**figures, "seconds_of_trials": seconds, "overhead_seconds_per_trial_between_start_and_end": overhead}


def trials_window(tuner_file: Path) -> float:
    """Seconds from the claim of our sweep's first trial to the end of its last: without imports and the report."""
    from optuna.pruners import NopPruner

    from ctrbench.tuner.definition import load_sweep
    from ctrbench.tuner.store import Store

    sweep = load_sweep(tuner_file, ZOO)
    store = Store(sweep.name, sweep.folder, None, sweep.direction, NopPruner())
    records = store.records()
    store.close()
    return max(r.finished or 0.0 for r in records) - min(r.started or 0.0 for r in records)


def run_fuxictr(scratch: Path, folder: Path, seed: int, candidate: tuple[str, int, int]) -> dict[str, Any]:
    """FuxiCTR's sweep with its fastest loader and threads."""
    data_format, num_workers, threads = candidate
    tuner_file = write_fuxictr_sweep(scratch, folder, data_format, num_workers, seed)
    command = [sys.executable, str(Path(__file__).resolve()), "--autotune", str(tuner_file)]
    wall = timed(command, folder / "log", threads)
    lines = (tuner_file.with_suffix("") / "results.jsonl").read_text().splitlines()
    return summarize(wall, [json.loads(line) for line in lines], folder / "log")


def timed(command: list[str], log: Path, threads: int = 0) -> float:
    """Seconds from the start of a command to its exit."""
    started = time.perf_counter()
    finish(start(command, log, threads), log)
    return time.perf_counter() - started


def summarize(wall: float, trials: list[dict[str, Any]], log: Path) -> dict[str, Any]:
    """The figures of one sweep.

    Raises:
        RuntimeError: a trial is missing.
    """
    aucs = [float(trial["valid_AUC"]) for trial in trials if trial["valid_AUC"]]
    if len(aucs) != len(SETTINGS):
        raise RuntimeError(f"{len(aucs)} trials of {len(SETTINGS)} came through\n{log.read_text()[-3000:]}")
    training = sum(float(trial[name]) for trial in trials for name in ("train_seconds", "evaluate_seconds"))
    return {
        "wall_seconds": wall,
        "trials_per_minute": 60 * len(trials) / wall,
        "training_seconds": training,
        "overhead_seconds_per_trial": (wall * SLOTS - training) / len(trials),
        "valid_aucs": aucs,
    }


def summarize_repeats(sweeps: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and ranges of one side's sweeps; mean and range of the validation AUC over all their trials."""
    aucs = [auc for sweep in sweeps for auc in sweep["valid_aucs"]]
    figures = {name: spread(sweep[name] for sweep in sweeps) for name in sweeps[0] if name != "valid_aucs"}
    means = [statistics.fmean(sweep["valid_aucs"]) for sweep in sweeps]
    auc = {"mean": statistics.fmean(aucs), "min": min(aucs), "max": max(aucs), "mean_by_seed": means}
    return {**figures, "valid_auc": auc}


def run_all(repeats: int, scratch: Path) -> dict[str, Any]:
    """Every figure, as often as `repeats` says, in turns."""
    make_data = [sys.executable, str(ROOT / "data" / "make_tiny.py"), "--dataset", DATASET_ID]
    for command in (
        [*make_data, "--output", str(scratch / "raw")],
        [sys.executable, str(Path(__file__).resolve()), "--encode", str(scratch)],
    ):
        finish(start(command, scratch / "log"), scratch / "log")
    best, tried = find_best_candidate(scratch, 1)
    runs: dict[str, list[dict[str, Any]]] = {"ctrbench": [], "fuxictr": [], "fuxictr as installed": []}
    for seed in range(FIRST_SEED, FIRST_SEED + repeats):
        runs["ctrbench"].append(run_ctrbench(scratch, scratch / f"ctrbench_{seed}", seed))
        runs["fuxictr"].append(run_fuxictr(scratch, scratch / f"fuxictr_{seed}", seed, best))
        if seed == FIRST_SEED:  # it takes minutes
            folder = scratch / f"installed_{seed}"
            runs["fuxictr as installed"].append(run_fuxictr(scratch, folder, seed, AS_INSTALLED))
        for side, done in runs.items():
            print(f"  {side}: {done[-1]['trials_per_minute']:.1f} trials/min", file=sys.stderr, flush=True)
    sides = {side: summarize_repeats(done) for side, done in runs.items()}
    ours, theirs, installed = (sides[side]["trials_per_minute"]["median"] for side in runs)
    return {
        "trials": len(SETTINGS),
        "slots": SLOTS,
        "repeats": repeats,
        "seeds": list(range(FIRST_SEED, FIRST_SEED + repeats)),
        "space": SPACE,
        "machine": environment(["torch", "fuxictr", "ray", "polars", "numpy"]),
        "fuxictr_settings": {
            "data": "encoded by its FeatureProcessor from Parquet before the clock starts, rebuild_dataset false",
            "fastest": name_candidate(best),
            "seconds_of_two_trials": tried,
        },
        "sides": sides,
        "ratio_trials_per_minute": ours / theirs,
        "ratio_trials_per_minute_as_installed": ours / installed,
    }


def to_markdown(result: dict[str, Any]) -> str:
    """The table for the README of this folder."""
    rows = []
    ours = result["sides"]["ctrbench"]
    for side, figures in result["sides"].items():
        rate, auc = figures["trials_per_minute"], figures["valid_auc"]
        rows.append(
            [
                side,
                f"{figures['wall_seconds']['median']:.1f}",
                f"{rate['median']:.1f}",
                f"{rate['min']:.1f} to {rate['max']:.1f}",
                f"{figures['training_seconds']['median'] / result['trials']:.2f}",
                f"{figures['overhead_seconds_per_trial']['median']:.2f}",
                f"{auc['mean']:.4f} ({auc['min']:.4f} to {auc['max']:.4f})",
            ]
        )
    header = ["", "seconds", "trials/min", "lowest to highest", "training s/trial", "overhead s/trial", "valid AUC"]
    return "\n".join(
        [
            f"{result['trials']} trials on {result['slots']} CPU slots, medians of {result['repeats']}; "
            f"{describe(result['machine'])}.",
            "",
            markdown(header, rows),
            "",
            f"Trials a minute: **{result['ratio_trials_per_minute_as_installed']:.1f}x** FuxiCTR's autotuner as installed "
            f"(one sweep), {result['ratio_trials_per_minute']:.1f}x it with its fastest settings "
            f"({result['fuxictr_settings']['fastest']}). Overhead is slots times seconds of the whole command, less "
            f"training, by trials. From our first trial's start to our last one's end it is "
            f"{ours['overhead_seconds_per_trial_between_start_and_end']['median']:.2f} s; the rest is start-up "
            f"(torch is imported once) and the report.",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--encode", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--autotune", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.encode:
        encode_for_fuxictr(arguments.encode)
        return 0
    if arguments.autotune:
        autotune(arguments.autotune)
        return 0
    use_cores(SLOTS)
    with tempfile.TemporaryDirectory() as scratch:
        result = run_all(arguments.repeats, Path(scratch))
    write_report(arguments.output, result)
    print(to_markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
