# SPDX-License-Identifier: Apache-2.0
"""What a leaderboard leaves in a folder: Markdown, CSV, the page, and copies of the evidence without the weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

from ctrbench.evidence import LEDGER, find_ledger, read_ledger
from ctrbench.files import atomic_path, write_text
from ctrbench.leaderboard.collect import VERIFICATION
from ctrbench.leaderboard.records import Board, Row, Run
from ctrbench.leaderboard.table import comparisons_to_csv, explanations, to_csv, to_markdown

EVIDENCE = ("report.json", "config.yaml", "train.log", "metrics.jsonl", VERIFICATION, "DONE")


def write_board(board: Board, folder: Path, look_at: Path | None = None, gpu: int = -1) -> list[Path]:
    """Write the tables, the comparisons and the page; the files written.

    Raises:
        CtrbenchError: the run to look at cannot be loaded, or the disk is full.
    """
    from ctrbench.leaderboard.page import write_page

    details = None
    if look_at is not None:
        from ctrbench.leaderboard.details import look_closely

        details = look_closely(look_at, gpu)
    names = ("leaderboard.md", "leaderboard.csv", "comparisons.csv", "leaderboard.html")
    paths = [folder / name for name in names]
    lines = explanations(board)
    made = f"Made by `{board.command}`.\n\n" if board.command else ""
    write_text(
        paths[0], "\n".join([f"# {board.title}\n", made + to_markdown(board), *([""] if lines else []), *lines, ""])
    )
    write_text(paths[1], to_csv(board))
    write_text(paths[2], comparisons_to_csv(board))
    write_page(paths[3], board, details)
    return paths


def copy_evidence(board: Board, folder: Path) -> None:
    """Copy what backs a board's rows, weights apart, to `<folder>/<dataset_id>/<expid>/seed_<seed>/`, with the ledger's lines.

    A ledger line of a run that is not on the board goes along when it is of the same experiment, so that a seed that
    was left out shows there too.
    """
    path = folder / LEDGER
    entries = {entry["report"]: entry for entry in (read_ledger(path) if path.exists() else ())}
    for row in (row for table in board.tables for row in table.rows):
        for run in row.runs:
            target = folder / row.dataset_id / row.expid / f"seed_{run.seed}"
            for name in EVIDENCE:
                if (run.folder / name).is_file():
                    with atomic_path(target / name) as partial:
                        shutil.copyfile(run.folder / name, partial)
                else:
                    (target / name).unlink(missing_ok=True)
        ledger = find_ledger(row.runs[0].folder)
        for entry in read_ledger(ledger) if ledger else ():
            if (entry["dataset_id"], entry["expid"]) == (row.dataset_id, row.expid):
                entries.setdefault(entry["report"], entry)
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in entries.values()))


def moved_to(board: Board, folder: Path) -> Board:
    """The board with its runs where `copy_evidence` has put them, so that the page's links lead there."""

    def moved(run: Run, row: Row) -> Run:
        return dataclasses.replace(run, folder=folder / row.dataset_id / row.expid / f"seed_{run.seed}")

    tables = [
        dataclasses.replace(
            table,
            rows=tuple(dataclasses.replace(row, runs=tuple(moved(run, row) for run in row.runs)) for row in table.rows),
        )
        for table in board.tables
    ]
    return dataclasses.replace(board, tables=tuple(tables))
