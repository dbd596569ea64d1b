# SPDX-License-Identifier: Apache-2.0
"""Run directories -> a table. Every figure is computed from report.json files; a run without DONE does not count."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ctrbench.errors import ConfigError, DataError

COLUMNS = ("dataset", "experiment", "seeds", "valid AUC", "test AUC", "test logloss", "parameters", "epochs", "train s")

_NEEDED = {"dataset_id", "expid", "seed", "metrics", "parameters", "epochs", "timings"}


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """The reports of all finished runs at or below `folder`, each with its `run_dir`.

    Raises:
        ConfigError: there is no finished run.
        DataError: a report is damaged.
    """
    reports = []
    for done in sorted(folder.rglob("DONE")):
        path = done.with_name("report.json")
        try:
            reports.append({**_read(path), "run_dir": str(path.parent)})
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: missing or damaged: run the experiment again") from error
    if not reports:
        raise ConfigError(f"{folder}: no finished run: train one first, as run_expid.py --expid SDCNv3_tiny")
    return reports


def summarize(reports: Iterable[dict[str, Any]]) -> list[dict[str, str]]:
    """One row per dataset and experiment, over its seeds, the best mean test AUC of each dataset first."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for report in reports:
        groups.setdefault((report["dataset_id"], report["expid"]), []).append(report)

    def rank(item: tuple[tuple[str, str], list[dict[str, Any]]]) -> tuple[str, float]:
        (dataset, _), runs = item
        values = _values(runs, "test", "AUC") or _values(runs, "valid", "AUC")
        return dataset, -statistics.fmean(values) if values else math.inf

    return [_row(dataset, expid, runs) for (dataset, expid), runs in sorted(groups.items(), key=rank)]


def to_markdown(rows: list[dict[str, str]]) -> str:
    """The table as Markdown, aligned so that it also reads well as plain text."""
    widths = {c: max(len(c), *(len(row[c]) for row in rows)) for c in COLUMNS}
    lines = [
        "| " + " | ".join(c.ljust(widths[c]) for c in COLUMNS) + " |",
        "|" + "|".join("-" * (widths[c] + 2) for c in COLUMNS) + "|",
    ]
    lines += ["| " + " | ".join(row[c].ljust(widths[c]) for c in COLUMNS) + " |" for row in rows]
    return "\n".join(lines)


def _read(path: Path) -> dict[str, Any]:
    report = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(report, dict) or not report.keys() >= _NEEDED:
        raise ValueError("not a report")
    return report


def _row(dataset: str, expid: str, runs: list[dict[str, Any]]) -> dict[str, str]:
    totals = {run["parameters"]["total"] for run in runs}
    seeds = sorted(run["seed"] for run in runs)
    cells = (
        dataset,
        expid,
        ", ".join(map(str, seeds)),
        _mean_and_deviation(_values(runs, "valid", "AUC")),
        _mean_and_deviation(_values(runs, "test", "AUC")),
        _mean_and_deviation(_values(runs, "test", "logloss")),
        " / ".join(f"{total:,}" for total in sorted(totals)),
        f"{statistics.fmean(run['epochs'] for run in runs):.1f}",
        f"{statistics.fmean(run['timings']['train_seconds'] for run in runs):.1f}",
    )
    return dict(zip(COLUMNS, cells, strict=True))


def _values(runs: list[dict[str, Any]], split: str, metric: str) -> list[float]:
    found = [run["metrics"].get(split, {}).get(metric) for run in runs]
    return [value for value in found if value is not None]


def _mean_and_deviation(values: list[float]) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.6f}"
    return f"{statistics.fmean(values):.6f} ± {statistics.stdev(values):.6f}"
