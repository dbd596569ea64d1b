# SPDX-License-Identifier: Apache-2.0
"""The trainer against FuxiCTR's own loop, and its rules for evaluations, learning rate, stopping and resuming."""

from __future__ import annotations

import copy
import itertools
import logging
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.models import BaseModel

from ctrbench import stopping
from ctrbench import trainer as trainer_module
from ctrbench.batches import Batches
from ctrbench.embedding import MergedEmbeddingDict
from ctrbench.errors import DataError, TrainingError
from ctrbench.schema import TrainingConfig
from ctrbench.trainer import Trainer
from ctrbench.zoo import build_model, load_model_class

ROOT = Path(__file__).resolve().parents[1]
FEATURES: dict[str, dict[str, Any]] = {
    "price": {"source": "", "type": "numeric"},
    "user": {"source": "", "type": "categorical", "padding_idx": 0, "vocab_size": 40},
    "item": {"source": "", "type": "categorical", "padding_idx": 0, "vocab_size": 30},
    "tags": {
        "source": "",
        "type": "sequence",
        "padding_idx": 0,
        "vocab_size": 12,
        "max_len": 4,
        "feature_encoder": "layers.MaskedAveragePooling()",
    },
}
PARAMS: dict[str, dict[str, Any]] = {
    "SDCNv3": {"num_deep_cross_layers": 2, "num_shallow_cross_layers": 2},
    "DCNv3": {"num_cross_layers": 2},
}


def make_columns(rows: int = 700, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    user = torch.randint(1, 40, (rows,), generator=generator, dtype=torch.int32)
    item = torch.randint(1, 30, (rows,), generator=generator, dtype=torch.int32)
    label = ((user + item) % 2 == 0).float()
    flips = torch.rand(rows, generator=generator) < 0.1
    return {
        "price": torch.randn(rows, generator=generator),
        "user": user,
        "item": item,
        "tags": torch.randint(0, 12, (rows, 4), generator=generator, dtype=torch.int32),
        "label": torch.where(flips, 1 - label, label),
    }


def make_settings(**values: Any) -> TrainingConfig:
    return TrainingConfig(**{"model": "SDCNv3", "dataset_id": "test", "batch_size": 64, "verbose": 0, **values})


def make_model(settings: TrainingConfig, dropout: float = 0.0, features: dict[str, Any] | None = None) -> BaseModel:
    feature_map = FeatureMap("test", "unused")
    feature_map.features.update(copy.deepcopy(features or FEATURES))
    feature_map.labels = ["label"]
    feature_map.num_fields = feature_map.get_num_fields()
    params = {**settings.model_dump(), **PARAMS[settings.model], "embedding_dim": 8, "batch_norm": True}
    dropouts = {"SDCNv3": ("deep_net_dropout", "shallow_net_dropout"), "DCNv3": ("net_dropout",)}[settings.model]
    params.update(dict.fromkeys(dropouts, dropout))
    torch.manual_seed(1)
    model_class = load_model_class(ROOT / "model_zoo" / settings.model, settings.model)
    model = build_model(model_class, feature_map, {**params, "gpu": -1, "model_id": "m"}, "test")
    for name, parameter in model.named_parameters():
        if name.startswith("embedding_layer"):  # large enough for gradients to be clipped
            parameter.data.normal_(std=0.5)
            if parameter.shape[0] > 1 and parameter.shape[1] > 1:
                parameter.data[0] = 0.0
    return model


class Recorder:
    """A list of batches as FuxiCTR's `fit` wants it."""

    def __init__(self, batches: list[dict[str, torch.Tensor]]):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        return iter(self.batches)


@pytest.mark.parametrize("model_name", ["DCNv3", "SDCNv3"])
@pytest.mark.parametrize("regularizers", [(0.0, 0.0), (0.3, 0.0), (1e-2, 1e-3)])
@pytest.mark.parametrize("max_norm", [10.0, 0.05], ids=["fuxictr_norm", "clipping_active"])
def test_50_steps_equal_fuxictr(model_name: str, regularizers: tuple[float, float], max_norm: float) -> None:
    embedding_regularizer, net_regularizer = regularizers
    settings = make_settings(
        model=model_name,
        embedding_regularizer=embedding_regularizer,
        net_regularizer=net_regularizer,
        max_gradient_norm=max_norm,
        learning_rate=1e-2,
    )
    fuxictr_model = make_model(settings)
    BaseModel.compile(fuxictr_model, "adam", "binary_crossentropy", settings.learning_rate)
    fuxictr_model._max_gradient_norm = max_norm
    trainer = Trainer(make_model(settings), settings)
    assert trainer.uses_fast_path
    assert any(isinstance(module, MergedEmbeddingDict) for module in trainer.model.modules())
    batches = Batches(make_columns(), settings.batch_size, shuffle=True, seed=3)
    fuxictr_model.train()
    trainer.model.train()
    steps = 0
    while steps < 50:
        for batch in batches:
            expected, got = fuxictr_model.train_step(batch), trainer.step(batch)
            torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-6)
            steps += 1
    expected_state, state = fuxictr_model.state_dict(), trainer.model.state_dict()
    assert state.keys() == expected_state.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, expected_state[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_plain_path_runs_fuxictrs_own_step() -> None:
    settings = make_settings(embedding_regularizer="l1_l2(1e-4,1e-3)")
    trainer = Trainer(make_model(settings), settings)
    assert not trainer.uses_fast_path and type(trainer.model.optimizer) is torch.optim.Adam
    before = float(trainer.step(next(iter(Batches(make_columns(), 700)))))
    for _ in range(30):
        after = float(trainer.step(next(iter(Batches(make_columns(), 700)))))
    assert after < before


def test_an_overridden_train_step_runs_as_written() -> None:
    settings = make_settings()
    model = make_model(settings)
    calls = []

    class Custom(type(model)):  # type: ignore[misc]
        def train_step(self, batch_data: Any) -> torch.Tensor:
            calls.append(len(batch_data["label"]))
            return super().train_step(batch_data)

    model.__class__ = Custom
    trainer = Trainer(model, settings)
    assert not trainer.uses_fast_path
    trainer.step(next(iter(Batches(make_columns(), 64))))
    assert calls == [64]


def fit(tmp_path: Path, rows: int = 700, resume: bool = False, **values: Any) -> Trainer:
    settings = make_settings(epochs=3, learning_rate=1e-2, early_stop_patience=20, **values)
    torch.manual_seed(7)
    trainer = Trainer(make_model(settings, dropout=0.2), settings, tmp_path)
    train = Batches(make_columns(rows), settings.batch_size, shuffle=True, seed=5)
    trainer.fit(train, Batches(make_columns(300, seed=1), 128), resume)
    return trainer


def test_same_seed_same_weights(tmp_path: Path) -> None:
    first, second = fit(tmp_path / "a"), fit(tmp_path / "b")
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


@pytest.mark.parametrize("stop_at", [5, 11, 17])
@pytest.mark.parametrize("options", [{}, {"eval_steps": 4}, {"checkpoint_every": 3}, {"checkpoint_every": "0.1 min"}])
def test_resume_is_bit_identical(tmp_path: Path, stop_at: int, options: dict[str, Any], monkeypatch: Any) -> None:
    # A clock by which every look at it, one a step, takes a second.
    clock = types.SimpleNamespace(monotonic=itertools.count(0.0).__next__)
    monkeypatch.setattr("ctrbench.checkpoint.time", clock)
    whole = fit(tmp_path / "whole", **options)
    step = Trainer.step
    steps = 0

    def interrupted(self: Trainer, batch: Any) -> torch.Tensor:
        nonlocal steps
        if steps == stop_at:
            raise KeyboardInterrupt
        steps += 1
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "broken", **options)
    monkeypatch.setattr(Trainer, "step", step)
    resumed = fit(tmp_path / "broken", resume=(tmp_path / "broken" / "last.ckpt").exists(), **options)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name

    def without_times(trainer: Trainer) -> list[dict[str, Any]]:
        return [{k: v for k, v in r.items() if not k.endswith("seconds")} for r in trainer.progress.history]

    assert without_times(whole) == without_times(resumed)


def test_checkpoints_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("ctrbench.checkpoint.time", types.SimpleNamespace(monotonic=lambda: now))
    step, save = Trainer.step, trainer_module.save_checkpoint
    written: list[int] = []

    def slow_step(self: Trainer, batch: Any) -> torch.Tensor:
        nonlocal now
        now += 10.0
        return step(self, batch)

    def slow_save(path: Path, state: dict[str, Any]) -> None:
        nonlocal now
        now += 15.0  # does not count: otherwise there might be nothing but checkpoints
        written.append(state["progress"]["total_steps"])
        save(path, state)

    monkeypatch.setattr(Trainer, "step", slow_step)
    monkeypatch.setattr(trainer_module, "save_checkpoint", slow_save)
    by_clock = fit(tmp_path / "clock", checkpoint_every="0.4 min")  # of 11 steps in each of 3 epochs
    assert written == [3, 6, 9, 11, 14, 17, 20, 22, 25, 28, 31, 33]  # an evaluation's checkpoint counts too
    monkeypatch.undo()
    without = fit(tmp_path / "without")
    assert all(torch.equal(x, without.model.state_dict()[name]) for name, x in by_clock.model.state_dict().items())
    figures = [[record["train_loss"] for record in t.progress.history] for t in (by_clock, without)]
    assert figures[0] == figures[1]


def decide(values: list[float], **options: Any) -> tuple[Trainer, list[float]]:
    settings = make_settings(**{"early_stop_patience": 9, **options})
    trainer = Trainer(make_model(settings), settings)
    rates = []
    for value in values:
        stopping.decide(trainer, {"AUC": value, "logloss": value})
        rates.append(trainer.model.optimizer.param_groups[0]["lr"])
    return trainer, rates


def test_learning_rate_falls_at_every_evaluation_without_improvement() -> None:
    # The sequence and the rates are those measured on FuxiCTR 2.3.10.
    _, rates = decide([0.7, 0.6, 0.6, 0.71, 0.5, 0.5, 0.5])
    assert rates == pytest.approx([1e-3, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6, 1e-6])


def test_improvement_must_exceed_1e_6() -> None:
    trainer, rates = decide([0.7, 0.7000005, 0.7000021])
    assert rates == pytest.approx([1e-3, 1e-4, 1e-4])
    assert trainer.progress.best_value == 0.7000021 and trainer.progress.stopping_steps == 0


def test_early_stop_counts_consecutive_evaluations() -> None:
    trainer, _ = decide([0.7, 0.6, 0.71, 0.6, 0.6], early_stop_patience=2)
    assert trainer.progress.is_stopped


@pytest.mark.parametrize(
    ("options", "values", "best"),
    [
        ({"monitor": "logloss", "monitor_mode": "min"}, [0.5, 0.4, 0.45], 0.4),
        ({"monitor": {"AUC": 1, "logloss": -1}}, [0.5, 0.4], 0.0),
        ({"monitor": {"AUC": 1, "logloss": 0}}, [0.5, 0.6], 0.6),
    ],
)
def test_monitor(options: dict[str, Any], values: list[float], best: float) -> None:
    trainer, _ = decide(values, **options)
    assert trainer.progress.best_value == pytest.approx(best)


def test_factor_and_floor_of_the_learning_rate_are_configurable() -> None:
    _, rates = decide([0.7, 0.6, 0.6], lr_decay_factor=0.5, min_learning_rate=4e-4)
    assert rates == pytest.approx([1e-3, 5e-4, 4e-4])
    _, rates = decide([0.7, 0.6], reduce_lr_on_plateau=False)
    assert rates == pytest.approx([1e-3, 1e-3])


def test_a_validation_split_of_one_class_is_refused(tmp_path: Path) -> None:
    settings = make_settings(epochs=1)
    valid = make_columns(100)
    valid["label"] = torch.ones(100)
    trainer = Trainer(make_model(settings), settings, tmp_path)
    with pytest.raises(TrainingError, match="the monitored AUC is nan in epoch 1: the validation split needs rows"):
        trainer.fit(Batches(make_columns(), 64), Batches(valid, 64))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    settings = make_settings(epochs=1)
    trainer = Trainer(make_model(settings), settings, tmp_path)
    columns = make_columns()
    columns["price"][100] = float("nan")
    with pytest.raises(TrainingError, match="became nan in epoch 1, batch 2: lower learning_rate"):
        trainer.fit(Batches(columns, 64), None)


def test_evaluation_without_labels_is_refused() -> None:
    settings = make_settings()
    columns = make_columns()
    del columns["label"]
    with pytest.raises(DataError, match="no label column 'label' to evaluate against: use predict"):
        Trainer(make_model(settings), settings).evaluate(Batches(columns, 64))


def test_training_without_validation_keeps_the_last_weights(tmp_path: Path) -> None:
    settings = make_settings(epochs=2)
    trainer = Trainer(make_model(settings), settings, tmp_path)
    progress = trainer.fit(Batches(make_columns(), 64), None)
    assert progress.best_epoch == 2 and (tmp_path / "best.safetensors").exists()


def test_log_lines_of_fuxictr(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(tmp_path)
    text = "\n".join(record.getMessage() for record in caplog.records)
    for line in (
        "Start training: 11 batches/epoch",
        "************ Epoch=1 start ************",
        "Train loss: 0.",
        "Evaluation @epoch 1 - batch 11: ",
        "[Metrics] AUC: 0.",
        "Save best model: monitor(max)=0.",
        "************ Epoch=1 end ************",
        "Training finished.",
        "Load best model: ",
    ):
        assert line in text
