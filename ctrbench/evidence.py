# SPDX-License-Identifier: Apache-2.0
"""What backs a finished run: hashes of its files, and a ledger that every finished run is entered in.

`report.json` holds the SHA-256 of the run's other files, `DONE` that of `report.json`, and `<model_root>/ledger.jsonl` has
a line for every run that ever finished there. A file that is altered, a run that is left out and a seed that is drawn until
it pleases show when these are compared.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import filelock

from ctrbench.config import Experiment, load_run
from ctrbench.errors import CtrbenchError, DataError
from ctrbench.files import sha256_of_file, sha256_of_value, storage_error, write_json, write_text
from ctrbench.manifest import read as read_manifest

WEIGHTS = "best.safetensors"
OWN_WEIGHTS = "best.model"  # of a model that saves itself
FILES = ("config.yaml", "train.log", "metrics.jsonl", WEIGHTS)
LEDGER = "ledger.jsonl"
# The curve and the final evaluation see the same weights in batches of the same size.
TOLERANCE = 1e-6
# How far up a ledger is looked for: <model_root>/<dataset_id>/<expid>/seed_<seed>.
_LEDGER_DEPTH = 4


def seal(run_dir: Path, report: dict[str, Any], model_root: Path) -> None:
    """Write report.json with the hashes of the run's other files, enter it in the ledger, and write DONE."""
    report["evidence"] = {
        name: sha256_of_file(run_dir / name) for name in (*FILES, OWN_WEIGHTS) if (run_dir / name).exists()
    }
    write_json(run_dir / "report.json", report)
    digest = sha256_of_file(run_dir / "report.json")
    entry = {key: report[key] for key in (*_CELL, "model_hash", "seed", "metrics", "sweep") if key in report}
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    append_to_ledger(model_root / LEDGER, {"time": now, **entry, "report": digest})
    write_text(run_dir / "DONE", digest + "\n")


def append_to_ledger(path: Path, entry: dict[str, Any]) -> None:
    """Add a line; one writer at a time, on disk when this returns.

    Raises:
        CtrbenchError: it cannot be written.
    """
    try:
        with filelock.FileLock(f"{path}.lock"), path.open("a+b") as stream:
            stream.seek(0, os.SEEK_END)
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":  # a writer died in the middle of a line
                    stream.write(b"\n")
            stream.write(json.dumps(entry).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise storage_error(error, path) from error


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """The entries of a ledger; a line that was cut off is none."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.keys() >= {*_CELL, "metrics", "report"} and type(entry.get("seed")) is int:
            entries.append(entry)
    return entries


def find_ledger(run_dir: Path) -> Path | None:
    """The ledger that a run is entered in: of the model_root around it."""
    folders = [run_dir.resolve(), *run_dir.resolve().parents][: _LEDGER_DEPTH + 1]
    return next((folder / LEDGER for folder in folders if (folder / LEDGER).is_file()), None)


def read_report(run_dir: Path) -> dict[str, Any]:
    """report.json of a run.

    Raises:
        DataError: it is missing or damaged.
    """
    path = run_dir / "report.json"
    try:
        report: Any = json.loads(path.read_text(encoding="utf-8"))
        if not _is_report(report):
            raise ValueError("not a report")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: missing or damaged: run the experiment again") from error
    found: dict[str, Any] = report
    return found


def problems_of(run_dir: Path, report: dict[str, Any]) -> list[str]:
    """What contradicts the report of a run among the files of its directory, weights apart; empty if nothing does."""
    problems = _seal_problems(run_dir, report)
    if problems:
        return problems
    try:
        experiment = load_run(run_dir)
    except CtrbenchError as error:
        return [str(error)]
    named = (experiment.training.dataset_id, experiment.expid, experiment.training.seed)
    if named != (report["dataset_id"], report["expid"], report["seed"]):
        return ["config.yaml is of another run"]
    if experiment.config_hash != report.get("config_hash"):
        return ["config.yaml does not have the hash that the report names"]
    return _split_problems(experiment) + _curve_problems(run_dir, report, experiment)


def data_problem(run_dir: Path, report: dict[str, Any], is_built: bool = False) -> str | None:
    """What the data that are here say against the report of a run; None if nothing, or if there are none.

    Args:
        run_dir: the run.
        report: of it.
        is_built: look at built data only, whose raw files need not be read again.

    Raises:
        CtrbenchError: the raw files are incomplete.
    """
    experiment = load_run(run_dir)
    if is_built and read_manifest(experiment.dataset.folder(experiment.root)) is None:
        return None
    from ctrbench.preprocess import expected_hash

    found = expected_hash(experiment.dataset, root=experiment.root, task=experiment.training.task)
    trained_on = str(report.get("data_hash"))
    if found in (None, trained_on):
        return None
    return f"its data are others now ({str(found)[:12]}) than it was trained on ({trained_on[:12]})"


def weights_problem(run_dir: Path, report: dict[str, Any]) -> str | None:
    """What is wrong with the stored weights; None if nothing is, or if they are not here."""
    for name in (WEIGHTS, OWN_WEIGHTS):
        path = run_dir / name
        if path.exists() and sha256_of_file(path) != report["evidence"].get(name):
            return f"{name} was altered after the run"
    return None


def ledger_problems(
    runs: Iterable[tuple[Path, dict[str, Any]]], ledger: Path | None, others: Iterable[dict[str, Any]] = ()
) -> list[str]:
    """What the ledger says against the runs of one experiment: one left out, one not entered, one repeated until it pleased.

    A sweep with other seeds throughout has chosen the setting, not the seeds.

    Args:
        runs: those that are judged, with their reports.
        ledger: of their model_root; None if there is none.
        others: reports of further runs of the experiment, which are not left out either.
    """
    if ledger is None:
        return [f"there is no {LEDGER} around them"]
    runs = list(runs)
    entries = read_ledger(ledger)
    known = {entry["report"] for entry in entries}
    problems = [
        f"seed {report['seed']} is not in {LEDGER}"
        for run_dir, report in runs
        if sha256_of_file(run_dir / "report.json") not in known
    ]
    same = [e for e in entries if _cell(e) == _cell(runs[0][1])]
    seeds = {report["seed"] for _, report in runs}
    here = seeds | {report["seed"] for report in others}
    by_sweep: dict[str, set[int]] = {}
    for entry in same:
        by_sweep.setdefault(str(entry.get("sweep", "")), set()).add(entry["seed"])
    drawn = [found for sweep, found in by_sweep.items() if not sweep or found & here]
    left_out = sorted(set().union(*drawn) - here)
    if left_out:
        problems.append(f"{LEDGER} also has seed {', '.join(map(str, left_out))}, which is left out here")
    for seed in sorted(seeds):
        results = {sha256_of_value(e["metrics"]) for e in same if e["seed"] == seed}
        if len(results) > 1:
            problems.append(f"seed {seed} was run until it had {len(results)} different results")
    return problems


# What a report must have, and what must be of this kind where it has it.
_NEEDED = {
    "dataset_id": str,
    "expid": str,
    "seed": int,
    "metrics": dict,
    "parameters": dict,
    "epochs": int,
    "timings": dict,
}
_KINDS = {
    **_NEEDED,
    "data_hash": str,
    "settings_hash": str,
    "config_hash": str,
    "model": str,
    "environment": dict,
    "determinism": str,
}
# Runs that are alike in these are of one experiment.
_CELL = ("dataset_id", "expid", "settings_hash", "data_hash")


def _is_report(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() >= _NEEDED.keys()
        and all(isinstance(value[key], kind) for key, kind in _KINDS.items() if key in value)
        and all(isinstance(figures, dict) for figures in value["metrics"].values())
        and all(isinstance(figure, int | float) for figures in value["metrics"].values() for figure in figures.values())
        and isinstance(value["parameters"].get("total"), int)
    )


def _cell(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry.get(key) for key in _CELL)


def _seal_problems(run_dir: Path, report: dict[str, Any]) -> list[str]:
    hashes = report.get("evidence")
    done = run_dir / "DONE"
    if not isinstance(hashes, dict) or not done.is_file():
        return ["it has no hashes of its files: it is unfinished or of an earlier version"]
    if done.read_text(encoding="utf-8", errors="replace").strip() != sha256_of_file(run_dir / "report.json"):
        return ["report.json was altered after the run"]
    problems = []
    for name in FILES:
        if name == WEIGHTS:
            continue
        path = run_dir / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif sha256_of_file(path) != hashes.get(name):
            problems.append(f"{name} was altered after the run")
    return problems


def _split_problems(experiment: Experiment) -> list[str]:
    """Whether it was tested on what it was trained on or chosen by."""
    dataset, root = experiment.dataset, experiment.root
    if not dataset.test_data:
        return []
    uses = {"train_data": "trained on it", "valid_data": "chose its best epoch by it"}
    return [
        f"{key} is test_data, so it {what}"
        for key, what in uses.items()
        if (path := getattr(dataset, key)) and (root / path).resolve() == (root / dataset.test_data).resolve()
    ]


def _curve_problems(run_dir: Path, report: dict[str, Any], experiment: Experiment) -> list[str]:
    """Whether the epoch that was kept is the one that validation chose."""
    settings = experiment.training
    monitor = {settings.monitor: 1} if isinstance(settings.monitor, str) else settings.monitor
    names = [name for name, weight in monitor.items() if weight]
    if "valid" not in report["metrics"] or not settings.save_best_only:
        return []
    try:
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        curve = [sum(monitor[n] * float(record[n]) for n in names) for record in map(json.loads, lines)]
        best = (max if settings.monitor_mode == "max" else min)(curve)
        reported = sum(monitor[n] * float(report["metrics"]["valid"][n]) for n in names)
    except (KeyError, ValueError, TypeError):
        return []  # the model decides by itself, or monitors what it does not report
    if abs(best - reported) > TOLERANCE:
        return [f"its weights are not those of the best validation: {reported:.6f}, but the curve reached {best:.6f}"]
    return []
