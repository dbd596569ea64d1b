# SPDX-License-Identifier: Apache-2.0
"""One slot of a sweep: a long-lived process that runs one trial after the other.

Python, the device and the data stay loaded between trials. The process ends with the one that started it, however that
ends: a thread waits for its end of the pipe.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import gc
import json
import logging
import os
import queue
import signal
import threading
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ctrbench.batches import ResidentData
from ctrbench.config import Experiment
from ctrbench.errors import CtrbenchError, InterruptedRunError, ModelCodeError
from ctrbench.memory import is_out_of_memory
from ctrbench.preprocess import build_dataset
from ctrbench.run import Session, run
from ctrbench.stacked_runs import run_together
from ctrbench.tuner.records import SeedResult


@dataclasses.dataclass(frozen=True)
class Task:
    """A trial as its worker gets it.

    Attributes:
        trial_id: of the store.
        experiments: one for each seed.
        gpu: index of the GPU; -1 is the CPU.
        sweep_id: identifies the sweep in the reports of its runs; empty for runs that belong to none.
        commands: how to run each experiment by hand.
        is_fresh: whether to begin its runs anew.
        asks: whether to wait for the pruner's word after each evaluation of the first seed.
        together: seeds that are trained in one stack, after the others.
    """

    trial_id: int
    experiments: list[Experiment]
    gpu: int
    sweep_id: str
    commands: list[str]
    asks: bool
    is_fresh: bool = False
    together: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """An evaluation of a running trial: the monitored value after each one of this seed's run so far."""

    trial_id: int
    seed: int
    curve: list[float]
    epoch: int


@dataclasses.dataclass(frozen=True)
class Ended:
    """A trial that ended.

    Attributes:
        trial_id: of the store.
        how: complete, pruned, failed, out_of_memory or stopped.
        results: its finished runs.
        curve: the monitored value at each evaluation of the first seed, if its run is finished.
        data_hash: of the data it was trained on.
        num_adopted: runs that were finished before.
        error: why it failed.
        trace: where.
    """

    trial_id: int
    how: str
    results: list[SeedResult]
    curve: list[float]
    data_hash: str | None = None
    num_adopted: int = 0
    error: str = ""
    trace: str = ""


PATIENCE_SECONDS = 20.0
# What a worker says when it can take a task.
READY = "ready"


class _PrunedError(Exception):
    """The trial is given up."""


def main(link: Connection, num_threads: int, log: Path) -> None:
    """Run the tasks that come through `link` until it closes.

    Args:
        link: to the parent.
        num_threads: of computations on the CPU.
        log: takes what libraries and models print, and where the interpreter crashed.
    """
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    faulthandler.enable()
    # A terminal sends Ctrl-C to every process; the parent decides what becomes of this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(num_threads)
    # The sweep's own lines are on the terminal; what a run says is in its train.log.
    logging.getLogger().addHandler(logging.NullHandler())
    inbox: queue.Queue[Any] = queue.Queue()
    stop = threading.Event()
    threading.Thread(target=_receive, args=(link, inbox, stop), daemon=True).start()
    data = ResidentData()
    link.send(READY)
    while True:
        task = inbox.get()
        if task is None:
            return
        if isinstance(task, Task):
            stop.clear()
            link.send(_Trial(task, link, inbox, stop, data).run())
            gc.collect()


def _receive(link: Connection, inbox: queue.Queue[Any], stop: threading.Event) -> None:
    try:
        while True:
            message = link.recv()
            if message == "stop":
                stop.set()
            inbox.put(message if message != "stop" else "go")
    except (EOFError, OSError):
        os._exit(1)  # the parent is gone; files are whole at any moment


class _Trial:
    def __init__(
        self, task: Task, link: Connection, inbox: queue.Queue[Any], stop: threading.Event, data: ResidentData
    ):
        self.task, self.link, self.inbox, self.stop, self.data = task, link, inbox, stop, data
        self.results: list[SeedResult] = []
        self.curve: list[float] = []
        self.num_adopted = 0
        self.data_hash: str | None = None

    def run(self) -> Ended:
        try:
            for group in self._groups():
                self._run_group(group)
            return self._ended("complete")
        except _PrunedError:
            return self._ended("pruned")
        except InterruptedRunError:
            return self._ended("stopped")
        except Exception as error:
            how = "out_of_memory" if is_out_of_memory(error) else "failed"
            if isinstance(error, CtrbenchError):
                return self._ended(how, str(error), traceback.format_exc() if isinstance(error, ModelCodeError) else "")
            return self._ended(how, f"{type(error).__name__}: {error}".strip(), traceback.format_exc())

    def _groups(self) -> list[list[int]]:
        """Positions of the experiments that are run at once."""
        seeds = [experiment.training.seed for experiment in self.task.experiments]
        groups = [[position] for position, seed in enumerate(seeds) if seed not in self.task.together]
        if self.task.together:
            groups.append([seeds.index(seed) for seed in self.task.together])
        return groups

    def _run_group(self, positions: list[int]) -> None:
        """Run what is missing of these experiments and keep what they gave; then raise the first error."""
        reports: dict[int, dict[str, Any] | BaseException] = {}
        for position in positions:
            if (found := self._finished_report(self.task.experiments[position])) is not None:
                reports[position] = found
        self.num_adopted += len(reports)
        reports |= self._run([position for position in positions if position not in reports])
        for position in positions:
            report, experiment = reports[position], self.task.experiments[position]
            if isinstance(report, BaseException):
                continue
            if position == 0:
                self.curve = _read_curve(experiment)
            self.data_hash = report["data_hash"]
            self.results.append(SeedResult.from_report(report, str(experiment.run_dir)))
        for error in reports.values():
            if isinstance(error, BaseException):
                raise error

    def _run(self, positions: list[int]) -> dict[int, dict[str, Any] | BaseException]:
        """Reports of the runs at these positions; a single one raises its error."""
        task = self.task
        experiments = [task.experiments[i] for i in positions]
        commands = [task.commands[i] for i in positions]
        sessions = [self._session(i) for i in positions]
        if len(positions) == 1:
            return {positions[0]: run(experiments[0], task.gpu, task.is_fresh, commands[0], sessions[0])}
        found = run_together(experiments, task.gpu, task.is_fresh, commands, sessions) if positions else []
        return dict(zip(positions, found, strict=True))

    def _session(self, position: int) -> Session:
        experiment = self.task.experiments[position]

        def tell(history: list[dict[str, Any]]) -> None:
            curve = _monitored(experiment, history)
            self.link.send(Evaluated(self.task.trial_id, experiment.training.seed, curve, history[-1]["epoch"]))
            # A setting is judged by its first seed; once that has come through, the others run to their end.
            if self.task.asks and position == 0 and self.inbox.get() == "prune":
                raise _PrunedError

        notes = {"sweep": self.task.sweep_id} if self.task.sweep_id else {}
        # A worker of a command that was just killed may take a moment to notice.
        return Session(self.data, tell, self.stop.is_set, is_quiet=True, patience=PATIENCE_SECONDS, notes=notes)

    def _finished_report(self, experiment: Experiment) -> dict[str, Any] | None:
        """The report of a run that this sweep finished before it was interrupted; runs of no sweep are chosen elsewhere."""
        run_dir = experiment.run_dir
        if not self.task.sweep_id or not (run_dir / "DONE").exists():
            return None
        try:
            report: dict[str, Any] = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
            same = report.get("sweep") == self.task.sweep_id and report["config_hash"] == experiment.config_hash
            if same and report["data_hash"] == self._data_hash_of(experiment):
                return report
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    @staticmethod
    def _data_hash_of(experiment: Experiment) -> str:
        return build_dataset(experiment.dataset, root=experiment.root, task=experiment.training.task).data_hash

    def _ended(self, how: str, error: str = "", trace: str = "") -> Ended:
        results, curve = self.results, self.curve
        return Ended(self.task.trial_id, how, results, curve, self.data_hash, self.num_adopted, error, trace)


def _monitored(experiment: Experiment, history: list[dict[str, Any]]) -> list[float]:
    """The monitored value of each evaluation."""
    weights = experiment.training.monitor
    monitor = {weights: 1} if isinstance(weights, str) else weights
    return [sum(weight * record[name] for name, weight in monitor.items() if weight) for record in history]


def _read_curve(experiment: Experiment) -> list[float]:
    """The curve of a finished run, which may have been evaluated before this process began."""
    try:
        lines = (experiment.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return _monitored(experiment, [json.loads(line) for line in lines])
    except (OSError, ValueError, KeyError):
        return []
