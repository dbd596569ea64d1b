# SPDX-License-Identifier: Apache-2.0
"""A clock for the phases of a training step: gather, forward, backward, optimizer.

A step is seen from outside, so that any model and any loop can be measured: the forward pass begins with the step, the
gather is the time in the modules that look embeddings up, the backward pass is `torch.autograd.backward`, and all that
comes after it counts as the optimizer, clipping included. A step that is replayed as one graph has no phases.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

from ctrbench.costs import BACKWARD, FORWARD, GATHER, OPTIMIZER, embedding_modules

PHASES = (GATHER, FORWARD, BACKWARD, OPTIMIZER)
STEP = "step"


class PhaseClock:
    """Times the phases of the steps that are taken while it is entered; outside it costs nothing.

        with PhaseClock(model) as clock:
            for batch in batches:
                with clock.step():
                    trainer.step(batch)
        clock.seconds()   # {"gather": [...], "forward": [...], ..., "step": [...]}, a figure for each step

    On a GPU the device's own time is measured, by events that do not hold it up.

    Args:
        model: whose embedding modules are watched.
        device: where it computes.
        is_traced: name the phases in a trace of torch's profiler as well.
        is_compiled: do not watch the embedding modules, since hooks would have them compiled anew; the forward pass then
            holds the gather.
    """

    def __init__(self, model: nn.Module, device: torch.device, is_traced: bool = False, is_compiled: bool = False):
        self._watched = [] if is_compiled else embedding_modules(model)
        self._is_gpu = device.type == "cuda"
        self._is_traced = is_traced
        self._steps: list[list[tuple[str, Any]]] = []
        self._is_in_step = False
        self._labels: list[Any] = []

    def __enter__(self) -> PhaseClock:
        self._hooks = [
            hook
            for module in self._watched
            for hook in (
                module.register_forward_pre_hook(lambda *_: self._begin(GATHER)),
                module.register_forward_hook(lambda *_: self._end(GATHER)),
            )
        ]
        self._backward = torch.autograd.backward
        torch.autograd.backward = self._watched_backward
        return self

    def __exit__(self, *_: object) -> None:
        torch.autograd.backward = self._backward
        for hook in self._hooks:
            hook.remove()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """One training step."""
        self._steps.append([])
        self._is_in_step = True
        self._begin(STEP)
        self._label(FORWARD)
        try:
            yield
        finally:
            while len(self._labels) > 1:  # the optimizer's, or the forward pass's where there was no backward
                self._unlabel()
            self._end(STEP)
            self._is_in_step = False

    def seconds(self) -> dict[str, list[float]]:
        """Seconds of every step and, where they were seen, of its phases."""
        if self._is_gpu:
            torch.cuda.synchronize()
        taken: dict[str, list[float]] = {}
        for marks in self._steps:
            for part, value in self._of_one(marks).items():
                taken.setdefault(part, []).append(value)
        return taken

    def _of_one(self, marks: list[tuple[str, Any]]) -> dict[str, float]:
        start, end = marks[0][1], marks[-1][1]
        whole = {STEP: self._between(start, end)}
        times = {name: mark for name, mark in marks}
        if f"end {BACKWARD}" not in times:
            return whole
        gather, opened = 0.0, None
        for name, mark in marks:
            if name == f"begin {GATHER}":
                opened = mark
            elif name == f"end {GATHER}" and opened is not None:
                gather, opened = gather + self._between(opened, mark), None
        first = next(mark for name, mark in marks if name == f"begin {BACKWARD}")
        last = times[f"end {BACKWARD}"]
        return {
            **({GATHER: gather} if self._watched else {}),
            FORWARD: self._between(start, first) - gather,
            BACKWARD: self._between(first, last),
            OPTIMIZER: self._between(last, end),
            **whole,
        }

    def _between(self, start: Any, end: Any) -> float:
        elapsed: float = start.elapsed_time(end) / 1e3 if self._is_gpu else end - start
        return elapsed

    def _watched_backward(self, *arguments: Any, **keywords: Any) -> None:
        if not self._is_in_step:
            self._backward(*arguments, **keywords)
            return
        self._unlabel()  # of the forward pass
        self._begin(BACKWARD)
        try:
            self._backward(*arguments, **keywords)
        finally:
            self._end(BACKWARD)
            self._label(OPTIMIZER)

    def _begin(self, name: str) -> None:
        self._mark(f"begin {name}")
        self._label(name)

    def _end(self, name: str) -> None:
        self._unlabel()
        self._mark(f"end {name}")

    def _mark(self, name: str) -> None:
        if not self._is_in_step:
            return
        mark: Any = time.perf_counter()
        if self._is_gpu:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self._steps[-1].append((name, mark))

    def _label(self, name: str) -> None:
        if self._is_traced and self._is_in_step:
            self._labels.append(record_function(f"ctrbench: {name}"))
            self._labels[-1].__enter__()

    def _unlabel(self) -> None:
        if self._labels:
            self._labels.pop().__exit__(None, None, None)
