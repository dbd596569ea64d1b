# SPDX-License-Identifier: Apache-2.0
"""`ctrbench tune`: what it refuses and how, and whole sweeps from the command to the files that they leave."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import ROOT, SMALL, Repository

from ctrbench.cli import main, run_param_tuner
from ctrbench.config import load_experiment
from ctrbench.preprocess import build_dataset
from ctrbench.tuner import tune as module
from ctrbench.tuner.definition import load_sweep
from ctrbench.tuner.records import TrialRecord
from ctrbench.tuner.store import Store
from ctrbench.yamlfile import load_yaml

DROPOUTS = {"net_dropout": [0.1, 0.2]}
LR = {"low": 1e-4, "high": 1e-1, "log": True}


# Bad input: tuner files


@pytest.mark.parametrize(
    ("space", "pattern"),
    [
        ({"embeding_dim": [8]}, r"\.embeding_dim: unknown key, got 8 \(did you mean 'embedding_dim'\?\)"),
        ({"num_workers": [2, 3]}, r"\.num_workers: nothing reads it, so its values would give equal trials: delete it"),
        ({"data_block_size": [1, 2]}, r"\.data_block_size: nothing reads it, so its values would give equal trials"),
        ({"model_root": ["a", "b"]}, r"\.model_root: does not change a result: give it one value"),
        ({"data_root": ["a", "b"]}, r"\.data_root: does not change a result: give it one value"),
        ({"verbose": [0, 1]}, r"\.verbose: does not change a result: give it one value"),
        ({"dataset_id": ["a", "b"]}, r"\.dataset_id: a sweep is about one dataset: set dataset_id beside tuner_space"),
        ({"net_dropout": []}, r"\.net_dropout: an empty list leaves nothing to try: give values, or delete the key"),
        ({"net_dropout": [0.1, 0.2, 0.1]}, r"\.net_dropout: lists 0\.1 twice: keep one"),
        ({"batch_size": {"low": 9, "high": 8}}, r"\.batch_size: low is above high, got \{'low': 9, 'high': 8\}"),
        ({"learning_rate": {**LR, "low": 0}}, r"\.learning_rate: log needs low above 0, got \{"),
        ({"learning_rate": {**LR, "step": 0.1}}, r"\.learning_rate: step must be positive and does not go with log"),
        ({"batch_size": {"low": 1, "high": 9, "step": 0}}, r"\.batch_size: step must be positive"),
        (
            {"learning_rate": LR},
            r"\.learning_rate: a grid needs a list of values or a step, got .*: or set sampler: random",
        ),
        ({"learning_rate": {"low": 0.1}}, r"\.learning_rate\.high: missing, this key is required"),
        (
            {"batch_size": {"low": 1, "high": 2000}, "epochs": {"low": 1, "high": 1000}},
            r": a grid of 2,000,000 trials: set sampler: random and num_trials",
        ),
        ({"batch_size": "big"}, r"\.batch_size: must be an integer, got 'big'"),
        ({"batch_size": [8, 0]}, r"\.batch_size: must be greater than or equal to 1, got 0"),
        ({"batch_size": {"low": 0, "high": 8}}, r"\.batch_size: must be greater than or equal to 1, got 0"),
        ({"net_dropout": {"low": 0.0, "high": 1.5, "step": 0.5}}, r"\.net_dropout: must lie in \[0, 1\), got 1\.5"),
        ({"num_heads": [1, 2.5]}, r"\.num_heads: must be int, got 2\.5"),
        ({"layer_norm": [1]}, r"\.layer_norm: must be bool, got 1"),
        ({"optimizer": ["adam", "adamm"]}, r"\.optimizer: no such optimizer in torch\.optim"),
        ({"metrics": ["AUC"]}, r"\.metrics: must be a list, got 'AUC'"),
        ({"min_categr_count": [1, 0]}, r"\.min_categr_count: must be greater than or equal to 1, got 0"),
        ({"n_rows": ["all"]}, r"\.n_rows: must be an integer, got 'all'"),
        (
            {"use_features": [["user_idd"]]},
            r"\.use_features: no such column, got 'user_idd' \(did you mean 'user_id'\?\)",
        ),
        (
            {"monitor": ["logloss"]},
            r"\.monitor: a lower logloss is better, but monitor_mode is max: set monitor_mode: min",
        ),
    ],
)
def test_a_tuner_space_that_is_refused(repository: Repository, refuses: Any, space: Any, pattern: str) -> None:
    refuses(repository.tuner(space), rf"^error: {repository.tuners}/sweep\.yaml: tuner_space{pattern}")


@pytest.mark.parametrize(
    ("keys", "pattern"),
    [
        ({"base_expid": None}, r"base_expid: missing, this key is required"),
        (
            {"base_expid": "DCNv3_tyny"},
            r"base_expid: .*/config has no 'DCNv3_tyny' \(did you mean 'DCNv3_tiny'\?\); known: ",
        ),
        ({"base_expid": 5}, r"base_expid: must be a string, got 5"),
        ({"base_config": "nowhere"}, r"base_config: no folder with model_config\.yaml, got 'nowhere' \(looked at "),
        ({"base_config": None}, r"base_config: no folder with model_config\.yaml, got None \(looked at "),
        (
            {"dataset_id": "tiny_crt"},
            r"dataset_id: unknown dataset, got 'tiny_crt' \(did you mean 'tiny_ctr'\?\); known: ",
        ),
        ({"dataset_id": 5}, r"dataset_id: must be a string, got 5"),
        ({"model_config": {"X": {}}}, r"model_config: no section 'DCNv3_tiny'; it has X"),
        ({"model_config": 5}, r"model_config: must be a .*, got 5"),
        ({"samplr": "grid"}, r"samplr: unknown key, got 'grid' \(did you mean 'sampler'\?\)"),
        ({"sampler": "grdi"}, r"sampler: must be 'grid', 'random' or 'tpe', got 'grdi' \(did you mean 'grid'\?\)"),
        ({"sampler_seed": -1}, r"sampler_seed: must be greater than or equal to 0, got -1"),
        ({"sampler": "random"}, r"num_trials: missing: sampler random needs num_trials, timeout or both"),
        ({"sampler": "tpe"}, r"num_trials: missing: sampler tpe needs num_trials, timeout or both"),
        ({"num_trials": 0}, r"num_trials: must be greater than or equal to 1, got 0"),
        ({"num_trials": "many"}, r"num_trials: must be an integer, got 'many'"),
        ({"timeout": -5}, r"timeout: must be greater than .*, got -5"),
        ({"timeout": "1h"}, r"timeout: must be a number, got '1h'"),
        ({"seeds": []}, r"seeds: must not be empty, got \[\]"),
        ({"seeds": 5}, r"seeds: must be a list, got 5"),
        ({"seeds": [1, 2, 1]}, r"seeds: lists a seed twice, got \[1, 2, 1\]"),
        ({"seeds": [1, -2]}, r"seeds: must be greater than or equal to 0, got -2"),
        ({"pruner": "medain"}, r"pruner: must be 'none', 'median' or 'successive_halving', got 'medain'"),
        (
            {"pruner": {"name": "median", "num_startup_trials": -1}},
            r"pruner: must be greater than or equal to 0, got -1",
        ),
        ({"exclude": {"if": {"net_dropout": 0.1}}}, r"exclude: must be a list, got "),
        ({"exclude": [{"if": {}}]}, r"exclude\[0\]\.if: must not be empty, got \{\}"),
        (
            {"exclude": [{"if": {"dropout": 0.1}}]},
            r"exclude\[0\]\.if\.dropout: 'dropout' is not in tuner_space, so this excludes",
        ),
        ({"exclude": [{"if": {"net_dropout": {"low": 0}}}]}, r"exclude: leaves no combination"),
    ],
)
def test_a_tuner_file_that_is_refused(repository: Repository, refuses: Any, keys: Any, pattern: str) -> None:
    error = refuses(repository.tuner(DROPOUTS, **keys), pattern)
    assert error.startswith(f"error: {repository.tuners}/sweep.yaml: ")


@pytest.mark.parametrize("space", [None, [1, 2], {}, "x"])
def test_a_tuner_space_that_is_none(repository: Repository, refuses: Any, space: Any) -> None:
    path = repository.tuner(DROPOUTS)
    content = {**load_yaml(path), "tuner_space": space}
    path.write_text(json.dumps(content))
    refuses(path, rf"sweep\.yaml: tuner_space: must (be a|not be empty).*, got {re.escape(repr(space))}$")


def test_seed_and_seeds(repository: Repository, refuses: Any) -> None:
    path = repository.tuner({**DROPOUTS, "seed": [1, 2]}, seeds=[3, 4])
    refuses(path, r"seeds: tuner_space has seed as well: keep one of them \(seeds averages, seed compares\)")


def test_no_validation_split(repository: Repository, refuses: Any) -> None:
    repository.write_dataset(valid_data=None)
    line = r"tiny_ctr\.yaml: tiny_ctr\.valid_data: missing, and a sweep compares its trials on the validation split: name a"
    refuses(repository.tuner(DROPOUTS), line)


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (None, r"sweep\.yaml: cannot be read: No such file or directory$"),
        ("a: [1", r"sweep\.yaml: line 1: "),
        ("a: 1\nb: {c: 1, c: 2}", r"sweep\.yaml: line 2: duplicate key 'c'"),
        ("- a\n- b\n", r"sweep\.yaml: must hold a mapping of sections, got list$"),
        (b"a: \xff\xfe", r"sweep\.yaml: not UTF-8 text \(byte 3\)$"),
        ("tuner_space: !!python/object/apply:os.getcwd []", r"sweep\.yaml: line 1: could not determine a constructor"),
    ],
)
def test_a_file_that_is_none(repository: Repository, refuses: Any, content: Any, pattern: str) -> None:
    path = repository.tuners / "sweep.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refuses(path, pattern)


@pytest.mark.parametrize(
    "is_built",
    [
        False,
        True,
    ],
)
def test_a_tuned_file_that_is_missing(repository: Repository, refuses: Any, tmp_path: Path, is_built: bool) -> None:
    repository.write_dataset(data_root=str(tmp_path / "built"))
    if is_built:
        experiment = load_experiment(repository.config_dir, "DCNv3_tiny")
        build_dataset(experiment.dataset, root=experiment.root)
    line = r"sweep\.yaml: tuner_space\.train_data: no such file, got 'no\.csv' \(looked in "
    path = repository.tuner({"train_data": [str(repository.raw / "train.csv"), "no.csv"]})
    refuses(path, line)


def test_a_model_that_does_not_exist(repository: Repository, refuses: Any) -> None:
    refuses(repository.tuner({"model": ["DCNv33"]}), r"has no model 'DCNv33' \(did you mean 'DCNv3'\?\)")


def test_an_empty_file_and_a_folder(repository: Repository, refuses: Any) -> None:
    path = repository.tuners / "sweep.yaml"
    path.write_text("")
    missing = "missing, this key is required"
    refuses(path, rf"sweep\.yaml: base_expid: {missing}", rf"sweep\.yaml: tuner_space: {missing}")
    refuses(repository.tuners, "tuners: cannot be read: Is a directory")


def test_all_that_is_wrong_is_told_at_once(repository: Repository, refuses: Any) -> None:
    space = {"batch_size": [0, 8], "learning_rate": [0.1, -1], "min_categr_count": [1, 0], "net_dropout": 1.5}
    keys = ("batch_size", "learning_rate", "min_categr_count", "net_dropout")
    refuses(repository.tuner(space), *(rf"tuner_space\.{key}: must " for key in keys))
    space = {"batch_size": [], "learning_rate": LR, "num_workers": [1, 2]}
    path = repository.tuner(space, seeds=[1, 1], exclude=[{"if": {"epochs": 1}}])
    wanted = (
        r"\.batch_size: an empty",
        r"\.learning_rate: a grid",
        r"\.num_workers: nothing",
        "seeds: lists",
        r"exclude\[0\]",
    )
    refuses(path, *wanted)


def test_an_unknown_key_is_one_problem(repository: Repository, refuses: Any) -> None:
    refuses(repository.tuner({"embeding_dim": [8, 16, 32]}), r"tuner_space\.embeding_dim: unknown key")


def test_a_misspelt_key_of_the_dataset(repository: Repository, refuses: Any) -> None:
    refuses(repository.tuner({"min_categr_cuont": [8]}), r"unknown key, got 8 \(did you mean 'min_categr_count'\?\)")


def test_a_misspelt_key_of_the_file(repository: Repository, refuses: Any) -> None:
    refuses(repository.tuner(DROPOUTS, model_confg={"X": {}}), r"\(did you mean 'model_config'\?\)")


def test_a_misspelt_if(repository: Repository, refuses: Any) -> None:
    path = repository.tuner(DROPOUTS, exclude=[{"iff": {"net_dropout": 0.1}}])
    refuses(path, r"exclude\[0\]\.if: missing", r"exclude\[0\]\.iff: unknown key")


def test_a_wrong_dataset_is_named_where_it_stands(repository: Repository, refuses: Any) -> None:
    refuses(repository.tuner(DROPOUTS, dataset_id="tiny_crt"), r"sweep\.yaml: dataset_id: unknown dataset")


def test_a_value_that_goes_only_with_others(repository: Repository) -> None:
    space = {"learning_rate": [1e-2, 1e-7], "min_learning_rate": [1e-6, 1e-8]}
    path = repository.tuner(space, exclude=[{"if": {"learning_rate": 1e-7, "min_learning_rate": 1e-6}}])
    assert main(["tune", "--config", str(path), "--dry-run"]) == 0


def test_trials_that_cannot_be_compared(repository: Repository, refuses: Any) -> None:
    path = repository.tuner({"monitor": ["AUC", {"AUC": 1, "logloss": -1}]})
    refuses(path, r"tuner_space\.monitor: ", arguments=("--dry-run",))


def test_a_tpe_search_of_nothing(repository: Repository, refuses: Any) -> None:
    exclude = [{"if": {"net_dropout": [0.1, 0.2]}}]
    path = repository.tuner(DROPOUTS, sampler="tpe", num_trials=3, exclude=exclude)
    refuses(path, "exclude: leaves no combination", arguments=("--dry-run",))


def test_no_validation_split_in_one_of_the_trials(repository: Repository, refuses: Any) -> None:
    path = repository.tuner({"valid_data": [str(repository.raw / "valid.csv"), None]})
    refuses(path, r"valid_data: missing, and a sweep compares its trials on the", arguments=("--dry-run",))


# Bad input: the command line


@pytest.mark.parametrize("gpu", ["99", "-2"])
def test_a_gpu_that_does_not_exist(repository: Repository, refuses: Any, gpu: str) -> None:
    line = rf"^error: --gpu {gpu}: no such GPU, this machine has \d+ GPUs?.*: use --gpu -1 for the CPU$"
    refuses(repository.tuner(DROPOUTS), line, arguments=("--gpu", "-1", gpu))
    refuses(repository.tuner(DROPOUTS), line, arguments=("--dry-run", "--gpu", gpu, gpu))


def test_a_tag_that_matches_nothing(repository: Repository, refuses: Any) -> None:
    refuses(repository.tuner(DROPOUTS), r"^error: --tag _003_: matches no expid", arguments=("--tag", "_003_"))
    path = repository.tuner({"learning_rate": LR}, sampler="random", num_trials=2)
    refuses(path, r"^error: --tag zzz: matches no expid of the sweep$", arguments=("--tag", "zzz"))


def test_a_tag_with_tpe(repository: Repository, refuses: Any) -> None:
    path = repository.tuner({"learning_rate": LR}, sampler="tpe", num_trials=2)
    line = r"^error: --tag 001: picks trials of a grid or a random search, but sampler is tpe$"
    refuses(path, line, arguments=("--tag", "001"))


def closed_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


STORES = [
    ("runs/my.db", r"--storage runs/my\.db: not a URL: use one as postgresql\+psycopg://.* or leave the option out"),
    (
        "sqlite:////no/such/folder/x.db",
        r"--storage sqlite:////no/such/folder/x\.db: cannot be reached: .*unable to open",
    ),
    (
        "postgresql+psycopg://me:secret@127.0.0.1:PORT/db",
        r"--storage postgresql\+psycopg://me@127\.0\.0\.1:\d+/db: cannot be",
    ),
    (
        "postgresql+psycopg://me:sec@ret@127.0.0.1:PORT/db",
        r"--storage postgresql\+psycopg://me@127\.0\.0\.1:\d+/db: cannot be",
    ),
    (
        "postgresql+psycopg://me:secret@127.0.0.1:port/db",
        r"--storage postgresql\+psycopg://me@127\.0\.0\.1:port/db: cannot",
    ),
    ("nosuchdb://me:secret@host/db", r"--storage nosuchdb://me@host/db: cannot be reached: "),
]


@pytest.mark.parametrize(("url", "pattern"), STORES)
def test_a_store_that_cannot_be_reached(repository: Repository, refuses: Any, url: str, pattern: str) -> None:
    url = url.replace("PORT", str(closed_port()))
    error = refuses(repository.tuner(DROPOUTS), f"^error: {pattern}", arguments=("--storage", url), is_clean=False)
    assert "secret" not in error and "sec@ret" not in error and "Traceback" not in error
    assert not [*repository.runs.rglob("*.csv"), *repository.runs.rglob("*.yaml"), *repository.runs.rglob("seed_*")]


@pytest.mark.parametrize(("url", "pattern"), STORES[:2])
def test_a_store_that_cannot_be_reached_leaves_nothing(
    repository: Repository, refuses: Any, url: str, pattern: str
) -> None:
    refuses(repository.tuner(DROPOUTS), pattern, arguments=("--storage", url))


@pytest.mark.parametrize(
    "url", ["postgresql:/me:secret@host/db", "postgresql+psycopg://host:1/db?user=me&password=secret"]
)
def test_a_password_is_never_shown(repository: Repository, refuses: Any, url: str) -> None:
    url = url.replace("host:1", f"127.0.0.1:{closed_port()}")
    error = refuses(repository.tuner(DROPOUTS), "--storage", arguments=("--storage", url), is_clean=False)
    assert "secret" not in error


@pytest.mark.parametrize("name", ["../../elsewhere", "a/b", ".."])
def test_a_name_is_not_a_path(repository: Repository, refuses: Any, name: str) -> None:
    path = repository.tuner(DROPOUTS)
    refuses(path, "--name .*names a folder", arguments=("--name", name, "--dry-run"))


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["tune"], ["tune", "--config", "x", "--gpu", "a"], ["tune", "--config", "x", "--stale-after", "a"]):
        with pytest.raises(SystemExit) as caught:
            main(command)
        assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        run_param_tuner(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(option in text for option in ("--tag", "--gpu", "--dry-run", "--storage", "--fresh", "--retry-failed"))


# A sweep that goes on


class NoEngine:
    """Runs nothing."""

    num_adopted = 0

    def __init__(self, *_: Any) -> None:
        pass

    def run(self) -> bool:
        return True


@pytest.fixture
def begun(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """A repository with a sweep in its store, of which nothing was run."""
    monkeypatch.setattr(module, "Engine", NoEngine)
    monkeypatch.setattr("ctrbench.tuner.slots.preload", lambda: None)
    assert main(["tune", "--config", str(repository.tuner(DROPOUTS))]) == 0
    assert (repository.runs / "sweeps" / "sweep" / "journal.log").exists()
    return repository


def test_a_changed_space_is_explained(begun: Repository, refuses: Any) -> None:
    path = begun.tuner({"net_dropout": [0.1, 0.3], "batch_size": 256})
    folder = re.escape(str(begun.runs / "sweeps" / "sweep"))
    refuses(
        path,
        rf"^error: .*/sweep\.yaml: {folder} holds another sweep named 'sweep' \(.*"
        r"tuner_space\.net_dropout was \[0\.1, 0\.2\], is \[0\.1, 0\.3\].*\): restore it, give this one its own --name, or "
        r"start over with --fresh$",
        is_clean=False,
    )
    assert main(["tune", "--config", str(path), "--name", "other"]) == 0
    assert main(["tune", "--config", str(begun.tuner(DROPOUTS))]) == 0
    begun.tuner({"net_dropout": [0.1, 0.3], "batch_size": 256})
    assert main(["tune", "--config", str(path), "--fresh"]) == 0
    assert main(["tune", "--config", str(path)]) == 0
    refuses(begun.tuner(DROPOUTS), "holds another sweep named 'sweep'", is_clean=False)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seeds": [1, 2]}, r"seeds was \[2024\], is \[1, 2\]"),
        ({"pruner": "median"}, r"pruner\.name was 'none', is 'median'"),
        ({"sampler": "tpe", "num_trials": 2}, r"sampler was 'grid', is 'tpe'"),
        ({"exclude": [{"if": {"net_dropout": 0.1}}]}, r"exclude was \[\], is \[\{'if': \{'net_dropout': 0\.1\}\}\]"),
        ({"tuner_space": {**DROPOUTS, "epochs": 2}}, r"tuner_space\.epochs was None, is 2"),
        ({"base_expid": "X"}, r"base\.learning_rate was 0\.01, is 0\.5"),
        ({"dataset": {"min_categr_count": 4}}, r"dataset\.min_categr_count was 2, is 4"),
    ],
)
def test_each_change_is_named(begun: Repository, refuses: Any, change: dict[str, Any], told: str) -> None:
    begun.write_base("X", learning_rate=0.5)
    begun.write_dataset(**change.pop("dataset", {}))
    refuses(begun.tuner(**{"tuner_space": DROPOUTS, **change}), told, is_clean=False)


def test_a_large_change_is_cut(begun: Repository, refuses: Any) -> None:
    space = {"batch_size": 1, "epochs": 1, "num_heads": 1, "embedding_dim": 8, "learning_rate": 0.1}
    error = refuses(begun.tuner(space), r"; \.\.\.\): restore it", is_clean=False)
    assert error.count(" was ") == 4


def test_num_trials_and_timeout_may_change(begun: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    for keys in ({"num_trials": 1}, {"num_trials": 2, "timeout": 60}, {"timeout": 0.5}):
        assert main(["tune", "--config", str(begun.tuner(DROPOUTS, **keys))]) == 0
    assert "error" not in capsys.readouterr().err


def test_a_store_that_is_shared_holds_another_sweep(begun: Repository, refuses: Any, tmp_path: Path) -> None:
    arguments = ("--storage", f"sqlite:///{tmp_path}/store.db")
    assert main(["tune", "--config", str(begun.tuner(DROPOUTS)), *arguments]) == 0
    path = begun.tuner({"net_dropout": [0.3]})
    refuses(
        path,
        r"the store holds another sweep named 'sweep' \(tuner_space\.net_dropout was",
        arguments=arguments,
        is_clean=False,
    )


# Whole sweeps


@dataclasses.dataclass
class Finished:
    """A sweep of three settings and two seeds each, and what it left as it ended."""

    repository: Repository
    path: Path
    command: list[str]
    status: int
    out: str
    err: str
    reports: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: int = 0

    def __post_init__(self) -> None:
        paths = self.repository.runs.rglob("report.json")
        self.reports = {str(path.parent): json.loads(path.read_text()) for path in paths}
        self.rows = len((self.repository.runs / "results.csv").read_text().splitlines())

    @property
    def folder(self) -> Path:
        return self.repository.runs / "sweeps" / "small"

    def table(self) -> pd.DataFrame:
        return pd.read_csv(self.folder / "results.csv")

    def marks(self) -> dict[str, int]:
        """When each run was finished."""
        return {str(path): path.stat().st_mtime_ns for path in sorted(self.repository.runs.rglob("DONE"))}


SPACE = {**SMALL, "learning_rate": [0.01, 0.03], "net_dropout": [0.1, 0.3], "metrics": [["AUC", "logloss"]]}


@pytest.fixture(scope="module")
def finished(shared_repository: Repository) -> Finished:
    """One sweep on two slots of the CPU, by FuxiCTR's command from FuxiCTR's folder."""
    exclude = [{"if": {"learning_rate": 0.03, "net_dropout": [0.1]}}]
    keys = {"base_config": "../model_zoo/DCNv3/config", "seeds": [1, 2], "exclude": exclude}
    path = shared_repository.tuner(SPACE, file="benchmarks/tuner_config/small.yaml", **keys)
    script = ROOT / "benchmarks" / "run_param_tuner.py"
    command = [sys.executable, str(script), "--config", "tuner_config/small.yaml", "--gpu", "-1", "-1"]
    folder = shared_repository.folder / "benchmarks"
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    return Finished(shared_repository, path, command, done.returncode, done.stdout, done.stderr)


def again(finished: Finished, *options: str) -> list[str]:
    return ["tune", "--config", str(finished.path), "--gpu", "-1", "-1", *options]


def test_what_a_sweep_says_and_leaves(finished: Finished) -> None:
    assert finished.status == 0, finished.err
    sweep = load_sweep(finished.path)
    experiments = [sweep.experiment(*sweep.plan.get(number)) for number in range(3)]  # type: ignore[misc]
    lines = finished.out.splitlines()
    table = finished.table()
    assert lines[0] == "3 complete" and len(lines) == 5
    # a line for each event, on standard error
    events = [line.split(" ", 1)[1] for line in finished.err.splitlines()]
    assert events[0] == f"small: grid, 3 trials, 2 seeds each, on cpu, cpu; {finished.folder}"
    assert {e.expid for e in experiments} == {
        event.split(":")[0] for event in events if event.endswith(": started on cpu")
    }
    done = [
        event for event in events if re.match(r"\[[123]/3\] \S+: validation AUC 0\.\d{6}(, the best so far)? \(", event)
    ]
    assert len(done) == 3 and len(events) == 7
    # results.csv
    assert (
        list(table.trial) == [1, 1, 2, 2, 3, 3] and list(table.seed) == [1, 2] * 3 and set(table.state) == {"complete"}
    )
    assert list(table.exp_id.unique()) == [f"[exp_id] {experiment.expid}" for experiment in experiments]
    for _, rows in table.groupby("trial"):
        assert rows.objective.nunique() == 1 and rows.objective.iloc[0] == pytest.approx(
            rows.valid_AUC.mean(), abs=1e-15
        )
        assert rows.valid_AUC.nunique() == 2  # seeds differ
    for _, row in table.iterrows():
        report = json.loads((Path(row.run_dir) / "report.json").read_text())
        assert (
            row.valid_AUC == report["metrics"]["valid"]["AUC"]
            and row.test_logloss == report["metrics"]["test"]["logloss"]
        )
        assert report["seed"] == row.seed and f"[command] {report['command']}" == row.command
    assert finished.rows == len(finished.reports) == 6
    # the best
    best = table.loc[table.objective.idxmax()]
    assert lines[1].startswith(f"best: {best.exp_id[9:]}: validation AUC {best.objective:.6f}, test AUC 0.")
    assert lines[2] == f"  learning_rate: {best.learning_rate}, net_dropout: {best.net_dropout}"
    assert list(load_yaml(finished.folder / "best_config" / "model_config.yaml")) == [best.exp_id[9:]]
    assert list(load_yaml(finished.folder / "config" / "model_config.yaml")) == [e.expid for e in experiments]
    assert best.exp_id[9:] in (finished.folder / "report.html").read_text()
    assert not [*(finished.folder / "alive").glob("*")]
    for experiment in experiments:
        read = load_experiment(finished.folder / "config", experiment.expid, finished.repository.zoo)
        assert read.config_hash == experiment.config_hash


def test_the_printed_command_gives_the_same_to_the_last_digit(finished: Finished) -> None:
    [line] = [line for line in finished.out.splitlines() if line.startswith("run it again: ")]
    words = shlex.split(line.removeprefix("run it again: "))
    expid = words[words.index("--expid") + 1]
    run_dir = finished.repository.runs / "tiny_ctr" / expid / "seed_1"
    before = json.loads((run_dir / "report.json").read_text())
    assert words[0] == "python"
    command = [sys.executable, *words[1:]]
    done = subprocess.run(command, cwd=finished.repository.folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    after = json.loads((run_dir / "report.json").read_text())
    assert after["metrics"] == before["metrics"] and after["config_hash"] == before["config_hash"]
    assert after["data_hash"] == before["data_hash"] and after["command"] != before["command"]


def test_the_same_command_repeats_nothing(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    before, table = finished.marks(), finished.table()
    started = time.perf_counter()
    assert main(again(finished)) == 0
    assert time.perf_counter() - started < 60
    output = capsys.readouterr()
    assert finished.marks() == before and output.out.splitlines()[:2] == finished.out.splitlines()[:2]
    assert "continued: 3 trials were finished before, 0 are run again" in output.err and "started on" not in output.err
    pd.testing.assert_frame_equal(finished.table(), table)


def test_more_trials_may_be_asked_for(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer are asked for first, then more: only what is new is run."""
    path = repository.tuner(SPACE, num_trials=1)
    assert main(["tune", "--config", str(path)]) == 0
    assert capsys.readouterr().out.startswith("1 complete\n")
    assert main(["tune", "--config", str(repository.tuner(SPACE, num_trials=2))]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("2 complete\n") and output.err.count("started on") == 1
    assert "continued: 1 trials were finished before" in output.err


def test_fresh_runs_again(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    before, table = finished.marks(), finished.table()
    assert main(again(finished, "--fresh", "--tag", "_002_")) == 0
    assert capsys.readouterr().out.startswith("1 complete\n")
    changed = [path for path, moment in finished.marks().items() if before.get(path) != moment]
    assert len(changed) == 2 and all("_002_" in path for path in changed)
    tagged = pd.read_csv(finished.repository.runs / "sweeps" / "small@_002_" / "results.csv")
    assert list(tagged.valid_AUC) == list(table.valid_AUC[table.trial == 2])
    assert list(tagged.trial) == [2, 2]


def test_a_trial_that_fails(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    """One that diverges, one whose values contradict each other, and one that is fine: the sweep goes on and ends with 1."""
    space = {**SMALL, "learning_rate": [0.01, 1e-4, 1e30], "min_learning_rate": [1e-6, 1e-3]}
    exclude = [{"if": {"learning_rate": [0.01, 1e30], "min_learning_rate": 1e-3}}]
    path = repository.tuner(space, file="tuners/failing.yaml", exclude=exclude)
    assert main(["tune", "--config", str(path)]) == 1
    output = capsys.readouterr()
    folder = repository.runs / "sweeps" / "failing"
    table = pd.read_csv(folder / "results.csv")
    assert list(table.state) == ["complete", "complete", "failed", "failed"]
    assert output.out.splitlines()[0] == "2 complete, 2 failed"
    assert "2 failed (--retry-failed runs them again):" in output.err
    assert "min_learning_rate: must not be above learning_rate (0.0001)" in table.error[2]
    assert "the training loss became" in table.error[3] and "Traceback" not in output.err
    assert main(["tune", "--config", str(path)]) == 1
    assert "4 trials were finished before" in capsys.readouterr().err


def test_a_tpe_sweep_with_a_pruner(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    space = {**SMALL, "epochs": 2, "learning_rate": {"low": 1e-3, "high": 1e-1, "log": True}, "net_dropout": [0, 0.2]}
    pruner = {"name": "median", "num_startup_trials": 1, "num_warmup_evaluations": 0}
    path = repository.tuner(space, file="tuners/tpe.yaml", sampler="tpe", num_trials=4, pruner=pruner)
    assert main(["tune", "--config", str(path)]) == 0
    table = pd.read_csv(repository.runs / "sweeps" / "tpe" / "results.csv")
    assert list(table.trial) == [1, 2, 3, 4] and set(table.state) <= {"complete", "pruned"}
    assert table.learning_rate.between(1e-3, 1e-1).all() and table.learning_rate.nunique() == 4
    first = capsys.readouterr().out
    assert main(["tune", "--config", str(path)]) == 0 and capsys.readouterr().out == first


def test_the_store_is_closed_after_a_refusal(begun: Repository, refuses: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    close = Store.close
    monkeypatch.setattr(Store, "close", lambda self: closed.append(1) or close(self))
    refuses(begun.tuner({"net_dropout": [0.5]}), "holds another sweep", is_clean=False)
    assert closed and not [*(begun.runs / "sweeps" / "sweep" / "alive").glob("*")]


def test_a_stopped_sweep_ends_with_130(
    begun: Repository, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NoEngine, "run", lambda self: False)
    assert main(["tune", "--config", str(begun.tuner(DROPOUTS))]) == 130
    output = capsys.readouterr()
    assert "stopped: the same command goes on where it was" in output.err and output.out.startswith("0 complete\n")
    failed = TrialRecord(0, "X_001", "failed", {}, error="Error: a\nb")
    monkeypatch.setattr(Store, "records", lambda self: [failed])
    assert main(["tune", "--config", str(begun.tuner(DROPOUTS))]) == 130
    assert "1 failed (--retry-failed runs them again):\n  X_001: Error: a\n" in capsys.readouterr().err
