# SPDX-License-Identifier: Apache-2.0
"""What a sweep leaves: results.csv for FuxiCTR's readers and for pandas, the best configuration, the last lines."""

from __future__ import annotations

import csv
import io
import re
from typing import Any

import optuna
import pandas as pd
import pytest
from conftest import make_record, make_result

from ctrbench.config import load_experiment
from ctrbench.tuner.definition import Sweep
from ctrbench.tuner.records import TrialRecord, best_of
from ctrbench.tuner.results import FUXICTR_COLUMNS, OWN_COLUMNS, final_lines, importance, to_csv, write_results

SPACE = {"net_dropout": [0.1, 0.2], "use_features": [None, ["user_id", "device"]], "learning_rate": [1e-05]}


def records_of(sweep: Sweep) -> list[TrialRecord]:
    """A complete trial of two seeds, one that was pruned in its second seed, one that failed and one that runs."""
    found = []
    for number, state in enumerate(("complete", "pruned", "failed", "running")):
        index, values = sweep.plan.get(number)  # type: ignore[misc]
        expid = sweep.experiment(index, values).expid
        found.append(make_record(index, None, state, expid=expid, values=values, host="here", device="gpu 1"))
    runs = [make_result(1, 0.71, total_seconds=1 / 3), make_result(2, 0.73, best_epoch=2)]
    return [
        TrialRecord(**{**vars(found[0]), "objective": 0.72, "seeds": runs, "curve": [0.71], "finished": 1.7e9}),
        TrialRecord(**{**vars(found[1]), "seeds": [make_result(1, 0.6)], "curve": [0.6], "device": "cpu"}),
        TrialRecord(**{**vars(found[2]), "error": 'DataError: a "b", c\nsecond line', "device": ""}),
        found[3],
    ]


@pytest.fixture
def sweep(repository: Any) -> Sweep:
    found: Sweep = repository.load(SPACE, seeds=[1, 2])
    return found


def read(text: str) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(text))


def test_results_csv(sweep: Sweep) -> None:
    text = to_csv(sweep, records_of(sweep)[::-1], gpu=3)
    table = read(text)
    assert list(table) == [
        *FUXICTR_COLUMNS,
        *OWN_COLUMNS,
        *("test_AUC", "test_logloss", "valid_AUC", "valid_logloss"),
        *("learning_rate", "net_dropout", "use_features"),
    ]
    assert list(table.trial) == [1, 1, 2, 3, 4]
    assert list(table.state) == ["complete", "complete", "pruned", "failed", "running"]
    assert list(table.seed.dropna()) == [1, 2, 1] and list(table.objective.dropna()) == [0.72, 0.72]
    assert list(table.valid_AUC.dropna()) == [0.71, 0.73, 0.6] and list(table.best_epoch.dropna()) == [1, 2, 1]
    assert list(table.train_seconds.dropna()) == [1.25] * 3 and table.total_seconds[0] == 0.333
    assert list(table.net_dropout) == [0.1, 0.1, 0.1, 0.2, 0.2] and set(table.learning_rate) == {1e-5}
    assert list(table.use_features.fillna("")) == ["", "", '["user_id", "device"]', "", '["user_id", "device"]']
    assert table.error[3] == 'DataError: a "b", c | second line' and table.error.notna().sum() == 1
    assert list(table.device.fillna("")) == ["gpu 1", "gpu 1", "cpu", "", "gpu 1"]
    assert table.run_dir[1] == "/runs/seed_2" and set(table.host) == {"here"}


def test_fuxictrs_cells(sweep: Sweep) -> None:
    rows = [*csv.reader(io.StringIO(to_csv(sweep, records_of(sweep), gpu=3)))]
    [expid, *_] = [record.expid for record in records_of(sweep)]
    command = f"python model_zoo/DCNv3/run_expid.py --config runs/sweeps/sweep/config --expid {expid} --gpu 1"
    assert re.fullmatch(r"20231114-\d{6}|20231115-\d{6}", rows[1][0])
    assert rows[1][1:7] == [
        f"[command] {command}",
        f"[exp_id] {expid}",
        "[dataset_id] tiny_ctr",
        "[train] N.A.",
        "[val] AUC: 0.710000 - logloss: 0.500000",
        "[test] AUC: 0.700000 - logloss: 0.510000",
    ]
    assert rows[2][1] == f"[command] {command} --seed 2"
    assert rows[3][1].endswith("--gpu -1") and rows[4][1] == "[command] " and rows[4][5] == "[val] N.A."
    assert rows[5][0] == "" and rows[5][6] == "[test] N.A."


def test_a_trial_of_its_own_data_names_it(repository: Any) -> None:
    sweep = repository.load({"min_categr_count": [2, 3]})
    records = [make_record(i, 0.7, values=sweep.plan.get(i)[1]) for i in range(2)]
    cells = [row[3] for row in csv.reader(io.StringIO(to_csv(sweep, records, -1)))]
    assert cells[1] == "[dataset_id] tiny_ctr" and re.fullmatch(r"\[dataset_id\] tiny_ctr_[0-9a-f]{8}", cells[2])


def test_runs_with_other_splits_and_numbers_to_the_last_digit(repository: Any) -> None:
    sweep = repository.load({"net_dropout": [0.1, 0.2]})
    value = 0.1 + 0.2
    runs = [make_result(2024, value, metrics={"valid": {"AUC": value}}), make_result(2024, 0.5)]
    records = [make_record(i, run.best_value, seeds=[run], values={"net_dropout": 0.1}) for i, run in enumerate(runs)]
    table = read(to_csv(sweep, records, -1))
    assert table.valid_AUC[0] == value and table.test_AUC.isna()[0] and table.test_AUC[1] == 0.49
    assert table.test[0] == "[test] N.A." and table.objective[0] == value


def test_nothing_yet(sweep: Sweep) -> None:
    assert len(read(to_csv(sweep, [], -1))) == 0


@pytest.mark.parametrize("key", ["epochs", "seed"])
def test_every_column_has_a_name_of_its_own(repository: Any, key: str) -> None:
    sweep = repository.load({"net_dropout": [0.1], key: [3]})
    names = to_csv(sweep, [], -1).splitlines()[0].split(",")
    assert len(set(names)) == len(names)


def test_the_last_lines(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    records = records_of(sweep)
    best = best_of(records, sweep.direction)
    lines = final_lines(sweep, records, best, gpu=2)
    expid = records[0].expid
    assert lines == [
        "1 complete, 1 pruned, 1 failed",
        f"best: {expid}: validation AUC 0.720000, test AUC 0.710000, test logloss 0.510000",
        "  net_dropout: 0.1, use_features: None",
        f"run it again: python model_zoo/DCNv3/run_expid.py --config runs/sweeps/sweep/best_config --expid {expid} --gpu 2",
        f"results, report and configurations: {sweep.folder}",
    ]
    monkeypatch.chdir(sweep.base.root)
    assert final_lines(sweep, records, best, 2)[-1] == "results, report and configurations: runs/sweeps/sweep"
    assert final_lines(sweep, records[2:], None, 2)[:1] == ["0 complete, 1 failed"]
    assert len(final_lines(sweep, [], None, 2)) == 2


def test_the_best_has_no_test_split(sweep: Sweep) -> None:
    run = make_result(1, 0.7, metrics={"valid": {"AUC": 0.7}})
    record = TrialRecord(**{**vars(records_of(sweep)[0]), "seeds": [run], "objective": 0.7})
    assert final_lines(sweep, [record], record, -1)[1] == f"best: {record.expid}: validation AUC 0.700000"


def test_the_best_of_equals_is_the_first_and_lower_may_be_better() -> None:
    records = [make_record(2, 0.7), make_record(1, 0.7), make_record(0, 0.6), make_record(3, state="failed")]
    best, lowest = best_of(records, "max"), best_of(records, "min")
    assert best is not None and lowest is not None and (best.index, lowest.index) == (1, 0)
    assert best_of(records[3:], "max") is None and best_of([], "min") is None


def make_study(sweep: Sweep, records: list[TrialRecord]) -> optuna.Study:
    study = optuna.create_study(direction="maximize")
    distributions = sweep.space.distributions()
    for record in records:
        params = sweep.space.to_sampled(record.values)
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=record.objective))
    return study


def test_all_files_are_written(repository: Any) -> None:
    sweep = repository.load({"learning_rate": [0.01, 0.02], "net_dropout": [0.1, 0.2, 0.3]})
    records = []
    for number in range(6):
        index, values = sweep.plan.get(number)
        expid = sweep.experiment(index, values).expid
        objective = values["learning_rate"] * 20 + values["net_dropout"] / 100
        records.append(make_record(index, objective, expid=expid, values=values))
    study = make_study(sweep, records)
    best = write_results(sweep, records, study, gpu=-1)
    assert best is records[5]
    names = {str(path.relative_to(sweep.folder)) for path in sweep.folder.rglob("*.*") if path.name != ".lock"}
    configs = {f"{folder}/{name}_config.yaml" for folder in ("config", "best_config") for name in ("model", "dataset")}
    assert names == {"results.csv", "report.html", *configs}
    again = load_experiment(sweep.folder / "best_config", best.expid, sweep.base.zoo)
    assert again.config_hash == sweep.experiment(5, records[5].values).config_hash
    page = (sweep.folder / "report.html").read_text()
    assert best.expid in page and "best_config" in page
    shares = importance(sweep, records, study)
    assert set(shares) == {"learning_rate", "net_dropout"} and list(shares.values()) == sorted(shares.values())[::-1]
    assert all(0 <= share <= 1 for share in shares.values())


def test_nothing_is_complete(repository: Any) -> None:
    sweep = repository.load({"net_dropout": [0.1, 0.2]})
    record = make_record(0, state="failed", error="x")
    assert write_results(sweep, [record], optuna.create_study(), gpu=-1) is None
    assert not (sweep.folder / "best_config").exists() and (sweep.folder / "report.html").exists()
    assert list(read((sweep.folder / "results.csv").read_text()).state) == ["failed"]


def test_importance_is_told_only_where_it_can_be(repository: Any) -> None:
    sweep = repository.load({"learning_rate": [0.01, 0.02], "net_dropout": [0.1, 0.2]})
    settings = [sweep.plan.get(number)[1] for number in range(4)]
    equal = [make_record(i, 0.5, values=values) for i, values in enumerate(settings)]
    assert importance(sweep, equal, make_study(sweep, equal)) == {}
    few = [make_record(i, 0.5 + i / 10, values=values) for i, values in enumerate(settings[:3])]
    assert importance(sweep, few, make_study(sweep, few)) == {}
    one = repository.load({"learning_rate": [0.01, 0.02, 0.03, 0.04]})
    records = [make_record(i, 0.5 + i / 10, values={"learning_rate": (i + 1) / 100}) for i in range(4)]
    assert importance(one, records, make_study(one, records)) == {}
