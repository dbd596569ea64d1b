# SPDX-License-Identifier: Apache-2.0
"""What a sweep leaves: results.csv, best_config/ and report.html."""

from __future__ import annotations

import csv
import io
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import optuna

from ctrbench.files import write_text
from ctrbench.tuner.configs import ConfigFolder, rerun_command, write_best
from ctrbench.tuner.definition import Sweep
from ctrbench.tuner.page import write_page
from ctrbench.tuner.records import SeedResult, SweepSummary, TrialRecord, best_of

# Finished trials that importance takes at least.
MIN_IMPORTANCE_TRIALS = 4
# FuxiCTR's columns, whose cells carry their names as its own files do, then ours.
FUXICTR_COLUMNS = ("time", "command", "exp_id", "dataset_id", "train", "val", "test")
OWN_COLUMNS = (
    "trial", "state", "seed", "objective", "best_epoch", "epochs", "train_seconds", "evaluate_seconds", "total_seconds",
    "host", "device", "run_dir", "error",
)  # fmt: skip


def write_results(sweep: Sweep, records: list[TrialRecord], study: optuna.Study, gpu: int) -> TrialRecord | None:
    """Write all that is left of a sweep; its best trial."""
    best = best_of(records, sweep.direction)
    configs = ConfigFolder(sweep, sweep.folder / "config")
    for record in records:
        if record.state == "complete":
            configs.add(record.values, sweep.experiment(record.index, record.values))
    write_text(sweep.folder / "results.csv", to_csv(sweep, records, gpu))
    command = None
    if best is not None:
        experiment = sweep.experiment(best.index, best.values)
        folder = write_best(sweep, best.values, experiment)
        command = rerun_command(sweep, experiment, gpu, folder)
    write_page(sweep.folder / "report.html", summarize(sweep, records, study, command))
    return best


def summarize(sweep: Sweep, records: list[TrialRecord], study: optuna.Study, command: str | None) -> SweepSummary:
    """The sweep as its report shows it."""
    return SweepSummary(
        name=sweep.name,
        base_expid=sweep.config.base_expid,
        dataset_id=sweep.base_dataset_id,
        objective=sweep.monitor,
        direction=sweep.direction,
        sampler=sweep.config.sampler,
        log_keys=sweep.space.log_keys,
        importance=importance(sweep, records, study),
        trials=records,
        rerun_command=command,
    )


def importance(sweep: Sweep, records: list[TrialRecord], study: optuna.Study) -> dict[str, float]:
    """How much each tuned key matters to the objective (PED-ANOVA), most important first."""
    keys = list(sweep.space.distributions())
    done = [record.objective for record in records if record.state == "complete"]
    if len(done) < MIN_IMPORTANCE_TRIALS or len(set(done)) == 1 or len(keys) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # What the best share of the trials has in common; of few trials a tenth would be one or none.
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=max(0.1, min(0.5, 5 / len(done))))
            found = optuna.importance.get_param_importances(study, evaluator=evaluator, params=keys)
        except (ValueError, RuntimeError):  # too few different values
            return {}
    return {key: float(share) for key, share in found.items()}


def to_csv(sweep: Sweep, records: list[TrialRecord], gpu: int) -> str:
    """One row for each finished run, and one for each trial that has none, by trial."""
    keys = [dimension.key for dimension in sweep.space.dimensions]
    names = sorted({f"{s}_{m}" for r in records for run in r.seeds for s, ms in run.metrics.items() for m in ms})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [*FUXICTR_COLUMNS, *OWN_COLUMNS, *names]
    writer.writerow([*columns, *(f"tuned_{key}" if key in columns else key for key in keys)])
    for record in sorted(records, key=lambda record: record.index):
        runs: list[SeedResult | None] = [*record.seeds] or [None]
        for run in runs:
            writer.writerow(_row(sweep, record, run, gpu, names, keys))
    return text.getvalue()


def _row(
    sweep: Sweep, record: TrialRecord, run: SeedResult | None, gpu: int, names: list[str], keys: list[str]
) -> list[Any]:
    metrics = run.metrics if run else {}
    flat = {f"{split}_{name}": value for split, values in metrics.items() for name, value in values.items()}
    moment = time.strftime("%Y%m%d-%H%M%S", time.localtime(record.finished)) if record.finished else ""
    device = -1 if record.device == "cpu" else int(record.device.split()[-1]) if record.device else gpu
    dataset_id, command = sweep.base_dataset_id, ""
    if record.state in ("complete", "pruned"):
        experiment = sweep.experiment(record.index, record.values)
        seeded = sweep.with_seed(experiment, run.seed) if run else experiment
        dataset_id, command = experiment.training.dataset_id, rerun_command(sweep, seeded, device)
    own = [record.index + 1, record.state, run.seed if run else "", _number(record.objective)]
    own += [run.best_epoch, run.epochs] if run else ["", ""]
    times = (run.train_seconds, run.evaluate_seconds, run.total_seconds) if run else ()
    own += [f"{seconds:.3f}" for seconds in times] or ["", "", ""]
    own += [record.host, record.device, run.run_dir if run else "", (record.error or "").replace("\n", " | ")]
    values = [_plain(record.values.get(key)) for key in keys]
    fuxictr = [
        moment,
        f"[command] {command}",
        f"[exp_id] {record.expid}",
        f"[dataset_id] {dataset_id}",
        "[train] N.A.",
        f"[val] {_metrics(metrics.get('valid'))}",
        f"[test] {_metrics(metrics.get('test'))}",
    ]
    return [*fuxictr, *own, *(_number(flat.get(name)) for name in names), *values]


def _metrics(values: dict[str, float] | None) -> str:
    return " - ".join(f"{name}: {value:.6f}" for name, value in (values or {}).items()) or "N.A."


def _number(value: float | None) -> str:
    return "" if value is None else repr(value)


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else "" if value is None else value


def final_lines(sweep: Sweep, records: list[TrialRecord], best: TrialRecord | None, gpu: int) -> list[str]:
    """What a person should know at the end."""
    counts = {state: sum(record.state == state for record in records) for state in ("complete", "pruned", "failed")}
    lines = [", ".join(f"{count} {state}" for state, count in counts.items() if count or state == "complete")]
    if best is not None:
        tests = [run.metrics["test"] for run in best.seeds if "test" in run.metrics]
        shown = [f"test {name} {statistics.fmean(t[name] for t in tests):.6f}" for name in (tests[0] if tests else {})]
        lines.append(f"best: {best.expid}: {', '.join([f'{sweep.monitor} {best.objective:.6f}', *shown])}")
        values = {d.key: best.values.get(d.key) for d in sweep.space.dimensions if not d.is_single}
        lines.append("  " + ", ".join(f"{key}: {value}" for key, value in values.items()))
        experiment = sweep.experiment(best.index, best.values)
        lines.append(f"run it again: {rerun_command(sweep, experiment, gpu, sweep.folder / 'best_config')}")
    lines.append(f"results, report and configurations: {_near(sweep.folder)}")
    return lines


def _near(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
