# SPDX-License-Identifier: Apache-2.0
"""Runs of one experiment with several seeds, in one process and in one stack: `ctrbench run --seeds 1 2 3`.

Every run is `ctrbench.run.run` as it stands, in a thread of its own. Only one thread runs at a time, until it asks for a
training step; when all have asked, `ctrbench.stacked` makes their steps together and they go on one after the other. So a
run evaluates, decides, stops, resumes and reports as it does alone, and leaves the same run directory; one that has
stopped, or failed, leaves the stack. Where a model cannot be stacked, its runs are made one after the other.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ctrbench.checkpoint import random_state, restore_random_state
from ctrbench.config import Experiment
from ctrbench.errors import ConfigError
from ctrbench.evidence import read_report
from ctrbench.run import Session, available_threads, run
from ctrbench.stacked import Stack, UnstackableError
from ctrbench.stacked_inputs import RandomState, signature_of
from ctrbench.trainer import Trainer

logger = logging.getLogger(__name__)
# A step that fails in the stack is made by each run alone, which shows whose it is. After so many in a row the stack is given up.
MAX_FAILURES = 2


def run_together(
    experiments: Sequence[Experiment],
    gpu: int = -1,
    fresh: bool = False,
    commands: Sequence[str] = (),
    sessions: Sequence[Session] = (),
) -> list[dict[str, Any] | BaseException]:
    """Run one experiment with several seeds, in a stack where its model allows it.

    After an interruption, unfinished runs go on from their checkpoints, which need not be of the same step, and runs that
    were finished by then stay; otherwise all are run anew, as a single run is.

    Args:
        experiments: alike but for their seeds.
        gpu: index of the GPU; -1 is the CPU.
        fresh: run all of them from the beginning.
        commands: how each was started, for its report.
        sessions: of each; all of them use the data of the first.

    Returns:
        For each the content of its report.json, or why it failed.

    Raises:
        ConfigError: they differ in more than their seeds, or a seed is there twice.
        KeyboardInterrupt: the user stopped them; what was trained since the last checkpoints is lost.
    """
    check_alike(experiments)
    experiments = list(experiments)
    finished = {} if fresh else finished_reports(experiments)
    available_threads()  # as many as this thread has
    given = list(sessions) or [Session() for _ in experiments]
    seats = [
        _Seat(experiment, gpu, fresh, command, dataclasses.replace(session, data=given[0].data))
        for experiment, command, session in zip(
            experiments, list(commands) or [""] * len(experiments), given, strict=True
        )
        if experiment.training.seed not in finished
    ]
    root = logging.getLogger()
    level = root.level
    root.setLevel(
        logging.INFO
    )  # each run would set it for its own time, and they do not end in the order that they began
    try:
        _Rendezvous(seats).run()
    finally:
        root.setLevel(level)
    results = {seat.experiment.training.seed: seat.result for seat in seats} | finished
    return [results[experiment.training.seed] for experiment in experiments]


class _Seat:
    """One run, in a thread that waits whenever it is not its turn."""

    def __init__(self, experiment: Experiment, gpu: int, fresh: bool, command: str, session: Session):
        self.experiment = experiment
        self.notes: dict[str, Any] = dict(session.notes)
        self.trainer: Trainer | None = None
        self.batch: Any = None  # of the step that it asks for; None when it asks for none
        self.loss: Tensor | None = None  # of the step that was made for it
        self.is_alone = False  # it makes all further steps by itself
        self.is_ended = False
        self.is_cancelled = False
        self.is_at_work = False
        self.result: dict[str, Any] | BaseException = RuntimeError("not run")
        self.stack: Stack | None = None
        self.state: RandomState | None = None
        self._all_state: dict[str, Any] = {}
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        title = f"seed {experiment.training.seed}"
        self._on_trainer = session.on_trainer
        session = dataclasses.replace(session, on_trainer=self._sit_down, title=title, notes=self.notes)
        self._run: Callable[[], dict[str, Any]] = lambda: run(experiment, gpu, fresh, command, session)
        # Not waited for when the process ends: files are whole at any moment.
        self._thread = threading.Thread(target=self._main, name=title, daemon=True)
        self._thread.start()

    def give_turn(self) -> None:
        """Let it run until it asks for a step or ends."""
        if self.state is not None:
            self.state.restore()
        self.is_at_work = True
        self._turn.release()
        self.wait()
        if not self.is_ended and self.trainer is not None:
            self.state = RandomState(self.trainer.device)

    def wait(self) -> None:
        """Until it asks for a step or has ended."""
        self._back.acquire()
        self.is_at_work = False

    def leave(self) -> None:
        """Take its model out of the stack."""
        if self.stack is not None and self.trainer is not None:
            self.stack.release(self.trainer)
        self.stack = None

    def finish_alone(self) -> None:
        """Let it make all further steps by itself, to its end."""
        assert self.trainer is not None and self.state is not None
        self.leave()
        restore_random_state(
            self._all_state, self.trainer.device
        )  # of Python and numpy, which a stack does not draw from
        self.is_alone, self.loss = True, None
        self.give_turn()

    def _main(self) -> None:
        self._turn.acquire()
        try:
            self.result = self._run()
        except BaseException as error:
            self.result = error
        self.is_ended, self.batch, self.trainer = True, None, None
        self._back.release()

    def _sit_down(self, trainer: Trainer) -> None:
        """Take the place of a trainer's step while it trains."""
        self._on_trainer(trainer)
        train = trainer.fit

        def fit(*arguments: Any, **keywords: Any) -> Any:
            trainer.step = self._step  # type: ignore[method-assign]
            try:
                return train(*arguments, **keywords)
            finally:
                del trainer.step
                self.leave()

        self.trainer = trainer
        trainer.fit = fit  # type: ignore[method-assign]

    def _step(self, batch: Any) -> Tensor:
        assert self.trainer is not None
        if not self.is_alone:
            if not self._all_state:
                self._all_state = random_state(self.trainer.device)
            self.batch = batch
            self._back.release()
            self._turn.acquire()
            self.batch = None
            if self.is_cancelled:
                raise KeyboardInterrupt
        loss, self.loss = self.loss, None
        return Trainer.step(self.trainer, batch) if loss is None else loss


class _Rendezvous:
    """Gives the runs their turns and makes their steps."""

    def __init__(self, seats: list[_Seat]):
        self.seats = seats
        self._failures = 0

    def run(self) -> None:
        """Until all have ended."""
        seats = self.seats
        try:
            for seat in seats:
                seat.give_turn()
            while seats := [seat for seat in seats if not seat.is_ended]:
                for group in _alike(seats):
                    if len(group) > 1 and not self._make_steps(group):
                        self._finish_one_by_one(seats)
                        return
                for seat in seats:
                    if seat.loss is None:
                        seat.leave()
                    seat.give_turn()
        except BaseException:
            self._cancel()
            raise

    def _make_steps(self, group: list[_Seat]) -> bool:
        """The next step of runs with batches of one shape; False when they are to go on without a stack."""
        trainers = [seat.trainer for seat in group if seat.trainer is not None]
        states = [seat.state for seat in group if seat.state is not None]
        try:
            stack = group[0].stack
            if stack is None or any(seat.stack is not stack for seat in group) or stack.trainers != trainers:
                for seat in group:
                    seat.leave()
                stack = Stack(trainers)
                for seat in group:
                    seat.stack = stack
            losses, states = stack.step([seat.batch for seat in group], states)
        except UnstackableError as error:
            name = type(trainers[0].model).__name__
            logger.debug("%s cannot be stacked, its seeds are run one after the other: %s", name, error)
            return False
        except Exception as error:
            self._failures += 1
            logger.debug("A step failed in the stack, each seed makes it alone: %s", error)
            return self._failures < MAX_FAILURES
        self._failures = 0
        seeds = [seat.experiment.training.seed for seat in group]
        for seat, loss, state in zip(group, losses, states, strict=True):
            seat.loss, seat.state = loss, state
            note = seat.notes.setdefault("stack", {"seeds": seeds, "steps": 0})
            note["steps"] += 1
        return True

    def _finish_one_by_one(self, seats: list[_Seat]) -> None:
        for seat in seats:
            if seat.loss is not None:  # of another group, whose step is made
                seat.give_turn()
        for seat in seats:
            if not seat.is_ended:
                seat.finish_alone()

    def _cancel(self) -> None:
        """End all threads; one that is at work comes to its next step first, or to its end."""
        for seat in self.seats:
            seat.is_cancelled = True
        for seat in self.seats:
            if seat.is_at_work:
                seat.wait()
            if not seat.is_ended and seat.batch is not None:
                seat.give_turn()


def _alike(seats: Sequence[_Seat]) -> list[list[_Seat]]:
    """Seats by the shapes of their batches."""
    groups: dict[Any, list[_Seat]] = {}
    for seat in seats:
        groups.setdefault(signature_of(seat.batch), []).append(seat)
    return list(groups.values())


def check_alike(experiments: Sequence[Experiment]) -> None:
    """Refuse experiments that are not one with several seeds.

    Raises:
        ConfigError: they are not.
    """
    seeds = [experiment.training.seed for experiment in experiments]
    if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        raise ConfigError(f"--seeds: {', '.join(map(str, twice))} is there twice: name every seed once")
    if len({(e.expid, e.settings_hash, e.run_dir.parent) for e in experiments}) > 1:
        raise ConfigError("runs that are trained together must be of one experiment and differ in their seeds alone")


def finished_reports(experiments: Sequence[Experiment]) -> dict[int, dict[str, Any]]:
    """By seed, the reports of runs that are finished, if others of these runs were interrupted."""
    from ctrbench.bench import is_finished

    is_interrupted = any((e.run_dir / "last.ckpt").exists() and not (e.run_dir / "DONE").exists() for e in experiments)
    return {e.training.seed: read_report(e.run_dir) for e in experiments if is_interrupted and is_finished(e)}
