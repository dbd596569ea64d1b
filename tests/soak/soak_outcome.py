# SPDX-License-Identifier: Apache-2.0
"""What a soak found, and the processes that it may kill."""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Children begin as copies of a process that has loaded all this, so that they start in milliseconds.
CONTEXT: Any = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ctrbench.tuner.worker"])


@dataclasses.dataclass
class Outcome:
    """The result of one soak.

    Attributes:
        title: what was done.
        promise: what must hold.
        count: how often it was done.
        results: how often it ended how.
        failures: one line for each time that the promise did not hold.
        seconds: that it took.
        notes: what else there is to say.
    """

    title: str
    promise: str
    count: int = 0
    results: Counter[str] = dataclasses.field(default_factory=Counter)
    failures: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    notes: list[str] = dataclasses.field(default_factory=list)

    def add(self, how: str, failure: str | None = None) -> None:
        """Count one time."""
        self.count += 1
        self.results[how] += 1
        if failure is not None:
            self.failures.append(failure)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**dataclasses.asdict(self), "results": dict(sorted(self.results.items()))}


@contextmanager
def timed(outcome: Outcome) -> Iterator[Outcome]:
    """Measure how long a soak takes."""
    started = time.perf_counter()
    yield outcome
    outcome.seconds = time.perf_counter() - started


def one_line(error: BaseException) -> str:
    """An error for a list of failures."""
    return f"{type(error).__name__}: {str(error)[:300]!r}"
