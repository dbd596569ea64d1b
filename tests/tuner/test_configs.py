# SPDX-License-Identifier: Apache-2.0
"""The configuration files that a sweep writes, read back by the command that runs one experiment."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL

from ctrbench.config import Experiment, load_experiment
from ctrbench.run import run
from ctrbench.sections import list_expids
from ctrbench.tuner.configs import ConfigFolder, rerun_command, trial_sections, write_best
from ctrbench.tuner.definition import Sweep, load_sweep
from ctrbench.yamlfile import load_yaml


def settings_of(sweep: Sweep) -> list[tuple[dict[str, Any], Experiment]]:
    found = [sweep.plan.get(number) for number in range(len(sweep.plan))]
    return [(values, sweep.experiment(index, values)) for index, values in found]  # type: ignore[misc]


def write_all(sweep: Sweep, folder: Path) -> Path:
    configs = ConfigFolder(sweep, folder)
    for values, experiment in settings_of(sweep):
        configs.add(values, experiment)
    return folder


@pytest.mark.parametrize(
    "space",
    [
        {"net_dropout": [0.1, 0.2, 0], "learning_rate": [1e-05, 0.1, 1]},
        {"embedding_regularizer": [1e-05, 0, None, "l2(1.e-5)", "l1_l2(1e-5,2e-6)", 1]},
        {"use_features": [None, ["user_id", "item_id"], ["device"]], "metrics": [["AUC", "logloss"], ["AUC"]]},
        {"group_id": [None, "user_id"], "eval_steps": [None, 10], "shuffle": [True, False]},
        {"feature_specs": [None, [{"name": ["user_id", "item_id"], "embedding_dim": 4}]]},
        {"min_categr_count": [1, 2, 3], "num_heads": [1, 2]},
        {"valid_size": 0.1, "valid_data": None, "split_type": ["random", "sequential"]},
        {"monitor": [{"AUC": 1, "logloss": -1}], "batch_size": [64, 128]},
        {"num_workers": 3, "layer_norm": [True, False], "seed": 5},
        {"n_rows": [None, 1000, 2000]},
        {"optimizer": ["adam", "AdamW"], "max_gradient_norm": [10.0, 1]},
    ],
)
def test_a_trial_is_the_same_experiment_when_it_is_read_back(repository: Any, tmp_path: Path, space: Any) -> None:
    repository.write_dataset(feature_cols=columns_with_and_without_encoders())
    sweep = repository.load(space)
    folder = write_all(sweep, tmp_path / "config")
    settings = settings_of(sweep)
    assert list_expids(folder) == [experiment.expid for _, experiment in settings]
    for values, experiment in settings:
        write_best(sweep, values, experiment)
        for place in (folder, sweep.folder / "best_config"):
            again = load_experiment(place, experiment.expid, sweep.base.zoo)
            assert again.config_hash == experiment.config_hash
            assert again.training == experiment.training and again.model_params == experiment.model_params
            assert again.run_dir == experiment.run_dir and again.zoo == experiment.zoo
        assert list_expids(sweep.folder / "best_config") == [experiment.expid]


def columns_with_and_without_encoders() -> list[dict[str, Any]]:
    kind = {"active": True, "dtype": "str"}
    return [
        {"name": ["user_id", "item_id", "device"], "type": "categorical", **kind},
        {"name": "category", "type": "categorical", "feature_encoder": None, **kind},
        {"name": "history", "type": "sequence", "splitter": "^", "max_len": 6, "feature_encoder": "null", **kind},
    ]


def test_base_names_and_values_that_yaml_could_misread(repository: Any, tmp_path: Path) -> None:
    repository.write_base("2024", learning_rate=0.5)
    sweep = repository.load({"batch_size": [1, 10]}, base_expid="2024")
    folder = write_all(sweep, tmp_path / "config")
    [first, second] = [experiment.expid for _, experiment in settings_of(sweep)]
    assert list_expids(folder) == [first, second] and first.startswith("2024_001_")
    write_all(sweep, folder)  # what is there is not added again
    assert list_expids(folder) == [first, second]
    assert load_experiment(folder, second, sweep.base.zoo).training.batch_size == 10


def test_each_trial_is_added_once_by_any_number_of_processes(repository: Any, tmp_path: Path) -> None:
    sweep = repository.load({"net_dropout": [0.1, 0.2], "min_categr_count": [2, 3]})
    one, other = ConfigFolder(sweep, tmp_path), ConfigFolder(sweep, tmp_path)
    for values, experiment in settings_of(sweep):
        one.add(values, experiment)
        other.add(values, experiment)
        ConfigFolder(sweep, tmp_path).add(values, experiment)
    text = (tmp_path / "model_config.yaml").read_text()
    assert text.startswith("# Written by the sweep sweep.\n") and len(load_yaml(tmp_path / "model_config.yaml")) == 4
    assert sorted(load_yaml(tmp_path / "dataset_config.yaml")) == sorted(
        {experiment.training.dataset_id for _, experiment in settings_of(sweep)}
    )


def test_sections_say_what_the_files_said_and_what_was_chosen(repository: Any) -> None:
    sweep = repository.load({"net_dropout": [0.3], "min_categr_count": [7], "learning_rate": 1e-05})
    [(values, experiment)] = settings_of(sweep)
    model, dataset = trial_sections(sweep, values, experiment)
    chosen = {"net_dropout": 0.3, "learning_rate": 1e-05, "dataset_id": experiment.dataset.dataset_id, "seed": 2024}
    assert model == {**sweep.sections.model, **chosen}
    assert dataset == {**sweep.sections.dataset, "min_categr_count": 7}  # type: ignore[dict-item]


def test_the_command_of_a_trial(repository: Any, tmp_path: Path) -> None:
    sweep = repository.load({"net_dropout": [0.1]}, seeds=[1, 2])
    [(_, experiment)] = settings_of(sweep)
    command = "python model_zoo/DCNv3/run_expid.py --config runs/sweeps/sweep/config --expid " + experiment.expid
    assert rerun_command(sweep, experiment, -1) == f"{command} --gpu -1"
    assert rerun_command(sweep, sweep.with_seed(experiment, 2), 3) == f"{command} --gpu 3 --seed 2"
    best = rerun_command(sweep, experiment, 0, sweep.folder / "best_config")
    assert best == f"{command} --gpu 0".replace("/sweep/config", "/sweep/best_config")
    elsewhere = repository.load({"net_dropout": [0.1], "model_root": str(tmp_path / "my runs")})
    words = shlex.split(rerun_command(elsewhere, experiment, -1))
    assert words[:4] == [
        "python",
        "model_zoo/DCNv3/run_expid.py",
        "--config",
        f"{tmp_path}/my runs/sweeps/sweep/config",
    ]
    (repository.zoo / "run_expid.py").unlink()
    words = shlex.split(rerun_command(sweep, experiment, -1))
    assert words[:5] == ["ctrbench", "run", "--zoo", "model_zoo/DCNv3", "--config"]


def test_a_trial_run_by_hand_gives_the_same_to_the_last_digit(repository: Any, tmp_path: Path) -> None:
    space = {**SMALL, "learning_rate": [0.01], "net_dropout": [0.3], "metrics": [["AUC", "logloss"]]}
    sweep = repository.load(space)
    [(values, experiment)] = settings_of(sweep)
    first = run(experiment)
    folder = write_best(sweep, values, experiment)
    (experiment.run_dir / "report.json").unlink()
    again = load_experiment(folder, experiment.expid, sweep.base.zoo)
    second = run(again)
    assert second["metrics"] == first["metrics"] and second["config_hash"] == first["config_hash"]
    assert json.loads((experiment.run_dir / "report.json").read_text())["metrics"] == first["metrics"]
    base = load_experiment(repository.config_dir, "DCNv3_tiny")
    assert again.config_hash != base.config_hash


def test_a_sweep_that_lies_elsewhere_is_read_back_from_there(repository: Any, tmp_path: Path) -> None:
    """Paths in the files are meant from the repository's root, wherever the sweep was asked for."""
    path = repository.tuner(
        {"model_root": str(tmp_path / "out"), "net_dropout": [0.1]},
        base_config=str(repository.config_dir),
        file="../mine/t.yaml",
    )
    sweep = load_sweep(path)
    [(values, experiment)] = settings_of(sweep)
    folder = write_best(sweep, values, experiment)
    assert folder == tmp_path / "out" / "sweeps" / "t" / "best_config"
    again = load_experiment(folder, experiment.expid, sweep.base.zoo)
    assert again.root == repository.folder and again.config_hash == experiment.config_hash
