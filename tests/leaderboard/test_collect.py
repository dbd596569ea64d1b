# SPDX-License-Identifier: Apache-2.0
"""Run directories -> rows: which runs count, what stands behind them, and what is refused."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_repository import SmallRepository, edit_report, report_of, reseal

from ctrbench.errors import ConfigError, DataError
from ctrbench.evidence import WEIGHTS
from ctrbench.files import sha256_of_file, write_json
from ctrbench.leaderboard.collect import VERIFICATION, collect, read_run
from ctrbench.leaderboard.records import Board, Row, Status
from ctrbench.leaderboard.table import explanations, to_markdown
from ctrbench.suite import load_suite
from ctrbench.yamlfile import load_yaml


def write_report(folder: Path, **values: Any) -> Path:
    """A run as little as the tables need, with no evidence."""
    known = {"dataset_id": "b", "expid": "X", "seed": 1, "parameters": {"total": 99}, "epochs": 3, "data_hash": "h"}
    known |= {"metrics": {"test": {"AUC": 0.5}}, "timings": {"train_seconds": 2.0}, **values}
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({k: v for k, v in known.items() if v is not None}))
    (folder / "DONE").touch()
    return folder


def rows_of(board: Board) -> dict[str, Row]:
    return {row.expid: row for table in board.tables for row in table.rows}


# Finished, honest runs


def test_recorded_runs(finished: SmallRepository) -> None:
    board = collect(finished.runs, command="a command")
    [table] = board.tables
    assert (table.dataset_id, table.metric, table.split) == ("tiny_ctr", "AUC", "test")
    assert board.command == "a command" and board.missing == ()
    assert table.data_hash == report_of(finished.run_dir("LR_tiny", 1))["data_hash"]
    for row in table.rows:
        assert row.status is Status.RECORDED and row.problems == () and row.is_comparable
        assert row.label == row.expid == f"{row.model}_tiny" and row.seeds == [1, 2, 3]
        assert set(row.summaries) == {(s, n) for s in ("valid", "test") for n in ("AUC", "logloss")}
        for run in row.runs:
            assert run.folder == finished.run_dir(row.expid, run.seed) and run.report == report_of(run.folder)
            assert [record["epoch"] for record in run.curve] == list(range(1, run.report["epochs"] + 1))
    assert len(table.comparisons) == 1


def test_what_each_run_is_linked_to(finished: SmallRepository) -> None:
    """A cell leads to configuration, seed, log, environment, git commit, data hash, and a command that gives it again."""
    for row in collect(finished.runs).tables[0].rows:
        for run in row.runs:
            report = run.report
            assert {"config.yaml", "train.log", "metrics.jsonl", "report.json"} <= {
                p.name for p in run.folder.iterdir()
            }
            assert load_yaml(run.folder / "config.yaml")["training"]["seed"] == report["seed"] == run.seed
            environment = {"ctrbench", "python", "torch", "device", "device_name", "threads", "git_commit"}
            assert environment <= report["environment"].keys()
            assert all(re.fullmatch("[0-9a-f]{64}", report[k]) for k in ("data_hash", "config_hash", "settings_hash"))
            assert report["command"].startswith("python ")  # of this test here; test_bench.py runs those of a suite


def test_weights_that_are_elsewhere(repository: SmallRepository) -> None:
    """As in the evidence that is published: the files agree, the weights are not there to evaluate."""
    run_dir = repository.run_dir("LR_tiny", 1)
    verification = {"report": sha256_of_file(run_dir / "report.json"), "is_equal": True, "metrics": {}}
    verification["weights"] = report_of(run_dir)["evidence"][WEIGHTS]
    write_json(run_dir / VERIFICATION, verification)
    assert read_run(run_dir).status is Status.PROVEN
    assert rows_of(collect(repository.runs))["LR_tiny"].status is Status.RECORDED  # of its other seeds
    (run_dir / WEIGHTS).unlink()
    run = read_run(run_dir)
    assert run.status is Status.RECORDED and run.problems == () and run.verification == verification


@pytest.mark.parametrize("changes", [{"report": "x"}, {"weights": "x"}, {"report": None}, 5, "text"])
def test_a_verification_of_something_else(repository: SmallRepository, changes: Any) -> None:
    run_dir = repository.run_dir("LR_tiny", 1)
    right = {"report": sha256_of_file(run_dir / "report.json"), "is_equal": False, "metrics": {"test": {"AUC": 0.1}}}
    right["weights"] = report_of(run_dir)["evidence"][WEIGHTS]
    write_json(run_dir / VERIFICATION, right)
    run = read_run(run_dir)
    assert run.status is Status.UNPROVEN and run.problems == ("its weights do not give the reported figures",)
    write_json(run_dir / VERIFICATION, {**right, **changes} if isinstance(changes, dict) else changes)
    run = read_run(run_dir)
    assert run.status is Status.RECORDED and run.verification is None and run.problems == ()


def test_seeds_with_different_settings(repository: SmallRepository) -> None:
    repository.train("LR_tiny", 4, "epochs=2")
    row = rows_of(collect(repository.runs))["LR_tiny"]
    assert row.status is Status.UNPROVEN and row.problems == ("its seeds were run with different settings",)


# Suites


def test_what_is_missing_of_a_suite(repository: SmallRepository) -> None:
    shutil.rmtree(repository.run_dir("LR_tiny", 2))
    (repository.run_dir("FM_tiny", 3) / "DONE").unlink()
    repository.suite(seeds=[1, 2, 3, 5])
    board = collect(repository.runs, load_suite("small", repository.folder))
    lines = ["FM_tiny on tiny_ctr, seed 3", "FM_tiny on tiny_ctr, seed 5"]
    lines += ["LR_tiny on tiny_ctr, seed 2", "LR_tiny on tiny_ctr, seed 5"]
    assert list(board.missing) == lines and board.title == "small"
    for row in board.tables[0].rows:
        assert row.status is Status.UNPROVEN and "seeds of the suite are missing" in row.problems
    told = explanations(board)
    assert told[-4:] == [f"- missing: {line}." for line in lines]
    assert "- unproven: FM_tiny, LR_tiny: seeds of the suite are missing." in told


def test_only_the_runs_of_a_suite(repository: SmallRepository) -> None:
    repository.train("FM_tiny", 9)
    repository.suite(models=["FM"], seeds=[1, 2, 3, 9])
    assert list(rows_of(collect(repository.runs, load_suite("small", repository.folder)))) == ["FM_tiny"]
    # a suite that leaves out a seed which was run
    repository.suite(models=["FM"])
    row = rows_of(collect(repository.runs, load_suite("small", repository.folder)))["FM_tiny"]
    assert row.problems == ("ledger.jsonl also has seed 9, which is left out here",) and row.seeds == [1, 2, 3]


def test_runs_with_other_settings_than_the_suite_has_now(repository: SmallRepository) -> None:
    repository.write_section("LR", "LR_tiny", epochs=7)
    suite = load_suite("small", repository.folder)
    rows = rows_of(collect(repository.runs, suite))
    assert rows["LR_tiny"].problems == tuple(f"seed {s}: run with other settings than small has now" for s in (1, 2, 3))
    assert rows["FM_tiny"].status is Status.RECORDED
    (repository.folder / "model_zoo" / "FM" / "src" / "FM.py").write_text("import no_such_module\n")
    assert rows_of(collect(repository.runs, suite))["FM_tiny"].status is Status.RECORDED


def test_a_suite_of_which_nothing_is_finished(repository: SmallRepository, refused: Callable[..., list[str]]) -> None:
    shutil.rmtree(repository.runs / "tiny_ctr")
    with pytest.raises(ConfigError, match=r"runs: no finished run of the suite small: ctrbench bench small$"):
        collect(repository.runs, load_suite("small", repository.folder))
    hint = ": train one first, as run_expid.py --expid SDCNv3_tiny"
    assert refused("leaderboard", repository.runs) == [f"{repository.runs}: no finished run{hint}"]
    assert refused("leaderboard", repository.folder / "nowhere") == [
        f"{repository.folder}/nowhere: no finished run{hint}"
    ]


def test_a_suite_that_does_not_exist(
    finished: SmallRepository, refused: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.folder)
    told = refused("leaderboard", finished.runs, "--suite", "smal")
    assert told == ["smal: no such suite (did you mean 'small'?); known: small"]


# What is not like the others


def test_two_runs_that_claim_one_cell(repository: SmallRepository, refused: Callable[..., list[str]]) -> None:
    shutil.copytree(repository.run_dir("LR_tiny", 1), repository.runs / "another" / "place")
    shutil.copytree(repository.run_dir("FM_tiny", 2), repository.runs / "tiny_ctr" / "FM_tiny" / "copy")
    a, b = repository.runs / "another" / "place", repository.run_dir("LR_tiny", 1)
    told = refused("leaderboard", repository.runs)
    assert f"LR_tiny on tiny_ctr, seed 1: {a} and {b} claim the same cell: remove one of them" in told
    assert sorted(line.split(":")[0] for line in told) == ["FM_tiny on tiny_ctr, seed 2", "LR_tiny on tiny_ctr, seed 1"]


def test_a_report_of_other_data(tmp_path: Path) -> None:
    """It is shown, but neither ranked among the others nor compared with them."""
    for seed in (1, 2):
        write_report(tmp_path / "A" / str(seed), expid="A", seed=seed, metrics={"test": {"AUC": 0.6 + seed / 100}})
        write_report(tmp_path / "B" / str(seed), expid="B", seed=seed, metrics={"test": {"AUC": 0.7 + seed / 99}})
        other = {"expid": "C", "seed": seed, "data_hash": "0123456789abcdef"}
        write_report(tmp_path / "C" / str(seed), **other, metrics={"test": {"AUC": 0.99}})
    write_report(tmp_path / "B" / "3", expid="B", seed=3, data_hash="h")
    [table] = collect(tmp_path).tables
    assert [(row.expid, row.is_comparable) for row in table.rows] == [("B", True), ("A", True), ("C", False)]
    assert [(c.first, c.second) for c in table.comparisons] == [("B", "A")] and table.data_hash == "h"
    row = table.rows[-1]
    assert row.status is Status.UNPROVEN and table.against_best(row) is None
    assert row.problems[-1] == "trained on other data (0123456789ab) than the dataset's other rows (h)"
    # one seed is enough
    write_report(tmp_path / "A" / "3", expid="A", seed=3, data_hash="i")
    [table] = collect(tmp_path).tables
    assert [(row.expid, row.is_comparable) for row in table.rows] == [("B", True), ("C", False), ("A", False)]
    assert table.comparisons == ()


def test_a_report_that_is_damaged(repository: SmallRepository, refused: Callable[..., list[str]]) -> None:
    path = repository.run_dir("LR_tiny", 1) / "report.json"
    path.write_text(path.read_text()[:-100])
    assert refused("leaderboard", repository.runs) == [f"{path}: missing or damaged: run the experiment again"]
    path.unlink()
    with pytest.raises(DataError, match="missing or damaged"):
        collect(repository.runs)


@pytest.mark.parametrize("report", [{"environment": {}}, {"model": None}, {"timings": {}, "data_hash": None}])
def test_a_report_without_what_is_not_needed(tmp_path: Path, report: dict[str, Any]) -> None:
    write_report(tmp_path / "1", **report)
    write_report(tmp_path / "2", seed=2, data_hash=None)
    board = collect(tmp_path)
    assert board.tables[0].rows[0].status is Status.UNPROVEN and to_markdown(board).count("\n") == 2


def test_ranks_without_numbers(tmp_path: Path) -> None:
    """A figure that is not defined, or not there, comes last and is compared with nothing."""
    nan, missing = {"test": {"AUC": math.nan}}, {"valid": {"AUC": 0.99}}
    for seed in (1, 2):
        for expid, metrics in (
            ("A", {"test": {"AUC": 0.6}}),
            ("N", nan),
            ("V", missing),
            ("E", {}),
            ("B", {"test": {"AUC": 0.7}}),
        ):
            write_report(tmp_path / expid / str(seed), expid=expid, seed=seed, metrics=metrics)
    [table] = collect(tmp_path).tables
    assert [row.expid for row in table.rows][:2] == ["B", "A"] and len(table.rows) == 5
    assert [(c.first, c.second) for c in table.comparisons] == [("B", "A")]
    text = to_markdown(collect(tmp_path))
    assert "| nan ± nan" in text and text.count("\n") == 6


def test_a_dataset_without_test_labels(tmp_path: Path) -> None:
    for expid, value in (("A", 0.6), ("B", 0.7)):
        write_report(tmp_path / expid, expid=expid, metrics={"valid": {"gAUC": value, "logloss": 0.3}})
    [table] = collect(tmp_path).tables
    assert (table.split, table.metric) == ("valid", "gAUC") and [row.expid for row in table.rows] == ["B", "A"]


def test_a_metric_that_is_better_when_it_is_smaller(tmp_path: Path) -> None:
    for expid, value in (("A", 0.6), ("B", 0.7)):
        write_report(tmp_path / expid, expid=expid, metrics={"test": {"MSE": value}})
    [table] = collect(tmp_path).tables
    assert table.metric == "MSE" and [row.expid for row in table.rows] == ["A", "B"]


def test_several_datasets(tmp_path: Path) -> None:
    for dataset in ("z", "a"):
        write_report(tmp_path / dataset, dataset_id=dataset)
    write_report(tmp_path / "unfinished", dataset_id="u").joinpath("DONE").unlink()
    assert [table.dataset_id for table in collect(tmp_path).tables] == ["a", "z"]


def test_data_that_changed_since(repository: SmallRepository) -> None:
    """Every row says so; data that cannot be read say nothing of a run."""
    path = repository.raw / "test.csv"
    path.write_text(path.read_text().replace("\n0,", "\n1,", 1))
    rows = rows_of(collect(repository.runs))
    for row in rows.values():
        assert row.status is Status.UNPROVEN
        assert all(
            re.search(r"its data are others now \(\w{12}\) than it was trained on \(\w{12}\)$", p) for p in row.problems
        )
        assert len(row.problems) == 3
    path.unlink()
    assert all(row.status is Status.RECORDED for row in rows_of(collect(repository.runs)).values())


def test_an_edit_that_is_sealed_again(repository: SmallRepository) -> None:
    """The ledger knows the report as it was."""
    run_dir = repository.run_dir("LR_tiny", 2)
    edit_report(run_dir, epochs=1)
    reseal(run_dir)
    rows = rows_of(collect(repository.runs))
    assert rows["LR_tiny"].problems == ("seed 2 is not in ledger.jsonl",) and rows["FM_tiny"].problems == ()
    (repository.runs / "ledger.jsonl").unlink()
    assert rows_of(collect(repository.runs))["FM_tiny"].problems == ("there is no ledger.jsonl around them",)
