# SPDX-License-Identifier: Apache-2.0
"""Models that replace FuxiCTR's `fit`, `train_epoch` or `eval_step`: their own loop runs as written, on our batches.

What it evaluates is recorded for the curve. Its state between steps is its own, so such a run is not checkpointed: once
interrupted, it starts over.
"""

from __future__ import annotations

import inspect
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctrbench import hooks
from ctrbench.batches import Batches
from ctrbench.errors import ConfigError, InterruptedRunError

if TYPE_CHECKING:
    from ctrbench.trainer import Progress, Trainer

logger = logging.getLogger(__name__)


class _Stoppable:
    """A split that ends the loop over it when the run is asked to stop."""

    def __init__(self, batches: Batches, should_stop: Callable[[], bool]):
        self._batches = batches
        self._should_stop = should_stop

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            if self._should_stop():
                raise InterruptedRunError(
                    "stopped in the model's own loop, of which there is no checkpoint: the same command starts over"
                )
            yield batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)


def run_own_loop(trainer: Trainer, train: Batches, valid: Batches | None, params: Mapping[str, Any]) -> Progress:
    """Train a model by its own loop, which leaves the best weights in it.

    Args:
        trainer: of the model.
        train: batches of the training split.
        valid: of the validation split.
        params: what FuxiCTR passes to a constructor, and to `fit`.

    Raises:
        ConfigError: there is no validation split, which FuxiCTR's loops need.
        TrainingError: the loop fails.
        InterruptedRunError: the run was asked to stop.
    """
    model, at = trainer.model, trainer.progress
    own = [name for name in hooks.LOOP_HOOKS if hooks.overrides(model, name)]
    name = type(model).__name__
    if valid is None:
        raise ConfigError(f"{name} brings its own {', '.join(own)}, which needs a validation split: set valid_data")
    logger.warning("%s brings its own %s: it runs as written; if interrupted, it starts over", name, ", ".join(own))
    started = time.perf_counter()

    def evaluate(batches: Batches, metrics: list[str] | None = None) -> dict[str, float]:
        begun = time.perf_counter()
        values = trainer.evaluate(batches, metrics)
        at.evaluate_seconds += time.perf_counter() - begun
        at.train_seconds = time.perf_counter() - started - at.evaluate_seconds
        record = {"epoch": getattr(model, "_epoch_index", 0) + 1, "step": getattr(model, "_total_steps", 0)}
        optimizer = getattr(model, "optimizer", None)
        rate = optimizer.param_groups[0]["lr"] if optimizer is not None else trainer.settings.learning_rate
        seconds = {"train_seconds": at.train_seconds, "evaluate_seconds": at.evaluate_seconds}
        at.history.append({**record, "learning_rate": rate, **values, **seconds})
        trainer.on_evaluation(at.history)
        return values

    settings = trainer.settings
    keywords = {**params, "epochs": settings.epochs, "max_gradient_norm": settings.max_gradient_norm}
    keywords["validation_data"] = valid
    with tempfile.TemporaryDirectory(prefix="ctrbench-") as scratch:
        model.model_dir, model.checkpoint = scratch, str(Path(scratch) / f"{model.model_id}.model")
        model.evaluate = evaluate
        try:
            with hooks.own_code(model, "its own loop"):
                model.fit(_Stoppable(train, trainer.should_stop), **_accepted(model.fit, keywords))
        finally:
            del model.evaluate
    at.train_seconds = time.perf_counter() - started - at.evaluate_seconds
    at.is_stopped = bool(getattr(model, "_stop_training", False))
    at.epoch = getattr(model, "_epoch_index", settings.epochs - 1) + (0 if at.is_stopped else 1)
    at.total_steps = getattr(model, "_total_steps", 0)
    _name_best(trainer)
    return at


def _accepted(function: Callable[..., Any], keywords: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return keywords
    return {name: value for name, value in keywords.items() if name in parameters}


def _name_best(trainer: Trainer) -> None:
    """The best evaluation by the configured monitor, for the report."""
    at, sign = trainer.progress, 1 if trainer.settings.monitor_mode == "max" else -1
    at.best_epoch = at.epoch
    for record in at.history:
        if all(name in record for name in trainer.monitor):
            value = sum(weight * record[name] for name, weight in trainer.monitor.items())
            if at.best_value is None or sign * value > sign * at.best_value:
                at.best_value, at.best_epoch = value, record["epoch"]
