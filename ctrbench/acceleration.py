# SPDX-License-Identifier: Apache-2.0
"""What a configuration may ask of a step beyond the fast path: `precision`, `compile` and `cuda_graph`.

`compile: true` lets torch fuse the forward and the backward pass; `cuda_graph: true` records a whole step on a GPU and
replays it, which saves the launch of every kernel. Both leave the training trajectory as it is, to rounding. `tf32` and
`bf16` do not: they round the factors of matrix products (bf16 also what the layers hand on), for training alone. Evaluations
and predictions are always computed in float32.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fuxictr.pytorch.models import BaseModel
from torch import Tensor, nn

from ctrbench import hooks
from ctrbench.errors import ConfigError
from ctrbench.schema import TrainingConfig

Step = Callable[[Any], Tensor]


def make_fast_step(model: BaseModel, settings: TrainingConfig, is_old: bool) -> Step:
    """One step of the fast path, in the precision and form that the settings ask for.

    Args:
        model: on its device, with the optimizer of the fast path.
        settings: the training section.
        is_old: whether `add_loss` takes the batch (FuxiCTR 2.0).

    Returns:
        A function of a batch that returns the loss with its penalty, a detached scalar on the device.

    Raises:
        ConfigError: the model or the device cannot do it.
    """
    set_precision(settings.precision)
    task_loss = _make_task_loss(model, settings, is_old)

    def step(batch: Any) -> Tensor:
        optimizer = model.optimizer
        optimizer.zero_grad()
        loss = task_loss(batch)
        loss.backward()
        penalty: Tensor = optimizer.step()
        return loss.detach() + penalty

    if not settings.cuda_graph:
        return step
    if model.device.type != "cuda":
        raise ConfigError("cuda_graph: true: needs a GPU: set cuda_graph: false, or choose a GPU with --gpu")
    from ctrbench.cudagraph import GraphedStep

    return GraphedStep(step, lambda: tuple(group["lr"] for group in model.optimizer.param_groups), settings.model)


def make_plain_step(model: BaseModel, settings: TrainingConfig, is_old: bool) -> Step:
    """One step by the model's own `train_step`; arguments and result as for `make_fast_step`.

    Raises:
        ConfigError: the settings ask for what only the fast path does.
    """
    asked = [key for key in ("compile", "cuda_graph") if getattr(settings, key)]
    asked += ["precision: bf16"] if settings.precision == "bf16" else []
    if asked:
        why = "with speed: plain a model" if settings.speed == "plain" else settings.model
        raise ConfigError(
            f"{asked[0]}: {why} is trained by its own step or optimizer, which runs as written: leave it out"
        )
    set_precision(settings.precision)
    return lambda batch: hooks.plain_step(model, batch, is_old).detach().reshape(())


def _make_task_loss(model: BaseModel, settings: TrainingConfig, is_old: bool) -> Step:
    loss: Step = functools.partial(hooks.task_loss, model, is_old=is_old)
    if settings.precision == "bf16":
        if is_old:
            raise ConfigError(
                f"precision: bf16: add_loss of {settings.model} runs the model itself, so that its loss would not stay in "
                "float32: set precision: fp32"
            )
        model.output_activation = _InFloat32(model.output_activation)
        loss = functools.partial(_bf16_loss, model)
    return Compiled(loss, settings.batch_size, settings.model) if settings.compile else loss


def set_precision(precision: str) -> None:
    """Whether float32 matrix products of a GPU may round their factors to tf32: a setting of the whole process."""
    is_tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if is_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = is_tf32


@contextlib.contextmanager
def in_full_precision() -> Iterator[None]:
    """Float32 matrix products without tf32 inside, whatever training uses."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    set_precision("fp32")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _bf16_loss(model: BaseModel, batch: Any) -> Tensor:
    with torch.autocast(model.device.type, torch.bfloat16):
        outputs = model.forward(batch)
    rounded = [name for name, x in outputs.items() if isinstance(x, Tensor) and x.dtype == torch.bfloat16]
    if rounded:  # bfloat16 knows no probability between 0.998 and 1
        raise ConfigError(
            f"precision: bf16: {type(model).__name__} gives '{rounded[0]}' without its output_activation, which is what is "
            "computed in float32: set precision: fp32"
        )
    loss: Tensor = model.add_loss(outputs, model.get_labels(batch))
    return loss


class _InFloat32(nn.Module):
    """An activation that is computed in float32, whatever it is given."""

    def __init__(self, activation: nn.Module):
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(x.float())
        return y


class Compiled:
    """A loss that torch compiles at its first batch; a batch of another size is not worth a compilation and runs as it is.

    Args:
        loss: of a batch.
        batch_size: rows of the batches that are compiled for.
        model: its name, for messages.
    """

    def __init__(self, loss: Step, batch_size: int, model: str):
        from ctrbench import compiled_dropout  # noqa: F401  (declares the operator that compiled code draws masks with)

        self._plain, self._compiled = loss, torch.compile(loss)
        self._batch_size, self._model = batch_size, model
        self._is_tried = False

    def __call__(self, batch: Any) -> Tensor:
        """The loss of `batch`.

        Raises:
            ConfigError: torch cannot compile the model here.
        """
        if num_rows(batch) != self._batch_size:
            return self._plain(batch)
        with contextlib.nullcontext() if self._is_tried else self._explained():
            loss: Tensor = self._compiled(batch)
        self._is_tried = True
        return loss

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ConfigError(
                f"compile: true: torch could not compile {self._model} here: {reason}: set compile: false, or install what is "
                "missing (a CPU needs a C++ compiler)"
            ) from error


def num_rows(batch: Any) -> int:
    """Rows of a batch of any form: the length of its first tensor."""
    return len(tensors_of(batch)[0])


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors of a batch, which is one, or a dict, list or tuple of batches, in a fixed order."""
    if isinstance(batch, Tensor):
        return [batch]
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]
