# SPDX-License-Identifier: Apache-2.0
"""A whole training step, recorded once on a GPU and replayed for every batch of the same shape.

A small model's step is hundreds of kernels of a few microseconds each, and launching them from Python takes longer than
running them. The recorded step reads its batch from memory of its own, into which each batch is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ctrbench.acceleration import tensors_of
from ctrbench.errors import ConfigError

Step = Callable[[Any], Tensor]
# Steps that are run as they are, on the side stream that recording needs: libraries set themselves up in the first ones.
WARM_UP = 3


class GraphedStep:
    """A step that is recorded after a few batches.

    Args:
        step: one optimizer step; returns the loss. It must not ask the device for a value.
        state: what a recorded step has taken from Python's side (learning rates); when it changes, it is recorded anew.
        model: its name, for messages.
    """

    def __init__(self, step: Step, state: Callable[[], Hashable], model: str):
        self._step, self._state, self._model = step, state, model
        self._shape: Hashable = None
        self._num_warm = 0
        self._recorded_for: Hashable = None
        self._graph: Any = None
        self._own: dict[int, Tensor] = {}
        self._batch: Any = None
        self._loss = torch.empty(0)

    def __call__(self, batch: Any) -> Tensor:
        """One step; returns its loss, a scalar on the device.

        Raises:
            ConfigError: the step cannot be recorded.
        """
        shape = tuple((tuple(x.shape), x.stride(), x.dtype) for x in tensors_of(batch))
        if self._shape is None:
            self._shape = shape
        if shape != self._shape:  # the last, smaller batch of an epoch
            return self._step(batch)
        if self._num_warm < WARM_UP:
            self._num_warm += 1
            return self._on_side_stream(batch)
        if self._graph is None or self._state() != self._recorded_for:
            self._record(batch)
        for own, given in zip(self._own.values(), _stores(batch).values(), strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._loss.clone()

    def _on_side_stream(self, batch: Any) -> Tensor:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = self._step(batch)
        torch.cuda.current_stream().wait_stream(stream)
        return loss

    def _record(self, batch: Any) -> None:
        self._graph = None  # frees the memory of the one before
        self._own = {key: store.clone() for key, store in _stores(batch).items()}
        self._batch = _placed(batch, self._own)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._loss = self._step(self._batch)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"cuda_graph: true: the step of {self._model} cannot be recorded ({reason}): set cuda_graph: false"
            ) from error
        self._graph, self._recorded_for = graph, self._state()


def _stores(batch: Any) -> dict[int, Tensor]:
    """The tensors that hold a batch, each once: the columns of a batch are views of a few."""
    stores: dict[int, Tensor] = {}
    for tensor in tensors_of(batch):
        store = tensor if tensor._base is None else tensor._base
        stores.setdefault(id(store), store)
    return stores


def _placed(batch: Any, own: dict[int, Tensor]) -> Any:
    """The same batch as views of the copies in `own`."""
    if isinstance(batch, Tensor):
        store = batch if batch._base is None else batch._base
        return own[id(store)].as_strided(batch.size(), batch.stride(), batch.storage_offset())
    if isinstance(batch, dict):
        return type(batch)((name, _placed(part, own)) for name, part in batch.items())
    if isinstance(batch, list | tuple):
        return type(batch)(_placed(part, own) for part in batch)
    return batch
