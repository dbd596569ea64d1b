# SPDX-License-Identifier: Apache-2.0
"""The parent process of a sweep: claims settings, hands them to its slots, and records what becomes of them."""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import signal
import threading
import time
from typing import Any

from ctrbench.config import Experiment
from ctrbench.errors import ConfigError, CtrbenchError
from ctrbench.files import write_text
from ctrbench.seeds import is_faster_stacked
from ctrbench.tuner.configs import ConfigFolder, rerun_command
from ctrbench.tuner.definition import Sweep
from ctrbench.tuner.display import Display
from ctrbench.tuner.records import Claim, Outcome, objective_of
from ctrbench.tuner.sampling import draw_tpe, setting_name
from ctrbench.tuner.slots import Slot, make_slots, messages
from ctrbench.tuner.space import Values
from ctrbench.tuner.store import Store

# A trial whose worker died so often in a row, without an evaluation in between, is given up.
MAX_DEATHS = 3
# How long workers have to write a checkpoint after Ctrl-C.
STOP_SECONDS = 30.0
POLL_SECONDS = 0.2
IDLE_SECONDS = 1.0
RECOVER_SECONDS = 1.0


@dataclasses.dataclass
class Job:
    """A trial of this process.

    Attributes:
        claim: of the store.
        index: number of the setting, as its expid has it.
        values: the tuned keys.
        experiments: one for each seed.
        curve: the monitored value at each evaluation of the first seed.
        epoch: that it is in.
        seed: of the run that it is in.
        is_fresh: whether it takes nothing from an unfinished run of an earlier sweep.
        deaths: of workers in a row while they ran it.
        is_alone: whether it ran out of memory and is tried once more with its device to itself.
    """

    claim: Claim
    index: int
    values: Values
    experiments: list[Experiment]
    curve: list[float] = dataclasses.field(default_factory=list)
    epoch: int = 0
    seed: int | None = None
    is_fresh: bool = False
    deaths: int = 0
    is_alone: bool = False

    @property
    def expid(self) -> str:
        """Name of the experiment."""
        return self.experiments[0].expid


class Engine:
    """Runs a sweep on the slots of this machine until there is nothing left of it.

    Args:
        sweep: what to run.
        store: its shared state.
        gpus: a slot for each.
        sweep_id: identifies the sweep in the reports of its runs.
        display: shows what happens.
        is_fresh: take nothing from unfinished runs of an earlier sweep.
    """

    def __init__(
        self, sweep: Sweep, store: Store, gpus: list[int], sweep_id: str, display: Display, is_fresh: bool = False
    ):
        self.is_fresh = is_fresh
        self.sweep, self.store, self.sweep_id, self.display = sweep, store, sweep_id, display
        self.configs = ConfigFolder(sweep, sweep.folder / "config")
        self.slots = make_slots(gpus, sweep.folder / "workers.log")
        self.pending: list[Job] = []
        self.num_settings = num_settings(sweep)
        self.asks = sweep.config.pruner.name != "none"
        self.is_stopping = False
        self.num_adopted = 0
        self._last_recovery = 0.0
        self._is_prepared = False
        self._started = time.monotonic()
        self._stop_at = self._deadline = math.inf
        if sweep.config.timeout is not None:
            self._deadline = self._started + sweep.config.timeout - store.seconds_used()

    def run(self) -> bool:
        """Run the sweep until nothing is left for this process or its time is over; False if it was told to stop."""
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.store.heartbeat(force=True)
            if self._is_over():
                self.display.line(
                    f"timeout: the {self.sweep.config.timeout:g} s of this sweep are used up: raise it to go on"
                )
            for slot in self.slots:
                self._start_worker(slot)
            while self._step():
                pass
        finally:
            self._end_workers()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return not self.is_stopping

    def _step(self) -> bool:
        """Fill the slots and take in what their workers say; False when there is nothing left to do."""
        self._recover()
        if not self.is_stopping:
            self._fill()
        is_busy = any(slot.job is not None for slot in self.slots)
        # A slot that is ready and got nothing shows that there is nothing left for this process.
        is_idle = not is_busy and any(slot.is_ready for slot in self.slots)
        if (self.is_stopping and not is_busy) or (is_idle and not self._others_run()):
            return False
        if time.monotonic() > self._stop_at:
            return False
        if is_busy and not self._is_prepared and all(slot.job is not None for slot in self.slots):
            self._is_prepared = True
            # What the end of the sweep needs takes seconds to load, and this process has nothing else to do now.
            threading.Thread(target=_load_results, daemon=True).start()
        self.display.update(self.store.records, self.slots, self.num_settings)
        for slot, message in messages(self.slots, POLL_SECONDS if is_busy else IDLE_SECONDS):
            self._handle(slot, message)
        self.store.heartbeat()
        return True

    def _others_run(self) -> bool:
        """Whether trials of other processes are not finished; this one waits for them, to take over what they leave."""
        if self._is_over():
            return False
        return self.store.has_unfinished(self.num_settings)

    def _is_over(self) -> bool:
        return time.monotonic() >= self._deadline

    # Claims

    def _fill(self) -> None:
        for slot in self.slots:
            if slot.job is None and slot.is_ready:
                job = self._next_job(slot)
                if job is not None:
                    self._start(slot, job)

    def _next_job(self, slot: Slot) -> Job | None:
        neighbours = [s.job for s in self.slots if s.gpu == slot.gpu and s.job is not None]
        if any(job.is_alone for job in neighbours):
            return None
        for job in self.pending:
            if not job.is_alone:
                self.pending.remove(job)
                return job
        alone = next((job for job in self.pending), None)
        if alone is not None:
            # Its device takes nothing new until it is empty, and then this trial only.
            if neighbours:
                return None
            self.pending.remove(alone)
            return alone
        return None if self._is_over() else self._claim()

    def _claim(self) -> Job | None:
        """The next setting that can be run; one whose values contradict each other is recorded as failed."""
        while True:
            claim = self.store.claim(self.num_settings)
            if claim is None:
                return None
            setting = self._setting(claim)
            if setting is None:
                self.num_settings = min(self.num_settings, claim.number)
                self.store.discard(claim.trial_id)
                continue
            index, values = setting
            try:
                experiments = self.sweep.experiments(index, values)
            except ConfigError as error:
                expid = f"{self.sweep.base_name}_{index + 1:03d}"
                self._describe(claim, index, expid, values)
                self.store.fail(claim.trial_id, Outcome("", error=str(error)))
                self.display.failed(expid, str(error))
                continue
            self._describe(claim, index, experiments[0].expid, values)
            self.configs.add(values, experiments[0])
            return Job(claim, index, values, experiments, is_fresh=self.is_fresh and claim.values is None)

    def _setting(self, claim: Claim) -> tuple[int, Values] | None:
        if self.sweep.config.sampler != "tpe":
            return self.sweep.plan.get(claim.number)
        if claim.values is not None:
            return claim.number, claim.values
        seen = {setting_name(record.values) for record in self.store.records() if record.values}
        study, seed = self.store.study, self.sweep.config.sampler_seed
        values = draw_tpe(study, claim.trial_id, self.sweep.space, seed, seen)
        return None if values is None else (claim.number, values)

    def _describe(self, claim: Claim, index: int, expid: str, values: Values) -> None:
        distributions = self.sweep.space.distributions()
        sampled = self.sweep.space.to_sampled(values)
        self.store.describe(
            claim.trial_id, index, expid, values, {k: (sampled[k], distributions[k]) for k in distributions}
        )

    # Trials

    def _start(self, slot: Slot, job: Job) -> None:
        from ctrbench.tuner.worker import Task

        # Where the pruner is to judge, it does so by the first seed alone.
        together = [e.training.seed for e in job.experiments[1 if self.asks else 0 :]]
        if job.is_alone or len(together) < 2 or not is_faster_stacked(job.experiments[0], slot.gpu):
            together = []
        commands = [
            rerun_command(self.sweep, e, slot.gpu, seeds=together if e.training.seed in together else ())
            for e in job.experiments
        ]
        task = Task(
            trial_id=job.claim.trial_id,
            experiments=job.experiments,
            gpu=slot.gpu,
            sweep_id=self.sweep_id,
            commands=commands,
            asks=self.asks,
            is_fresh=job.is_fresh,
            together=together,
        )
        job.is_fresh = False
        slot.run(job, task)
        self.display.started(job.expid, slot.device)

    def _handle(self, slot: Slot, message: Any) -> None:
        from ctrbench.tuner.worker import READY, Ended, Evaluated

        if message is None:
            self._on_death(slot)
        elif message == READY:
            slot.is_ready, slot.failed_starts = True, 0
        elif isinstance(message, Evaluated):
            self._on_evaluation(slot, message)
        elif isinstance(message, Ended):
            self._on_end(slot, message)

    def _on_evaluation(self, slot: Slot, message: Any) -> None:
        job: Job = slot.job
        job.deaths, job.epoch, job.seed = 0, message.epoch, message.seed
        if message.seed == job.experiments[0].training.seed:
            job.curve = message.curve
            if self.asks:
                slot.say("prune" if self.store.is_hopeless(job.claim.trial_id, job.curve) else "go")

    def _on_end(self, slot: Slot, message: Any) -> None:
        job, seconds = slot.job, time.monotonic() - slot.since
        if message.data_hash is not None:
            self._check_data(job.experiments[0], message.data_hash)
        slot.job = None
        job.curve = message.curve or job.curve
        trial_id, outcome = job.claim.trial_id, Outcome(slot.device, job.curve, message.results)
        if message.how == "complete":
            self.num_adopted += message.num_adopted
            if self.store.complete(trial_id, outcome):
                self.display.completed(job.expid, objective_of(message.results), seconds, slot.device)
        elif message.how == "pruned":
            if self.store.prune(trial_id, outcome):
                self.display.pruned(job.expid, job.curve, seconds)
        elif message.how == "stopped":
            self.store.release(trial_id)
        elif message.how == "out_of_memory" and not job.is_alone:
            job.is_alone = True
            self.pending.append(job)
            self.display.line(
                f"{job.expid}: out of memory on {slot.device}: it is run once more with the device to itself"
            )
            slot.is_ready = False
            slot.kill()  # what it holds goes with it
        else:
            self._fail(job, slot.device, message.error, message.results, message.trace)

    def _fail(self, job: Job, device: str, error: str, results: Any = (), trace: str = "") -> None:
        outcome = Outcome(device, job.curve, list(results), error or "failed without a message")
        if self.store.fail(job.claim.trial_id, outcome):
            self.display.failed(job.expid, error)
            if trace:
                write_text(self.sweep.folder / "errors" / f"{job.expid}.txt", trace)

    def _on_death(self, slot: Slot) -> None:
        """Restart a worker that died, and give its trial to the next free slot."""
        job = slot.job
        cause = slot.bury()
        if not self.is_stopping:
            if job is None:
                slot.check_start(cause)
            self._start_worker(slot)
        if job is None:
            return
        job.deaths += 1
        if self.is_stopping:
            self.store.release(job.claim.trial_id)
        elif job.deaths >= MAX_DEATHS:
            self._fail(job, slot.device, f"its worker died {job.deaths} times in a row ({cause})")
        else:
            self.display.line(f"{job.expid}: its worker died ({cause}): the trial goes on elsewhere")
            self.pending.append(job)

    def _check_data(self, experiment: Experiment, data_hash: str) -> None:
        dataset_id = experiment.training.dataset_id
        agreed = self.store.agree(f"data {dataset_id}", data_hash)
        if agreed != data_hash:
            raise CtrbenchError(
                f"{dataset_id}: the data of this machine ({data_hash[:12]}) is not what the sweep's other trials were "
                f"trained on ({agreed[:12]}): copy the same raw files here, or start over with --fresh"
            )

    def _recover(self) -> None:
        now = time.monotonic()
        if now - self._last_recovery >= RECOVER_SECONDS:
            self._last_recovery = now
            for number in self.store.recover():
                self.display.line(f"trial {number + 1}: the process that ran it is gone: it goes on here")

    def _start_worker(self, slot: Slot) -> None:
        try:
            slot.start()
        except OSError:
            if not self.is_stopping:  # Ctrl-C came while it loaded
                raise

    # The end

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.is_stopping:
            for slot in self.slots:
                slot.kill()
            self.display.__exit__()
            os._exit(128 + number)
        self.is_stopping, self._stop_at = True, time.monotonic() + STOP_SECONDS
        self.display.line("stopping: running trials write a checkpoint; once more to stop at once")
        for slot in self.slots:
            if slot.job is not None:
                slot.say("stop")
            elif slot.link is not None:
                slot.say(None)

    def _end_workers(self) -> None:
        """End the workers and give back what they did not finish."""
        for slot in self.slots:
            slot.kill()  # an idle worker holds nothing, and files are whole at any moment
        for slot in self.slots:
            if slot.process is not None:
                job = slot.job
                slot.bury()
                if job is not None:
                    self.pending.append(job)
        for job in self.pending:
            self.store.release(job.claim.trial_id)
        self.pending.clear()


def _load_results() -> None:
    importlib.import_module("ctrbench.tuner.results")
    importlib.import_module("optuna.importance")


def num_settings(sweep: Sweep) -> float:
    """Settings that a sweep is to run; infinite where only its timeout ends it."""
    config = sweep.config
    if config.sampler == "tpe":
        return config.num_trials or math.inf
    return math.inf if config.sampler == "random" and config.num_trials is None else len(sweep.plan)
