# SPDX-License-Identifier: Apache-2.0
"""Model folders in FuxiCTR's layout that replace parts of the loop: each part runs as written."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from ctrbench.config import load_experiment
from ctrbench.errors import ConfigError, TrainingError
from ctrbench.predict import write_predictions
from ctrbench.run import run
from ctrbench.zoo import load_model_class

BODY = """
import torch
from torch import nn
from fuxictr.pytorch.models import BaseModel
from fuxictr.pytorch.layers import FeatureEmbedding

class Small(BaseModel):
    calls = []

    def __init__(self, feature_map, model_id="Small", gpu=-1, learning_rate=1e-3, embedding_dim=8, **kwargs):
        super().__init__(feature_map, model_id=model_id, gpu=gpu, **kwargs)
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.fc = nn.Linear(feature_map.sum_emb_out_dim(), 1)
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs):
        x = self.embedding_layer(self.get_inputs(inputs), flatten_emb=True)
        return {"y_pred": self.output_activation(self.fc(x))}
"""
HOOKS = {
    "plain": "",
    "old_add_loss": """
    def add_loss(self, inputs):
        self.calls.append("add_loss")
        return self.loss_fn(self.forward(inputs)["y_pred"], self.get_labels(inputs), reduction="mean")
""",
    "train_step": """
    def train_step(self, batch):
        self.calls.append("train_step")
        return super().train_step(batch)
""",
    "decision": """
    def lr_decay(self, factor=0.5, min_lr=1e-6):
        self.calls.append("lr_decay")
        return super().lr_decay(factor, min_lr)

    def checkpoint_and_earlystop(self, logs, min_delta=1e-6):
        self.calls.append(("decide", sorted(logs)))
        super().checkpoint_and_earlystop(logs, min_delta=10.0 if self._best_metric > 0 else min_delta)
""",
    "lr_decay": """
    def lr_decay(self, factor=0.5, min_lr=1e-6):
        self.calls.append("lr_decay")
        return super().lr_decay(factor, min_lr)
""",
    "labels": """
    def get_labels(self, inputs):
        return 1 - super().get_labels(inputs)
""",
    "metrics": """
    def evaluate_metrics(self, y_true, y_pred, metrics, group_id=None):
        return {name: 0.25 for name in metrics}
""",
    "evaluate": """
    def evaluate(self, data_generator, metrics=None):
        self.calls.append("evaluate")
        return {name: 0.75 for name in metrics}
""",
    "default_add_loss": """
    def add_loss(self, return_dict, y_true=None):
        self.calls.append("add_loss")
        return super().add_loss(return_dict, y_true)
""",
    "reduction_add_loss": """
    def add_loss(self, inputs, reduction="mean"):
        self.calls.append("add_loss")
        return self.loss_fn(self.forward(inputs)["y_pred"], self.get_labels(inputs), reduction=reduction)
""",
    "stops": """
    def train_step(self, batch):
        self.calls.append((self._total_steps, self._steps_per_epoch))
        self._stop_training = self._total_steps == 11
        return super().train_step(batch)
""",
    "rate": """
    def compile(self, optimizer, loss, lr):
        super().compile("SGD", loss, 10 * lr)
""",
    "partial": """
    def evaluate(self, data_generator, metrics=None):
        return {"Recall": 0.5}
""",
    "words": """
    def evaluate(self, data_generator, metrics=None):
        return {name: "good" for name in metrics}
""",
    "predict": """
    def predict(self, data_generator):
        return [0.5]
""",
    "many_rows": """
    def get_inputs(self, inputs, feature_source=None):
        assert len(inputs["label"]) >= 100, "at least 100 rows"
        return super().get_inputs(inputs, feature_source)
""",
}


def folder(root: Path, hook: str) -> Path:
    zoo = root / f"small_{hook}"
    (zoo / "src").mkdir(parents=True)
    (zoo / "config").mkdir()
    (zoo / "src" / "Small.py").write_text(BODY + HOOKS[hook])
    (zoo / "src" / "__init__.py").write_text("from .Small import Small\n")
    base = (
        "Base: {model: Small, dataset_id: tiny_ctr, batch_size: 500, epochs: 3, learning_rate: 0.01, embedding_dim: 8}"
    )
    (zoo / "config" / "model_config.yaml").write_text(f"{base}\nSmall_test: {{}}\n")
    shipped = Path(__file__).resolve().parents[1] / "config" / "dataset_config" / "tiny_ctr.yaml"
    (zoo / "config" / "dataset_config.yaml").write_text(shipped.read_text())
    return zoo


def train(root: Path, hook: str, overrides: list[str], *more: str) -> tuple[dict[str, Any], list[Any], list[Any]]:
    """The report, what the hooks saw and the curve of three epochs."""
    zoo = folder(root, hook)
    experiment = load_experiment(zoo / "config", "Small_test", zoo, [*overrides, *more])
    report = run(experiment)
    curve = [json.loads(line) for line in (experiment.run_dir / "metrics.jsonl").read_text().splitlines()]
    return report, load_model_class(zoo, "Small").calls, curve


def test_fuxictr_2_0_add_loss_gets_the_batch(tmp_path: Path, tiny_overrides: list[str]) -> None:
    plain, _, _ = train(tmp_path, "plain", tiny_overrides)
    report, calls, _ = train(tmp_path, "old_add_loss", tiny_overrides)
    assert report["uses_fast_path"] and len(calls) == 3 * 8
    assert report["metrics"] == plain["metrics"]
    slow, _, _ = train(tmp_path / "sgd", "old_add_loss", tiny_overrides, "optimizer=Adamax")
    assert not slow["uses_fast_path"] and slow["metrics"]["test"]["AUC"] > 0.5


@pytest.mark.parametrize("hook", ["default_add_loss", "reduction_add_loss"])
def test_the_signatures_of_add_loss(tmp_path: Path, tiny_overrides: list[str], hook: str) -> None:
    plain, _, _ = train(tmp_path, "plain", tiny_overrides)
    report, calls, _ = train(tmp_path, hook, tiny_overrides)
    assert len(calls) == 3 * 8 and report["metrics"] == plain["metrics"]


def test_a_train_step_can_end_the_training(tmp_path: Path, tiny_overrides: list[str]) -> None:
    report, calls, curve = train(tmp_path, "stops", tiny_overrides)
    assert calls == [(step, 8) for step in range(1, 12)]
    assert report["epochs"] == 2 and len(curve) == 1 and report["best_epoch"] == 1


def test_the_optimizer_that_a_model_asks_for(tmp_path: Path, tiny_overrides: list[str]) -> None:
    """`compile` decides, not the configuration; FuxiCTR's own is only recorded."""
    report, _, curve = train(tmp_path, "rate", tiny_overrides)
    assert not report["uses_fast_path"] and curve[0]["learning_rate"] == pytest.approx(0.1)
    zoo = folder(tmp_path / "asked", "plain")
    code = (zoo / "src" / "Small.py").read_text()
    (zoo / "src" / "Small.py").write_text(
        code.replace('kwargs["loss"], learning_rate', 'kwargs["loss"], learning_rate / 4')
    )
    experiment = load_experiment(zoo / "config", "Small_test", zoo, tiny_overrides)
    assert run(experiment)["uses_fast_path"]
    first = json.loads((experiment.run_dir / "metrics.jsonl").read_text().splitlines()[0])
    assert first["learning_rate"] == pytest.approx(0.0025)


def test_own_evaluations_that_say_nothing_of_use(tmp_path: Path, tiny_overrides: list[str]) -> None:
    with pytest.raises(TrainingError, match="Small: its evaluate gives Recall: the monitored AUC is missing"):
        train(tmp_path, "partial", tiny_overrides)
    with pytest.raises(TrainingError, match=r"Small: its evaluate must give one number for each metric, got .*good"):
        train(tmp_path, "words", tiny_overrides)


def test_own_predictions_must_be_of_all_rows(tmp_path: Path, tiny_overrides: list[str]) -> None:
    train(tmp_path, "predict", tiny_overrides)
    (run_dir,) = tmp_path.glob("runs/*/*/seed_*")
    with pytest.raises(ConfigError, match="Small: its predict gives 1 y_pred for 1000 rows"):
        write_predictions(run_dir, tmp_path / "out.csv")


def test_a_model_that_needs_more_than_a_few_rows(tmp_path: Path, tiny_overrides: list[str]) -> None:
    assert train(tmp_path, "many_rows", tiny_overrides)[0]["epochs"] == 3


def test_an_own_train_step_runs_as_written(tmp_path: Path, tiny_overrides: list[str]) -> None:
    plain, _, _ = train(tmp_path, "plain", tiny_overrides)
    report, calls, _ = train(tmp_path, "train_step", tiny_overrides)
    assert not report["uses_fast_path"] and calls == ["train_step"] * 24
    assert report["metrics"]["test"]["AUC"] == pytest.approx(plain["metrics"]["test"]["AUC"], abs=1e-5)


def test_an_own_decision_keeps_the_first_weights_and_halves_the_rate(tmp_path: Path, tiny_overrides: list[str]) -> None:
    report, calls, curve = train(tmp_path, "decision", tiny_overrides)
    assert calls == [("decide", ["AUC"]), ("decide", ["AUC"]), "lr_decay", ("decide", ["AUC"]), "lr_decay"]
    assert report["best_epoch"] == 1 and report["epochs"] == 3
    assert report["metrics"]["valid"]["AUC"] == pytest.approx(curve[0]["AUC"], abs=1e-9)
    assert [record["learning_rate"] for record in curve] == [0.01, 0.01, 0.005]


def test_an_own_lr_decay_sets_the_rate(tmp_path: Path, tiny_overrides: list[str]) -> None:
    more = ("monitor=logloss", "monitor_mode=min", "learning_rate=3.0", "early_stop_patience=3")
    _, calls, curve = train(tmp_path, "lr_decay", tiny_overrides, *more)
    assert calls == ["lr_decay"] * len(calls) and calls
    assert {a["learning_rate"] / b["learning_rate"] for a, b in itertools.pairwise(curve)} <= {1.0, 2.0}


def test_own_labels_metrics_and_evaluate_are_used(tmp_path: Path, tiny_overrides: list[str]) -> None:
    plain, _, _ = train(tmp_path, "plain", tiny_overrides)
    flipped, _, _ = train(tmp_path, "labels", tiny_overrides)
    assert flipped["metrics"]["test"]["AUC"] > 0.5  # both trained and evaluated on the flipped labels
    assert flipped["metrics"]["test"]["AUC"] == pytest.approx(plain["metrics"]["test"]["AUC"], abs=0.05)
    assert train(tmp_path, "metrics", tiny_overrides)[0]["metrics"]["test"] == {"AUC": 0.25, "logloss": 0.25}
    report, calls, _ = train(tmp_path, "evaluate", tiny_overrides)
    assert report["metrics"]["test"] == {"AUC": 0.75, "logloss": 0.75} and set(calls) == {"evaluate"}


def test_a_model_that_fails_on_the_data_says_so_before_anything_is_written(
    tmp_path: Path, tiny_overrides: list[str]
) -> None:
    message = (
        r"Small fails on the first rows of tiny_ctr: RuntimeError: mat1 and mat2 shapes cannot be multiplied .*check"
    )
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, "plain", tiny_overrides, "feature_specs=[{name: user_id, emb_output_dim: 4}]")
    assert not list(tmp_path.rglob("seed_*"))
