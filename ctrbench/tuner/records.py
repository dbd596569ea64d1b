# SPDX-License-Identifier: Apache-2.0
"""What a sweep knows of its trials: plain values, the same whichever store they come from."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any


@dataclasses.dataclass(frozen=True)
class SeedResult:
    """One finished run of a trial.

    Attributes:
        seed: its seed.
        metrics: by split (valid, test), metric by name.
        best_value: the monitored value of the best evaluation.
        best_epoch: the epoch of that evaluation, from 1.
        epochs: epochs trained.
        train_seconds: time of training steps.
        evaluate_seconds: time of evaluations.
        total_seconds: time of the run, data and files included.
        run_dir: its run directory, on the machine that ran it.
    """

    seed: int
    metrics: dict[str, dict[str, float]]
    best_value: float
    best_epoch: int
    epochs: int
    train_seconds: float
    evaluate_seconds: float
    total_seconds: float
    run_dir: str

    @classmethod
    def from_report(cls, report: dict[str, Any], run_dir: str) -> SeedResult:
        """The part of a run's report.json that a sweep keeps."""
        timings = report["timings"]
        return cls(
            seed=report["seed"],
            metrics=report["metrics"],
            best_value=report["best_value"],
            best_epoch=report["best_epoch"],
            epochs=report["epochs"],
            train_seconds=timings["train_seconds"],
            evaluate_seconds=timings["evaluate_seconds"],
            total_seconds=timings["total_seconds"],
            run_dir=run_dir,
        )


@dataclasses.dataclass(frozen=True)
class Claim:
    """A setting that this process is to run.

    Attributes:
        trial_id: of the store.
        number: of the setting in the plan.
        values: drawn earlier, if they were.
    """

    trial_id: int
    number: int
    values: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    Attributes:
        device: where it ran.
        curve: the monitored value at each evaluation of the first seed.
        seeds: its finished runs.
        error: why it failed.
    """

    device: str
    curve: list[float] = dataclasses.field(default_factory=list)
    seeds: list[SeedResult] = dataclasses.field(default_factory=list)
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class TrialRecord:
    """One setting of a sweep and what became of it.

    Attributes:
        index: number of the setting in the plan, from 0.
        expid: name of its experiment.
        state: complete, pruned, failed, running or waiting.
        values: tuned key -> value.
        objective: mean over seeds of the monitored validation value; None unless complete.
        curve: the monitored value at each evaluation of the first seed.
        seeds: its finished runs.
        error: why it failed.
        host: the machine that ran it.
        device: the device that ran it.
        started: unix time, in seconds.
        finished: unix time, in seconds.
    """

    index: int
    expid: str
    state: str
    values: dict[str, Any]
    objective: float | None = None
    curve: list[float] = dataclasses.field(default_factory=list)
    seeds: list[SeedResult] = dataclasses.field(default_factory=list)
    error: str | None = None
    host: str = ""
    device: str = ""
    started: float | None = None
    finished: float | None = None

    @property
    def train_seconds(self) -> float:
        """Seconds of training and evaluating, over all seeds."""
        return sum(seed.train_seconds + seed.evaluate_seconds for seed in self.seeds)


def objective_of(seeds: list[SeedResult]) -> float:
    """Mean over seeds of the best monitored value."""
    return statistics.fmean(seed.best_value for seed in seeds)


@dataclasses.dataclass(frozen=True)
class SweepSummary:
    """A sweep as its report shows it.

    Attributes:
        name: of the sweep.
        base_expid: the experiment that its trials vary.
        dataset_id: the data that it is about.
        objective: what is optimised, for people.
        direction: max or min.
        sampler: grid, random or tpe.
        log_keys: keys searched on a log scale.
        importance: key -> share of the objective's variation in [0, 1], most important first; empty when unknown.
        trials: by index.
        rerun_command: repeats the best trial.
    """

    name: str
    base_expid: str
    dataset_id: str
    objective: str
    direction: str
    sampler: str
    log_keys: frozenset[str]
    importance: dict[str, float]
    trials: list[TrialRecord]
    rerun_command: str | None = None

    @property
    def best(self) -> TrialRecord | None:
        """The complete trial with the best objective; of equals the first."""
        return best_of(self.trials, self.direction)


def best_of(trials: list[TrialRecord], direction: str) -> TrialRecord | None:
    """The complete trial with the best objective; of equals the first."""
    done = [trial for trial in trials if trial.state == "complete" and trial.objective is not None]
    sign = 1 if direction == "max" else -1
    return max(done, key=lambda trial: (sign * (trial.objective or 0.0), -trial.index), default=None)
