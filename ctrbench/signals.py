# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM during a run: training writes a checkpoint first, everything else ends at once."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TerminatedError(BaseException):
    """SIGTERM outside training, as KeyboardInterrupt is Ctrl-C."""


class StopRequest:
    """Turns a signal into a request that training asks for after every step.

    Before the first step there is nothing to save, and a second signal means it: both end the run at once, by an exception.
    As a context manager it holds the handlers; outside the main thread, where there are no signals, it does nothing.

    Attributes:
        signal: the number of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._is_training = False
        self._previous: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Whether to stop; `Session.should_stop`."""
        self._is_training = True
        return self.signal is not None

    @property
    def status(self) -> int:
        """The exit status of a process that such a signal ended."""
        return 128 + (self.signal or signal.SIGINT)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # What is ignored (nohup, a background job of a shell) stays ignored.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        is_first = self.signal is None
        self.signal = self.signal or number
        if is_first and self._is_training:
            print(
                "\nstopping after this step, with a checkpoint; once more to end at once", file=sys.stderr, flush=True
            )
            return
        raise TerminatedError if number == signal.SIGTERM else KeyboardInterrupt
