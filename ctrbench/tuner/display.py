# SPDX-License-Identifier: Apache-2.0
"""What a person sees of a running sweep: a live table on a terminal, one line per event elsewhere."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from ctrbench.tuner.definition import Sweep
from ctrbench.tuner.records import TrialRecord, best_of
from ctrbench.tuner.slots import Slot

REFRESH_SECONDS = 0.5


class Display:
    """One line per event, as a log wants it.

    Args:
        sweep: what is run.
        done: settings that were finished before.
    """

    def __init__(self, sweep: Sweep, done: list[TrialRecord]):
        self.sweep = sweep
        self.num_done = len(done)
        self.num_settings = float("inf")
        best = best_of(done, sweep.direction)
        self.best = None if best is None else best.objective
        self.started_at = time.monotonic()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def line(self, text: str) -> None:
        """Say something."""
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

    def started(self, expid: str, device: str) -> None:
        """A trial begins."""
        self.line(f"{expid}: started on {device}")

    def completed(self, expid: str, objective: float, seconds: float, device: str) -> None:
        """A trial is finished."""
        sign = 1 if self.sweep.direction == "max" else -1
        is_best = self.best is None or sign * objective > sign * self.best
        if is_best:
            self.best = objective
        mark = ", the best so far" if is_best else ""
        self._done(f"{expid}: {self.sweep.monitor} {objective:.6f}{mark} ({seconds:.1f} s on {device})")

    def pruned(self, expid: str, curve: list[float], seconds: float) -> None:
        """A trial is given up."""
        self._done(f"{expid}: pruned at {curve[-1]:.6f} after {_count(len(curve), 'evaluation')} ({seconds:.1f} s)")

    def failed(self, expid: str, error: str) -> None:
        """A trial failed."""
        self._done(f"{expid}: failed: {first_line(error)}")

    def update(self, records: Callable[[], list[TrialRecord]], slots: list[Slot], num_settings: float) -> None:
        """Show the present state; called often."""
        self.num_settings = num_settings

    def _done(self, text: str) -> None:
        self.num_done += 1
        total = "" if self.num_settings == float("inf") else f"/{self.num_settings:.0f}"
        self.line(f"[{self.num_done}{total}] {text}")


class LiveDisplay(Display):
    """A table that is redrawn in place, with the events above it."""

    def __init__(self, sweep: Sweep, done: list[TrialRecord]):
        super().__init__(sweep, done)
        from rich.console import Console
        from rich.live import Live

        self._console = Console(stderr=True, highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._last = 0.0

    def __enter__(self) -> Display:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()  # gives the cursor back

    def line(self, text: str) -> None:
        self._console.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False, soft_wrap=True)

    def started(self, expid: str, device: str) -> None:
        pass  # the table shows it

    def update(self, records: Callable[[], list[TrialRecord]], slots: list[Slot], num_settings: float) -> None:
        super().update(records, slots, num_settings)
        if time.monotonic() - self._last >= REFRESH_SECONDS:
            self._last = time.monotonic()
            self._live.update(self._table(records(), slots), refresh=True)

    def _table(self, records: list[TrialRecord], slots: list[Slot]) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="dim")
        for name, side in (
            ("slot", "left"),
            ("trial", "left"),
            ("epoch", "right"),
            ("last", "right"),
            ("best", "right"),
        ):
            table.add_column(name, justify=side)  # type: ignore[arg-type]
        table.add_column("time", justify="right")
        for slot in slots:
            table.add_row(*slot_cells(slot, self.sweep.direction))
        head = status_line(records, self.num_settings, len(slots), time.monotonic() - self.started_at)
        best = best_of(records, self.sweep.direction)
        tail = f"best {self.sweep.monitor} {best.objective:.6f}: {best.expid}" if best else "no trial is finished yet"
        return Group(Text(head, style="bold"), table, Text(tail, style="green" if best else "dim"))


def make_display(sweep: Sweep, done: list[TrialRecord]) -> Display:
    """The display that suits stderr."""
    return LiveDisplay(sweep, done) if sys.stderr.isatty() else Display(sweep, done)


def slot_cells(slot: Slot, direction: str) -> tuple[str, ...]:
    """A slot's row: device, trial, epoch, last and best monitored value, time."""
    job = slot.job
    if job is None:
        return (slot.device, "idle" if slot.is_ready else "starting", "", "", "", "")
    better = max if direction == "max" else min
    last, best = (f"{job.curve[-1]:.6f}", f"{better(job.curve):.6f}") if job.curve else ("", "")
    name = (
        job.expid
        if len(job.experiments) == 1
        else f"{job.expid} seed {job.experiments[0].training.seed if job.seed is None else job.seed}"
    )
    return (slot.device, name, str(job.epoch or ""), last, best, duration(time.monotonic() - slot.since))


def status_line(records: list[TrialRecord], num_settings: float, num_slots: int, seconds: float) -> str:
    """Counts by state and the estimated time left."""
    counts = Counter(record.state for record in records)
    finished = counts["complete"] + counts["pruned"] + counts["failed"]
    total = "" if num_settings == float("inf") else f" of {num_settings:.0f}"
    parts = [f"{finished}{total} done", f"{counts['running']} running"]
    parts += [f"{counts[state]} {state}" for state in ("pruned", "failed", "waiting") if counts[state]]
    parts.append(duration(seconds))
    left = seconds_left(records, num_settings, max(num_slots, counts["running"]))
    if left is not None:
        parts.append(f"about {duration(left)} left")
    return " · ".join(parts)


def seconds_left(records: list[TrialRecord], num_settings: float, num_slots: int) -> float | None:
    """By the mean time of the finished trials; None as long as there is none, or no end."""
    took = [r.finished - r.started for r in records if r.finished and r.started and r.state in ("complete", "pruned")]
    if not took or num_settings == float("inf"):
        return None
    finished = sum(record.state in ("complete", "pruned", "failed") for record in records)
    mean = sum(took) / len(took)
    running = sum(min(time.time() - r.started, mean) for r in records if r.state == "running" and r.started)
    return max(0.0, ((num_settings - finished) * mean - running) / num_slots)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02.0f} s"


def first_line(text: str) -> str:
    """The first line of an error."""
    return (text.strip().splitlines() or ["no message"])[0]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
