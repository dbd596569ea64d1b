# SPDX-License-Identifier: Apache-2.0
"""The parts of FuxiCTR's loop that a model folder may replace. Where it does, its own code runs as written."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from fuxictr.pytorch.models import BaseModel
from torch import Tensor, nn

from ctrbench.batches import Batch

STEP_HOOKS = ("train_step", "compute_loss", "regularization_loss")


def overrides(model: nn.Module, name: str) -> bool:
    """Whether the model's class has its own version of a `BaseModel` method."""
    own = getattr(type(model), name, None)
    return own is not None and own is not getattr(BaseModel, name)


def task_loss(model: BaseModel, batch: Batch, is_old: bool) -> Tensor:
    """The loss without penalties, by `add_loss(return_dict, y_true)` or, if `is_old`, by FuxiCTR 2.0's `add_loss(inputs)`."""
    if is_old:
        loss: Tensor = model.add_loss(batch)
    else:
        loss = model.add_loss(model.forward(batch), model.get_labels(batch))
    return loss


def plain_step(model: BaseModel, batch: Batch, is_old: bool) -> Tensor:
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
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(needed) == 1


@torch.inference_mode()
def by_batch(model: BaseModel, batches: Iterable[Batch], hook: str) -> Tensor:
    """What `get_labels` or `get_group_id` gives for all rows, (N,)."""
    return torch.cat([getattr(model, hook)(batch).reshape(-1) for batch in batches])


def own_metrics(
    model: BaseModel, y_true: Tensor, y_pred: Tensor, names: Sequence[str], group_id: Tensor | None
) -> dict[str, float]:
    """Metrics by the model's own `evaluate_metrics`, which takes arrays."""
    groups = None if group_id is None else group_id.cpu().numpy()
    figures = y_true.double().cpu().numpy(), y_pred.double().cpu().numpy()
    values: dict[str, Any] = model.evaluate_metrics(*figures, list(names), groups)
    return {name: float(value) for name, value in values.items()}
