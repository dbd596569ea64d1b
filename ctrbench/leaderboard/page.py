# SPDX-License-Identifier: Apache-2.0
"""A leaderboard as one self-contained HTML page: charts as SVG, words and tables in page.html.j2.

The page loads nothing, so that it can be mailed, archived and opened from a file. Its only script sorts the tables.
"""

from __future__ import annotations

import bisect
import collections
import math
import os
import statistics
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ctrbench.charts import is_number, number
from ctrbench.files import write_text
from ctrbench.leaderboard.charts import (
    IntervalColumn,
    best_of,
    cost_chart,
    direction_of,
    interval_column,
    interval_of,
    is_significant,
    look_of,
    short_names,
    tested,
)
from ctrbench.leaderboard.curve_charts import learning_curves
from ctrbench.leaderboard.detail_charts import calibration_chart, calibration_error, heat_map, strongest_of
from ctrbench.leaderboard.gaps import find_gaps
from ctrbench.leaderboard.records import Board, Comparison, Details, Row, Run, Status, Summary, Table

# The files of a run that its line links to.
FILES = ("config.yaml", "report.json", "train.log", "metrics.jsonl")
SHADES = 4  # classes d1 to d4 of the matrix of pairs


def write_page(path: Path, board: Board, details: Details | None = None) -> None:
    """Write the page of a leaderboard to `path`, atomically.

    Args:
        path: the HTML file; its links to runs' files are relative to its folder.
        board: what to show.
        details: a run to look at closely.
    """
    write_text(path, render_page(board, path.parent, details))


def render_page(board: Board, folder: Path, details: Details | None = None) -> str:
    """The HTML of a leaderboard's page that will lie in `folder`."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        breakable=breakable, metric=metric_text, seconds=seconds_text, p_value=p_text, number=number
    )
    footnotes: dict[str, int] = {}
    sections = [_section(table, f"t{i}", folder, footnotes) for i, table in enumerate(board.tables, 1)]
    return environment.get_template("page.html.j2").render(
        board=board,
        sections=sections,
        footnotes=footnotes,
        environments=_environments(board),
        details=_details(details) if details else None,
        statuses=Status,
    )


# --- values as text


def breakable(name: str) -> Markup:
    """A name that may be broken after its underscores."""
    return Markup("_<wbr>").join(name.split("_"))


def metric_text(value: float | None) -> str:
    """A metric in six digits."""
    return "–" if value is None else f"{value:.6f}" if is_number(value) else "not a number"


def seconds_text(value: float) -> str:
    """Seconds in as many digits as matter."""
    return f"{value:,.1f}" if is_number(value) else "–"


def p_text(value: float) -> str:
    """A p value."""
    return "–" if not is_number(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def size_text(value: float) -> str:
    """A count of parameters, short: 201.7k."""
    size, unit = next(((s, u) for s, u in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= s), (1.0, ""))
    return f"{value / size:.4g}{unit}"


def seeds_text(seeds: list[int]) -> str:
    """Seeds, as 2024–2028 where they follow each other."""
    if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]}–{seeds[-1]}"
    return ", ".join(map(str, seeds))


# --- a table


def _section(table: Table, anchor: str, folder: Path, footnotes: dict[str, int]) -> dict[str, Any]:
    """What the page shows of a dataset."""
    column, best = interval_column(table), best_of(table)
    rows = [_row(table, row, column, footnotes) for row in table.rows]
    ranks = iter(range(1, len(rows) + 1))
    for row in rows:
        row["rank"] = next(ranks) if row["row"].is_comparable else None
    costs = [
        (label, cost_chart(table, cost, label, anchor, text))
        for label, cost, text in (
            ("training time in seconds", _train_seconds, number),
            ("trainable parameters", _parameters, size_text),
        )
    ]
    return {
        "table": table,
        "anchor": anchor,
        "better": "higher is better" if direction_of(table.metric) == "max" else "lower is better",
        "best": best,
        "best_summary": best.summary(table.split, table.metric) if best else None,
        "tied": [row["row"].label for row in rows if "tied" in row["look"].split()],
        "unproven": sum("unproven" in row["look"].split() for row in rows),
        "strange": sum(not row["row"].is_comparable for row in rows),
        "column": column,
        "rows": rows,
        "has_intervals": any(interval_of(row["main"]) for row in rows),
        "has_p": any(row["pair"] for row in rows),
        "has_published": any(row["row"].published for row in rows),
        "has_valid": table.split != "valid" and any(row["valid"] for row in rows),
        "has_logloss": table.metric != "logloss" and any(row["logloss"] for row in rows),
        "costs": [(label, chart) for label, chart in costs if chart],
        "curves": learning_curves(table, anchor),
        "pairs": _pairs(table) if table.comparisons else None,
        "gaps": find_gaps(table),
        "runs": [_run(run, row, table, folder) for row in table.rows for run in row.runs],
    }


def _train_seconds(row: Row) -> float:
    return row.mean_of("timings", "train_seconds")


def _parameters(row: Row) -> float:
    return float(row.parameters)


def _row(table: Table, row: Row, column: IntervalColumn | None, footnotes: dict[str, int]) -> dict[str, Any]:
    """What the table shows of an experiment."""
    main = row.summary(table.split, table.metric)
    published = row.published.metrics.get(table.metric) if row.published else None
    notes = []
    if row.published and published is not None:
        for text in (f"Published in {row.published.source}", *row.published.flags):
            notes.append(footnotes.setdefault(text, len(footnotes) + 1))
    return {
        "row": row,
        "look": look_of(table, row),
        "seeds": seeds_text(row.seeds),
        "main": main,
        "interval": interval_of(main),
        "drawing": column.draw(main, published, _in_words(row, main, published)) if column else "",
        "valid": row.summary("valid", table.metric),
        "logloss": row.summary(table.split, "logloss"),
        "train_seconds": _train_seconds(row),
        "pair": tested(table, row),
        "published": published,
        "notes": notes,
    }


def _in_words(row: Row, main: Summary | None, published: float | None) -> str:
    words = f"{row.label}: {metric_text(main.mean if main else None)}"
    if interval := interval_of(main):
        words += f", 95% interval {interval[0]:.6f} to {interval[1]:.6f}"
    return words + (f", published {published:g}" if published is not None else "")


def _pairs(table: Table) -> dict[str, Any]:
    """The matrix of the pairs that were compared: the difference of the row's experiment to the column's."""
    known = {(c.first, c.second): c for c in table.comparisons}
    known |= {(c.second, c.first): _turned(c) for c in table.comparisons}
    compared = {expid for pair in known for expid in pair}
    rows = [
        (rank, row, name)
        for rank, (row, name) in enumerate(zip(table.rows, short_names(table), strict=True), 1)
        if row.expid in compared
    ]
    sizes = [abs(c.difference) for c in table.comparisons if c.difference and is_number(c.difference)]
    unit = 10.0 ** math.floor(math.log10(statistics.median(sizes))) if sizes else 1.0
    told = sorted(abs(c.difference) for c in table.comparisons if is_significant(c.adjusted_p))
    sign = 1 if direction_of(table.metric) == "max" else -1

    def cell(row: Row, other: Row) -> dict[str, str] | None:
        c = known.get((row.expid, other.expid))
        if c is None or not is_number(c.difference):
            return None
        look = ""
        if is_significant(c.adjusted_p):  # a shade by rank, which no outlier can squeeze
            depth = math.ceil(SHADES * bisect.bisect(told, abs(c.difference)) / len(told))
            look = f"{'up' if sign * c.difference > 0 else 'down'} d{depth}"
        title = f"{row.label} − {other.label}\n{c.difference:+.6f}, 95% interval {c.low:+.6f} to {c.high:+.6f}\n"
        title += f"p {p_text(c.p)}, Holm {p_text(c.adjusted_p)}, {c.num_seeds} seeds"
        return {"text": f"{round(c.difference / unit, 1) + 0.0:+.1f}", "look": look, "title": title}

    heads = [(rank, row.label, name) for rank, row, name in rows]
    return {
        "unit": f"{unit:.12f}".rstrip("0").rstrip("."),
        "heads": heads,
        "lines": [
            (head, [cell(row, other) for _, other, _ in rows]) for head, (_, row, _) in zip(heads, rows, strict=True)
        ],
        "told": len(told),
        "comparisons": [(c, is_significant(c.adjusted_p)) for c in table.comparisons],
    }


def _turned(c: Comparison) -> Comparison:
    return Comparison(c.second, c.first, c.num_seeds, -c.difference, -c.high, -c.low, c.p, c.adjusted_p)


# --- evidence


def _run(run: Run, row: Row, table: Table, folder: Path) -> dict[str, Any]:
    """What the evidence table shows of a run."""
    report, checked = run.report, run.verification or {}
    bootstrap = checked.get("bootstrap")
    commit, _, dirty = str(report.get("environment", {}).get("git_commit") or "–").partition("-")
    return {
        "run": run,
        "label": row.label,
        "value": run.metric(table.split, table.metric),
        "bootstrap": bootstrap if bootstrap and bootstrap.get("metric") == table.metric else None,
        "best_epoch": report.get("best_epoch"),
        "epochs": report.get("epochs"),
        "config_hash": str(report.get("config_hash") or "–"),
        "data_hash": str(report.get("data_hash") or "–"),
        "commit": commit[:12] + (f"-{dirty}" if dirty else ""),
        "command": str(report.get("command") or "–"),
        "checked": str(checked.get("time", "")),
        "is_retrained": bool(checked.get("is_retrained")),
        "files": _links(run, row, folder),
    }


def _links(run: Run, row: Row, folder: Path) -> list[tuple[str, str]]:
    """(name, relative address) of its files: of the copies beside the page, where they are of this run, or else its own."""
    copy = folder / row.dataset_id / row.expid / f"seed_{run.seed}"
    try:
        is_copied = (copy / "report.json").read_bytes() == (run.folder / "report.json").read_bytes()
    except OSError:
        is_copied = False
    found = []
    for name in FILES:
        places = [copy / name] * is_copied + [run.folder / name]
        if place := next((p for p in places if p.is_file()), None):
            found.append((name, quote(Path(os.path.relpath(place.resolve(), folder.resolve())).as_posix())))
    return found


def _environments(board: Board) -> list[tuple[int, dict[str, Any]]]:
    """(runs, machine and versions), the most frequent first; the commit is told with each run."""
    runs = [run for table in board.tables for row in table.rows for run in row.runs]
    found = [{k: v for k, v in run.report.get("environment", {}).items() if k != "git_commit"} for run in runs]
    counts = collections.Counter(tuple(sorted((k, str(v)) for k, v in values.items())) for values in found)
    first = ("device_name", "device", "threads", "ctrbench", "python", "torch")
    order = {key: i for i, key in enumerate(first)}
    return [
        (count, dict(sorted(values, key=lambda item: (order.get(item[0], len(order)), item[0]))))
        for values, count in counts.most_common()
    ]


# --- a run looked at closely


def _details(details: Details) -> dict[str, Any]:
    """What the page shows of the chosen run: fields by importance, in every chart."""
    size = len(details.fields)
    worth = [value if is_number(value) else 0.0 for value in details.importance]
    order = sorted(range(size), key=lambda i: -worth[i])
    low, high = min([0.0, *worth]), max([0.0, *worth])
    span = (high - low) or 1.0
    bars = [
        {
            "field": details.fields[i],
            "value": metric_text(details.importance[i]),
            "start": f"{100 * (min(worth[i], 0.0) - low) / span:.2f}",
            "width": f"{100 * abs(worth[i]) / span:.2f}",
            "is_negative": worth[i] < 0,
        }
        for i in order
    ]
    strongest = strongest_of([details.interactions], has_diagonal=False)
    pairs = heat_map(
        details.interactions, details.fields, order, "Interactions of field pairs", strongest, has_diagonal=False
    )
    deepest = strongest_of(list(details.layers.values()))
    layers = []
    for name, matrix in details.layers.items():
        is_ours = len(matrix) == size
        fields = details.fields if is_ours else tuple(map(str, range(1, len(matrix) + 1)))
        places = order if is_ours else list(range(len(matrix)))
        layers.append((name, heat_map(matrix, fields, places, f"Field pairs in {name}", deepest, is_small=True)))
    return {
        "details": details,
        "label": details.run.report.get("expid", ""),
        "calibration": calibration_chart(details),
        "error": calibration_error(details),
        "bars": bars,
        "pairs": pairs if size > 1 else None,
        "layers": layers,
    }
