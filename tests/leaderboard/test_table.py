# SPDX-License-Identifier: Apache-2.0
"""The tables: every number in them recomputed from report.json files, without the code that made them."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from small_repository import SEEDS, SmallRepository, report_of

from ctrbench.leaderboard.collect import collect
from ctrbench.leaderboard.records import Board, Published, Row, Run, Status, Table
from ctrbench.leaderboard.statistics import compare, summarize
from ctrbench.leaderboard.table import (
    CSV_COLUMNS,
    comparisons_to_csv,
    explanations,
    table_to_markdown,
    to_csv,
    to_markdown,
)
from ctrbench.suite import load_suite
from ctrbench.yamlfile import dump_yaml


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def rows_of(text: str) -> list[dict[str, str]]:
    """The rows of a Markdown table by the names in its head."""
    head, rule, *lines = [line for line in text.splitlines() if line.startswith("|")]
    assert set(rule) == {"|", "-"} and len({len(line) for line in (head, rule, *lines)}) == 1
    return [dict(zip(cells(head), cells(line), strict=True)) for line in lines]


@pytest.fixture(scope="module")
def board(finished: SmallRepository) -> Board:
    return collect(finished.runs, load_suite("small", finished.folder), "ctrbench leaderboard")


@pytest.fixture(scope="module")
def reports(finished: SmallRepository) -> dict[str, list[dict[str, Any]]]:
    """expid -> its reports by seed, read here and nowhere else."""
    return {e: [report_of(finished.run_dir(e, seed)) for seed in SEEDS] for e in ("LR_tiny", "FM_tiny")}


def test_markdown(board: Board, reports: dict[str, list[dict[str, Any]]]) -> None:
    rows = rows_of(to_markdown(board))
    means = {e: statistics.fmean(r["metrics"]["test"]["AUC"] for r in of_it) for e, of_it in reports.items()}
    assert [row["experiment"] for row in rows] == sorted(means, key=lambda e: -means[e])
    p = paired_p(reports)
    for rank, row in enumerate(rows):
        of_it = reports[row["experiment"]]
        auc, valid, logloss = (
            [r["metrics"][split][name] for r in of_it]
            for split, name in (("test", "AUC"), ("valid", "AUC"), ("test", "logloss"))
        )
        mean, deviation = statistics.fmean(auc), statistics.stdev(auc)
        half = stats.t.ppf(0.975, 2) * deviation / math.sqrt(3)
        assert row == {
            "experiment": row["experiment"],
            "seeds": "1-3",
            "test AUC": f"{mean:.6f} ± {deviation:.6f}",
            "95% interval": f"{mean - half:.6f} .. {mean + half:.6f}",
            "valid": f"{statistics.fmean(valid):.6f}",
            "logloss": f"{statistics.fmean(logloss):.6f}",
            "parameters": f"{of_it[0]['parameters']['total']:,}",
            "train s": f"{statistics.fmean(r['timings']['train_seconds'] for r in of_it):.1f}",
            "against best, p": "-" if rank == 0 else f"{p:.3f}",
            "evidence": "recorded",
        }
    assert explanations(board) == []


def paired_p(reports: dict[str, list[dict[str, Any]]]) -> float:
    values = [[r["metrics"]["test"]["AUC"] for r in of_it] for of_it in reports.values()]
    return float(stats.ttest_rel(*values).pvalue)  # one pair, so Holm changes nothing


def test_csv(board: Board, reports: dict[str, list[dict[str, Any]]], finished: SmallRepository) -> None:
    lines = list(csv.DictReader(io.StringIO(to_csv(board))))
    assert tuple(lines[0]) == CSV_COLUMNS and len(lines) == 2
    best = lines[0]["expid"]
    for rank, line in enumerate(lines, 1):
        of_it = reports[line["expid"]]
        auc = [r["metrics"]["test"]["AUC"] for r in of_it]
        logloss = [r["metrics"]["test"]["logloss"] for r in of_it]
        half = stats.t.ppf(0.975, 2) * statistics.stdev(auc) / math.sqrt(3)
        expected = {
            "mean": statistics.fmean(auc),
            "deviation": statistics.stdev(auc),
            "low": statistics.fmean(auc) - half,
            "high": statistics.fmean(auc) + half,
            "valid_mean": statistics.fmean(r["metrics"]["valid"]["AUC"] for r in of_it),
            "logloss_mean": statistics.fmean(logloss),
            "logloss_deviation": statistics.stdev(logloss),
            "parameters": of_it[0]["parameters"]["total"],
            "epochs": statistics.fmean(r["epochs"] for r in of_it),
            "train_seconds": statistics.fmean(r["timings"]["train_seconds"] for r in of_it),
            "rows_per_second": statistics.fmean(r["train_rows_per_second"] for r in of_it),
        }
        assert {key: float(line[key]) for key in expected} == pytest.approx(expected, rel=1e-12)
        texts = {"dataset_id": "tiny_ctr", "rank": str(rank), "model": line["expid"].split("_")[0], "seeds": "1 2 3"}
        texts |= {
            "split": "test",
            "metric": "AUC",
            "status": "recorded",
            "problems": "",
            "published": "",
            "verdict": "",
        }
        texts |= {"data_hash": of_it[0]["data_hash"], "published_source": "", "git_commit": ""}
        assert {key: line[key] for key in texts} == texts
        if line["expid"] == best:
            assert line["difference_to_best"] == line["p_holm"] == ""
        else:
            first = [r["metrics"]["test"]["AUC"] for r in reports[best]]
            gap = statistics.fmean(a - b for a, b in zip(auc, first, strict=True))
            assert float(line["difference_to_best"]) == pytest.approx(gap, abs=1e-15) and gap < 0
            assert float(line["p_holm"]) == pytest.approx(paired_p(reports), abs=1e-12)


def test_comparisons_csv(board: Board, reports: dict[str, list[dict[str, Any]]]) -> None:
    [line] = csv.DictReader(io.StringIO(comparisons_to_csv(board)))
    first, second = ([r["metrics"]["test"]["AUC"] for r in reports[line[side]]] for side in ("first", "second"))
    test = stats.ttest_rel(first, second)
    interval = test.confidence_interval(0.95)
    numbers = {"difference": statistics.fmean(first) - statistics.fmean(second), "low": interval.low,
               "high": interval.high, "p": test.pvalue, "p_holm": test.pvalue}  # fmt: skip
    assert {key: float(line[key]) for key in numbers} == pytest.approx(numbers, abs=1e-12)
    assert (line["dataset_id"], line["metric"], line["seeds"]) == ("tiny_ctr", "AUC", "3")


# Boards that are made up


def make_run(expid: str, seed: int, metrics: dict[str, dict[str, float]], **report: Any) -> Run:
    known = {"expid": expid, "dataset_id": "d", "seed": seed, "metrics": metrics, "parameters": {"total": 1234567}}
    known |= {"epochs": 3, "timings": {"train_seconds": 2.0}, "data_hash": "h", **report}
    return Run(Path("/runs") / expid / str(seed), known, [], Status.RECORDED)


def make_row(expid: str, auc: dict[int, float], status: Status = Status.RECORDED, **values: Any) -> Row:
    runs = tuple(make_run(expid, seed, {"test": {"AUC": value}}) for seed, value in auc.items())
    known = {"dataset_id": "d", "expid": expid, "model": expid, "label": expid, "runs": runs, "status": status}
    known |= {"summaries": {("test", "AUC"): summarize(auc)}, "problems": (), "published": None, "verdict": ""}
    return Row(**{**known, **values})  # type: ignore[arg-type]


def make_table(*rows: Row, dataset_id: str = "d") -> Table:
    values = {row.expid: row.summaries["test", "AUC"].values for row in rows if row.is_comparable}
    return Table(dataset_id, "AUC", "test", rows, tuple(compare(values)), "h")


def made(*rows: Row, **values: Any) -> Board:
    return Board((make_table(*rows),), "title", **values)


def test_against_best_in_both_directions() -> None:
    """Pairs are in the order of the rows' names or ranks; the difference is always that of the row to the best."""
    best, other = make_row("Z", {1: 0.8, 2: 0.9}), make_row("A", {1: 0.7, 2: 0.65})
    table = Table(
        "d", "AUC", "test", (best, other), tuple(compare({"A": {1: 0.7, 2: 0.65}, "Z": {1: 0.8, 2: 0.9}})), "h"
    )
    [first, second] = csv.DictReader(io.StringIO(to_csv(Board((table,), "t"))))
    assert first["difference_to_best"] == "" and float(second["difference_to_best"]) == pytest.approx(-0.175)


def test_a_row_of_one_seed_and_one_without_the_metric() -> None:
    rows = rows_of(table_to_markdown(make_table(make_row("A", {7: 0.8}))))
    assert (
        rows[0]["test AUC"] == "0.800000" and rows[0]["95% interval"] == rows[0]["valid"] == rows[0]["logloss"] == "-"
    )
    assert "against best, p" not in rows[0] and "published" not in rows[0] and rows[0]["parameters"] == "1,234,567"
    empty = make_row("B", {1: 0.1}, summaries={})
    table = Table("d", "AUC", "test", (make_row("A", {1: 0.8}), empty), (), "h")
    assert rows_of(table_to_markdown(table))[1]["test AUC"] == "-"
    line = list(csv.DictReader(io.StringIO(to_csv(Board((table,), "t")))))[1]
    assert line["mean"] == line["deviation"] == line["low"] == line["high"] == ""


@pytest.mark.parametrize(
    ("seeds", "text"),
    [((2024, 2025, 2026), "2024-2026"), ((1, 2), "1, 2"), ((1, 2, 4), "1, 2, 4"), ((5,), "5")],
)
def test_seeds(seeds: tuple[int, ...], text: str) -> None:
    [row] = rows_of(table_to_markdown(make_table(make_row("A", dict.fromkeys(seeds, 0.5)))))
    assert row["seeds"] == text


def test_p_values() -> None:
    values = {"A": {1: 0.9, 2: 0.91, 3: 0.92, 4: 0.93}, "B": {1: 0.8, 2: 0.8101, 3: 0.8199, 4: 0.83}, "C": {9: 0.5}}
    rows = rows_of(table_to_markdown(make_table(*(make_row(name, auc) for name, auc in values.items()))))
    assert [row["against best, p"] for row in rows] == ["-", "< 0.001", "-"]


def test_what_was_published_and_how_the_mean_lies_to_it() -> None:
    flags = ("one run each", "four digits")
    rows = rows_of(
        to_markdown(
            made(
                make_row("A", {1: 0.8}, published=Published({"AUC": 0.81}, "p", flags), verdict="one seed, -0.0100"),
                make_row("B", {1: 0.7}, published=Published({"logloss": 0.3}, "p", flags[1:])),
                make_row("C", {1: 0.6}),
            )
        )
    )
    assert [(row["published"], row["verdict"]) for row in rows] == [
        ("0.81", "one seed, -0.0100"),
        ("-", "-"),
        ("-", "-"),
    ]


def test_explanations() -> None:
    """Each reason once, with the rows and seeds that it is about; flags of all published figures without their names."""
    flags = ("one run each", "four digits")
    rows = (
        make_row("A", {1: 0.8}, Status.UNPROVEN, problems=("seed 1: train.log is missing", "seed 3: train.log is missing"),
                 published=Published({"AUC": 0.81}, "p", flags)),
        make_row("B", {1: 0.7}, Status.UNPROVEN, problems=("seed 2: train.log is missing", "seed 4 is not in ledger.jsonl"),
                 published=Published({"AUC": 0.81}, "p", flags[1:])),
        make_row("C", {1: 0.6}, Status.UNPROVEN, problems=("/x/config.yaml: line 1: wrong",)),
    )  # fmt: skip
    assert explanations(made(*rows, missing=("C on d, seed 2",))) == [
        "- unproven: A (seed 1, 3), B (seed 2): train.log is missing.",
        "- unproven: B: seed 4 is not in ledger.jsonl.",
        "- unproven: C: /x/config.yaml: line 1: wrong.",
        "- missing: C on d, seed 2.",
        "- published figures (A): one run each.",
        "- published figures: four digits.",
    ]
    line = next(csv.DictReader(io.StringIO(to_csv(made(*rows)))))
    assert line["status"] == "unproven" and line["problems"] == "; ".join(rows[0].problems)


def test_several_datasets() -> None:
    tables = (make_table(make_row("A", {1: 0.8}), dataset_id="a"), make_table(make_row("B", {1: 0.7}), dataset_id="b"))
    text = to_markdown(Board(tables, "title"))
    assert [line for line in text.splitlines() if line.startswith("**")] == ["**a**", "**b**"]
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 4 and not text.endswith("\n")
    assert [line["dataset_id"] for line in csv.DictReader(io.StringIO(to_csv(Board(tables, "t"))))] == ["a", "b"]


def test_all_statistics_of_many_rows(tmp_path: Path) -> None:
    """Five experiments, some seeds missing: each pair as scipy compares it, Holm's correction by hand."""
    aucs = {
        name: {seed: 0.8 + 0.01 * index + 0.003 * math.sin(7 * seed + index) for seed in range(1, 6)}
        for index, name in enumerate("abcde")
    }
    del aucs["c"][2], aucs["c"][4], aucs["e"][1]
    for name, auc in aucs.items():
        for seed, value in auc.items():
            write_report(tmp_path / name / f"{seed}", expid=name, seed=seed, metrics={"test": {"AUC": value}})
    board = collect(tmp_path)
    assert [row.expid for row in board.tables[0].rows] == ["e", "d", "c", "b", "a"]
    lines = list(csv.DictReader(io.StringIO(comparisons_to_csv(board))))
    assert len(lines) == 10
    p = {}
    for line in lines:
        first, second = aucs[line["first"]], aucs[line["second"]]
        shared = sorted(first.keys() & second.keys())
        assert int(line["seeds"]) == len(shared)
        found = stats.ttest_rel([first[s] for s in shared], [second[s] for s in shared])
        p[line["first"], line["second"]] = found.pvalue
        assert float(line["p"]) == pytest.approx(found.pvalue, rel=1e-9)
        assert float(line["difference"]) == pytest.approx(
            statistics.fmean(first[s] - second[s] for s in shared), abs=1e-12
        )
    highest, adjusted = 0.0, {}
    for rank, pair in enumerate(sorted(p, key=p.__getitem__)):
        highest = max(highest, min(1.0, p[pair] * (10 - rank)))
        adjusted[pair] = highest
    assert {(x["first"], x["second"]): float(x["p_holm"]) for x in lines} == pytest.approx(adjusted, rel=1e-9)
    assert set(p) == set(itertools.combinations("edcba", 2))


def write_report(folder: Path, **values: Any) -> None:
    """A run as little as the tables need, with no evidence."""
    known = {"dataset_id": "b", "expid": "X", "seed": 1, "parameters": {"total": 1234567}, "epochs": 3}
    known |= {"metrics": {"test": {"AUC": 0.5}}, "timings": {"train_seconds": 2.0}, **values}
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(known))
    (folder / "DONE").touch()


def test_the_command(
    finished: SmallRepository, shown: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`ctrbench leaderboard` prints the table and, below it, what has to be known."""
    repository = finished.copy(tmp_path / "repository")
    monkeypatch.chdir(repository.folder)
    content = {
        "sources": {"paper": "the paper"},
        "flags": {"cut": "given to four digits"},
        "results": {"tiny_ctr": [{"of": "LR", "metrics": {"AUC": 0.9}, "source": "paper", "flags": ["cut"]}]},
    }
    (repository.folder / "benchmarks").mkdir()
    (repository.folder / "benchmarks" / "published.yaml").write_text(dump_yaml(content))
    text = shown(0, "leaderboard", "--suite", "small")  # runs/ is the default
    rows = {row["experiment"]: row for row in rows_of(text)}
    auc = [report_of(repository.run_dir("LR_tiny", seed))["metrics"]["test"]["AUC"] for seed in SEEDS]
    assert rows["LR_tiny"]["published"] == "0.9"
    assert rows["LR_tiny"]["verdict"] == f"below, {statistics.fmean(auc) - 0.9:+.4f}"
    assert rows["FM_tiny"]["published"] == rows["FM_tiny"]["verdict"] == "-"
    assert text.splitlines()[-2:] == ["", "- published figures: given to four digits."]
