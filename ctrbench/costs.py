# SPDX-License-Identifier: Apache-2.0
"""The least that a training step must do: floating point operations and bytes, counted on one batch.

Counted are

- FLOPs: matrix products, forward and backward, by torch's own formulas (2 per multiply and add). Elementwise work is
  not: it is bound by memory.
- bytes of the forward and of the backward pass: every operand and result of a matrix product, read or written once.
  All that lies between two products could be fused into them. That caches keep nothing is assumed.
- bytes of the gather: the rows that the batch looks up and the embeddings that are made of them, and as much again for
  their gradient in the backward pass.
- bytes of the optimizer: every trainable parameter and its optimizer state, read and written once; the gradients of
  parameters outside the embedding tables, written and read once. A table's gradient beyond the rows of the batch follows
  from its weights.
- bytes of the batch itself, read and written once when it is drawn.

What a step really moves is more; by how much is what the figures are for. So shares of the ceilings are comparable
between implementations of the same model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from fuxictr.pytorch.layers import FeatureEmbeddingDict
from fuxictr.pytorch.models import BaseModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ctrbench import hooks
from ctrbench.ceilings import Ceilings
from ctrbench.checkpoint import random_state, restore_random_state
from ctrbench.crosslayer import as_written
from ctrbench.embedding import MergedEmbeddingDict, embedding_parameters

FORWARD, BACKWARD, GATHER, OPTIMIZER, DATA = "forward", "backward", "gather", "optimizer", "data"


@dataclasses.dataclass(frozen=True)
class StepCosts:
    """What one training step must do at least; see the module's text for what is counted.

    Attributes:
        rows: of the batch.
        flops: by part of the step, forward and backward.
        bytes: by part: data, gather, forward, backward, optimizer.
    """

    rows: int
    flops: dict[str, int]
    bytes: dict[str, int]

    @property
    def total_flops(self) -> int:
        """Of the whole step."""
        return sum(self.flops.values())

    @property
    def total_bytes(self) -> int:
        """Of the whole step, without drawing the batch."""
        return sum(count for part, count in self.bytes.items() if part != DATA)

    def floor_seconds(self, limits: Ceilings, part: str | None = None) -> float:
        """The least time of a part or of the whole step: that of its bytes or of its FLOPs, whichever is longer."""
        flops = self.flops.get(part, 0) if part else self.total_flops
        moved = self.bytes.get(part, 0) if part else self.total_bytes
        return max(flops / limits.flops_per_second, moved / limits.bytes_per_second)


class _Products(TorchDispatchMode):
    """Counts matrix products and their operands while it is active, by the part that is set."""

    def __init__(self) -> None:
        super().__init__()
        self.part = FORWARD
        self.flops = {FORWARD: 0, BACKWARD: 0}
        self.bytes = {FORWARD: 0, BACKWARD: 0}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip it torch would import the compiler, which takes longer than all the counting

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops[self.part] += formula(*args, **kwargs, out_val=result)
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            self.bytes[self.part] += sum(map(num_bytes, tensors))
        return result


class _Lookups:
    """Counts the bytes of what embedding modules look up and give, as a forward hook of each of them."""

    def __init__(self) -> None:
        self.bytes = 0

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], given: Any) -> None:
        ids = arguments[0] if arguments and isinstance(arguments[0], Mapping) else {}
        for name, embedding in given.items() if isinstance(given, Mapping) else ():
            read = ids[name].numel() if name in ids and not ids[name].is_floating_point() else 0
            self.bytes += num_bytes(embedding) + read * embedding.shape[-1] * embedding.element_size()


def count_step(model: BaseModel, batch: Any) -> StepCosts:
    """Run a model forward and backward on one batch and count; the model and the random generators stay as they are.

    Args:
        model: with the optimizer that has trained it, so that its state is known.
        batch: as in training.
    """
    products, lookups = _Products(), _Lookups()
    with untouched(model), as_written(model), _uncompiled(), contextlib.ExitStack() as stack:
        for module in embedding_modules(model):
            stack.callback(module.register_forward_hook(lookups).remove)
        model.train()
        with products:
            loss = hooks.task_loss(model, batch, hooks.takes_inputs(model))
            products.part = BACKWARD
            loss.backward()
    columns = [x for x in tree_leaves(batch) if isinstance(x, Tensor)]
    parts = {DATA: 2 * sum(map(num_bytes, columns)), GATHER: 2 * lookups.bytes, OPTIMIZER: optimizer_bytes(model)}
    return StepCosts(max((len(x) for x in columns if x.dim()), default=0), products.flops, {**parts, **products.bytes})


def optimizer_bytes(model: BaseModel) -> int:
    """Bytes that an update of all parameters must move."""
    tables = {id(p) for p in embedding_parameters(model)}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = getattr(model, "optimizer", None)
    state: Any = optimizer.state_dict() if hasattr(optimizer, "state_dict") else {}
    held = sum(num_bytes(x) for x in tree_leaves(state) if isinstance(x, Tensor) and x.dim())
    gradients = sum(num_bytes(p) for p in trained if id(p) not in tables)
    return 2 * (sum(map(num_bytes, trained)) + held + gradients)


def embedding_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that look embeddings up: what FuxiCTR's layers do it with, or what takes its place."""
    return [m for m in model.modules() if isinstance(m, FeatureEmbeddingDict | MergedEmbeddingDict)]


def num_bytes(tensor: Tensor) -> int:
    """Bytes of all elements."""
    return tensor.numel() * tensor.element_size()


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Run what was compiled as it was written: a compiled function hides its matrix products."""
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
    return contextlib.nullcontext()


@contextlib.contextmanager
def untouched(model: BaseModel) -> Iterator[None]:
    """Give a model its buffers, gradients and mode back afterwards, and the generators their state; weights must not change."""
    was_training, state = model.training, random_state(model.device)
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    gradients = [(p, p.grad) for p in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        model.train(was_training)
        restore_random_state(state, model.device)
