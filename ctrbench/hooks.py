# SPDX-License-Identifier: Apache-2.0
"""The parts of FuxiCTR's loop that a model folder may replace. Where it does, its own code runs as written."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuxictr.pytorch.models import BaseModel, MultiTaskModel
from torch import Tensor, nn

from ctrbench.errors import ConfigError, CtrbenchError, InterruptedRunError, ModelCodeError, TrainingError
from ctrbench.zoo import place, written_class

STEP_HOOKS = ("train_step", "compute_loss", "regularization_loss")
# A model that replaces one of these brings its own loop: see `ctrbench.ownloop`.
LOOP_HOOKS = ("fit", "train_epoch", "eval_step")
HOOKS = (
    *(*LOOP_HOOKS, *STEP_HOOKS, "add_loss", "compile", "get_inputs", "get_labels", "get_group_id"),
    *("evaluate", "predict", "evaluate_metrics", "checkpoint_and_earlystop", "lr_decay"),
    *("save_weights", "load_weights", "model_to_device"),
)


def class_overrides(model_class: type[nn.Module], name: str) -> bool:
    """Whether a model class has its own version of a method of FuxiCTR's base classes."""
    own = getattr(model_class, name, None)
    return own is not None and own not in (getattr(BaseModel, name), getattr(MultiTaskModel, name))


def overrides(model: nn.Module, name: str) -> bool:
    """Whether a model has its own version of a method of FuxiCTR's base classes."""
    return name in vars(model) or class_overrides(type(model), name)


def own_hooks(model: nn.Module) -> list[str]:
    """The methods of FuxiCTR's base classes that a model replaces, for the report."""
    written = written_class(type(model))
    return [name for name in HOOKS if name in vars(model) or class_overrides(written, name)]


def task_loss(model: BaseModel, batch: Any, is_old: bool) -> Tensor:
    """The loss without penalties, by `add_loss(return_dict, y_true)` or, if `is_old`, by FuxiCTR 2.0's `add_loss(inputs)`."""
    if is_old:
        loss: Tensor = model.add_loss(batch)
    else:
        loss = model.add_loss(model.forward(batch), model.get_labels(batch))
    return loss


def plain_step(model: BaseModel, batch: Any, is_old: bool) -> Tensor:
    """One step of the model's own loop; `is_old` as for `task_loss`."""
    if overrides(model, "train_step") or overrides(model, "compute_loss") or not is_old:
        loss: Tensor = model.train_step(batch)
        return loss
    # FuxiCTR's step, which no longer knows the signature of 2.0.
    model.optimizer.zero_grad()
    loss = model.add_loss(batch) + model.regularization_loss()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), model._max_gradient_norm)
    model.optimizer.step()
    return loss


def takes_inputs(model: BaseModel) -> bool:
    """Whether `add_loss` has the signature of FuxiCTR 2.0: it takes the batch and runs the model itself."""
    if not overrides(model, "add_loss"):
        return False
    parameters = inspect.signature(model.add_loss).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(names) == 1 or names[1:] == ["reduction"]


def output_names(model: BaseModel, given: Any) -> list[str]:
    """The entries of what `forward` gives that are predictions: `y_pred`, or else `<label>_pred` of every label.

    Raises:
        ConfigError: there are none.
    """
    several = [f"{label}_pred" for label in model.feature_map.labels]
    if isinstance(given, Mapping):
        for names in (["y_pred"], several):
            if set(names) <= given.keys():
                return names
    what = ", ".join(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
    raise ConfigError(
        f"{type(model).__name__}: forward gives {what}: it must give a dict with 'y_pred', or with "
        f"{' and '.join(map(repr, several))}"
    )


def own_metrics(
    model: BaseModel, y_true: Tensor, y_pred: Tensor, names: Sequence[str], group_id: Tensor | None
) -> dict[str, float]:
    """Metrics by the model's own `evaluate_metrics`, which takes arrays."""
    groups = None if group_id is None else group_id.cpu().numpy()
    figures = y_true.double().cpu().numpy(), y_pred.double().cpu().numpy()
    return as_figures(model, model.evaluate_metrics(*figures, list(names), groups))


def as_figures(model: BaseModel, values: dict[str, Any]) -> dict[str, float]:
    """What a model's own evaluation gives, as numbers that reports hold."""
    try:
        return {name: float(value) for name, value in values.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise TrainingError(
            f"{type(model).__name__}: its evaluate must give one number for each metric, got {values!r}"
        ) from error


def own_predictions(model: BaseModel, batches: Any) -> dict[str, Tensor]:
    """What a model's own `predict` gives: `y_pred` (N,), or for a dict by label `<label>_pred` each."""
    given = model.predict(batches)
    labels = model.feature_map.labels
    if not isinstance(given, dict):
        given = {"y_pred": given}
    named = {f"{name}_pred" if name in labels else name: values for name, values in given.items()}
    return {
        name: (x if isinstance(x, Tensor) else torch.as_tensor(np.asarray(x))).reshape(-1) for name, x in named.items()
    }


def loop_state(model: BaseModel) -> dict[str, Any]:
    """What a model with its own `train_step` carries from one step to the next beside weights and optimizer.

    Gradients that it accumulates, its numbers and tensors, and the state of schedules and further optimizers.
    """
    if not overrides(model, "train_step"):
        return {}
    own = {name: value for name, value in vars(model).items() if name != "_made_optimizer"}
    return {
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        "values": {name: value for name, value in own.items() if isinstance(value, bool | int | float | Tensor)},
        "states": {name: value.state_dict() for name, value in own.items() if _has_state(value)},
    }


def restore_loop_state(model: BaseModel, state: dict[str, Any]) -> None:
    """Set everything that `loop_state` gave."""
    parameters = dict(model.named_parameters())
    for name, gradient in state.get("gradients", {}).items():
        parameters[name].grad = gradient.to(parameters[name].device)
    for name, value in state.get("values", {}).items():
        setattr(model, name, value.to(model.device) if isinstance(value, Tensor) else value)
    for name, value in state.get("states", {}).items():
        getattr(model, name).load_state_dict(value)


def _has_state(value: Any) -> bool:
    return not isinstance(value, nn.Module) and hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


@contextlib.contextmanager
def own_code(model: nn.Module, doing: str) -> Iterator[None]:
    """Turn an error in a model's own code into one line that says where.

    Raises:
        ModelCodeError: with file and line in the model's folder, or in FuxiCTR's models where those cannot use what the
            model gives. What comes from elsewhere stays as it is.
    """
    try:
        yield
    except (CtrbenchError, InterruptedRunError):
        raise
    except Exception as error:
        own, stock = (Path(inspect.getfile(c)).parent for c in (written_class(type(model)), BaseModel))
        spot = place(error, own) or place(error, stock)
        if spot is None:
            raise
        what = (str(error).strip().splitlines() or [""])[0]
        raise ModelCodeError(
            f"{spot}: {type(model).__name__} fails in {doing}: {type(error).__name__}: {what}"
        ) from error
