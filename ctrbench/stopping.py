# SPDX-License-Identifier: Apache-2.0
"""What follows from an evaluation: FuxiCTR's rule for the best weights, the learning rate and the end of training."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from ctrbench import hooks
from ctrbench.errors import TrainingError

if TYPE_CHECKING:
    from ctrbench.trainer import Trainer

# An evaluation is an improvement when it is better than the best by more than this (FuxiCTR).
MIN_DELTA = 1e-6
logger = logging.getLogger(__name__)


def decide(trainer: Trainer, values: dict[str, float]) -> None:
    """Keep the weights if they are the best; else cut the learning rate at once, and stop after `patience` of these.

    Raises:
        TrainingError: the monitored metric is missing or not finite.
    """
    at, settings = trainer.progress, trainer.settings
    if missing := [name for name, weight in trainer.monitor.items() if weight and name not in values]:
        raise TrainingError(
            f"{settings.model}: its evaluate gives {', '.join(values)}: the monitored {missing[0]} is missing"
        )
    value = sum(weight * values[name] for name, weight in trainer.monitor.items() if weight)
    if not math.isfinite(value):
        raise TrainingError(
            f"the monitored {' + '.join(trainer.monitor)} is {value} in epoch {at.epoch + 1}: the validation split "
            "needs rows of both classes (and of usable groups)"
        )
    if hooks.overrides(trainer.model, "checkpoint_and_earlystop"):
        _decide_by_model(trainer, values, value)
        return
    sign = 1 if settings.monitor_mode == "max" else -1
    if at.best_value is not None and sign * value < sign * at.best_value + MIN_DELTA:
        at.stopping_steps += 1
        logger.info("Monitor(%s)=%.6f STOP!", settings.monitor_mode, value)
        if settings.reduce_lr_on_plateau:
            _reduce_learning_rate(trainer)
    else:
        at.best_value, at.best_epoch, at.stopping_steps = value, at.epoch + 1, 0
        logger.info("Save best model: monitor(%s)=%.6f", settings.monitor_mode, value)
        trainer.save_best()
    if not settings.save_best_only:
        trainer.save_best()
    if at.stopping_steps >= settings.early_stop_patience:
        at.is_stopped = True
        logger.info("********* Epoch=%d early stop *********", at.epoch + 1)


def _decide_by_model(trainer: Trainer, values: dict[str, float], value: float) -> None:
    """The model's own `checkpoint_and_earlystop`, with the state and the attributes that FuxiCTR's has."""
    at, model = trainer.progress, trainer.model
    worst = -math.inf if trainer.settings.monitor_mode == "max" else math.inf
    model._best_metric = worst if at.best_value is None else at.best_value
    model._stopping_steps = at.stopping_steps

    def save_weights(checkpoint: str) -> None:
        at.best_epoch = at.epoch + 1
        trainer.save_best()

    model.save_weights = save_weights
    model.checkpoint_and_earlystop(values)
    del model.save_weights
    at.best_value = float(model._best_metric) if math.isfinite(model._best_metric) else value
    at.stopping_steps, at.is_stopped = int(model._stopping_steps), bool(model._stop_training)


def _reduce_learning_rate(trainer: Trainer) -> None:
    model, settings = trainer.model, trainer.settings
    if hooks.overrides(model, "lr_decay"):
        model.lr_decay()
        return
    for group in model.optimizer.param_groups:
        group["lr"] = max(group["lr"] * settings.lr_decay_factor, settings.min_learning_rate)
    logger.info("Reduce learning rate on plateau: %.6f", model.optimizer.param_groups[0]["lr"])
