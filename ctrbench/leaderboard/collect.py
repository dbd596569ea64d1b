# SPDX-License-Identifier: Apache-2.0
"""Run directories -> a leaderboard: rows over seeds, what stands behind them, comparisons."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

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
from ctrbench.files import sha256_of_file, shown_path
from ctrbench.leaderboard.published import PublishedResults, find_published, verdict
from ctrbench.leaderboard.records import LOSSES, Board, Row, Run, Status, Table
from ctrbench.leaderboard.statistics import compare, summarize
from ctrbench.suite import Cell, Suite

VERIFICATION = "verification.json"


def collect(folder: Path, suite: Suite | None = None, command: str = "") -> Board:
    """The leaderboard of all finished runs at or below `folder`, or of those that belong to a suite.

    Raises:
        ConfigError: there is none, or two of them claim one cell.
        DataError: a report is damaged.
    """
    cells, unknown = _cells(suite) if suite else ({}, [])
    runs = [run for run in read_runs(folder) if suite is None or _key(run) in cells]
    if not runs:
        which = f" of the suite {suite.name}: ctrbench bench {suite.name}" if suite else None
        hint = which or ": train one first, as run_expid.py --expid SDCNv3_tiny"
        raise ConfigError(f"{folder}: no finished run{hint}")
    _check_cells(runs)
    published = find_published(folder) or find_published(suite.root if suite else Path.cwd())
    missing = sorted(cells.keys() - {_key(run) for run in runs})
    known = _suite_problems(suite, cells, runs, missing) if suite else {}
    by_dataset = collections.defaultdict(list)
    for run in runs:
        by_dataset[run.report["dataset_id"]].append(run)
    tables = [_table(dataset, of_it, published, known) for dataset, of_it in sorted(by_dataset.items())]
    lines = [f"{expid} on {dataset}, seed {seed}" for dataset, expid, seed in missing]
    return Board(tuple(tables), suite.name if suite else shown_path(folder), command, (*lines, *unknown))


def read_runs(folder: Path) -> list[Run]:
    """All finished runs at or below `folder`, with their state.

    Raises:
        DataError: a report is damaged.
    """
    return [read_run(done.parent) for done in sorted(folder.rglob("DONE"))]


def read_run(run_dir: Path) -> Run:
    """One finished run.

    Raises:
        DataError: its report is damaged.
    """
    report = read_report(run_dir)
    problems = problems_of(run_dir, report)
    if not problems and (damaged := weights_problem(run_dir, report)):
        problems = [damaged]
    if not problems:
        with suppress(CtrbenchError):  # raw files that are incomplete say nothing of the run
            problems += [problem] if (problem := data_problem(run_dir, report, is_built=True)) else []
    verification = _verification(run_dir, report)
    if verification and not verification.get("is_equal"):
        is_compared = verification.get("metrics") or not verification.get("problems")
        problems += ["its weights do not give the reported figures"] if is_compared else verification["problems"]
    is_evaluated = verification is not None and (run_dir / WEIGHTS).exists()
    status = Status.UNPROVEN if problems else Status.PROVEN if is_evaluated else Status.RECORDED
    return Run(run_dir, report, _curve(run_dir), status, tuple(problems), verification)


def _verification(run_dir: Path, report: dict[str, Any]) -> dict[str, Any] | None:
    """verification.json, if it speaks of this report and these weights."""
    try:
        found: dict[str, Any] = json.loads((run_dir / VERIFICATION).read_text(encoding="utf-8"))
        is_ours = found["report"] == sha256_of_file(run_dir / "report.json")
        return found if is_ours and found["weights"] == report["evidence"][WEIGHTS] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _curve(run_dir: Path) -> list[dict[str, Any]]:
    try:
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [record for record in map(json.loads, lines) if isinstance(record, dict)]
    except (OSError, ValueError):
        return []


def _key(run: Run) -> tuple[str, str, int]:
    return run.report["dataset_id"], run.report["expid"], run.seed


def _cells(suite: Suite) -> tuple[dict[tuple[str, str, int], Cell], list[str]]:
    """The cells of a suite, and what is to be said of sweeps that have none yet."""
    from ctrbench.bench import best_of_sweep

    cells, unknown = list(suite.cells()), []
    for path in suite.sweeps:
        found = best_of_sweep(path, suite.config.seeds)
        cells += found
        unknown += [] if found else [f"the best setting of the sweep {path.stem}"]
    return {(cell.dataset_id, cell.expid, cell.seed): cell for cell in cells}, unknown


def _suite_problems(
    suite: Suite, cells: dict[tuple[str, str, int], Cell], runs: list[Run], missing: list[tuple[str, str, int]]
) -> dict[tuple[str, str], list[str]]:
    """Dataset and expid -> how its runs are not what the suite says."""
    problems: dict[tuple[str, str], list[str]] = {(dataset, expid): [] for dataset, expid, _ in cells}
    for dataset, expid in {(dataset, expid) for dataset, expid, _ in missing}:
        problems[dataset, expid].append("seeds of the suite are missing")
    settings: dict[tuple[str, str], str | None] = {}
    for run in runs:
        dataset, expid, _ = key = _key(run)
        if (dataset, expid) not in settings:
            settings[dataset, expid] = None
            with suppress(CtrbenchError):  # its model folder is broken; what it did stands
                settings[dataset, expid] = cells[key].experiment(is_data_required=False).settings_hash
        if settings[dataset, expid] not in (None, run.report.get("settings_hash")):
            what = f"seed {run.seed}: run with other settings than {suite.name} has now"
            problems[dataset, expid].append(what)
    return problems


def _check_cells(runs: Sequence[Run]) -> None:
    """Refuse two runs that claim one cell."""
    folders = collections.defaultdict(list)
    for run in runs:
        folders[_key(run)].append(run.folder)
    problems = [
        f"{expid} on {dataset}, seed {seed}: {' and '.join(map(shown_path, found))} claim the same cell: remove one of them"
        for (dataset, expid, seed), found in folders.items()
        if len(found) > 1
    ]
    if problems:
        raise ConfigError(problems)


def _table(
    dataset_id: str, runs: list[Run], published: PublishedResults | None, known: dict[tuple[str, str], list[str]]
) -> Table:
    split = "test" if any(run.report["metrics"].get("test") for run in runs) else "valid"
    metric = _main_metric(runs, split)
    hashes = [run.report.get("data_hash", "") for run in runs]
    sound = [run.report.get("data_hash", "") for run in runs if not run.problems]
    reference = max(hashes, key=lambda h: (sound.count(h), hashes.count(h), h))
    by_expid = collections.defaultdict(list)
    for run in sorted(runs, key=lambda run: run.seed):
        by_expid[run.report["expid"]].append(run)
    rows = []
    for expid, of_it in by_expid.items():
        row = _row(dataset_id, expid, of_it, published, split, metric)
        strange = sorted({r.report.get("data_hash", "") for r in of_it} - {reference})
        problems = [*row.problems, *known.get((dataset_id, expid), ())]
        if strange:
            problems.append(
                f"trained on other data ({strange[0][:12]}) than the dataset's other rows ({reference[:12]})"
            )
        status = Status.UNPROVEN if problems else row.status
        rows.append(dataclasses.replace(row, problems=tuple(problems), status=status, is_comparable=not strange))
    sign = 1 if metric in LOSSES else -1

    def rank(row: Row) -> tuple[bool, bool, float]:
        value = row.summary(split, metric)
        is_known = value is not None and math.isfinite(value.mean)
        return not row.is_comparable, not is_known, sign * value.mean if value and is_known else 0.0

    rows.sort(key=rank)
    summaries = {row.expid: row.summary(split, metric) for row in rows if row.is_comparable}
    values = {expid: found.values for expid, found in summaries.items() if found and math.isfinite(found.mean)}
    return Table(dataset_id, metric, split, tuple(rows), tuple(compare(values)), reference)


def _row(
    dataset_id: str, expid: str, runs: list[Run], published: PublishedResults | None, split: str, metric: str
) -> Row:
    names = {(s, n): None for run in runs for s, values in run.report["metrics"].items() for n in values}
    summaries = {}
    for found_split, name in names:
        values = {run.seed: value for run in runs if (value := run.metric(found_split, name)) is not None}
        summaries[found_split, name] = summarize(values)
    problems = [f"seed {run.seed}: {problem}" for run in runs for problem in run.problems]
    if len({run.report.get("settings_hash") for run in runs}) > 1:
        problems.append("its seeds were run with different settings")
    if not problems:
        problems += ledger_problems([(run.folder, run.report) for run in runs], find_ledger(runs[0].folder))
    is_proven = all(run.status is Status.PROVEN for run in runs)
    status = Status.UNPROVEN if problems else Status.PROVEN if is_proven else Status.RECORDED
    model = str(runs[0].report.get("model", ""))
    known = published.find(dataset_id, expid, model) if published else None
    by_source = published.by_source(dataset_id, expid, model, metric) if published else {}
    against = verdict(summaries.get((split, metric)), known, metric)
    return Row(
        dataset_id, expid, model, expid, tuple(runs), summaries, status, tuple(problems), known, against, True, by_source
    )  # fmt: skip


def _main_metric(runs: Iterable[Run], split: str) -> str:
    """What a dataset is ranked by: AUC, or else what its runs report first."""
    names = [name for run in runs for s in (split, "valid") for name in run.report["metrics"].get(s, {})]
    return "AUC" if "AUC" in names or not names else names[0]
