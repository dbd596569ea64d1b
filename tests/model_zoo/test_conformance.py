# SPDX-License-Identifier: Apache-2.0
"""What every model folder must pass. Folders are found by path, so a new one is tested without a line here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.models import BaseModel
from torch import nn

from ctrbench.batches import Batches
from ctrbench.checkpoint import load_weights, save_weights
from ctrbench.config import Experiment, load_experiment
from ctrbench.errors import ConfigError
from ctrbench.items import key_column
from ctrbench.metrics import evaluate_metrics
from ctrbench.sections import list_expids
from ctrbench.trainer import Trainer
from ctrbench.zoo import build_model, load_model_class

ROOT = Path(__file__).resolve().parents[2]
HISTORY = "item_seq"
ZOO = sorted(path.parent for path in (ROOT / "model_zoo").glob("*/src"))
EXPIDS = [(zoo, expid) for zoo in ZOO for expid in list_expids(zoo / "config")]
each_folder = pytest.mark.parametrize("zoo", ZOO, ids=lambda zoo: zoo.name)


def open_experiment(zoo: Path, expid: str, *overrides: str) -> Experiment:
    return load_experiment(zoo / "config", expid, zoo, ("verbose=0", *overrides), is_data_required=False)


def tiny(zoo: Path) -> str:
    """The folder's experiment on tiny data."""
    return next(e for e in list_expids(zoo / "config") if e in (f"{zoo.name}_tiny", f"{zoo.name}_tiny_mm"))


def make_feature_map(experiment: Experiment) -> FeatureMap:
    """The dataset's fields with small vocabularies, and a small item table where it has one."""
    feature_map = FeatureMap(experiment.dataset.dataset_id, "unused")
    key = key_column(experiment.dataset)
    for i, column in enumerate(c for c in experiment.dataset.feature_cols if c.active):
        spec: dict[str, Any] = {"source": column.source, "type": column.type}
        if column.type in ("categorical", "sequence"):
            spec |= {"padding_idx": 0, "vocab_size": 12 + i}
        if column.type == "sequence":
            spec |= {"max_len": column.max_len or 3, "feature_encoder": column.encoder}
        if column.type == "embedding":
            spec |= {"embedding_dim": experiment.model_params["embedding_dim"], "pretrain_dim": 6}
        if column.type == "meta" and key is not None and column.name == HISTORY:
            spec |= {"max_len": 100}
        feature_map.features[column.name] = spec
    feature_map.labels = [column.name for column in experiment.dataset.label_col]
    feature_map.num_fields = feature_map.get_num_fields()
    feature_map.default_emb_dim = experiment.model_params["embedding_dim"]
    if key is not None:
        items = [name for name, spec in feature_map.features.items() if spec["source"] == "item"]
        table = make_columns(feature_map, feature_map.features[key.name]["vocab_size"], items)
        feature_map.item_key, feature_map.item_table = key.name, {**table, key.name: torch.arange(len(table[key.name]))}
    return feature_map


def make_model(experiment: Experiment, seed: int = 0) -> BaseModel:
    torch.manual_seed(seed)
    params = {**experiment.flat(), "gpu": -1, "model_id": experiment.expid}
    model_class = load_model_class(experiment.zoo, experiment.training.model)
    return build_model(model_class, make_feature_map(experiment), params, experiment.source)


def make_columns(feature_map: FeatureMap, rows: int, names: list[str] | None = None) -> dict[str, torch.Tensor]:
    """Random columns `names`; by default those of a split, with its label."""
    generator = torch.Generator().manual_seed(0)
    key = getattr(feature_map, "item_key", None)
    columns = {}
    for name in names or feature_map.features:
        spec = feature_map.features[name]
        if names is None and key is not None and spec["source"] == "item" and name != key:
            continue  # it lives in the item table
        if spec["type"] == "numeric":
            columns[name] = torch.randn(rows, generator=generator)
        elif spec["type"] == "embedding":
            columns[name] = torch.randn(rows, spec["pretrain_dim"], generator=generator)
        elif spec["type"] == "meta" and "max_len" in spec:
            size = feature_map.features[key]["vocab_size"]
            history = torch.randint(1, size, (rows, spec["max_len"]), generator=generator, dtype=torch.int32)
            lengths = torch.randint(0, 9, (rows, 1), generator=generator)
            columns[name] = history * (torch.arange(spec["max_len"]) >= spec["max_len"] - lengths)
        elif spec["type"] != "meta":
            shape = (rows, spec["max_len"]) if spec["type"] == "sequence" else (rows,)
            columns[name] = torch.randint(1, spec["vocab_size"], shape, generator=generator, dtype=torch.int32)
    if names is None:
        columns[feature_map.labels[0]] = (torch.rand(rows, generator=generator) < 0.5).float()
    return columns


def one_batch(feature_map: FeatureMap, rows: int) -> dict[str, torch.Tensor]:
    return next(iter(Batches(make_columns(feature_map, rows), rows)))


@each_folder
def test_files(zoo: Path) -> None:
    for name in ("README.md", "run_expid.py", "config/model_config.yaml", "src/__init__.py", f"src/{zoo.name}.py"):
        assert (zoo / name).is_file(), name
    assert len((zoo / "run_expid.py").read_text().splitlines()) <= 15
    assert len((zoo / "src" / f"{zoo.name}.py").read_text().splitlines()) < 120
    source = "".join(path.read_text() for path in (zoo / "src").glob("*.py"))
    # Mathematics only: no device moves, no data access, no dependence on this package.
    assert not re.search(r"\.cuda\(|\.to\((self\.)?device|\bopen\(|import ctrbench|from ctrbench", source)


@pytest.mark.parametrize(("zoo", "expid"), EXPIDS, ids=[expid for _, expid in EXPIDS])
def test_every_experiment_builds_and_trains_every_parameter(zoo: Path, expid: str) -> None:
    model = make_model(open_experiment(zoo, expid))
    for name, parameter in model.named_parameters():  # past the ReLUs that a fresh model may have shut
        if name.startswith("embedding_layer"):
            nn.init.normal_(parameter, std=0.05)
    batch = one_batch(model.feature_map, 64)
    model.train()
    model.compute_loss(model(batch), model.get_labels(batch)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@each_folder
def test_batch_of_one(zoo: Path) -> None:
    model = make_model(open_experiment(zoo, tiny(zoo)))
    model.eval()
    output = model(one_batch(model.feature_map, 1))["y_pred"]
    assert output.shape == (1, 1) and 0 < output.item() < 1


@each_folder
def test_same_seed_same_weights(zoo: Path) -> None:
    experiment = open_experiment(zoo, tiny(zoo))
    first, second, other = make_model(experiment, 3), make_model(experiment, 3), make_model(experiment, 4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@each_folder
def test_save_and_load(zoo: Path, tmp_path: Path) -> None:
    experiment = open_experiment(zoo, tiny(zoo))
    model, other = make_model(experiment, 1), make_model(experiment, 2)
    save_weights(tmp_path / "weights.safetensors", model)
    load_weights(tmp_path / "weights.safetensors", other)
    batch = one_batch(model.feature_map, 8)
    assert torch.equal(model.eval()(batch)["y_pred"], other.eval()(batch)["y_pred"])


@each_folder
def test_overfits_64_rows(zoo: Path) -> None:
    experiment = open_experiment(zoo, tiny(zoo), "embedding_regularizer=0", "learning_rate=1e-2")
    model = make_model(experiment)
    trainer = Trainer(model, experiment.training)
    batches = Batches(make_columns(model.feature_map, 64), 64)
    model.train()
    losses = [float(trainer.step(batch)) for _ in range(200) for batch in batches]
    label = batches.column(model.feature_map.labels[0])
    assert losses[-1] < losses[0] / 4
    assert evaluate_metrics(label, trainer.predict(batches), ["AUC"])["AUC"] > 0.99


@each_folder
def test_unknown_key_is_refused(zoo: Path) -> None:
    with pytest.raises(ConfigError, match=r"embeding_dim: unknown key, got 4 \(did you mean 'embedding_dim'\?\)"):
        open_experiment(zoo, tiny(zoo), "embeding_dim=4")


@each_folder
def test_runs_in_stock_fuxictr(zoo: Path, tmp_path: Path) -> None:
    experiment = open_experiment(zoo, tiny(zoo), "metrics=[AUC, logloss]", "group_id=null")
    model_class = load_model_class(zoo, zoo.name)
    params = {**experiment.flat(), "gpu": -1, "model_id": "stock", "model_root": str(tmp_path), "verbose": 0}
    model = model_class(make_feature_map(experiment), **params)
    Path(model.model_dir).mkdir(parents=True)
    batches = list(Batches(make_columns(model.feature_map, 256), 64))
    model.fit(batches, epochs=2, validation_data=batches)
    assert set(model.evaluate(batches)) == {"AUC", "logloss"}
