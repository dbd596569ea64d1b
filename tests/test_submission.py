# SPDX-License-Identifier: Apache-2.0
"""The challenge's files: from a trained run on an unlabelled test split, and their form."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from conftest import ROOT, load_script

from ctrbench.cli import main, run_expid
from ctrbench.errors import ConfigError
from ctrbench.metrics import evaluate_metrics
from ctrbench.submission import write_submission

EXPID = "QIN_tiny_mm"


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mm") / "raw"
    load_script(ROOT / "data" / "make_tiny_mm.py").make_tiny_mm(folder, rows=8000)
    return folder


def words(raw: Path, *more: str) -> list[str]:
    folder = raw.parent
    values = [f"{split}_data={raw / split}.parquet" for split in ("train", "valid", "test")]
    values += [
        f"item_info={raw / 'item_info.parquet'}",
        f"data_root={folder / 'data'}",
        f"model_root={folder / 'runs'}",
    ]
    return [word for value in (*values, "verbose=0", "epochs=4", "batch_size=128", *more) for word in ("--set", value)]


@pytest.fixture(scope="module")
def run_dir(raw: Path) -> Path:
    assert run_expid(ROOT / "model_zoo" / "QIN", ["--expid", EXPID, *words(raw)]) == 0
    return raw.parent / "runs" / "tiny_mm" / EXPID / "seed_20242025"


def test_a_run_on_the_challenges_layout_validates_and_submits(run_dir: Path, raw: Path, tmp_path: Path) -> None:
    report = json.loads((run_dir / "report.json").read_text())
    assert set(report["metrics"]) == {"valid"} and set(report["metrics"]["valid"]) == {"AUC", "gAUC", "logloss"}
    assert main(["predict", str(run_dir), "--submission", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{EXPID}.zip", "prediction.csv"]
    with zipfile.ZipFile(tmp_path / "out" / f"{EXPID}.zip") as archive:
        assert archive.namelist() == ["prediction.csv"]
        assert archive.read("prediction.csv") == (tmp_path / "out" / "prediction.csv").read_bytes()
    frame = pl.read_csv(tmp_path / "out" / "prediction.csv")
    assert frame.columns == ["ID", "Task2"] and frame["ID"].to_list() == list(range(1000))
    # In row order: the labels that the challenge keeps back agree with the predictions, shuffled ones do not.
    labels = pl.read_parquet(raw / "test_labels.parquet")["label"].to_torch().float()
    y_pred = torch.from_numpy(frame["Task2"].to_numpy().astype(np.float32))
    assert evaluate_metrics(labels, y_pred, ["AUC"])["AUC"] > 0.58
    main(["predict", str(run_dir), "--output", str(tmp_path / "plain.parquet")])
    assert np.array_equal(pl.read_parquet(tmp_path / "plain.parquet")["y_pred"].to_numpy(), y_pred.numpy())


def test_the_other_task_and_refusals(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(run_dir), "--submission", str(tmp_path), "--task", "Task1&2"]) == 0
    assert (tmp_path / "prediction.csv").read_text().startswith("ID,Task1&2\n0,")
    assert main(["predict", str(run_dir), "--submission", str(tmp_path), "--task", "Task3"]) == 2
    assert "--task Task3: must be Task2 or Task1&2" in capsys.readouterr().err
    assert main(["predict", str(run_dir), "--submission", str(tmp_path), "--data", "x.parquet"]) == 2
    assert "--submission: scores a split of the run's dataset" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--task Task1: must be"):
        write_submission(torch.rand(3), tmp_path, "x", "Task1")


def test_folded_weights_are_exported(run_dir: Path, raw: Path, tmp_path: Path) -> None:
    script = load_script(ROOT / "model_zoo" / "QIN" / "export_folded.py")
    output = tmp_path / "folded.safetensors"
    assert script.main([str(run_dir), "--output", str(output)]) == 0
    folded = words(raw, "num_row=1", f"model_root={tmp_path / 'runs'}", "epochs=1")
    assert run_expid(ROOT / "model_zoo" / "QIN", ["--expid", EXPID, *folded]) == 0
    other = tmp_path / "runs" / "tiny_mm" / EXPID / "seed_20242025"
    shutil.copyfile(output, other / "best.safetensors")
    for directory, name in ((run_dir, "rows"), (other, "folded")):
        assert main(["predict", str(directory), "--output", str(tmp_path / f"{name}.parquet")]) == 0
    rows, one = (pl.read_parquet(tmp_path / f"{name}.parquet")["y_pred"].to_numpy() for name in ("rows", "folded"))
    np.testing.assert_allclose(one, rows, rtol=1e-4, atol=1e-6)


def test_a_history_of_more_slots_than_are_stored(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_expid(ROOT / "model_zoo" / "QIN", ["--expid", EXPID, *words(raw, "max_len=101")]) == 2
    assert "QIN: max_len = 101, but 'item_seq' holds 100 slots: lower max_len" in capsys.readouterr().err
