# SPDX-License-Identifier: Apache-2.0
"""`--dry-run`: every trial is listed and checked, memory and time are estimated, nothing is run or written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL

from ctrbench.cli import main
from ctrbench.config import load_experiment
from ctrbench.estimate import estimate
from ctrbench.preprocess import build_dataset
from ctrbench.tuner import dry_run
from ctrbench.tuner.dry_run import _bytes, describe

SPACE = {**SMALL, "net_dropout": [0.1, 0.2], "num_cross_layers": [1, 2]}


@pytest.fixture
def built(repository: Any) -> Any:
    """A repository whose dataset is built."""
    experiment = load_experiment(repository.config_dir, "DCNv3_tiny")
    build_dataset(experiment.dataset, root=experiment.root)
    return repository


def files_below(*folders: Path) -> dict[Path, tuple[int, int]]:
    found = (path for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in found if path.is_file()}


def test_trials_are_listed_with_their_size(
    built: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(built.folder)
    path = built.tuner(SPACE)
    before = files_below(built.folder, built.data_root)
    assert main(["tune", "--config", str(path), "--dry-run", "--gpu", "-1", "-1"]) == 0
    output = capsys.readouterr()
    assert files_below(built.folder, built.data_root) == before and not built.runs.exists()
    lines = output.out.splitlines()
    sweep = built.load(SPACE)
    assert output.err == "" and lines[0] == f"sweep: grid of 4 trials; {sweep.folder}"
    settings = [(layers, dropout) for layers in (1, 2) for dropout in (0.1, 0.2)]
    for number, (line, (layers, dropout)) in enumerate(zip(lines[1:5], settings, strict=True)):
        experiment = sweep.experiment(*sweep.plan.get(number))
        shown = f"{experiment.expid}  num_cross_layers={layers}  net_dropout={dropout}"
        assert line.startswith(f"  {shown}  {estimate(experiment).parameters:,} parameters, ")
    size = r"[\d.]+ [KM]iB"
    assert re.fullmatch(
        rf"memory: up to {size} per trial for model, optimizer and data, beside activations; "
        rf"2 trials share a device: {size}",
        lines[5],
    )
    assert re.fullmatch(
        r"time: about [\d.]+ s for an epoch of the first trial \(4,000 rows, steps timed on random rows\), so at most "
        r".+ for 4 runs of 1 epochs on 2 slots; early stopping and pruning shorten it",
        lines[6],
    )
    assert len(lines) == 7


def test_time_counts_seeds_slots_and_epochs(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = dry_run.estimate
    timed = []

    def fake(experiment: Any, gpu: int | None = None) -> Any:
        timed.append(gpu)
        found = real(experiment)
        return found if gpu is None else type(found)(**{**vars(found), "epoch_seconds": 10.0})

    monkeypatch.setattr(dry_run, "estimate", fake)
    sweep = built.load({**SPACE, "epochs": 3}, seeds=[1, 2])
    lines, problems = describe(sweep, [0, 0, 1])
    assert problems == [] and timed == [0, None, None, None]
    # 4 trials on 3 slots are two rounds of 2 seeds of 3 epochs of 10 s
    assert (
        "time: about 10 s for an epoch" in lines[-1]
        and "at most 2 min 00 s for 8 runs of 3 epochs on 3 slots" in lines[-1]
    )
    assert "; 2 trials share a device: " in lines[-2]
    assert "share" not in describe(sweep, [0, 1])[0][-2]


def test_a_dataset_that_is_not_built(repository: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repository.write_dataset(data_root=str(tmp_path / "none"))
    assert main(["tune", "--config", str(repository.tuner(SPACE)), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[-1].startswith("memory and time: not known before tiny_ctr is built")
    assert all("parameters" not in line for line in lines) and not (tmp_path / "none").exists()
    assert not repository.runs.exists()


def test_raw_data_that_is_missing_does_not_matter_yet(
    repository: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository.write_dataset(data_root=str(tmp_path / "none"), train_data="./no.csv")
    assert main(["tune", "--config", str(repository.tuner(SPACE)), "--dry-run"]) == 0
    assert "its data is missing: ./no.csv" in capsys.readouterr().out.splitlines()[-1]
    assert main(["tune", "--config", str(repository.tuner(SPACE, sampler="random", num_trials=2)), "--dry-run"]) == 0


def test_trials_of_data_of_their_own(built: Any) -> None:
    lines, problems = describe(built.load({**SPACE, "min_categr_count": [2, 5], "num_cross_layers": 1}), [-1])
    assert problems == [] and ["parameters" in line for line in lines[1:5]] == [True, False] * 2
    assert lines[5].startswith("memory: up to ")


def test_a_combination_that_contradicts_itself(built: Any, refuses: Any, capsys: pytest.CaptureFixture[str]) -> None:
    space = {**SMALL, "min_learning_rate": [1e-6, 1e-3], "learning_rate": [1e-2, 1e-4]}
    path = built.tuner(space)
    line = (
        r"^error: trial 4 \(learning_rate=0\.0001  min_learning_rate=0\.001\): .*/sweep\.yaml: "
        r"tuner_space\.min_learning_rate: must not be above learning_rate \(0\.0001\), got 0\.001$"
    )
    refuses(path, line, arguments=("--dry-run",))
    main(["tune", "--config", str(path), "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sweep: grid of 4 trials; ") and sum("learning_rate=" in line for line in lines) == 3
    assert "for 3 runs of 1 epochs" in lines[-1]


def test_a_model_that_refuses_a_combination(built: Any, refuses: Any) -> None:
    """What only the model's constructor knows."""
    space = {**SMALL, "embedding_dim": [8, 7]}
    line = (
        r"DCNv3_tiny_002_[0-9a-f]{8}: .*/model_config\.yaml: DCNv3_tiny: DCNv3: embedding_dim must be even, .*, got 7$"
    )
    refuses(built.tuner(space), line, arguments=("--dry-run",))


def test_a_long_list_is_cut(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "MAX_SHOWN", 3)
    lines, _ = describe(built.load(SPACE), [-1])
    assert lines[4] == "  ... 1 more" and len(lines) == 7


def test_a_random_plan_and_a_tag(built: Any) -> None:
    sweep = built.load(
        {**SMALL, "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}}, sampler="random", num_trials=3
    )
    lines, problems = describe(sweep, [-1])
    assert problems == [] and lines[0].startswith("sweep: random of 3 trials; ")
    expids = [sweep.experiment(*sweep.plan.get(number)).expid for number in range(3)]
    assert [line.split()[0] for line in lines[1:4]] == expids
    tagged = built.load(SPACE, tag="_003_")
    lines, _ = describe(tagged, [-1])
    assert lines[0].startswith("sweep@_003_: grid of 1 trials; ") and lines[1].startswith("  DCNv3_tiny_003_")


def test_a_search_that_goes_by_results(built: Any, capsys: pytest.CaptureFixture[str]) -> None:
    space = {
        **SMALL,
        "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
        "num_cross_layers": {"low": 1, "high": 3},
        "net_dropout": {"low": 0.0, "high": 0.5, "step": 0.1},
        "layer_norm": [True, False],
    }
    assert main(["tune", "--config", str(built.tuner(space, sampler="tpe", num_trials=6)), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sweep: tpe, 6 trials, drawn as results come in; ")
    assert set(lines[1:-2]) >= {
        "  learning_rate: 0.0001 to 0.1 on a log scale",
        "  num_cross_layers: 1 to 3",
        "  net_dropout: 0 to 0.5 in steps of 0.1",
        "  layer_norm: one of True, False",
    }
    assert lines[-2].startswith("memory: ") and "for 6 runs of 1 epochs on 1 slots" in lines[-1]
    lines, problems = describe(built.load(space, sampler="random", timeout=90), [-1])
    assert lines[0].startswith("sweep: random, trials for 90 s, drawn as results come in") and problems == []
    assert lines[-1].startswith("memory: ")  # how many there will be is not known
    assert not built.runs.exists()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (2048, "2 KiB"),
        (5 * 2**20, "5 MiB"),
        (3 * 2**40, "3.07e+03 GiB"),
    ],
)
def test_bytes(count: int, text: str) -> None:
    assert _bytes(count) == text


def test_nothing_is_left_where_there_was_nothing(repository: Any, tmp_path: Path) -> None:
    for name in ("runs", "data"):
        shutil.rmtree(repository.folder / name, ignore_errors=True)
    before = files_below(repository.folder)
    path = repository.tuner(SPACE, sampler="random", num_trials=2)
    assert main(["tune", "--config", str(path), "--dry-run"]) == 0
    assert files_below(repository.folder) == {**before, path: files_below(repository.folder)[path]}
