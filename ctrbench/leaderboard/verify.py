# SPDX-License-Identifier: Apache-2.0
"""`ctrbench verify`: the stored weights of finished runs are evaluated again, on data with the reported hash."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctrbench.config import load_run
from ctrbench.environment import describe_environment
from ctrbench.errors import ConfigError, CtrbenchError
from ctrbench.evidence import (
    WEIGHTS,
    data_problem,
    find_ledger,
    ledger_problems,
    problems_of,
    read_report,
    weights_problem,
)
from ctrbench.files import sha256_of_file, write_json
from ctrbench.leaderboard.collect import VERIFICATION
from ctrbench.leaderboard.rebuild import altered_files
from ctrbench.leaderboard.statistics import LEVEL, bootstrap_auc
from ctrbench.run import Session, available_threads, check_gpu, load_trained, open_batches, run
from ctrbench.stacked_runs import run_together

# Another machine, or another number of threads, adds up in another order.
TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a run's verification.

    Attributes:
        run_dir: the run.
        problems: why it is not proven; empty if it is.
        metrics: of the evaluation, by split; empty where it did not come to that.
    """

    run_dir: Path
    problems: tuple[str, ...]
    metrics: dict[str, dict[str, float]]


def find_runs(paths: list[Path]) -> list[Path]:
    """The finished runs at or below the given folders.

    Raises:
        ConfigError: there is none below one of them.
    """
    found: list[Path] = []
    for path in paths:
        runs = [done.parent for done in sorted(path.rglob("DONE"))]
        if not runs:
            raise ConfigError(f"{path}: no finished run there")
        found += runs
    return list(dict.fromkeys(found))


def verify(run_dir: Path, gpu: int = -1, retrain: bool = False) -> Verdict:
    """Check a run's files and data, evaluate its weights again and compare; leaves verification.json where it came to that.

    Args:
        run_dir: a finished run.
        gpu: index of the GPU; -1 is the CPU.
        retrain: train it anew, in a temporary folder, instead of taking the stored weights.

    Raises:
        ConfigError: there is no such GPU.
    """
    check_gpu(gpu)
    metrics: dict[str, dict[str, float]] = {}
    details: dict[str, Any] = {}
    try:
        report = read_report(run_dir)
        problems = _contradictions(run_dir, report, retrain)
        if problems:
            return Verdict(run_dir, tuple(problems), {})
        problems = altered_files(load_run(run_dir))
        if not problems:
            metrics, details = (_retrain if retrain else _evaluate)(run_dir, report, gpu)
            problems = differences(report["metrics"], metrics, _source(report, details, retrain))
    except CtrbenchError as error:
        return Verdict(run_dir, tuple(str(error).splitlines()), {})
    except Exception as error:  # of the model's code, which need not be what it was
        return Verdict(run_dir, (f"{type(error).__name__}: {error}".splitlines()[0],), {})
    verification = {
        "report": sha256_of_file(run_dir / "report.json"),
        "weights": report["evidence"].get(WEIGHTS),
        "is_equal": not problems,
        "problems": problems,
        "is_retrained": retrain,
        "metrics": metrics,
        **details,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_json(run_dir / VERIFICATION, verification)
    return Verdict(run_dir, tuple(problems), metrics)


def _contradictions(run_dir: Path, report: dict[str, Any], retrain: bool) -> list[str]:
    """What can be said against a run before any model is built."""
    if problems := problems_of(run_dir, report):
        return problems
    if not retrain:
        if damaged := weights_problem(run_dir, report):
            return [damaged]
        if not (run_dir / WEIGHTS).exists():
            return [f"{WEIGHTS} is not here: copy it here, or train the run anew with --retrain"]
    beside = [read_report(done.parent) for done in run_dir.resolve().parent.glob("*/DONE")]
    if problems := ledger_problems([(run_dir, report)], find_ledger(run_dir), beside):
        return problems
    changed = data_problem(run_dir, report)
    return [f"{changed}: restore the raw files, or run it again"] if changed else []


def differences(
    reported: dict[str, dict[str, float]], found: dict[str, dict[str, float]], source: str = "its weights give"
) -> list[str]:
    """Where a report's figures are not those that were found; a figure that is not defined must be so again."""
    problems = []
    for split, values in reported.items():
        for name, value in values.items():
            again = found.get(split, {}).get(name)
            if again is None:
                problems.append(f"{split} {name} is reported, but cannot be computed again")
            elif not (abs(again - value) <= TOLERANCE * max(1.0, abs(value)) or (value != value and again != again)):
                problems.append(f"{split} {name} is reported as {value:.6f}, but {source} {again:.6f}")
    return problems


def _source(report: dict[str, Any], details: dict[str, Any], retrain: bool) -> str:
    """Where the new figures come from; a model that is trained on another device becomes another one."""
    if not retrain:
        return "its weights give"
    there, here = report.get("environment", {}).get("device"), details["environment"]["device"]
    return "training it anew gives" if there == here else f"training it anew on {here}, not on {there}, gives"


def _evaluate(run_dir: Path, report: dict[str, Any], gpu: int) -> tuple[dict[str, Any], dict[str, Any]]:
    experiment, data, feature_map, trainer = load_trained(run_dir, gpu)
    metrics: dict[str, dict[str, float]] = {}
    details: dict[str, Any] = {"environment": describe_environment(experiment.root, trainer.device)}
    for split in report["metrics"]:
        batches = open_batches(experiment, data, feature_map, split, trainer)
        metrics[split] = {name: float(v) for name, v in trainer.evaluate(batches).items()}
        if split != "test" or "AUC" not in metrics[split]:
            continue
        predictions = trainer.evaluator.predict(batches)
        if "y_pred" in predictions:  # not one of several tasks
            label = batches.column(feature_map.labels[0]).double().cpu().numpy()
            score = predictions["y_pred"].double().cpu().numpy()
            low, high = bootstrap_auc(label, score, seed=0)
            details["bootstrap"] = {"split": split, "metric": "AUC", "level": LEVEL, "low": low, "high": high}
            details["calibration"] = calibration(label, score)
    return metrics, details


def _retrain(run_dir: Path, report: dict[str, Any], gpu: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of the same training, together with the seeds that were in its stack if it was in one."""
    experiment = load_run(run_dir)
    seeds = report.get("stack", {}).get("seeds") or [experiment.training.seed]
    with tempfile.TemporaryDirectory() as folder:
        changes = {"model_root": folder, "verbose": 0}
        experiments = [
            dataclasses.replace(experiment, training=experiment.training.model_copy(update={**changes, "seed": seed}))
            for seed in seeds
        ]
        sessions = [Session(is_quiet=True) for _ in seeds]
        threads, wanted = torch.get_num_threads(), report.get("environment", {}).get("threads")
        try:
            if isinstance(wanted, int):
                torch.set_num_threads(wanted)  # the order of sums depends on it
                available_threads.cache_clear()
            if len(seeds) == 1:
                found: dict[str, Any] | BaseException = run(experiments[0], gpu, session=sessions[0])
            else:
                found = run_together(experiments, gpu, sessions=sessions)[seeds.index(experiment.training.seed)]
        finally:
            torch.set_num_threads(threads)
            available_threads.cache_clear()
    if isinstance(found, BaseException):
        raise found
    return found["metrics"], {"environment": found["environment"]}


def calibration(label: np.ndarray[Any, Any], score: np.ndarray[Any, Any], num_bins: int = 20) -> list[dict[str, float]]:
    """Predicted and observed click rate in bins of equally many rows, from the lowest scores to the highest."""
    order = np.argsort(score, kind="stable")
    bins = [part for part in np.array_split(order, num_bins) if len(part)]
    return [
        {"predicted": float(score[part].mean()), "observed": float((label[part] > 0).mean()), "rows": len(part)}
        for part in bins
    ]
