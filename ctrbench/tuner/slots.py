# SPDX-License-Identifier: Apache-2.0
"""The slots of a sweep: worker processes, one for each entry of `--gpu`, restarted when they die."""

from __future__ import annotations

import dataclasses
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ctrbench.errors import CtrbenchError

# A worker that dies so often in a row before it can take a task will not start at all.
MAX_FAILED_STARTS = 3
_context = multiprocessing.get_context("forkserver")


def preload() -> None:
    """Begin to load what a worker needs, in a process of its own that all workers are then forked from."""
    _context.set_forkserver_preload(["ctrbench.tuner.worker"])
    with _without_interrupts():
        multiprocessing.forkserver.ensure_running()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that begin in this block never see Ctrl-C, which a terminal sends to all; ours comes after the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclasses.dataclass
class Slot:
    """One place for a trial.

    Attributes:
        number: of the slot, from 0.
        gpu: index of the GPU; -1 is the CPU.
        num_threads: threads of its computations on the CPU.
        log: takes what the worker prints.
        job: what it runs; None when it is idle.
        since: when the job began, in seconds of the monotonic clock.
    """

    number: int
    gpu: int
    num_threads: int
    log: Path
    job: Any = None
    since: float = 0.0
    is_ready: bool = False
    failed_starts: int = 0
    process: Any = None
    link: Connection | None = None

    @property
    def device(self) -> str:
        """The device as tables show it."""
        return "cpu" if self.gpu < 0 else f"gpu {self.gpu}"

    def start(self) -> None:
        """Start the worker process."""
        from ctrbench.tuner.worker import main

        self.is_ready = False
        for attempt in range(MAX_FAILED_STARTS):
            self.link, theirs = _context.Pipe()
            self.process = _context.Process(target=main, args=(theirs, self.num_threads, self.log), daemon=True)
            try:
                with _without_interrupts():
                    self.process.start()
                return
            except (EOFError, OSError):  # the fork server died; the next attempt starts another
                self.link.close()
                self.process = self.link = None
                if attempt == MAX_FAILED_STARTS - 1:
                    raise
            finally:
                theirs.close()

    def run(self, job: Any, task: Any) -> None:
        """Hand a task to the worker."""
        self.job, self.since = job, time.monotonic()
        self.say(task)

    def say(self, message: Any) -> None:
        """Send a message to the worker; one that has just died is noticed elsewhere."""
        assert self.link is not None
        with suppress(OSError):
            self.link.send(message)

    def kill(self) -> None:
        """End the worker at once."""
        if self.process is not None and self.process.is_alive():
            self.process.kill()

    def bury(self) -> str:
        """Close what is left of a dead worker; what it died of."""
        assert self.link is not None
        self.link.close()
        self.process.join(5)
        code = self.process.exitcode
        self.process.close()
        self.process, self.link, self.job = None, None, None
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return f"{name}, perhaps the machine was out of memory" if name == "SIGKILL" else name
        return f"exit status {code}"

    def check_start(self, cause: str) -> None:
        """Count a death before the first task.

        Raises:
            CtrbenchError: there were several in a row.
        """
        self.failed_starts = 0 if self.is_ready else self.failed_starts + 1
        if self.failed_starts >= MAX_FAILED_STARTS:
            raise CtrbenchError(
                f"the worker of slot {self.number} ({self.device}) died {MAX_FAILED_STARTS} times before it could start "
                f"({cause}): {self.log} has what it said"
            )


def make_slots(gpus: Iterable[int], log: Path) -> list[Slot]:
    """A slot for each entry of `--gpu`, the CPU's cores shared among them; `log` takes what workers print."""
    gpus = list(gpus)
    num_threads = max(1, len(os.sched_getaffinity(0)) // len(gpus))
    return [Slot(number, gpu, num_threads, log) for number, gpu in enumerate(gpus)]


def messages(slots: list[Slot], timeout: float) -> list[tuple[Slot, Any]]:
    """What the workers said within `timeout` seconds, at most one message of each; None of one that died."""
    by_link = {slot.link: slot for slot in slots if slot.link is not None}
    received: list[tuple[Slot, Any]] = []
    for link in wait(list(by_link), timeout):
        slot = by_link[link]  # type: ignore[index]
        try:
            received.append((slot, slot.link.recv()))  # type: ignore[union-attr]
        except (EOFError, OSError):
            received.append((slot, None))
    return received
