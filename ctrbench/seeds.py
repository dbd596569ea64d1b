# SPDX-License-Identifier: Apache-2.0
"""One experiment with several seeds at once: `ctrbench run --seeds 1 2 3`, in a stack on a GPU, in processes on a CPU.

A step of a small model leaves a GPU idle most of the time, which a stack fills. On a CPU the activations of one model fit
the caches and those of a stack do not, and a process for each core with one thread wastes nothing on sharing work out: there
a stack wins only where runs are so short that the start of processes counts. benchmarks/speed/seeds.py measures the steps.
"""

from __future__ import annotations

import collections
import os
import time
from collections.abc import Sequence
from typing import Any

from ctrbench.config import Experiment
from ctrbench.errors import CtrbenchError, TrainingError
from ctrbench.evidence import read_report
from ctrbench.tuner.slots import Slot, make_slots, messages, preload

FORMS = ("auto", "stack", "processes")
# A seed whose worker died so often is given up.
MAX_DEATHS = 3
# On a CPU a stack is faster, the start of processes included, up to so many embedded numbers in a batch, with so few cores.
STACK_CELLS, STACK_CORES = 1 << 13, 2
# The same where one process makes all the runs anyway: a stack of five against one run after the other.
SLOT_CELLS = 1 << 14
POLL_SECONDS = 0.5
STOP_SECONDS = 30.0
Result = dict[str, Any] | BaseException


def run_seeds(
    experiments: Sequence[Experiment], gpu: int = -1, fresh: bool = False, command: str = "", form: str = "auto"
) -> list[Result]:
    """Run an experiment with several seeds.

    Args:
        experiments: alike but for their seeds.
        gpu: index of the GPU; -1 is the CPU.
        fresh: do not continue unfinished runs.
        command: how they were started, for the reports.
        form: one of FORMS: "stack" is one process with stacked parameters, "processes" a process for each core, "auto" what
            is faster.

    Returns:
        For each the content of its report.json, or why it failed.

    Raises:
        ConfigError: they differ in more than their seeds, or a seed is there twice.
        KeyboardInterrupt: the user stopped them; the same command goes on from their checkpoints.
    """
    is_stack = form == "stack" or (form == "auto" and (gpu >= 0 or is_tiny(experiments[0])))
    if not is_stack:
        preload()  # workers load torch while this process does
    from ctrbench.run import check_gpu
    from ctrbench.stacked_runs import check_alike, finished_reports, run_together

    check_gpu(gpu)
    check_alike(experiments)
    if is_stack:
        return run_together(experiments, gpu, fresh, [command] * len(experiments))
    kept: dict[int, Result] = {} if fresh else dict(finished_reports(experiments))
    missing = [e for e in experiments if e.training.seed not in kept]
    found = _Processes(missing, gpu, fresh, command).run() if missing else {}
    return [(kept | found)[e.training.seed] for e in experiments]


def is_tiny(experiment: Experiment) -> bool:
    """Whether a stack of this experiment is faster than processes on the cores that there are."""
    return 0 < _cells(experiment) <= STACK_CELLS and len(os.sched_getaffinity(0)) <= STACK_CORES


def is_faster_stacked(experiment: Experiment, gpu: int) -> bool:
    """Whether a process trains several seeds of this experiment faster in a stack than one after the other.

    Not with `deterministic: true`, which a stack cannot keep where it is interrupted.
    """
    return not experiment.training.deterministic and (gpu >= 0 or 0 < _cells(experiment) <= SLOT_CELLS)


def _cells(experiment: Experiment) -> int:
    """Embedded numbers in a batch."""
    width = experiment.model_params.get("embedding_dim", 16)
    columns = [c for c in experiment.dataset.feature_cols if c.active and c.type != "meta"]
    cells: int = experiment.training.batch_size * sum(c.embedding_dim or width for c in columns)
    return cells


class _Processes:
    """Runs experiments in worker processes, one for each core; on a GPU one only."""

    def __init__(self, experiments: Sequence[Experiment], gpu: int, fresh: bool, command: str):
        self.pending = collections.deque(experiments)
        self.fresh, self.command = fresh, command
        self.results: dict[int, Result] = {}
        self._deaths: collections.Counter[int] = collections.Counter()
        count = 1 if gpu >= 0 else min(len(os.sched_getaffinity(0)), len(experiments))
        folder = experiments[0].run_dir.parent
        folder.mkdir(parents=True, exist_ok=True)
        self.slots = make_slots([gpu] * count, folder / "workers.log")

    def run(self) -> dict[int, Result]:
        """All of them, by seed."""
        try:
            for slot in self.slots:
                slot.start()
            while self.pending or any(slot.job is not None for slot in self.slots):
                self._fill()
                self._listen()
        except KeyboardInterrupt:
            self._stop()
            raise
        finally:
            for slot in self.slots:
                slot.kill()
            for slot in self.slots:
                if slot.process is not None:
                    slot.bury()
        return self.results

    def _fill(self) -> None:
        from ctrbench.tuner.worker import Task

        for slot in self.slots:
            if slot.job is None and slot.is_ready and self.pending:
                job = self.pending.popleft()
                slot.run(job, Task(job.training.seed, [job], slot.gpu, "", [self.command], False, self.fresh))

    def _listen(self) -> None:
        from ctrbench.tuner.worker import READY, Ended

        for slot, message in messages(self.slots, POLL_SECONDS):
            if message is None:
                self._on_death(slot)
            elif message == READY:
                slot.is_ready, slot.failed_starts = True, 0
            elif isinstance(message, Ended):
                job, slot.job = slot.job, None
                if message.how == "complete":
                    self.results[job.training.seed] = read_report(job.run_dir)
                else:
                    self.results[job.training.seed] = TrainingError(message.error or message.how)

    def _on_death(self, slot: Slot) -> None:
        job, cause = slot.job, slot.bury()
        if job is None:
            slot.check_start(cause)
        else:
            self._deaths[job.training.seed] += 1
            if self._deaths[job.training.seed] < MAX_DEATHS:
                self.pending.appendleft(job)  # it goes on from its checkpoint
            else:
                self.results[job.training.seed] = CtrbenchError(f"its worker died {MAX_DEATHS} times ({cause})")
        slot.start()

    def _stop(self) -> None:
        """Let running experiments write a checkpoint."""
        for slot in self.slots:
            if slot.job is not None:
                slot.say("stop")
        deadline = time.monotonic() + STOP_SECONDS
        self.pending.clear()
        while any(slot.job is not None for slot in self.slots) and time.monotonic() < deadline:
            self._listen()
