# SPDX-License-Identifier: Apache-2.0
"""The training loop: FuxiCTR's semantics, for any FuxiCTR model.

A model that keeps FuxiCTR's own loss and step is trained by the fast path: merged embedding table, L2 and clipping
inside the optimizer, cheaper dropout masks. Where a model overrides `train_step`, `compute_loss`,
`regularization_loss` or `compile`, derives from `MultiTaskModel`, or asks for another optimizer or for L1, its own
`train_step` runs as written; so do its own `checkpoint_and_earlystop`, `lr_decay`, `save_weights`, `load_weights` and
all that `ctrbench.evaluation` and `ctrbench.ownloop` respect.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from fuxictr.pytorch.models import BaseModel
from fuxictr.pytorch.torch_utils import get_optimizer
from torch import Tensor

from ctrbench import hooks
from ctrbench.acceleration import in_full_precision, make_fast_step, make_plain_step, num_rows
from ctrbench.batches import Batches
from ctrbench.checkpoint import (
    CheckpointSchedule,
    load_checkpoint,
    load_weights,
    random_state,
    restore_random_state,
    save_checkpoint,
    save_weights,
)
from ctrbench.errors import ConfigError, DataError, InterruptedRunError, TrainingError
from ctrbench.evaluation import Evaluator, Watch
from ctrbench.fastpath import keeps_stock_loop, take_fast_path
from ctrbench.files import shown_path
from ctrbench.forms import FormFinder
from ctrbench.guards import warn_of_explosion
from ctrbench.memory import enough_memory, fitting_rows, is_out_of_memory
from ctrbench.ownloop import run_own_loop
from ctrbench.schema import TrainingConfig
from ctrbench.stopping import decide

# Reading the loss stalls a GPU, so there it is only looked at this often between evaluations.
GPU_LOSS_CHECK_STEPS = 200
# What `save_weights` of a model's own writes, beside best.safetensors.
OWN_WEIGHTS = "best.model"
logger = logging.getLogger(__name__)


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
        params: what the model was constructed with, for a `fit` of its own and the length of its histories.
        data_loader: the data loader class of the model's folder, which is not run, for messages.
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
        params: Mapping[str, Any] | None = None,
        data_loader: str | None = None,
    ):
        self.model = model
        self.settings = settings
        self.device: torch.device = model.device
        self.best_weights = run_dir / "best.safetensors" if run_dir else None
        self.last_checkpoint = run_dir / "last.ckpt" if run_dir else None
        self.watch: Watch = watch or (lambda batches, count, label: iter(batches))
        self.evaluator = Evaluator(model, self.watch)
        self.on_evaluation = on_evaluation or (lambda history: None)
        self.should_stop = should_stop
        self.progress = Progress()
        self._checkpoints = CheckpointSchedule(settings.checkpoint_steps, settings.checkpoint_seconds)
        self.monitor = {settings.monitor: 1} if isinstance(settings.monitor, str) else settings.monitor
        self.params = params or {}
        self._forms = FormFinder(model, self.params.get("max_len"), data_loader)
        self._has_old_add_loss = hooks.takes_inputs(model)
        has_own_weights = hooks.overrides(model, "save_weights") or hooks.overrides(model, "load_weights")
        self._own_save_weights = model.save_weights if run_dir and has_own_weights else None
        is_asked = use_fast_path and settings.speed == "auto"
        self.uses_fast_path = is_asked and keeps_stock_loop(model, settings)
        if self.uses_fast_path:
            take_fast_path(model, settings)
        elif getattr(model, "optimizer", None) is None:
            model.optimizer = get_optimizer(settings.optimizer, model.parameters(), settings.learning_rate)
        self._tell_model(None, None)

    @property
    def evaluation_rows(self) -> int:
        """Rows of a batch without gradients."""
        return self.evaluator.rows(self.settings, self._forms.found)

    def adapt(self, batches: Batches) -> Batches:
        """The same rows in batches of the form that the model takes, found out on the first of them.

        Raises:
            ConfigError: the model runs on none.
        """
        return batches.in_form(self._forms.find(batches))

    def fit(self, train: Batches, valid: Batches | None, resume: bool = False) -> Progress:
        """Train until `epochs` or early stopping, then load the best weights.

        Raises:
            TrainingError: the loss or the monitored metric is no longer finite.
        """
        at = self.progress
        eval_steps = self.settings.eval_steps or len(train)
        self._tell_model(train, valid)
        if any(hooks.overrides(self.model, name) for name in hooks.LOOP_HOOKS):
            run_own_loop(self, train, valid, self.params)
            self.save_best()
            return at
        if resume:
            self._restore()
            at = self.progress
        self._checkpoints.restart()
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
            self.load_best()
            if self._own_save_weights:  # it may have kept others than the model's at that time
                save_weights(self.best_weights, self.model)
        else:
            self.save_best()
        return at

    def load_best(self) -> None:
        """Load the best weights of the run directory, by the model's own `load_weights` if it has one.

        Raises:
            DataError: they are missing or damaged.
        """
        assert self.best_weights is not None
        own = self.best_weights.with_name(OWN_WEIGHTS)
        if self._own_save_weights and own.exists():
            with hooks.own_code(self.model, "load_weights"):
                self.model.load_weights(str(own))
        else:
            load_weights(self.best_weights, self.model)

    def step(self, batch: Any) -> Tensor:
        """One optimizer step.

        Returns:
            The training loss with its penalty, a detached scalar on the device.
        """
        return self.built_step(batch)

    @functools.cached_property
    def built_step(self) -> Callable[[Any], Tensor]:
        """What `step` does, in the form that the configuration asks for.

        Raises:
            ConfigError: the model or the device cannot do it.
        """
        make = make_fast_step if self.uses_fast_path else make_plain_step
        return make(self.model, self.settings, self._has_old_add_loss)

    def predict(self, batches: Batches) -> Tensor:
        """Predictions (N,) in row order of a model with one output.

        Raises:
            ConfigError: it has several.
        """
        with in_full_precision(), enough_memory(self.device, batches.batch_size):
            outputs = self.evaluator.predict(batches)
        if len(outputs) != 1:
            raise ConfigError(f"{self.settings.model} has the outputs {', '.join(outputs)}: one is wanted here")
        return next(iter(outputs.values()))

    def evaluate(self, batches: Batches, metrics: Iterable[str] | None = None) -> dict[str, float]:
        """Metrics on a split; `metrics` of the configuration by default.

        Raises:
            DataError: the split has no label.
        """
        with in_full_precision(), enough_memory(self.device, batches.batch_size):
            return self.evaluator.evaluate(batches, list(metrics or self.settings.metrics))

    def _tell_model(self, train: Batches | None, valid: Batches | None) -> None:
        """Set what FuxiCTR's `fit` sets, for steps and decisions of the model's own."""
        model, settings = self.model, self.settings
        model.valid_gen, model._max_gradient_norm = valid, settings.max_gradient_norm
        model._best_metric = -math.inf if settings.monitor_mode == "max" else math.inf
        model._stopping_steps, model._stop_training = 0, False
        model._total_steps, model._batch_index, model._epoch_index = 0, 0, 0
        if train is not None:
            model._steps_per_epoch = len(train)
            model._eval_steps = settings.eval_steps or len(train)

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
            at.is_stopped = at.is_stopped or model._stop_training  # a step of its own may say so
            is_evaluation = at.total_steps % eval_steps == 0
            is_asked_to_stop = self.should_stop()
            if self.device.type == "cpu" or steps == GPU_LOSS_CHECK_STEPS or is_evaluation:
                at.loss_sum, at.loss_steps = at.loss_sum + self._finite(losses), at.loss_steps + steps
                losses, steps = torch.zeros((), device=self.device), 0
            if is_evaluation:
                at.train_seconds += time.perf_counter() - started
                self._evaluate_and_decide(valid, len(train))
                started = time.perf_counter()
            elif is_asked_to_stop or self._checkpoints.is_due(at.total_steps):
                # What was summed up so far goes on, so that no figure depends on when a checkpoint is written.
                loss_sum, loss_steps = at.loss_sum + self._finite(losses), at.loss_steps + steps
                self._save(dataclasses.replace(at, loss_sum=loss_sum, loss_steps=loss_steps))
            if is_asked_to_stop:
                where = f"epoch {at.epoch + 1}, batch {at.batch}"
                raise InterruptedRunError(f"stopped in {where}: the same command goes on from there")
            if at.is_stopped:
                break
        if steps:  # the next evaluation is in another epoch
            at.loss_sum, at.loss_steps = at.loss_sum + self._finite(losses), at.loss_steps + steps
        at.train_seconds += time.perf_counter() - started

    def _guarded_step(self, batch: Any) -> Tensor:
        try:
            return self.step(batch)
        except Exception as error:
            # torch's binary cross entropy refuses a prediction that is nan before the loss could show it.
            if isinstance(error, RuntimeError) and re.search("between 0 and 1|device-side assert", str(error)):
                raise self._diverged(math.nan) from error
            if not is_out_of_memory(error):
                with hooks.own_code(self.model, f"epoch {self.progress.epoch + 1}, batch {self.progress.batch}"):
                    raise
        # Outside the handler, whose traceback holds on to the tensors of the step.
        rows = num_rows(batch)
        fitting = fitting_rows(self.step, batch, rows)
        remedy = f"set batch_size: {fitting}, which fits" if fitting else "lower batch_size and embedding_dim"
        raise TrainingError(f"not enough memory on {self.device} for a batch of {rows} rows: {remedy}")

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
        warn_of_explosion(train_loss, at.history)
        at.loss_sum, at.loss_steps = 0.0, 0
        record: dict[str, Any] = {"epoch": at.epoch + 1, "step": at.total_steps, "train_loss": train_loss}
        record["learning_rate"] = self.model.optimizer.param_groups[0]["lr"]
        started = time.perf_counter()
        if valid is None:
            at.best_epoch = at.epoch + 1
            self.save_best()
        else:
            logger.info("Evaluation @epoch %d - batch %d: ", at.epoch + 1, at.batch)
            values = self.evaluate(valid, list(self.monitor))
            record.update(values)
            decide(self, values)
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

    def save_best(self) -> None:
        """Keep the present weights as the best of the run directory, if there is one."""
        if self.best_weights:
            save_weights(self.best_weights, self.model)
            if self._own_save_weights:
                self._own_save_weights(str(self.best_weights.with_name(OWN_WEIGHTS)))

    def _save(self, progress: Progress | None = None) -> None:
        if self.last_checkpoint:
            state = {
                "progress": dataclasses.asdict(progress or self.progress),
                "model": self.model.state_dict(),
                "optimizer": self.model.optimizer.state_dict(),
                "random": random_state(self.device),
                "loop": hooks.loop_state(self.model),
            }
            save_checkpoint(self.last_checkpoint, state)
        self._checkpoints.restart()

    def _restore(self) -> None:
        assert self.last_checkpoint is not None
        state = load_checkpoint(self.last_checkpoint)
        try:
            self.progress = Progress(**state["progress"])
            self.model.load_state_dict(state["model"])
            self.model.optimizer.load_state_dict(state["optimizer"])
            restore_random_state(state["random"], self.device)
            hooks.restore_loop_state(self.model, state.get("loop", {}))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"{self.last_checkpoint}: of another version or model ({str(error).splitlines()[0]}): "
                "start over with --fresh"
            ) from error
        logger.info("Resume after epoch %d, step %d", self.progress.epoch, self.progress.total_steps)
