# SPDX-License-Identifier: Apache-2.0
"""Run directories: what a rerun may remove, and what evaluating may rebuild."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest

from ctrbench import environment
from ctrbench.config import Experiment, load_experiment
from ctrbench.errors import CtrbenchError, DataError
from ctrbench.run import load_trained, prepare, run

ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT / "model_zoo" / "DCNv3"


@pytest.fixture
def raw(tiny_raw: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_raw, tmp_path / "raw"))


def open_experiment(raw: Path, *overrides: str) -> Experiment:
    folder = raw.parent
    paths = [f"{split}_data={raw / split}.csv" for split in ("train", "valid", "test")]
    settings = [*paths, f"data_root={folder / 'data'}", f"model_root={folder / 'runs'}", "verbose=0", "epochs=1"]
    return load_experiment(ZOO / "config", "DCNv3_tiny", ZOO, [*settings, *overrides])


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_a_rerun_that_is_refused_leaves_the_finished_run_alone(raw: Path) -> None:
    experiment = open_experiment(raw)
    run(experiment)
    before = content(experiment.run_dir)
    stored = raw.parent / "data" / "tiny_ctr" / "test.h5"
    stored.write_bytes(bytes(stored.stat().st_size))  # of the same size, so that only reading it shows the damage
    with pytest.raises(DataError, match=r"test\.h5: damaged file"):
        run(open_experiment(raw))
    assert content(experiment.run_dir) == before and "DONE" in before


def test_leftovers_of_a_killed_run_are_removed(raw: Path) -> None:
    experiment = open_experiment(raw)
    experiment.run_dir.mkdir(parents=True)
    leftover = experiment.run_dir / ".last.ckpt.123.partial"
    leftover.write_text("half")
    run(experiment)
    assert not leftover.exists()


@pytest.mark.parametrize("split", ["train", "valid"])
def test_labels_of_one_class_are_refused_before_training(raw: Path, split: str) -> None:
    pl.read_csv(raw / f"{split}.csv").with_columns(label=pl.lit(1)).write_csv(raw / f"{split}.csv")
    experiment = open_experiment(raw)
    with pytest.raises(
        DataError, match=rf"{split}\.h5: every 'label' of the {split} split is 1: it needs rows of both"
    ):
        run(experiment)
    assert not experiment.run_dir.exists()


def test_a_place_that_cannot_be_written(raw: Path) -> None:
    (raw.parent / "runs").write_text("a file in the way")
    with pytest.raises(CtrbenchError, match=r"seed_2024: cannot be written: "):
        run(open_experiment(raw))


def test_evaluating_never_replaces_the_data_of_a_run_by_other_data(raw: Path) -> None:
    experiment = open_experiment(raw)
    run(experiment)
    folder = raw.parent / "data" / "tiny_ctr"
    before = content(folder)
    pl.read_csv(raw / "test.csv").head(500).write_csv(raw / "test.csv")
    with pytest.raises(DataError, match=r"not the data that .* was trained on"):
        load_trained(experiment.run_dir)
    assert content(folder) == before


def test_evaluating_rebuilds_the_data_of_a_run_when_that_gives_it_back(raw: Path) -> None:
    experiment = open_experiment(raw)
    run(experiment)
    run(open_experiment(raw, "min_categr_count=9", "seed=1"))  # the same folder, other settings
    _, data, feature_map, _ = load_trained(experiment.run_dir)
    assert data.data_hash == experiment_hash(experiment.run_dir)
    assert feature_map.features["user_id"]["vocab_size"] > 300


def experiment_hash(run_dir: Path) -> str:
    return str(json.loads((run_dir / "report.json").read_text())["data_hash"])


def test_an_unfinished_run_is_named_as_such(raw: Path, caplog: pytest.LogCaptureFixture) -> None:
    experiment = open_experiment(raw)
    run(experiment)
    (experiment.run_dir / "DONE").unlink()
    load_trained(experiment.run_dir)
    assert "the run is not finished; these are its best weights so far" in caplog.text


def test_a_report_names_the_commit_that_its_run_began_with(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"commit": "of the loaded code"}
    monkeypatch.setattr(environment.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=now["commit"]))

    def commit_meanwhile(*arguments: Any, **options: Any) -> Any:
        now["commit"] = "of later code"
        return prepare(*arguments, **options)

    monkeypatch.setattr("ctrbench.run.prepare", commit_meanwhile)
    environment.git_commit.cache_clear()
    assert run(open_experiment(raw))["environment"]["git_commit"] == "of the loaded code"
    environment.git_commit.cache_clear()
