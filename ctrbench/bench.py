# SPDX-License-Identifier: Apache-2.0
"""`ctrbench bench <suite>`: run what is missing of a suite on all slots; what is finished stays, what was interrupted goes on."""

from __future__ import annotations

import collections
import dataclasses
import signal
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import filelock

from ctrbench.config import Experiment
from ctrbench.errors import ConfigError, CtrbenchError
from ctrbench.evidence import data_problem, problems_of, read_report, weights_problem
from ctrbench.files import storage_error, write_text
from ctrbench.sections import list_expids, read_sections
from ctrbench.seeds import is_faster_stacked
from ctrbench.suite import Cell, Suite
from ctrbench.tuner.slots import Slot, make_slots, messages
from ctrbench.validation import missing_data

# A run whose worker died so often is given up.
MAX_DEATHS = 3
STOP_SECONDS = 30.0
POLL_SECONDS = 0.5


@dataclasses.dataclass
class Job:
    """What a slot is given: a cell that is to be run, or the cells of one experiment, whose seeds are trained together.

    Attributes:
        cells: which.
        experiments: what they run.
        deaths: of workers while they ran it.
        is_alone: whether it ran out of memory and is tried once more with its device to itself.
    """

    cells: list[Cell]
    experiments: list[Experiment]
    deaths: int = 0
    is_alone: bool = False

    @property
    def name(self) -> str:
        """For messages."""
        seeds = [cell.seed for cell in self.cells]
        return f"{self.cells[0].expid}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"

    def apart(self, finished: Collection[int] = ()) -> list[Job]:
        """A job for each cell but for the seeds that are finished."""
        return [
            dataclasses.replace(self, cells=[cell], experiments=[experiment])
            for cell, experiment in zip(self.cells, self.experiments, strict=True)
            if cell.seed not in finished
        ]


class Bench:
    """Runs the cells of a suite.

    Args:
        suite: the suite.
        gpus: a slot for each; -1 is the CPU.
        is_fresh: run finished cells again.
    """

    def __init__(self, suite: Suite, gpus: list[int], is_fresh: bool = False):
        self.suite, self.gpus, self.is_fresh = suite, gpus, is_fresh
        self.folder = suite.root / "runs" / "suites" / suite.name
        self.failed: dict[str, str] = {}
        self.num_done = self.num_total = 0
        self.is_stopping = False
        self._deadline = float("inf")
        self._pending: collections.deque[Job] = collections.deque()
        self._slots: list[Slot] = []

    def run(self) -> int:
        """Run the suite to its end.

        Returns:
            The exit status: 0, 1 if a run failed, 130 if it was stopped.

        Raises:
            ConfigError: another process runs this suite.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.folder / ".lock").acquire(timeout=0)
        except filelock.Timeout as error:
            raise ConfigError(f"{self.folder}: another process is running this suite: wait for it") from error
        except OSError as error:
            raise storage_error(error, self.folder) from error
        with lock:
            self._run_cells(list(self.suite.cells()))
            for sweep in self.suite.sweeps if not self.is_stopping else ():
                self._run_sweep(sweep)
        if self.failed:
            print(f"{len(self.failed)} failed, the same command tries them again:", file=sys.stderr)
            print("\n".join(f"  {name}: {error}" for name, error in self.failed.items()), file=sys.stderr)
        if self.is_stopping:
            print("stopped: the same command goes on where it was", file=sys.stderr)
            return 130
        return 1 if self.failed else 0

    def _run_cells(self, cells: list[Cell]) -> None:
        failed_before = len(self.failed)
        missing = self._missing(cells)
        self.num_total = len(cells)
        self.num_done = len(cells) - len(missing) - (len(self.failed) - failed_before)
        _say(f"{self.suite.name}: {_count(len(cells), 'run')}, {self.num_done} of them finished, {len(missing)} to do")
        if not missing:
            return
        self._pending.extend(self._together(missing))
        self._slots = make_slots(self.gpus[: len(missing)] or self.gpus, self.folder / "workers.log")
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for slot in self._slots:
                slot.start()
            while self._step():
                pass
        finally:
            for slot in self._slots:
                slot.kill()
            for slot in self._slots:
                if slot.process is not None:
                    slot.bury()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _missing(self, cells: list[Cell]) -> list[Job]:
        """The cells that have no finished run of this configuration and data; one that cannot be run is recorded as failed."""
        jobs = []
        for cell in cells:
            try:
                experiment = cell.experiment(is_data_required=False)
                if not self.is_fresh and is_finished(experiment):
                    continue
                if missing_data(experiment.dataset, experiment.root):
                    experiment = cell.experiment()  # which says what is missing
                jobs.append(Job([cell], [experiment]))
            except CtrbenchError as error:
                self._fail(f"{cell.expid}, seed {cell.seed}", "; ".join(str(error).splitlines()))
        return jobs

    def _together(self, jobs: list[Job]) -> list[Job]:
        """Jobs that train the seeds of an experiment together, where that is faster and leaves every slot something to do."""
        merged: dict[Any, Job] = {}
        for job in jobs:
            [cell], [experiment] = job.cells, job.experiments
            seed = None if is_stacked(experiment, self.gpus) else cell.seed
            key = (cell.zoo, cell.config_dir, cell.expid, cell.dataset_id, seed)
            first = merged.setdefault(key, Job([], []))
            first.cells.append(cell)
            first.experiments.append(experiment)
        return list(merged.values()) if len(merged) >= len(self.gpus) else jobs

    def _run_sweep(self, path: Path) -> None:
        from ctrbench.tuner.tune import Options, tune

        _say(f"{self.suite.name}: sweep {path.stem}")
        try:
            status = tune(Options(config=path, gpus=self.gpus))
            cells = best_of_sweep(path, self.suite.config.seeds)
        except CtrbenchError as error:
            self._fail(path.stem, "; ".join(str(error).splitlines()))
            return
        if status == 130:
            self.is_stopping = True
            return
        if status == 1 and cells:
            self._fail(path.stem, f"some of its trials failed: ctrbench tune --config {path} --retry-failed")
        if not cells:
            self._fail(path.stem, "no trial of the sweep is complete")
            return
        self._run_cells(cells)

    def _step(self) -> bool:
        if not self.is_stopping:
            for slot in self._slots:
                if slot.job is None and slot.is_ready:
                    self._fill(slot)
        is_busy = any(slot.job is not None for slot in self._slots)
        if (not is_busy and (self.is_stopping or not self._pending)) or time.monotonic() > self._deadline:
            return False
        for slot, message in messages(self._slots, POLL_SECONDS):
            self._handle(slot, message)
        return True

    def _fill(self, slot: Slot) -> None:
        neighbours = [s.job for s in self._slots if s.gpu == slot.gpu and s.job is not None]
        if not self._pending or any(job.is_alone for job in neighbours):
            return
        if self._pending[0].is_alone and neighbours:
            return  # its device takes nothing new until it is empty
        from ctrbench.tuner.worker import Task

        job = self._pending.popleft()
        together = [cell.seed for cell in job.cells] if len(job.cells) > 1 else []
        commands = [cell.command(self.suite.root, slot.gpu, together) for cell in job.cells]
        task = Task(id(job), job.experiments, slot.gpu, "", commands, False, self.is_fresh, together)
        slot.run(job, task)

    def _handle(self, slot: Slot, message: Any) -> None:
        from ctrbench.tuner.worker import READY, Ended

        if message is None:
            self._on_death(slot)
        elif message == READY:
            slot.is_ready, slot.failed_starts = True, 0
        elif isinstance(message, Ended):
            self._on_end(slot, message)

    def _on_end(self, slot: Slot, message: Any) -> None:
        job, seconds = slot.job, time.monotonic() - slot.since
        slot.job = None
        with_others = f", {len(job.cells)} seeds together" if len(job.cells) > 1 else ""
        for result in message.results:
            self.num_done += 1
            values = result.metrics
            shown = ", ".join(f"{s} {n} {v:.6f}" for s in values for n, v in list(values[s].items())[:1])
            name = f"{job.cells[0].expid}, seed {result.seed}"
            _say(f"[{self.num_done}/{self.num_total}] {name}: {shown} ({seconds:.1f} s on {slot.device}{with_others})")
        if message.how in ("complete", "stopped"):
            return
        is_full = message.how == "out_of_memory"
        if len(job.cells) > 1:
            reason = "out of memory" if is_full else message.error.splitlines()[0]
            _say(f"{job.name}: {reason}: what is missing is run one seed after the other")
            self._pending.extendleft(reversed(job.apart({result.seed for result in message.results})))
        elif is_full and not job.is_alone:
            job.is_alone = True
            self._pending.appendleft(job)
            _say(f"{job.name}: out of memory on {slot.device}: it is run once more with the device to itself")
        else:
            self._fail(job.name, message.error or "failed without a message", message.trace)
            return
        if is_full:
            slot.is_ready = False
            slot.kill()  # what it holds goes with it

    def _on_death(self, slot: Slot) -> None:
        job = slot.job
        cause = slot.bury()
        if not self.is_stopping:
            if job is None:
                slot.check_start(cause)
            slot.start()
        if job is None:
            return
        job.deaths += 1
        if job.deaths >= MAX_DEATHS:
            for part in job.apart():
                self._fail(part.name, f"its worker died {job.deaths} times ({cause})")
        elif not self.is_stopping:
            _say(f"{job.name}: its worker died ({cause}): it goes on from its checkpoint")
            self._pending.appendleft(job)

    def _fail(self, name: str, error: str, trace: str = "") -> None:
        self.failed[name] = error
        _say(f"{name}: failed: {error}")
        if trace:
            write_text(self.folder / "errors" / f"{name.replace(', seed ', '_seed_')}.txt", trace)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.is_stopping:
            self._deadline = 0.0
            return
        self.is_stopping, self._deadline = True, time.monotonic() + STOP_SECONDS
        _say("stopping: running experiments write a checkpoint; once more to stop at once")
        for slot in self._slots:
            slot.say("stop")


def is_stacked(experiment: Experiment, gpus: Sequence[int]) -> bool:
    """Whether a suite trains the seeds of an experiment in one stack: on GPUs alone.

    On a CPU a run can be repeated to the last bit, also after an interruption, which a stack would give up for little: it is
    faster there for tiny batches only.
    """
    return all(gpu >= 0 and is_faster_stacked(experiment, gpu) for gpu in gpus)


def is_finished(experiment: Experiment) -> bool:
    """Whether the run directory holds a finished, unaltered run of this configuration and of the data as they are now."""
    run_dir = experiment.run_dir
    if not (run_dir / "DONE").is_file():
        return False
    try:
        report = read_report(run_dir)
        if report.get("config_hash") != experiment.config_hash or problems_of(run_dir, report):
            return False
        if weights_problem(run_dir, report):
            return False
    except CtrbenchError:
        return False
    return data_problem(run_dir, report, is_built=True) is None


def best_of_sweep(path: Path, seeds: Sequence[int]) -> list[Cell]:
    """The runs of the best setting that a sweep has found so far; none if it has not finished a trial.

    Raises:
        CtrbenchError: the tuner file is wrong.
    """
    from ctrbench.tuner.definition import load_sweep

    sweep = load_sweep(path, is_data_required=False)
    config_dir = sweep.folder / "best_config"
    if not (config_dir / "model_config.yaml").is_file():
        return []
    [expid] = list_expids(config_dir)
    dataset_id = read_sections(config_dir, expid, sweep.base.zoo).model["dataset_id"]
    return [Cell(sweep.base.zoo, config_dir, expid, dataset_id, seed) for seed in seeds]


def describe(suite: Suite) -> list[str]:
    """What `ctrbench bench --dry-run` says: each cell and whether it is finished."""
    lines = []
    for cell in suite.cells():
        try:
            experiment = cell.experiment(is_data_required=False)
            state = "finished" if is_finished(experiment) else "to do"
        except CtrbenchError as error:
            state = f"cannot run: {'; '.join(str(error).splitlines())}"
        lines.append(f"{cell.expid}, seed {cell.seed}: {state}")
    for path in suite.sweeps:
        try:
            best_of_sweep(path, suite.config.seeds)
            lines.append(f"sweep {path.stem}, then its best setting with {_count(len(suite.config.seeds), 'seed')}")
        except CtrbenchError as error:
            lines.append(f"sweep {path.stem}: cannot run: {'; '.join(str(error).splitlines())}")
    return lines


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _say(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)
