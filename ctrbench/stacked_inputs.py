# SPDX-License-Identifier: Apache-2.0
"""What goes into a step of `ctrbench.stacked` beside the parameters: batches of several models, and random states."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor


class RandomState:
    """The states of torch's generators on the CPU and, if that is where a model is, on its GPU."""

    def __init__(self, device: torch.device):
        self._device = device
        self._cpu = torch.get_rng_state()
        self._gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Make it the state of the generators."""
        torch.set_rng_state(self._cpu)
        if self._gpu is not None:
            torch.cuda.set_rng_state(self._gpu, self._device)

    def equals(self, other: RandomState) -> bool:
        """Whether two states are one."""
        pairs = (self._cpu, other._cpu), (self._gpu, other._gpu)
        return all(mine is None or theirs is None or torch.equal(mine, theirs) for mine, theirs in pairs)


@contextlib.contextmanager
def random_kept(device: torch.device) -> Iterator[None]:
    """Undo what the block does to torch's generators."""
    before = RandomState(device)
    try:
        yield
    finally:
        before.restore()


def stack_batches(batches: Sequence[Any]) -> Any:
    """Batches of one form as one batch whose tensors have a leading dimension of models.

    Columns are views of few packed matrices, so it is these that are stacked.
    """
    leaves = [pytree.tree_leaves(batch) for batch in batches]
    packed: dict[Any, Tensor] = {}
    stacked: list[Any] = []
    for parts in zip(*leaves, strict=True):
        bases = [x._base for x in parts]
        if not _are_columns(parts, bases):
            stacked.append(torch.stack(parts))
            continue
        first, place = parts[0], (bases[0].data_ptr(), bases[0].dtype)
        base = packed[place] if place in packed else packed.setdefault(place, torch.stack(bases))
        offset = first.storage_offset() - bases[0].storage_offset()
        stacked.append(base.as_strided((len(parts), *first.shape), (base.stride(0), *first.stride()), offset))
    return pytree.tree_unflatten(stacked, pytree.tree_structure(batches[0]))


def _are_columns(parts: Sequence[Tensor], bases: Sequence[Any]) -> bool:
    """Whether tensors are the same columns of packed matrices (B, ...) of one shape."""
    first, base = parts[0], bases[0]
    return all(
        b is not None
        and (b.shape, b.stride()) == (base.shape, base.stride())
        and b.shape[0] == len(x)
        and b.is_contiguous()
        and x.stride() == first.stride()
        and x.storage_offset() - b.storage_offset() == first.storage_offset() - base.storage_offset()
        for x, b in zip(parts, bases, strict=True)
    )


def signature_of(batch: Any) -> Any:
    """What batches that can be stacked have in common."""
    return tuple((x.shape, x.dtype) if isinstance(x, Tensor) else type(x) for x in pytree.tree_leaves(batch))


def copied(batch: Any) -> Any:
    """A batch whose tensors are not those of the given one."""
    # A model may write to its batch. Columns stay views of one matrix no longer, which costs but a moment.
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, batch)
