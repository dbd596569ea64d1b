# SPDX-License-Identifier: Apache-2.0
"""A leaderboard as Markdown, as CSV and as lines on a terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from ctrbench.leaderboard.records import Board, Row, Summary, Table
from ctrbench.leaderboard.statistics import p_text

CSV_COLUMNS = (
    "dataset_id", "rank", "expid", "model", "seeds", "split", "metric", "mean", "deviation", "low", "high", "valid_mean",
    "logloss_mean", "logloss_deviation", "parameters", "epochs", "train_seconds", "rows_per_second", "published",
    "published_source", "verdict", "difference_to_best", "p_holm", "status", "problems", "data_hash", "git_commit",
)  # fmt: skip


def to_markdown(board: Board) -> str:
    """All tables, each below the name of its dataset where there are several."""
    parts = []
    for table in board.tables:
        if len(board.tables) > 1:
            parts.append(f"**{table.dataset_id}**\n")
        parts.append(table_to_markdown(table) + "\n")
    return "\n".join(parts).rstrip("\n")


def table_to_markdown(table: Table) -> str:
    """One table, aligned so that it also reads well as plain text."""
    head, *rows = _cells(table)
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in (head, *rows)
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def explanations(board: Board) -> list[str]:
    """What stands below the tables: why rows are unproven, and what has to be known about published figures."""
    lines = [f"- unproven: {', '.join(of_it)}: {problem}." for problem, of_it in _problems(board).items()]
    lines += [f"- missing: {cell}." for cell in board.missing]
    flags: dict[str, list[str]] = {}
    for table in board.tables:
        for row in table.rows:
            for flag in row.published.flags if row.published else ():
                flags.setdefault(flag, []).append(row.label)
    everyone = {row.label for table in board.tables for row in table.rows if row.published}
    for flag, labels in flags.items():
        of = "" if set(labels) == everyone else f" ({', '.join(dict.fromkeys(labels))})"
        lines.append(f"- published figures{of}: {flag}.")
    return lines


def to_csv(board: Board) -> str:
    """One line for each row of each table, all digits kept."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for table in board.tables:
        for rank, row in enumerate(table.rows, 1):
            writer.writerow(_csv_row(table, rank, row))
    return text.getvalue()


def comparisons_to_csv(board: Board) -> str:
    """One line for each pair of rows: difference, its interval, p and Holm's p."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("dataset_id", "metric", "first", "second", "seeds", "difference", "low", "high", "p", "p_holm"))
    for table in board.tables:
        for c in table.comparisons:
            numbers = (c.num_seeds, c.difference, c.low, c.high, c.p, c.adjusted_p)
            writer.writerow((table.dataset_id, table.metric, c.first, c.second, *numbers))
    return text.getvalue()


def _problems(board: Board) -> dict[str, list[str]]:
    """Problem -> the rows that have it, with their seeds where it is one of single runs."""
    found: dict[str, dict[str, list[str]]] = {}
    for table in board.tables:
        for row in table.rows:
            for problem in row.problems:
                seed, colon, what = problem.partition(": ")
                is_of_run = bool(colon) and seed.startswith("seed ")
                seeds = found.setdefault(what if is_of_run else problem, {}).setdefault(row.label, [])
                seeds += [seed.removeprefix("seed ")] * is_of_run
    return {
        problem: [f"{label} (seed {', '.join(seeds)})" if seeds else label for label, seeds in rows.items()]
        for problem, rows in found.items()
    }


def _cells(table: Table) -> Iterator[list[str]]:
    has_p = any(table.against_best(row) for row in table.rows)
    has_published = any(row.published for row in table.rows)
    head = ["experiment", "seeds", f"{table.split} {table.metric}", "95% interval", "valid", "logloss", "parameters"]
    head += ["train s"] + ["against best, p"] * has_p + ["published", "verdict"] * has_published + ["evidence"]
    yield head
    for row in table.rows:
        main, valid = row.summary(table.split, table.metric), row.summary("valid", table.metric)
        logloss = row.summary(table.split, "logloss")
        cells = [row.label, _seeds(row.seeds), _mean_and_deviation(main), _interval(main)]
        cells += [f"{valid.mean:.6f}" if valid else "-", f"{logloss.mean:.6f}" if logloss else "-"]
        cells += [f"{row.parameters:,}", f"{row.mean_of('timings', 'train_seconds'):.1f}"]
        if has_p:
            cells.append(_p_value(table, row))
        if has_published:
            value = row.published.metrics.get(table.metric) if row.published else None
            cells += [f"{value:g}" if value is not None else "-", row.verdict or "-"]
        yield [*cells, row.status.value]


def _csv_row(table: Table, rank: int, row: Row) -> list[object]:
    main, valid = row.summary(table.split, table.metric), row.summary("valid", table.metric)
    logloss = row.summary(table.split, "logloss")
    pair = table.against_best(row)
    difference = None if pair is None else pair.difference if pair.first == row.expid else -pair.difference
    commits = sorted({str(run.report.get("environment", {}).get("git_commit") or "") for run in row.runs})
    numbers = [main.mean, main.deviation, main.low, main.high] if main else [None] * 4
    return [
        table.dataset_id, rank, row.expid, row.model, " ".join(map(str, row.seeds)), table.split, table.metric, *numbers,
        valid.mean if valid else None, logloss.mean if logloss else None, logloss.deviation if logloss else None,
        row.parameters, row.mean_of("epochs"), row.mean_of("timings", "train_seconds"),
        row.mean_of("train_rows_per_second"), row.published.metrics.get(table.metric) if row.published else None,
        row.published.source if row.published else None, row.verdict, difference, pair.adjusted_p if pair else None,
        row.status.value, "; ".join(row.problems), " ".join(sorted({str(r.report.get("data_hash")) for r in row.runs})),
        " ".join(commits),
    ]  # fmt: skip


def _seeds(seeds: list[int]) -> str:
    """2024-2028 where they follow each other."""
    if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]}-{seeds[-1]}"
    return ", ".join(map(str, seeds))


def _mean_and_deviation(summary: Summary | None) -> str:
    if summary is None:
        return "-"
    return f"{summary.mean:.6f}" + ("" if summary.deviation is None else f" ± {summary.deviation:.6f}")


def _interval(summary: Summary | None) -> str:
    return "-" if summary is None or summary.low is None else f"{summary.low:.6f} .. {summary.high:.6f}"


def _p_value(table: Table, row: Row) -> str:
    pair = table.against_best(row)
    if pair is None:
        return "-"
    return p_text(pair.adjusted_p)
