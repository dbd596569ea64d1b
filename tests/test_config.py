# SPDX-License-Identifier: Apache-2.0
"""From YAML files to an experiment: merging, lookup, and every problem as one line that says where and what."""

from __future__ import annotations

import dataclasses
import logging
import textwrap
from pathlib import Path
from typing import Any

import pytest
from torch.nn import functional

from ctrbench.config import Experiment, load_experiment, load_run
from ctrbench.errors import ConfigError
from ctrbench.schema import DatasetConfig, TrainingConfig
from ctrbench.sections import find_root, list_expids
from ctrbench.validation import parse_regularizer
from ctrbench.yamlfile import dump_yaml, load_yaml, parse_yaml

MODEL = """
from __future__ import annotations
from torch import nn

class Toy(nn.Module):
    def __init__(self, feature_map, model_id: str = "Toy", gpu: int = -1, embedding_dim: int = 8,
                 hidden_units: list[int] = (8,), net_dropout: float = 0, num_layers: int = 2, name: str | None = None,
                 use_bias: bool = True, rate: float | str | None = None, activation="ReLU", scale=0.5, anything=None,
                 units=[], odd: "no.such.Type" = None, **kwargs):
        super().__init__()
"""
MODEL_CONFIG = """
Base: {model: Toy, learning_rate: 1e-3, batch_size: 32, num_layers: 3}
Toy_a: {dataset_id: tiny, batch_size: 64, embedding_dim: 4}
"""
DATASET_CONFIG = """
tiny:
  data_root: ./built/
  data_format: csv
  train_data: ./raw/train.csv
  feature_cols:
    - {name: [user, item], type: categorical, fill_na: '1e-3'}
    - {name: price, type: numeric, dtype: float}
    - {name: tags, type: sequence, max_len: 3, feature_encoder: null}
    - {name: session, type: meta}
    - {name: unused, type: categorical, active: false}
  label_col: {name: label, dtype: float}
"""
MANIFEST = """{
    "format_version": 1, "settings_hash": "a", "data_hash": "b", "sources": {}, "outputs": {}, "num_rows": {"train": 1}
}"""


class Repository:
    """A repository with one model folder, one dataset and no data."""

    def __init__(self, root: Path):
        self.root, self.zoo = root, root / "model_zoo" / "Toy"
        self.config = self.zoo / "config"
        self.write("model_zoo/Toy/src/__init__.py", MODEL)
        self.write("model_zoo/Toy/config/model_config.yaml", MODEL_CONFIG)
        self.write("config/dataset_config/tiny.yaml", DATASET_CONFIG)

    def write(self, path: str, text: str) -> Path:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(textwrap.dedent(text))
        return target

    def load(self, *overrides: str, expid: str = "Toy_a", **options: Any) -> Experiment:
        return load_experiment(self.config, expid, overrides=overrides, **{"is_data_required": False, **options})

    def problems(self, *overrides: str, **options: Any) -> list[str]:
        """The lines that are reported, without the path of the repository."""
        with pytest.raises(ConfigError) as caught:
            self.load(*overrides, **options)
        assert str(caught.value).splitlines() == caught.value.problems
        return [line.replace(f"{self.root}/", "") for line in caught.value.problems]


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "repository")


def test_the_experiment_wins_over_base_and_overrides_over_both(repository: Repository) -> None:
    experiment = repository.load("embedding_dim=16", "epochs=7", "net_dropout=1e-1", seed=5)
    assert (experiment.training.learning_rate, experiment.training.batch_size) == (1e-3, 64)
    assert (experiment.training.epochs, experiment.training.seed) == (7, 5)
    assert experiment.model_params == {"num_layers": 3, "embedding_dim": 16, "net_dropout": 0.1}
    assert experiment.zoo == repository.zoo and experiment.root == repository.root
    assert experiment.run_dir == repository.root / "runs" / "tiny" / "Toy_a" / "seed_5"
    assert experiment.flat()["num_layers"] == 3 and experiment.flat()["batch_size"] == 64
    with pytest.raises(dataclasses.FrozenInstanceError):
        experiment.expid = "other"  # type: ignore[misc]


def test_overrides_reach_the_dataset_and_the_last_one_wins(repository: Repository) -> None:
    experiment = repository.load("train_data=a.csv", "train_data = b=c.csv", "min_categr_count=3", "test_data=")
    assert experiment.dataset.train_data == "b=c.csv"
    assert (experiment.dataset.min_categr_count, experiment.dataset.test_data) == (3, None)
    assert repository.load("seed=3").training.seed == 3
    assert repository.load("seed=3", seed=4).training.seed == 4


def test_feature_cols_are_one_entry_per_column(repository: Repository) -> None:
    columns = {column.name: column for column in repository.load().dataset.feature_cols}
    assert list(columns) == ["user", "item", "price", "tags", "session", "unused"]
    assert columns["item"].fill_na == "1e-3" and columns["tags"].encoder is None
    assert repository.load().dataset.label_col[0].name == "label"


def test_an_expid_that_yaml_takes_for_a_number(repository: Repository) -> None:
    repository.write(
        "model_zoo/Toy/config/model_config.yaml", "007: {model: Toy, dataset_id: tiny}\non: {model: Toy}\nBase: {}\n"
    )
    assert list_expids(repository.config) == ["007", "on"]
    assert repository.load(expid="007").run_dir.parent.name == "007"
    assert repository.problems(expid="7")[0].endswith("config: unknown expid '7'; known: 007, on")


def test_model_config_as_a_folder(repository: Repository) -> None:
    (repository.config / "model_config.yaml").unlink()
    for name, text in {
        "a": "Base: {model: Toy, dataset_id: tiny, batch_size: 1, epochs: 1}\nToy_a: {epochs: 2}\n",
        "b": "Base: {model: Toy, dataset_id: tiny, batch_size: 2}\nToy_b: {}\n",
        "c": "Toy_c: {seed: 3}\n",
    }.items():
        repository.write(f"model_zoo/Toy/config/model_config/{name}.yaml", text)
    assert list_expids(repository.config) == ["Toy_a", "Toy_b", "Toy_c"]
    settings = {expid: repository.load(expid=expid).training for expid in list_expids(repository.config)}
    assert (settings["Toy_a"].batch_size, settings["Toy_a"].epochs) == (1, 2)
    assert (settings["Toy_b"].batch_size, settings["Toy_b"].epochs) == (2, 100)  # its own Base, not the other's
    assert (settings["Toy_c"].batch_size, settings["Toy_c"].seed) == (1, 3)
    repository.write("model_zoo/Toy/config/model_config/b.yaml", "Base: {model: Toy, batch_size: no}\nToy_b: {seed: x}")
    folder = "model_zoo/Toy/config/model_config"
    assert repository.problems(expid="Toy_b") == [
        f"{folder}/a.yaml: Toy_b.dataset_id: missing, this key is required",
        f"{folder}/b.yaml: Base.batch_size: must be an integer, got False",
        f"{folder}/b.yaml: Toy_b.seed: must be an integer, got 'x'",
    ]
    repository.write("model_zoo/Toy/config/model_config/b.yaml", "Toy_a: {}")
    assert repository.problems() == [
        "model_zoo/Toy/config: expid 'Toy_a' is in a.yaml and b.yaml: keep one of them",
    ]


def test_a_dataset_is_looked_up_in_the_model_folder_first(repository: Repository) -> None:
    assert repository.load().dataset.data_root == "./built/"
    own = load_yaml(repository.root / "config/dataset_config/tiny.yaml")
    own["tiny"]["data_root"] = "./own/"
    repository.write("model_zoo/Toy/config/dataset_config.yaml", dump_yaml(own))
    assert repository.load().dataset.data_root == "./own/"
    own["tiny"]["data_root"] = "./folder/"
    (repository.config / "dataset_config.yaml").unlink()
    repository.write("model_zoo/Toy/config/dataset_config/any_name.yaml", dump_yaml(own))
    assert repository.load().dataset.data_root == "./folder/"
    repository.write("model_zoo/Toy/config/dataset_config/any_name.yaml", dump_yaml({"other": own["tiny"]}))
    assert repository.load().dataset.data_root == "./built/"
    assert repository.load("dataset_id=other").dataset.data_root == "./folder/"
    [line] = repository.problems("dataset_id=tny")
    assert line == "--set: Toy_a.dataset_id: unknown dataset, got 'tny' (did you mean 'tiny'?); known: other, tiny"


def test_unread_keys_are_accepted_with_one_warning(repository: Repository, caplog: pytest.LogCaptureFixture) -> None:
    own = load_yaml(repository.root / "config/dataset_config/tiny.yaml")
    own["tiny"]["data_block_size"] = 10
    own["tiny"]["feature_cols"][0]["encoder"] = "x"
    own["tiny"]["feature_cols"][1]["encoder"] = "x"
    repository.write("config/dataset_config/tiny.yaml", dump_yaml(own))
    with caplog.at_level(logging.WARNING):
        experiment = repository.load("num_workers=3", "pickle_feature_encoder=true", "gpu=1")
    assert [record.getMessage() for record in caplog.records] == [
        "Keys that nothing reads, accepted for FuxiCTR's sake: gpu, num_workers, pickle_feature_encoder, "
        "data_block_size, feature_cols.encoder"
    ]
    assert experiment.model_params == {"num_layers": 3, "embedding_dim": 4}
    caplog.clear()
    repository.problems("num_workers=3", "epochs=0")  # no warning beside an error
    assert not caplog.records


TRAINING, DATASET = "--set: Toy_a", "--set: tiny"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        # training settings
        ("batch_sise=5", f"{TRAINING}.batch_sise: unknown key, got 5 (did you mean 'batch_size'?)"),
        ("model=", f"{TRAINING}.model: must be a string, got None"),
        ("dataset_id=5", f"{TRAINING}.dataset_id: must be a string, got 5"),
        ("monitor_mode=maxx", f"{TRAINING}.monitor_mode: must be 'max' or 'min', got 'maxx' (did you mean 'max'?)"),
        ("epochs=1.0", f"{TRAINING}.epochs: must be an integer, got 1.0"),
        ("shuffle=1", f"{TRAINING}.shuffle: must be a boolean, got 1"),
        ("seed=4294967296", f"{TRAINING}.seed: must be less than 4294967296, got 4294967296"),
        ("epochs=0", f"{TRAINING}.epochs: must be greater than or equal to 1, got 0"),
        ("learning_rate=.inf", f"{TRAINING}.learning_rate: must be a finite number, got inf"),
        ("metrics=[]", f"{TRAINING}.metrics: must not be empty, got []"),
        ("metrics=[AUC, 3]", f"{TRAINING}.metrics: must be a string, got 3"),
        (
            "checkpoint_every=0",
            f"{TRAINING}.checkpoint_every: must be a number of steps (500) or of minutes (10 min), got 0",
        ),
        (
            "checkpoint_every=10 s",
            f"{TRAINING}.checkpoint_every: must be a number of steps (500) or of minutes (10 min), got '10 s'",
        ),
        ("checkpoint_every='10'", "checkpoint_every: must be a number of steps (500) or of minutes (10 min), got '10'"),
        ("checkpoint_every=0.5", "checkpoint_every: must be a number of steps (500) or of minutes (10 min), got 0.5"),
        ("checkpoint_every=true", "checkpoint_every: must be a number of steps (500) or of minutes (10 min), got True"),
        (
            "checkpoint_every=[10 min]",
            "checkpoint_every: must be a number of steps (500) or of minutes (10 min), got ['10 min']",
        ),
        (
            "checkpoint_every=0.0 min",
            "checkpoint_every: must be a number of steps (500) or of minutes (10 min), got '0.0 min'",
        ),
        (
            "checkpoint_every=-1 min",
            "checkpoint_every: must be a number of steps (500) or of minutes (10 min), got '-1 min'",
        ),
        ("monitor=AUCC", f"{TRAINING}.monitor: unknown metric 'AUCC' (did you mean 'AUC'?); known: "),
        ("monitor=3", f"{TRAINING}.monitor: must be a string or a dictionary, got 3"),
        ("monitor={AUC: x}", f"{TRAINING}.monitor: must be a number, got 'x'"),
        ("monitor={AUC: .nan}", f"{TRAINING}.monitor: must be a finite number, got nan"),
        (
            "monitor=logloss",
            "monitor: a lower logloss is better, but monitor_mode is max: set monitor_mode: min, got 'logloss'",
        ),
        (
            "monitor_mode=min",
            "monitor: a higher AUC is better, but monitor_mode is min: set monitor_mode: max, got 'AUC'",
        ),
        ("monitor={AUC: -1}", "monitor: a higher AUC is better, but monitor_mode is max: set monitor_mode: min"),
        (
            "monitor={AUC: 1, logloss: 1}",
            "a lower logloss is better, but its weight is 1 and monitor_mode is max: change the sign of the weight",
        ),
        (
            "task=regression",
            "metrics: AUC needs labels 0 and 1, but task is regression: use MSE or MAE, got ['AUC', 'logloss']",
        ),
        (
            "task=regression",
            "monitor: AUC needs labels 0 and 1, but task is regression: set monitor: MSE and monitor_mode",
        ),
        ("min_learning_rate=.inf", f"{TRAINING}.min_learning_rate: must be a finite number, got inf"),
        ("min_learning_rate=1", f"{TRAINING}.min_learning_rate: must not be above learning_rate (0.001), got 1"),
        ("monitor={gAUC: 1}", f"{TRAINING}.monitor: gAUC is computed within groups: set group_id"),
        ("monitor={AUC: 0}", f"{TRAINING}.monitor: must weight at least one metric, got {{'AUC': 0}}"),
        ("net_regularizer=-1", f"{TRAINING}.net_regularizer: must not be negative or infinite, got -1.0"),
        ("embedding_regularizer=.nan", f"{TRAINING}.embedding_regularizer: must not be negative or infinite, got nan"),
        ("embedding_regularizer=l1_l2(1)", "must be a number, l1(x), l2(x) or l1_l2(x,y), got 'l1_l2(1)'"),
        ("optimizer=LBFGS", f"{TRAINING}.optimizer: no such optimizer in torch.optim, got 'LBFGS'"),
        ("optimizer=adamw", "no such optimizer in torch.optim (did you mean 'AdamW'?), got 'adamw'"),
        ("loss=mse_los", "loss: no such loss in torch.nn.functional (did you mean 'mse_loss'?), got 'mse_los'"),
        (
            "loss=nll_loss",
            "loss: cannot train one output per row towards a label of 0 or 1: use binary_crossentropy or",
        ),
        (
            "loss=binary_cross_entropy_with_logits",
            f"{TRAINING}.loss: takes logits, but the output of a binary task is a probability: use binary_crossentropy, got",
        ),
        ("task=regression", "loss: needs labels and outputs in [0, 1], but task is regression, got 'binary_cross"),
        ("group_id=usr", f"{TRAINING}.group_id: no such column, got 'usr' (did you mean 'user'?)"),
        ("group_id=unused", f"{TRAINING}.group_id: no such column, got 'unused'"),
        ("group_id=price", "group_id: must be a column of type meta or categorical, 'price' is numeric"),
        ("use_features=[user, itm]", f"{TRAINING}.use_features: no such column, got 'itm' (did you mean 'item'?)"),
        ("feature_specs=[{name: [user, itm]}]", "feature_specs: no such column, got 'itm' (did you mean 'item'?)"),
        ("feature_specs=[{name: {user: 1}}]", "feature_specs: no such column, got {'user': 1}"),
        ("feature_specs=[{name: [[user]]}]", f"{TRAINING}.feature_specs: no such column, got ['user']"),
        ("feature_specs=[{name: []}]", "feature_specs: each entry needs a 'name', got {'name': []}"),
        (
            "feature_specs=[{name: user, embeding_dim: 2}]",
            f"{TRAINING}.feature_specs: user: unknown key 'embeding_dim' (did you mean 'embedding_dim'?)",
        ),
        (
            "feature_specs=[{name: [user, tags], embedding_dim: 0}]",
            "feature_specs: user, tags: embedding_dim must be a positive integer, got 0",
        ),
        ("feature_specs=[{name: user, max_len: 3}]", "feature_specs: user: 'max_len' is fixed by the stored data"),
        ("feature_specs=[{name: tags, feature_encoder: {a: 1}}]", "feature_encoder {'a': 1} is not allowed"),
        (
            "feature_specs=[{name: user, pretrain_usage: add}]",
            "pretrain_usage must be one of init, sum, concat, got 'add'",
        ),
        ("feature_specs=[{name: user, freeze_emb: 1}]", "freeze_emb must be one of True, False, got 1"),
        ("feature_specs=[{name: user, source: [a]}]", "source must be a string, got ['a']"),
        (
            "feature_specs=[{name: item, share_embedding: [user]}]",
            "feature_specs: item: share_embedding names ['user'], which is not a feature",
        ),
        (
            "feature_specs=[{name: user, share_embedding: item}]",
            "feature_specs: user: share_embedding names 'item', which comes later (or is this feature)",
        ),
        (
            "feature_specs=[{name: price, share_embedding: user}]",
            "share_embedding names 'user': both must be categorical or sequence",
        ),
        ("use_features=[user, user]", f"{TRAINING}.use_features: 'user' is named twice"),
        ("feature_specs=[user]", f"{TRAINING}.feature_specs: must be a dictionary, got 'user'"),
        # model settings
        ("embedding_dim=4.0", f"{TRAINING}.embedding_dim: must be int, got 4.0"),
        ("embedding_dim=0", f"{TRAINING}.embedding_dim: must be at least 1, got 0"),
        ("num_layers=-1", f"{TRAINING}.num_layers: must be at least 1, got -1"),
        ("net_dropout=1", f"{TRAINING}.net_dropout: must lie in [0, 1), got 1"),
        ("net_dropout=.nan", f"{TRAINING}.net_dropout: must lie in [0, 1), got nan"),
        ("use_bias=1", f"{TRAINING}.use_bias: must be bool, got 1"),
        ("hidden_units=[8, a]", f"{TRAINING}.hidden_units: must be list[int], got [8, 'a']"),
        ("name=3", f"{TRAINING}.name: must be str | None, got 3"),
        ("rate=[1]", f"{TRAINING}.rate: must be float | str | None, got [1]"),
        ("activation=3", f"{TRAINING}.activation: must be str | list | None, got 3"),
        ("scale=true", f"{TRAINING}.scale: must be float | str | list | None, got True"),
        ("max_len=3", f"{TRAINING}.max_len: unknown key, got 3"),
        # dataset settings
        ("feature_cols=3", f"{DATASET}.feature_cols: must be a list, got 3"),
        ("feature_cols=[user]", f"{DATASET}.feature_cols[0]: must be a mapping of keys, got 'user'"),
        ("feature_cols=[{name: a}]", f"{DATASET}.feature_cols['a'].type: missing, this key is required"),
        (
            "feature_cols=[{name: a, type: meta, fil_na: 1}]",
            f"{DATASET}.feature_cols['a'].fil_na: unknown key, got 1 (did you mean 'fill_na'?)",
        ),
        (
            "feature_cols=[{name: a, type: categorial}]",
            "must be 'numeric', 'categorical', 'sequence', 'embedding' or 'meta', got 'categorial' (did you mean 'cate",
        ),
        ("feature_cols=[{type: meta}]", f"{DATASET}.feature_cols[0].name: missing, this key is required"),
        (
            "feature_cols=[{name: [label, a, a], type: meta}]",
            f"{DATASET}.feature_cols: column 'a' is listed more than once",
        ),
        ("feature_cols=[]", "feature_cols: missing, this key is required for data_format csv"),
        ("label_col={name: label, dtyp: int}", f"{DATASET}.label_col[0].dtyp: unknown key, got 'int' (did you mean 'd"),
        ("label_col=[]", f"{DATASET}.label_col: missing, this key is required for data_format csv"),
        ("feature_cols=[{name: '', type: meta}]", f"{DATASET}.feature_cols[''].name: must not be empty, got ''"),
        ("label_col={name: ''}", "must not be empty, got ''"),
        (
            "feature_cols=[{name: type, type: categorical}]",
            f"{DATASET}.feature_cols['type'].name: 'type' is an attribute of every torch module, so that no layer can have "
            "this name: rename the column, as {name: type_, preprocess: copy_from(type)}",
        ),
        ("feature_cols=[{name: training, type: numeric}]", "'training' is an attribute of every torch module"),
        ("feature_cols=[{name: a.b, type: numeric}]", "'a.b' contains a dot, so that no layer can have this name"),
        ("sep=''", f"{DATASET}.sep: must be one ASCII character (a tab is \"\\t\" in double quotes), got ''"),
        ("sep=';;'", f"{DATASET}.sep: must be one ASCII character"),
        ("sep=é", f"{DATASET}.sep: must be one ASCII character"),
        ("valid_size=x", f"{DATASET}.valid_size: must be a number, got 'x'"),
        ("train_data=", f"{DATASET}.train_data: missing, this key is required"),
        ("train_data=''", f"{DATASET}.train_data: missing, this key is required"),
        ("valid_size=-1", f"{DATASET}.valid_size: must be greater than or equal to 0, got -1"),
        (
            "data_format=cvs",
            f"{DATASET}.data_format: must be 'csv', 'parquet', 'h5' or 'npz', got 'cvs' (did you mean 'csv'?)",
        ),
    ],
)
def test_what_is_refused(repository: Repository, override: str, line: str) -> None:
    assert any(line in problem for problem in repository.problems(override))


@pytest.mark.parametrize(
    "override",
    [
        "embedding_dim=1",
        "net_dropout=0",
        "hidden_units=[]",
        "name=null",
        "rate=l2(1e-3)",
        "activation=[ReLU, Dice]",
        "scale=1",
        "anything={a: 1}",
        "units=3",
        "odd=[1]",
        "monitor={AUC: 1, logloss: -1}",
        "monitor={AUC: 1, logloss: 0}",
        "metrics=[AUC, gAUC]",
        "min_learning_rate=1e-3",
        "loss=bce",
        "optimizer=SGD",
        "embedding_regularizer=l1_l2(1e-3, 1e-4)",
        "use_features=[user, price]",
        "feature_specs=[{name: user, embedding_dim: 2}, {name: [item, tags], embedding_dim: 2}]",
        "checkpoint_every=500",
        "checkpoint_every=10 min",
        "valid_size=100",
        "valid_size=0.1",
    ],
)
def test_what_is_accepted(repository: Repository, override: str) -> None:
    experiment = repository.load(override, "group_id=session")
    key, _, text = override.partition("=")
    settings = experiment.flat() | experiment.dataset.model_dump()
    assert settings[key] == parse_yaml(text, "x")


def test_keys_in_the_wrong_file(repository: Repository) -> None:
    repository.write(
        "model_zoo/Toy/config/model_config.yaml",
        "Base: {model: Toy, min_categr_count: 2}\nToy_a: {dataset_id: tiny, train_data: a.csv}\n",
    )
    own = load_yaml(repository.root / "config/dataset_config/tiny.yaml")
    own["tiny"] |= {"batch_size": 3, "embedding_dim": 4}
    repository.write("config/dataset_config/tiny.yaml", dump_yaml(own))
    models, datasets = "model_zoo/Toy/config/model_config.yaml", "config/dataset_config/tiny.yaml"
    assert repository.problems() == [
        f"{models}: Base.min_categr_count: belongs in dataset_config, got 2",
        f"{models}: Toy_a.train_data: belongs in dataset_config, got 'a.csv'",
        f"{datasets}: tiny.batch_size: belongs in model_config, got 3",
        f"{datasets}: tiny.embedding_dim: unknown key, got 4",
    ]


def test_all_problems_are_reported_at_once(repository: Repository) -> None:
    repository.write(
        "model_zoo/Toy/config/model_config.yaml",
        "Base: {model: Toy, learning_rate: fast, net_dropout: 2}\nToy_a: {dataset_id: tiny, nun_layers: 2}\n",
    )
    own = load_yaml(repository.root / "config/dataset_config/tiny.yaml")
    own["tiny"] |= {"data_fromat": "csv"}
    del own["tiny"]["train_data"]
    repository.write("model_zoo/Toy/config/dataset_config.yaml", dump_yaml(own))
    config = "model_zoo/Toy/config"
    assert repository.problems("metrics=[AUCC]", "min_categr_count=0", "group_id=usr") == [
        f"{config}/model_config.yaml: Base.learning_rate: must be a number, got 'fast'",
        f"{config}/model_config.yaml: Base.net_dropout: must lie in [0, 1), got 2",
        f"{config}/model_config.yaml: Toy_a.nun_layers: unknown key, got 2 (did you mean 'num_layers'?)",
        *[line for line in repository.problems("metrics=[AUCC]") if line.startswith("--set: Toy_a.metrics: unknown")],
        "--set: tiny.min_categr_count: must be greater than or equal to 1, got 0",
        f"{config}/dataset_config.yaml: tiny.data_fromat: unknown key, got 'csv' (did you mean 'data_format'?)",
    ]
    own["tiny"].pop("data_fromat")
    repository.write("model_zoo/Toy/config/dataset_config.yaml", dump_yaml(own))
    lines = repository.problems("metrics=[AUCC]", "group_id=usr")
    assert lines[-2:] == [
        f"{config}/dataset_config.yaml: tiny.train_data: missing, this key is required",
        "--set: Toy_a.group_id: no such column, got 'usr' (did you mean 'user'?)",
    ]


def test_missing_raw_files(repository: Repository) -> None:
    required = {"is_data_required": True}
    lines = repository.problems("valid_data=raw/part_*.csv", **required)
    datasets = "config/dataset_config/tiny.yaml"
    help_ = f"(looked in {repository.root}); data/README.md says how to get it"
    assert lines == [
        f"{datasets}: tiny.train_data: no such file, got './raw/train.csv' {help_}",
        f"--set: tiny.valid_data: no such file, got 'raw/part_*.csv' {help_}",
    ]
    repository.write("raw/train.csv", "")
    repository.write("raw/part_1.csv", "")
    repository.load("valid_data=raw/part_*.csv", f"test_data={repository.root}/raw/*_1.csv", **required)
    repository.load("valid_data=raw", **required)
    assert len(repository.problems("train_data=train", "data_format=h5", **required)) == 1
    repository.write("built/tiny/train.h5", "")
    repository.load("train_data=train", "data_format=h5", **required)  # as FuxiCTR names them
    repository.write("built/tiny/manifest.json", "{}")
    assert len(repository.problems("train_data=gone.csv", **required)) == 1
    repository.write("built/tiny/manifest.json", MANIFEST)
    repository.load("train_data=gone.csv", **required)  # not needed any more


def test_problems_of_the_columns_come_with_all_others(repository: Repository) -> None:
    own = load_yaml(repository.root / "config/dataset_config/tiny.yaml")
    columns = own["tiny"]["feature_cols"]
    columns[0]["share_embedding"] = "tags"
    columns[1]["fill_na"] = "x"
    columns[2]["feature_encoder"] = "print()"
    columns[4]["normalizer"] = "MinMaxScaler"  # of an inactive column, which may be anything
    own["tiny"] |= {"test_size": 0.5, "test_data": "test.csv", "item_info": "items.csv"}
    own["tiny"]["label_col"]["preprocess"] = "copy"
    repository.write("config/dataset_config/tiny.yaml", dump_yaml(own))
    datasets = "config/dataset_config/tiny.yaml: tiny"
    later = "'tags' comes later in feature_cols (or is this column): move it before this one"
    lines = repository.problems("epochs=0", "valid_size=1.5", "use_features=[user, user]")
    assert [line.partition("; ")[0] for line in lines] == [
        "--set: Toy_a.epochs: must be greater than or equal to 1, got 0",
        "--set: tiny.valid_size: must be a fraction below 1 or a number of rows, got 1.5",
        f"{datasets}.test_size: test_data is given too: keep one of them",
        f"{datasets}.item_info: needs an active categorical column of source: item, the table's key",
        f"{datasets}.label_col['label'].preprocess: unknown function 'copy' (did you mean 'copy_from'?)",
        f"{datasets}.feature_cols['user'].share_embedding: {later}",
        f"{datasets}.feature_cols['item'].share_embedding: {later}",
        f"{datasets}.feature_cols['price'].fill_na: must be a number, as dtype is float, got 'x'",
        f"{datasets}.feature_cols['tags'].feature_encoder: 'print()' is not allowed",
        "--set: Toy_a.use_features: 'user' is named twice",
    ]
    ready = {"data_format": "h5", "feature_cols": [], "label_col": [], "item_info": None}
    repository.write("config/dataset_config/tiny.yaml", dump_yaml({"tiny": {**own["tiny"], **ready}}))
    repository.load("valid_size=1.5")  # ready files bring their own columns and splits


def test_data_that_is_kept_needs_no_settings_to_build_it(repository: Repository) -> None:
    lines = repository.problems("rebuild_dataset=false")
    needed = "needed when rebuild_dataset is false (the files hold ids)"
    assert lines == [
        f"config/dataset_config/tiny.yaml: tiny.feature_cols['{name}'].vocab_size: {needed}"
        for name in ("user", "item", "tags")
    ]
    repository.write("built/tiny/manifest.json", MANIFEST)
    repository.load("rebuild_dataset=false")


@pytest.mark.parametrize("key", ["epochs", "unknown", "loss", "optimizer", "feature_cols", "dataset_id", "num_layers"])
def test_a_huge_value_is_cut(repository: Repository, key: str) -> None:
    [line] = repository.problems(f"{key}={'x' * 1000}")
    assert "got 'xxx" in line and "xxx ..." in line and line.count("x") < 110


@pytest.mark.parametrize("task", ["binary_classification", "regression"])
def test_losses(repository: Repository, task: str) -> None:
    """Of all the losses of torch, those that lead one output per row to its label."""
    fit = {"mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"}
    fit |= {"binary_cross_entropy"} if task == "binary_classification" else {"poisson_nll_loss"}
    names = [name for name in dir(functional) if name.endswith(("loss", "entropy", "with_logits", "kl_div"))]
    assert len(names) > 15
    settings = ["task=regression", "metrics=[MSE, MAE]", "monitor=MSE", "monitor_mode=min"]
    for name in names:
        overrides = [f"loss={name}", *(settings if task == "regression" else [])]
        if name in fit:
            repository.load(*overrides)
        else:
            [line] = repository.problems(*overrides)
            assert line.startswith("--set: Toy_a.loss: ") and line.endswith(f", got '{name}'")


@pytest.mark.parametrize(
    ("file", "text", "line"),
    [
        ("model_config", "Base: 3\nToy_a: {}", "model_config.yaml: Base: must be a section of keys, got 3"),
        ("model_config", "Toy_a:\n", "model_config.yaml: Toy_a: must be a section of keys, got None"),
        ("model_config", "Toy_b: {}", "config: unknown expid 'Toy_a' (did you mean 'Toy_b'?); known: Toy_b"),
        ("model_config", "", "config: unknown expid 'Toy_a'; known: none"),
        ("model_config", "Toy_a: {dataset_id: tiny}", "model_config.yaml: Toy_a.model: missing, this key is required"),
        ("model_config", "Toy_a: {model: Toy}", "Toy_a.dataset_id: missing, this key is required"),
        ("model_config", "Toy_a: {a: 1, a: 2}", "model_config.yaml: line 1: duplicate key 'a'"),
        ("dataset_config", "tiny: [1]", "dataset_config.yaml: tiny: must be a section of keys, got [1]"),
    ],
)
def test_sections(repository: Repository, file: str, text: str, line: str) -> None:
    repository.write(f"model_zoo/Toy/config/{file}.yaml", text)
    assert repository.problems()[-1].endswith(line)


def test_base_is_no_experiment(repository: Repository) -> None:
    assert repository.problems(expid="Base") == ["model_zoo/Toy/config: unknown expid 'Base'; known: Toy_a"]


def test_not_a_configuration_folder(repository: Repository) -> None:
    message = "not a configuration folder, it has neither model_config.yaml nor model_config/*.yaml"
    for load in (list_expids, lambda folder: load_experiment(folder, "Toy_a")):
        with pytest.raises(ConfigError) as caught:
            load(repository.root)
        assert str(caught.value) == f"{repository.root}: {message}"


@pytest.mark.parametrize("text", ["epochs", "=3", " =3"])
def test_an_override_without_key_or_value(repository: Repository, text: str) -> None:
    assert repository.problems(text) == [f"--set {text}: must be key=value"]


def test_an_override_that_is_not_yaml(repository: Repository) -> None:
    assert repository.problems("epochs=[1")[0].startswith("--set epochs: line 1: ")
    assert "constructor" in repository.problems("name=!!python/object/apply:os.getcwd []")[0]


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", "/tmp", "a\0"])
def test_names_that_would_leave_the_folder(repository: Repository, name: str) -> None:
    refusal = "names a folder, so it must not contain '/' or be '.' or '..'"
    shown = name.replace("\0", "\\x00")
    assert repository.problems(expid=name) == [f"--expid {shown}: {refusal}"]
    if "\0" not in name:
        section = load_yaml(repository.root / "config/dataset_config/tiny.yaml")["tiny"]
        repository.write("model_zoo/Toy/config/dataset_config.yaml", dump_yaml({name: section}))
        line = f"model_zoo/Toy/config/dataset_config.yaml: {name}: {refusal}"
        assert repository.problems(f"dataset_id='{name}'") == [line]


def test_the_model_folder(repository: Repository, tmp_path: Path) -> None:
    benchmarks = repository.write("benchmarks/x/model_config.yaml", MODEL_CONFIG).parent
    repository.config = benchmarks
    assert repository.load().zoo == repository.zoo
    line = "--set: Toy_a.model: no model folder, got 'Toyy' (did you mean 'Toy'?); known: Toy"
    assert repository.problems("model=Toyy") == [line]
    assert repository.problems("model=Toyy", zoo=repository.zoo)[0].startswith(
        "model_zoo/Toy/src/__init__.py: has no model 'Toyy' (did you mean 'Toy'?); it has "
    )
    # A configuration that lies elsewhere, for a model folder of the repository.
    elsewhere = tmp_path / "elsewhere" / "config"
    elsewhere.mkdir(parents=True)
    (elsewhere / "model_config.yaml").write_text(MODEL_CONFIG)
    repository.config = elsewhere
    experiment = repository.load(zoo=repository.zoo)
    assert (experiment.root, experiment.dataset.data_root) == (repository.root, "./built/")
    assert repository.problems() == [
        f"{elsewhere}/model_config.yaml: Base.model: no model folder, got 'Toy'; {elsewhere.parent}/model_zoo has none: "
        "name it with --zoo FOLDER",
        f"{elsewhere}/model_config.yaml: Toy_a.dataset_id: unknown dataset, got 'tiny'; there is no "
        f"{elsewhere}/dataset_config.yaml or {elsewhere.parent}/config/dataset_config/*.yaml",
    ]


def test_a_foreign_model_folder(tmp_path: Path) -> None:
    folder = tmp_path / "Foreign"
    for path, text in {
        "src/__init__.py": MODEL,
        "config/model_config.yaml": MODEL_CONFIG,
        "config/dataset_config.yaml": DATASET_CONFIG,
        "config/sub/model_config.yaml": MODEL_CONFIG,
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    assert find_root(folder / "config") == find_root(folder / "config" / "sub") == folder
    experiment = load_experiment(folder / "config", "Toy_a", is_data_required=False)
    assert (experiment.root, experiment.zoo) == (folder, folder)
    assert experiment.run_dir == folder / "runs" / "tiny" / "Toy_a" / "seed_2024"
    assert find_root(tmp_path / "nothing" / "config") == tmp_path / "nothing"


def test_the_root_of_a_relative_path(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository.config)
    assert find_root(Path(".")) == repository.root
    monkeypatch.chdir(repository.root)
    assert find_root(Path("model_zoo/Toy/config")) == repository.root


@pytest.mark.parametrize(
    ("value", "steps", "seconds"),
    [
        (None, None, None),
        (500, 500, None),
        ("10 min", None, 600),
        ("10min", None, 600),
        ("10 minutes", None, 600),
        ("1 minute", None, 60),
        ("0.5 min", None, 30),
    ],
)
def test_checkpoints_by_steps_or_by_minutes(value: Any, steps: int | None, seconds: float | None) -> None:
    settings = TrainingConfig(model="Toy", dataset_id="tiny", checkpoint_every=value)
    assert (settings.checkpoint_steps, settings.checkpoint_seconds) == (steps, seconds)
    assert settings.checkpoint_every == value  # config.yaml says it as it was written


def make_experiment(training: dict[str, Any] | None = None, dataset: dict[str, Any] | None = None) -> Experiment:
    """An experiment with some values replaced, unchecked."""
    column = {"name": "tags", "type": "sequence"}
    section = DatasetConfig(dataset_id="tiny", feature_cols=[column], label_col=[{"name": "label"}])
    return Experiment(
        "Toy_a",
        TrainingConfig(model="Toy", dataset_id="tiny").model_copy(update=training or {}),
        {"embedding_dim": 4},
        section.model_copy(update=dataset or {}),
        Path("zoo"),
        Path("root"),
        "source",
    )


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
@pytest.mark.parametrize("key", TrainingConfig.model_fields)
def test_config_hash_covers_the_training_settings(key: str) -> None:
    changed = make_experiment(training={key: "changed"})
    is_same = changed.config_hash == make_experiment().config_hash
    assert is_same is (key in {"model_root", "verbose", "checkpoint_every"})


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
@pytest.mark.parametrize("key", DatasetConfig.model_fields)
def test_config_hash_covers_the_dataset_settings(key: str) -> None:
    value: Any = [] if key in ("feature_cols", "label_col") else "changed"
    changed = make_experiment(dataset={key: value})
    assert (changed.config_hash == make_experiment().config_hash) is (key == "data_root")


def test_config_hash_covers_the_model_and_the_columns(repository: Repository) -> None:
    overrides = [
        (),
        ("embedding_dim=5",),
        ("net_dropout=0.1",),
        ("feature_cols=[{name: tags, type: sequence}]",),
        ("feature_cols=[{name: tags, type: sequence, feature_encoder: null}]",),
    ]
    assert len({repository.load(*values).config_hash for values in overrides}) == len(overrides)


def test_config_hash_ignores_where_things_lie(repository: Repository, tmp_path: Path) -> None:
    moved = Repository(tmp_path / "moved")
    assert moved.load().config_hash == repository.load("verbose=0", "model_root=elsewhere").config_hash
    moved.write("config/dataset_config/other_name.yaml", DATASET_CONFIG)
    (moved.root / "config/dataset_config/tiny.yaml").unlink()
    assert moved.load().config_hash == repository.load().config_hash


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (
            "learning_rate=1",
            "monitor={AUC: 1, logloss: -0.5}",
            "embedding_regularizer=1e-5",
            "use_features=[user, item]",
        ),
        ("net_regularizer=l2(1e-5)", "feature_specs=[{name: user, embedding_dim: 2}]", "name='1e-3'", "rate=.inf"),
        ("feature_cols=[{name: 'on', type: sequence, splitter: null}, {name: '1', type: numeric, fill_na: 0}]",),
        ("valid_size=0.1", "test_size=5", "hidden_units=[4, 2]", "anything={a: [1, null]}", 'sep="\\t"'),
    ],
)
def test_a_run_directory_holds_the_whole_experiment(repository: Repository, overrides: tuple[str, ...]) -> None:
    experiment = repository.load(*overrides)
    experiment.run_dir.mkdir(parents=True)
    (experiment.run_dir / "config.yaml").write_text(experiment.to_yaml())
    loaded = load_run(experiment.run_dir)
    assert loaded.source == str(experiment.run_dir / "config.yaml")
    assert dataclasses.replace(loaded, source=experiment.source) == experiment
    assert (loaded.config_hash, loaded.run_dir) == (experiment.config_hash, experiment.run_dir)
    encoders = [[c.encoder for c in e.dataset.feature_cols] for e in (loaded, experiment)]
    assert encoders[0] == encoders[1]


def test_not_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not a run directory, it has no config\.yaml$"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        {"training": None},
        {"training": {"model": "Toy", "dataset_id": "tiny", "epochz": 3}},
        {"dataset": {}},
        {"model": "abc"},
        {"model": [1]},
        {"zoo": 3},
        {"root": None},
    ],
    ids=repr,
)
def test_a_damaged_run_directory(repository: Repository, damage: dict[str, Any]) -> None:
    experiment = repository.load()
    experiment.run_dir.mkdir(parents=True)
    path = experiment.run_dir / "config.yaml"
    for content in (dump_yaml({**parse_yaml(experiment.to_yaml(), "x"), **damage}), "expid: Toy_a\n"):
        path.write_text(content)
        with pytest.raises(ConfigError, match=r"config\.yaml: damaged: .*: run the experiment again$"):
            load_run(experiment.run_dir)


@pytest.mark.parametrize(
    ("value", "pairs"),
    [
        (None, []),
        (0, []),
        (1e-3, [(2, 1e-3)]),
        (2, [(2, 2.0)]),
        ("l1(1e-3)", [(1, 1e-3)]),
        ("l2( 0.5 )", [(2, 0.5)]),
        ("l1_l2(1e-3, 2)", [(1, 1e-3), (2, 2.0)]),
    ],
)
def test_parse_regularizer(value: Any, pairs: list[tuple[int, float]]) -> None:
    assert parse_regularizer(value) == pairs


@pytest.mark.parametrize(
    "value", ["l3(1)", "l2", "l2()", "l2(x)", "l2(-1)", "l2(1,2)", "l1_l2(1)", "l2(inf)", "l1(nan)"]
)
def test_parse_regularizer_refuses(value: str) -> None:
    with pytest.raises(ConfigError, match=r"must be a number, l1\(x\), l2\(x\) or l1_l2\(x,y\), got"):
        parse_regularizer(value)
