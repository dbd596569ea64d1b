# SPDX-License-Identifier: Apache-2.0
"""Runs that give the same bits when they are repeated, and the sentence in a report that says whether this one would.

On a CPU every run is made of deterministic operators. Where several threads share the work, torch has one of another kind
that models use: the gradient of `x[rows]`, which its threads add up in the order in which they come. The deterministic form
takes no longer to speak of, so nothing has to be asked for. On a GPU there are more of them, some have no other form, and
the other form may be slow: there `deterministic: true` is needed. What torch does not know of, a clock or a thread of a
model folder's own, stays that folder's affair.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.utils.deterministic

from ctrbench.errors import TrainingError

# cuBLAS gives the same sums again if its streams have work space of a fixed size.
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")
_memory: Any = torch.utils.deterministic  # its attribute is a property that type checkers do not see
_NO_FORM = re.compile(r"(\S+) does not have a deterministic implementation")
_CUBLAS = re.compile(r"deterministic.*cublas", re.IGNORECASE | re.DOTALL)


@contextlib.contextmanager
def deterministic_operators(is_asked: bool, gpu: int, compiles: bool = False) -> Iterator[None]:
    """Use deterministic operators inside, as far as the device's promise needs them; then leave torch as it was before.

    Runs in threads of one process share the setting, and the last of them to end gives it back. The work space of cuBLAS
    stays: it is read once in the life of a process, and the next run may need it.

    Args:
        is_asked: `deterministic: true`.
        gpu: index of the GPU; -1 is the CPU.
        compiles: `compile: true`, so that torch's compiler has to know of it.

    Raises:
        TrainingError: it is asked for, and an operator has no deterministic form.
    """
    if gpu >= 0 and os.environ.get(WORKSPACE) not in _WORKSPACES and (is_asked or WORKSPACE not in os.environ):
        os.environ[WORKSPACE] = _WORKSPACES[0]
    if gpu >= 0 and not is_asked:
        yield
        return
    if compiles:
        import torch._inductor  # noqa: F401 (so that it is there to be told)
    _shared.take(_Setting(True, not is_asked, is_asked, True, False))
    try:
        yield
    except Exception as error:
        if is_asked and (what := _without_form(error)):
            raise TrainingError(f"deterministic: true: {what}") from error
        raise
    finally:
        _shared.give_back()


def promise(device: torch.device, is_asked: bool, stack: Mapping[str, Any] | None, is_resumed: bool) -> str:
    """What holds when a run is repeated, for its report.

    Args:
        device: that it was trained on.
        is_asked: `deterministic: true`.
        stack: of seeds that were trained together, as the report notes it.
        is_resumed: it went on from a checkpoint.
    """
    if device.type != "cpu" and not is_asked:
        return "none: set deterministic: true"
    if stack is not None and is_resumed:
        return "none: seeds that are trained together go on from different steps: use --together processes"
    same = f"machine and threads ({torch.get_num_threads()})" if device.type == "cpu" else "GPU model and versions"
    return f"bitwise: same {same}" + ("" if stack is None else f", seeds {stack['seeds']} together")


@dataclasses.dataclass(frozen=True)
class _Setting:
    """The settings of the whole process that decide which operators torch takes."""

    is_deterministic: bool
    warns_only: bool
    fills_memory: bool
    cudnn_deterministic: bool
    cudnn_benchmark: bool

    @classmethod
    def now(cls) -> _Setting:
        return cls(
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            _memory.fill_uninitialized_memory,
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
        )

    def apply(self) -> None:
        if "torch._inductor" in sys.modules:
            torch.use_deterministic_algorithms(self.is_deterministic, warn_only=self.warns_only)
        else:  # the same, without loading the compiler, which takes as long as all else before the first step
            torch.set_deterministic_debug_mode((1 if self.warns_only else 2) if self.is_deterministic else 0)
        # Memory that is read before it is written: a mistake, and to rule it out costs a pass over every new tensor.
        _memory.fill_uninitialized_memory = self.fills_memory
        torch.backends.cudnn.deterministic = self.cudnn_deterministic
        torch.backends.cudnn.benchmark = self.cudnn_benchmark


class _Shared:
    """A setting that is in force while anyone needs it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._before: _Setting | None = None

    def take(self, setting: _Setting) -> None:
        with self._lock:
            if self._before is None:
                self._before = _Setting.now()
            self._count += 1
            setting.apply()

    def give_back(self) -> None:
        with self._lock:
            self._count -= 1
            if self._count == 0 and self._before is not None:
                self._before.apply()
                self._before = None


_shared = _Shared()


def _without_form(error: BaseException | None) -> str | None:
    """What an error says of an operator without a deterministic form, itself or by its cause, and what to do."""
    while error is not None:
        if isinstance(error, RuntimeError):
            if match := _NO_FORM.search(str(error)):
                return f"torch has no deterministic form of {match[1]}: set deterministic: false"
            if _CUBLAS.search(str(error)):
                return (
                    f"cuBLAS was in use before the run: start a new process with {WORKSPACE}={_WORKSPACES[0]} in its "
                    "environment, or set deterministic: false"
                )
        error = error.__cause__
    return None
