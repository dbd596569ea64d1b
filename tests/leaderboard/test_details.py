# SPDX-License-Identifier: Apache-2.0
"""A run looked at closely: what fields are worth, against predictions of raw rows whose columns were shuffled."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import roc_auc_score
from small_repository import SmallRepository, report_of

from ctrbench.cli import main
from ctrbench.errors import ConfigError, DataError
from ctrbench.evidence import WEIGHTS
from ctrbench.leaderboard import details as module
from ctrbench.leaderboard.details import look_closely
from ctrbench.zoo import load_model_class

FIELDS = ("user_id", "item_id", "category", "device", "weekday", "slot", "price", "age", "history")


def test_what_fields_are_worth(finished: SmallRepository, tmp_path: Path) -> None:
    run_dir = finished.run_dir("FM_tiny", 1)
    found = look_closely(run_dir)
    assert (found.metric, found.num_rows, found.fields) == ("AUC", 100, FIELDS)
    assert found.run.folder == run_dir and found.layers == {}
    assert found.value == pytest.approx(report_of(run_dir)["metrics"]["test"]["AUC"], abs=1e-12)
    raw = pl.read_csv(finished.raw / "test.csv", infer_schema=False)
    generator = torch.Generator().manual_seed(1)
    orders = {name: torch.randperm(100, generator=generator).tolist() for name in FIELDS}

    def auc(*shuffled: str) -> float:
        rows, output = tmp_path / "rows.csv", tmp_path / "out.csv"
        raw.with_columns(raw[name][orders[name]] for name in shuffled).write_csv(rows)
        assert main(["predict", str(run_dir), "--data", str(rows), "--output", str(output)]) == 0
        frame = pl.read_csv(output)
        return float(roc_auc_score(frame["label"].to_numpy(), frame["y_pred"].to_numpy()))

    lost = {name: found.value - auc(name) for name in ("price", "history", "item_id")}
    assert len(found.importance) == 9 and max(map(abs, lost.values())) > 0.01
    for name, value in lost.items():
        assert found.importance[FIELDS.index(name)] == pytest.approx(value, abs=1e-9)
    for pair in itertools.combinations(lost, 2):
        i, j = (FIELDS.index(name) for name in pair)
        expected = found.value - auc(*pair) - lost[pair[0]] - lost[pair[1]]
        assert found.interactions[i][j] == found.interactions[j][i] == pytest.approx(expected, abs=1e-9)
    assert all(found.interactions[i][i] == 0 for i in range(9))
    assert sum(b["rows"] for b in found.calibration) == 100
    again = look_closely(run_dir)
    assert (again.importance, again.interactions) == (found.importance, found.interactions)


def test_some_of_many_rows(finished: SmallRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ROWS", 40)
    found = look_closely(finished.run_dir("LR_tiny", 1))
    assert found.num_rows == 40 and sum(b["rows"] for b in found.calibration) == 100  # of all rows
    monkeypatch.setattr(module, "MANY_FIELDS", 8)
    monkeypatch.setattr(module, "MAX_ROWS_OF_MANY_FIELDS", 30)
    assert look_closely(finished.run_dir("LR_tiny", 1)).num_rows == 30


def test_a_model_that_knows_its_own_interactions(finished: SmallRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model_class(finished.folder / "model_zoo" / "LR", "LR")
    matrix = torch.arange(81.0).reshape(9, 9)
    monkeypatch.setattr(model, "field_interactions", lambda self: {"layer 1": matrix}, raising=False)
    found = look_closely(finished.run_dir("LR_tiny", 1))
    assert np.array_equal(found.layers["layer 1"], matrix.numpy())


def test_a_run_that_cannot_be_looked_at(
    repository: SmallRepository, refused: Callable[..., list[str]], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"nowhere/report\.json: missing or damaged: run the experiment again"):
        look_closely(repository.runs / "nowhere")
    run_dir = repository.train("LR_tiny", 9, "test_data=", "epochs=1")
    with pytest.raises(
        ConfigError, match=r"seed_9: has no test AUC, so there is nothing to look at closely: choose another"
    ):
        look_closely(run_dir)
    (repository.run_dir("LR_tiny", 1) / WEIGHTS).unlink()
    with pytest.raises(DataError, match=r"best\.safetensors: no such file"):
        look_closely(repository.run_dir("LR_tiny", 1))
    output = tmp_path / "out"
    assert main(["leaderboard", str(repository.runs), "--output", str(output), "--look-at", str(run_dir)]) == 2
    assert not output.exists()  # nothing is written by halves
