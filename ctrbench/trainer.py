# SPDX-License-Identifier: Apache-2.0
"""The training loop: FuxiCTR's semantics, for any FuxiCTR model.

A model that keeps FuxiCTR's own loss and step is trained by the fast path: merged embedding table, L2 and clipping
inside the optimizer, cheaper dropout masks. Where a model overrides `train_step`, `compute_loss`,
`regularization_loss` or `compile`, or asks for another optimizer or for L1, its own `train_step` runs as written; so do
its own `get_labels`, `evaluate`, `evaluate_metrics`, `checkpoint_and_earlystop` and `lr_decay`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from fuxictr.pytorch.models import BaseModel
from fuxictr.pytorch.torch_utils import get_optimizer
from torch import Tensor

from ctrbench import hooks
from ctrbench.batches import Batch, Batches
from ctrbench.checkpoint import (
    load_checkpoint,
    load_weights,
    random_state,
    restore_random_state,
    save_checkpoint,
    save_weights,
)
from ctrbench.dropout import speed_up_dropout
from ctrbench.embedding import embedding_parameters, merge_embeddings
from ctrbench.errors import ConfigError, CtrbenchError, DataError, InterruptedRunError, TrainingError
from ctrbench.files import shown_path
from ctrbench.metrics import evaluate_metrics
from ctrbench.optim import CoupledAdam
from ctrbench.schema import TrainingConfig
from ctrbench.validation import parse_regularizer

# An evaluation is an improvement when it is better than the best by more than this (FuxiCTR).
MIN_DELTA = 1e-6
# Reading the loss stalls a GPU, so there it is only looked at this often between evaluations.
GPU_LOSS_CHECK_STEPS = 200
logger = logging.getLogger(__name__)
Watch = Callable[[Iterable[Batch], int, str], Iterator[Batch]]


@dataclasses.dataclass
class Progress:
    """Where a training run stands; what a checkpoint needs beyond weights, optimizer and random generators."""

    epoch: int = 0
    batch: int = 0
    total_steps: int = 0
    best_value: float | None = None
    best_epoch: int = 0
    stopping_steps: int = 0
    is_stopped: bool = False
    loss_sum: float = 0.0
    loss_steps: int = 0
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class Trainer:
    """Trains, evaluates and predicts with one model.

    Args:
        model: a `fuxictr` model, already on its device.
        settings: the training section of the configuration.
        run_dir: where best.safetensors and last.ckpt go; None keeps nothing on disk; the last weights stay.
        watch: wraps an iterable of batches to show progress.
        on_evaluation: called after every evaluation with all records so far (epoch, loss, metrics, ...).
        use_fast_path: False trains by the model's own `train_step` throughout, the plain form that the fast path equals.
        should_stop: asked after every step; when it says so, a checkpoint is written and `InterruptedRunError` raised.
    """

    def __init__(
        self,
        model: BaseModel,
        settings: TrainingConfig,
        run_dir: Path | None = None,
        watch: Watch | None = None,
        on_evaluation: Callable[[list[dict[str, Any]]], None] | None = None,
        use_fast_path: bool = True,
        should_stop: Callable[[], bool] = lambda: False,
    ):
        self.model = model
        self.settings = settings
        self.device: torch.device = model.device
        self.best_weights = run_dir / "best.safetensors" if run_dir else None
        self.last_checkpoint = run_dir / "last.ckpt" if run_dir else None
        self.watch: Watch = watch or (lambda batches, count, label: iter(batches))
        self.on_evaluation = on_evaluation or (lambda history: None)
        self.should_stop = should_stop
        self.progress = Progress()
        self.monitor = {settings.monitor: 1} if isinstance(settings.monitor, str) else settings.monitor
        self._has_old_add_loss = hooks.takes_inputs(model)
        self.uses_fast_path = use_fast_path and _keeps_stock_loop(model, settings)
        if self.uses_fast_path:
            merge_embeddings(model)
            if self.device.type == "cpu":
                speed_up_dropout(model)
            model.optimizer = _coupled_adam(model, settings)
        elif getattr(model, "optimizer", None) is None:
            model.optimizer = get_optimizer(settings.optimizer, model.parameters(), settings.learning_rate)
        model._max_gradient_norm = settings.max_gradient_norm

    @property
    def items_for_batches(self) -> dict[str, Tensor] | None:
        """The item table if the batches are to carry the target item's features.

        A model with the class attribute `reads_item_table = True` looks items up in `feature_map.item_table` itself.
        """
        table: dict[str, Tensor] | None = getattr(self.model.feature_map, "item_table", None)
        return None if getattr(self.model, "reads_item_table", False) else table

    def fit(self, train: Batches, valid: Batches | None, resume: bool = False) -> Progress:
        """Train until `epochs` or early stopping, then load the best weights.

        Raises:
            TrainingError: the loss or the monitored metric is no longer finite.
        """
        if resume:
            self._restore()
        at = self.progress
        eval_steps = self.settings.eval_steps or len(train)
        self.model._eval_steps = eval_steps
        logger.info("Start training: %d batches/epoch", len(train))
        if not at.is_stopped:
            logger.info("************ Epoch=%d start ************", at.epoch + 1)
        while at.epoch < self.settings.epochs and not at.is_stopped:
            self._train_epoch(train, valid, eval_steps)
            if not at.is_stopped:
                logger.info("************ Epoch=%d end ************", at.epoch + 1)
                at.epoch, at.batch = at.epoch + 1, 0
        logger.info("Training finished.")
        if self.best_weights and self.best_weights.exists():
            logger.info("Load best model: %s", shown_path(self.best_weights))
            load_weights(self.best_weights, self.model)
        return at

    def step(self, batch: Batch) -> Tensor:
        """One optimizer step.

        Returns:
            The training loss with its penalty, a detached scalar on the device.
        """
        model = self.model
        if not self.uses_fast_path:
            return hooks.plain_step(model, batch, self._has_old_add_loss).detach()
        model.optimizer.zero_grad()
        loss = hooks.task_loss(model, batch, self._has_old_add_loss)
        loss.backward()
        penalty: Tensor = model.optimizer.step()
        return loss.detach() + penalty

    @torch.inference_mode()
    def predict(self, batches: Batches, label: str = "Predict") -> Tensor:
        """Predictions (N,) in row order, on the device."""
        self.model.eval()
        outputs = [
            self.model.forward(batch)["y_pred"].reshape(-1) for batch in self.watch(batches, len(batches), label)
        ]
        return torch.cat(outputs)

    def evaluate(self, batches: Batches, metrics: Iterable[str] | None = None) -> dict[str, float]:
        """Metrics on a split; `metrics` of the configuration by default.

        Raises:
            DataError: the split has no label.
        """
        feature_map = self.model.feature_map
        label = feature_map.labels[0]
        if label not in batches.names:
            raise DataError(f"the split has no label column '{label}' to evaluate against: use predict")
        names = list(metrics or self.settings.metrics)
        if hooks.overrides(self.model, "evaluate"):
            own: dict[str, float] = self.model.evaluate(batches, metrics=names)  # it logs for itself
            return own
        y_pred = self.predict(batches, "Evaluate")
        y_true = self._column(batches, label, "get_labels")
        group_id = self._column(batches, feature_map.group_id, "get_group_id") if feature_map.group_id else None
        if hooks.overrides(self.model, "evaluate_metrics"):
            values = hooks.own_metrics(self.model, y_true, y_pred, names, group_id)
        else:
            values = evaluate_metrics(y_true, y_pred, names, group_id)
        logger.info("[Metrics] %s", " - ".join(f"{name}: {value:.6f}" for name, value in values.items()))
        return values

    def probe(self, batch: Batch) -> None:
        """Run the model on a few rows, so that one that does not fit the data says so before anything is written.

        Raises:
            ConfigError: the model fails.
        """
        self.model.eval()
        try:
            with torch.random.fork_rng(devices=[]), torch.inference_mode():
                self.model.forward(batch)
        except CtrbenchError:
            raise
        except Exception as error:
            what = (str(error).strip().splitlines() or [""])[0]
            raise ConfigError(
                f"{self.settings.model} fails on the first rows of {self.settings.dataset_id}: {type(error).__name__}: "
                f"{what}: check embedding_dim, feature_encoder and the model's keys against the columns"
            ) from error

    def _column(self, batches: Batches, name: str, hook: str) -> Tensor:
        own = hooks.overrides(self.model, hook)
        return hooks.by_batch(self.model, batches, hook) if own else batches.column(name)

    def _train_epoch(self, train: Batches, valid: Batches | None, eval_steps: int) -> None:
        at, model = self.progress, self.model
        model.train()
        started = time.perf_counter()
        losses = torch.zeros((), device=self.device)
        steps = 0
        batches = train.at(at.epoch, at.batch)
        remaining = len(train) - at.batch
        model._epoch_index = at.epoch
        for batch in self.watch(batches, remaining, f"Epoch {at.epoch + 1}"):
            model._batch_index = at.batch
            at.batch += 1
            at.total_steps += 1
            model._total_steps = at.total_steps
            losses += self._guarded_step(batch)
            steps += 1
            is_evaluation = at.total_steps % eval_steps == 0
            is_asked_to_stop = self.should_stop()
            is_checkpoint = is_asked_to_stop or at.total_steps % (self.settings.checkpoint_every or sys.maxsize) == 0
            if self.device.type == "cpu" or steps == GPU_LOSS_CHECK_STEPS or is_evaluation or is_checkpoint:
                at.loss_sum, at.loss_steps = at.loss_sum + self._finite(losses), at.loss_steps + steps
                losses, steps = torch.zeros((), device=self.device), 0
            if is_evaluation:
                at.train_seconds += time.perf_counter() - started
                self._evaluate_and_decide(valid, len(train))
                started = time.perf_counter()
            elif is_checkpoint:
                self._save()
            if is_asked_to_stop:
                raise InterruptedRunError(f"stopped in epoch {at.epoch + 1}, batch {at.batch}")
            if at.is_stopped:
                break
        at.train_seconds += time.perf_counter() - started

    def _guarded_step(self, batch: Batch) -> Tensor:
        try:
            return self.step(batch)
        except RuntimeError as error:
            # torch's binary cross entropy refuses a prediction that is nan before the loss could show it.
            if "between 0 and 1" in str(error) or "device-side assert" in str(error):
                raise self._diverged(math.nan) from error
            raise

    def _finite(self, loss: Tensor) -> float:
        value = float(loss)
        if not math.isfinite(value):
            raise self._diverged(value)
        return value

    def _diverged(self, value: float) -> TrainingError:
        at = self.progress
        return TrainingError(
            f"the training loss became {value} in epoch {at.epoch + 1}, batch {at.batch}: lower learning_rate or "
            "max_gradient_norm, or raise embedding_regularizer"
        )

    def _evaluate_and_decide(self, valid: Batches | None, steps_per_epoch: int) -> None:
        at = self.progress
        train_loss = at.loss_sum / max(at.loss_steps, 1)
        logger.info("Train loss: %.6f", train_loss)
        at.loss_sum, at.loss_steps = 0.0, 0
        record: dict[str, Any] = {"epoch": at.epoch + 1, "step": at.total_steps, "train_loss": train_loss}
        record["learning_rate"] = self.model.optimizer.param_groups[0]["lr"]
        started = time.perf_counter()
        if valid is None:
            at.best_epoch = at.epoch + 1
            self._save_best()
        else:
            logger.info("Evaluation @epoch %d - batch %d: ", at.epoch + 1, at.batch)
            values = self.evaluate(valid, list(self.monitor))
            record.update(values)
            self._decide(values)
            self.model.train()
        at.evaluate_seconds += time.perf_counter() - started
        record.update(train_seconds=at.train_seconds, evaluate_seconds=at.evaluate_seconds)
        at.history.append(record)
        if at.batch == steps_per_epoch and not at.is_stopped:
            # A resumed run starts with the next epoch.
            self._save(dataclasses.replace(at, epoch=at.epoch + 1, batch=0))
        else:
            self._save()
        self.on_evaluation(at.history)

    def _decide(self, values: dict[str, float]) -> None:
        """FuxiCTR's rule: without an improvement cut the learning rate at once, and stop after `patience` of these."""
        at, settings = self.progress, self.settings
        value = sum(weight * values[name] for name, weight in self.monitor.items() if weight)
        if not math.isfinite(value):
            raise TrainingError(
                f"the monitored {' + '.join(self.monitor)} is {value} in epoch {at.epoch + 1}: the validation split "
                "needs rows of both classes (and of usable groups)"
            )
        if hooks.overrides(self.model, "checkpoint_and_earlystop"):
            self._decide_by_model(values, value)
            return
        sign = 1 if settings.monitor_mode == "max" else -1
        if at.best_value is not None and sign * value < sign * at.best_value + MIN_DELTA:
            at.stopping_steps += 1
            logger.info("Monitor(%s)=%.6f STOP!", settings.monitor_mode, value)
            if settings.reduce_lr_on_plateau:
                self._reduce_learning_rate()
        else:
            at.best_value, at.best_epoch, at.stopping_steps = value, at.epoch + 1, 0
            logger.info("Save best model: monitor(%s)=%.6f", settings.monitor_mode, value)
            self._save_best()
        if not settings.save_best_only:
            self._save_best()
        if at.stopping_steps >= settings.early_stop_patience:
            at.is_stopped = True
            logger.info("********* Epoch=%d early stop *********", at.epoch + 1)

    def _decide_by_model(self, values: dict[str, float], value: float) -> None:
        """The model's own `checkpoint_and_earlystop`, with the state and the attributes that FuxiCTR's has."""
        at, model = self.progress, self.model
        worst = -math.inf if self.settings.monitor_mode == "max" else math.inf
        model._best_metric = worst if at.best_value is None else at.best_value
        model._stopping_steps, model._stop_training = at.stopping_steps, False

        def save_weights(checkpoint: str) -> None:
            at.best_epoch = at.epoch + 1
            self._save_best()

        model.save_weights = save_weights
        model.checkpoint_and_earlystop(values)
        del model.save_weights
        at.best_value = model._best_metric if math.isfinite(model._best_metric) else value
        at.stopping_steps, at.is_stopped = model._stopping_steps, model._stop_training

    def _reduce_learning_rate(self) -> None:
        if hooks.overrides(self.model, "lr_decay"):
            self.model.lr_decay()
            return
        for group in self.model.optimizer.param_groups:
            group["lr"] = max(group["lr"] * self.settings.lr_decay_factor, self.settings.min_learning_rate)
        logger.info("Reduce learning rate on plateau: %.6f", self.model.optimizer.param_groups[0]["lr"])

    def _save_best(self) -> None:
        if self.best_weights:
            save_weights(self.best_weights, self.model)

    def _save(self, progress: Progress | None = None) -> None:
        if self.last_checkpoint:
            state = {
                "progress": dataclasses.asdict(progress or self.progress),
                "model": self.model.state_dict(),
                "optimizer": self.model.optimizer.state_dict(),
                "random": random_state(self.device),
            }
            save_checkpoint(self.last_checkpoint, state)

    def _restore(self) -> None:
        assert self.last_checkpoint is not None
        state = load_checkpoint(self.last_checkpoint)
        try:
            self.progress = Progress(**state["progress"])
            self.model.load_state_dict(state["model"])
            self.model.optimizer.load_state_dict(state["optimizer"])
            restore_random_state(state["random"], self.device)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"{self.last_checkpoint}: of another version or model ({str(error).splitlines()[0]}): "
                "start over with --fresh"
            ) from error
        logger.info("Resume after epoch %d, step %d", self.progress.epoch, self.progress.total_steps)


def _keeps_stock_loop(model: BaseModel, settings: TrainingConfig) -> bool:
    is_stock = isinstance(model, BaseModel) and not any(hooks.overrides(model, name) for name in hooks.STEP_HOOKS)
    penalties = parse_regularizer(settings.embedding_regularizer) + parse_regularizer(settings.net_regularizer)
    has_optimizer = getattr(model, "optimizer", None) is not None
    return is_stock and not has_optimizer and settings.optimizer.lower() == "adam" and all(p == 2 for p, _ in penalties)


def _coupled_adam(model: BaseModel, settings: TrainingConfig) -> CoupledAdam:
    embedding = list(embedding_parameters(model))
    known = {id(parameter) for parameter in embedding}
    net = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [
        (embedding, sum(weight for _, weight in parse_regularizer(settings.embedding_regularizer))),
        (net, sum(weight for _, weight in parse_regularizer(settings.net_regularizer))),
    ]
    return CoupledAdam(groups, settings.learning_rate, settings.max_gradient_norm)
