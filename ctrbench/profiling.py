# SPDX-License-Identifier: Apache-2.0
"""Profiles of finished runs: a trace of a few more training steps, and one page that says where their time goes."""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ctrbench.batches import Batches
from ctrbench.ceilings import Ceilings
from ctrbench.costs import DATA, StepCosts
from ctrbench.environment import describe_environment
from ctrbench.files import atomic_path, shown_path, write_text
from ctrbench.phases import PHASES, STEP, PhaseClock
from ctrbench.trainer import Trainer

PROFILE, TRACE = "profile.md", "trace.json"
WARM_UP_STEPS, TRACED_STEPS = 3, 3
TIMED_STEPS, TIMED_SECONDS = 20, 10.0
TOP_OPERATORS = 15
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Operator:
    """What one operator took in a step: its own time, without that of what it calls.

    Attributes:
        name: as torch names it.
        seconds: of the device, by step.
        calls: by step.
    """

    name: str
    seconds: float
    calls: float


@dataclasses.dataclass(frozen=True)
class StepProfile:
    """Steps that were watched.

    Attributes:
        seconds: by phase, for each step; drawing the batch is "data".
        operators: the costliest first.
        operator_seconds: of all operators together, by step.
    """

    seconds: dict[str, list[float]]
    operators: list[Operator]
    operator_seconds: float

    def medians(self) -> dict[str, float]:
        """The median seconds of each phase."""
        return {name: statistics.median(values) for name, values in self.seconds.items()}


def write_profile(run_dir: Path, trainer: Trainer, train: Batches, report: dict[str, Any]) -> None:
    """Watch a few more training steps and write trace.json and profile.md.

    To be called after a run's weights are saved and its figures taken: the steps change the model that is in memory.

    Args:
        run_dir: of the run.
        trainer: of the run.
        train: batches of the training split.
        report: of the run, its speed included.
    """
    try:
        found = profile_steps(trainer, train, run_dir / TRACE)
    except Exception as error:  # a model's own step may do anything, and the run itself is finished
        logger.warning("No profile: %s: %s", type(error).__name__, error)
        return
    write_text(run_dir / PROFILE, describe(found, trainer, report))
    logger.info("Profile: %s; trace: %s", shown_path(run_dir / PROFILE), shown_path(run_dir / TRACE))


def profile_steps(trainer: Trainer, train: Batches, trace: Path | None = None) -> StepProfile:
    """Take training steps: a few to warm up, some with a clock alone, a few with torch's profiler.

    Args:
        trainer: whose model is trained on.
        train: batches of the training split.
        trace: file for a trace that chrome://tracing and ui.perfetto.dev show.
    """
    trainer.model.train()
    batches = _endless(train)
    for _ in range(WARM_UP_STEPS):
        trainer.step(next(batches))
    seconds = _timed(trainer, batches)
    activities = [ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    # Names of phases are for the trace; the clock's own figures under the profiler would be too long.
    with profile(activities=activities) as profiler, _clock(trainer, is_traced=True) as clock:
        for _ in range(TRACED_STEPS):
            with record_function(f"ctrbench: {DATA}"):
                batch = next(batches)
            with clock.step():
                trainer.step(batch)
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
    if trace is not None:
        with atomic_path(trace) as partial:
            profiler.export_chrome_trace(str(partial))
    operators = _operators(profiler, trainer.device)
    return StepProfile(seconds, operators[:TOP_OPERATORS], sum(operator.seconds for operator in operators))


def _clock(trainer: Trainer, is_traced: bool = False) -> PhaseClock:
    return PhaseClock(trainer.model, trainer.device, is_traced, trainer.settings.compile)


def _endless(train: Batches) -> Iterator[Any]:
    epoch = 0
    while True:
        yield from train.ordered(train.batch_size, train.shuffle, train.seed).at(epoch)
        epoch += 1


def _timed(trainer: Trainer, batches: Iterator[Any]) -> dict[str, list[float]]:
    data: list[float] = []
    end = time.perf_counter() + TIMED_SECONDS
    with _clock(trainer) as clock:
        while len(data) < TIMED_STEPS and (len(data) < 3 or time.perf_counter() < end):
            started = time.perf_counter()
            batch = next(batches)
            if trainer.device.type == "cuda":
                torch.cuda.synchronize(trainer.device)
            data.append(time.perf_counter() - started)
            with clock.step():
                trainer.step(batch)
    return {DATA: data, **clock.seconds()}


def _operators(profiler: Any, device: torch.device) -> list[Operator]:
    """Operators by their own time, on a GPU that of the kernels that they launch; kernels themselves are left out there."""
    where = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    found = [
        Operator(event.key, getattr(event, where) / 1e6 / TRACED_STEPS, event.count / TRACED_STEPS)
        for event in profiler.key_averages()
        if not event.key.startswith("ctrbench: ") and event.device_type == DeviceType.CPU
    ]
    return sorted((operator for operator in found if operator.seconds > 0), key=lambda o: -o.seconds)


def describe(found: StepProfile, trainer: Trainer, report: dict[str, Any]) -> str:
    """The page: the run, a step's phases against their floors, the costliest operators."""
    speed, environment = report["speed"], describe_environment(Path.cwd(), trainer.device)
    costs = StepCosts(**{k: speed["step"][k] for k in ("rows", "flops", "bytes")}) if "step" in speed else None
    limits = Ceilings(**speed["ceilings"]) if "ceilings" in speed else None
    medians = found.medians()
    title = f"{report['expid']}, seed {report['seed']}"
    machine = f"{environment['device_name']}, {environment['threads']} threads, torch {environment['torch']}"
    lines = [f"# Where the time of {title} goes", "", f"{machine}; B = {trainer.settings.batch_size:,}.", ""]
    lines += ["## The run", "", *_run_table(speed), ""]
    lines += [f"## A training step: {1e3 * medians[STEP]:.3g} ms", "", *_phase_table(medians, costs, limits), ""]
    lines += [f"Medians of {len(found.seconds[STEP])} steps after training; the batch is drawn before a step.", ""]
    lines += _ceiling_lines(limits)
    lines += ["## The costliest operators", "", *_operator_table(found), ""]
    lines += [
        f"Of {TRACED_STEPS} steps under the profiler, an operator's own time, without that of what it calls. "
        f"[{TRACE}]({TRACE}) holds every call, for chrome://tracing or https://ui.perfetto.dev.",
        "",
    ]
    return "\n".join(lines)


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]


def _run_table(speed: dict[str, Any]) -> list[str]:
    rows = [[part, f"{share:.1%}"] for part, share in speed["shares"].items() if share is not None]
    rates = ("train_rows_per_second", "evaluate_rows_per_second")
    train, evaluate = (f"{speed[name]:,.0f}" for name in rates)
    return [
        f"{train} rows/s in training, {evaluate} rows/s in evaluation.",
        "",
        *_table(["", "share of the time"], rows),
    ]


def _phase_table(medians: dict[str, float], costs: StepCosts | None, limits: Ceilings | None) -> list[str]:
    rows = []
    for phase in (DATA, *PHASES, STEP):
        if phase not in medians:
            continue
        seconds = medians[phase]
        share = "" if phase == DATA else f"{seconds / medians[STEP]:.1%}"
        row = [phase, f"{1e3 * seconds:.3f}", share]
        if costs is not None:
            part = None if phase == STEP else phase
            flops = costs.flops.get(phase, 0) if part else costs.total_flops
            moved = costs.bytes.get(phase, 0) if part else costs.total_bytes
            row += [f"{flops / 1e9:.3f}", f"{moved / 1e6:.1f}"]
            if limits is not None:
                floor = costs.floor_seconds(limits, part)
                row += [f"{1e3 * floor:.3f}", f"{floor / max(seconds, 1e-12):.1%}"]
        rows.append(row)
    header = ["", "ms", "share of the step", "GFLOP", "MB", "floor, ms", "of the floor"]
    return _table(header[: len(rows[0])], rows)


def _ceiling_lines(limits: Ceilings | None) -> list[str]:
    if limits is None:
        return []
    return [
        f"This machine copies {limits.bytes_per_second / 1e9:.3g} GB/s and multiplies matrices at "
        f"{limits.flops_per_second / 1e9:.4g} GFLOP/s ({limits.precision}). A phase's floor is the time of its matrix "
        "products or of the bytes that it must move, whichever is longer: `ctrbench.costs` says what is counted.",
        "",
    ]


def _operator_table(found: StepProfile) -> list[str]:
    total = max(found.operator_seconds, 1e-12)
    rows = [
        [f"`{o.name}`", f"{1e3 * o.seconds:.3f}", f"{o.seconds / total:.1%}", f"{o.calls:.0f}"] for o in found.operators
    ]
    return _table(["operator", "ms of a step", "share", "calls"], rows)
