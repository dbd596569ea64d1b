# SPDX-License-Identifier: Apache-2.0
"""How fast a run was: rows a second, where its time went, and how near it came to what the machine can do.

`DataClock` times the drawing of batches from outside the training loop. What a step must do at least is counted once,
after training; see `ctrbench.costs`. A short run is not held up by any of this: it reports its rates alone.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any

from ctrbench.batches import Batches
from ctrbench.ceilings import Ceilings, ceilings
from ctrbench.costs import StepCosts, count_step
from ctrbench.evaluation import Watch
from ctrbench.trainer import Trainer

# Seconds of training that make it worth while to count, which takes as long as a few steps, and to measure ceilings, which
# takes half a second once on a machine.
COUNT_AFTER_SECONDS = 2.0
MEASURE_AFTER_SECONDS = 20.0
logger = logging.getLogger(__name__)


class DataClock:
    """A `watch` for a trainer that times how long its loop over an epoch waits for batches.

    On a GPU that is the time in which the host prepares them; the device may be at work all the while.

    Args:
        shown: another `watch`, which shows progress.

    Attributes:
        seconds: waited in training.
        batches: drawn in training.
    """

    def __init__(self, shown: Watch | None = None):
        self._shown = shown
        self.seconds = 0.0
        self.batches = 0

    def __call__(self, items: Iterable[Any], count: int, label: str) -> Iterator[Any]:
        """Pass `items` on; those of an epoch are timed."""
        source = self._timed(items) if label.startswith("Epoch") else iter(items)
        return self._shown(source, count, label) if self._shown else source

    def _timed(self, items: Iterable[Any]) -> Iterator[Any]:
        iterator = iter(items)
        while True:
            started = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - started
            self.batches += 1
            yield item


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds and rows of a run.

    Attributes:
        train_seconds: of training, batches included.
        evaluate_seconds: of all evaluations.
        steps: of training.
        train_rows: rows that these saw.
        evaluated_rows: rows of the evaluations after training.
        final_seconds: of these evaluations.
    """

    train_seconds: float
    evaluate_seconds: float
    steps: int
    train_rows: int
    evaluated_rows: int
    final_seconds: float


def describe_speed(trainer: Trainer, train: Batches, times: Times, is_thorough: bool = False) -> dict[str, Any]:
    """What report.json says of a run's speed, after it was trained and evaluated; log lines say the same.

    Args:
        trainer: of the run.
        train: its batches.
        times: what it took.
        is_thorough: count and measure however short the run was.

    Returns:
        Rows a second in training and in the last evaluations, the shares of the time, and, where known, what a step must
        do at least, the ceilings, and the rates and shares of them that training reached.
    """
    total = max(times.train_seconds + times.evaluate_seconds, 1e-9)
    data = data_seconds(trainer, times)
    step = times.train_seconds - (data or 0.0)
    shares = {"data": None if data is None else data / total, "step": step / total}
    report: dict[str, Any] = {
        "train_rows_per_second": times.train_rows / max(times.train_seconds, 1e-9),
        "evaluate_rows_per_second": times.evaluated_rows / max(times.final_seconds, 1e-9),
        "shares": {**shares, "evaluation": times.evaluate_seconds / total},
    }
    if is_thorough or times.train_seconds > COUNT_AFTER_SECONDS:
        costs = step_costs(trainer, train)
        limits = limits_of(trainer, is_thorough or times.train_seconds > MEASURE_AFTER_SECONDS)
        report.update(_against_ceilings(costs, limits, times.steps / max(step, 1e-9)))
    _log(report)
    return report


def data_seconds(trainer: Trainer, times: Times) -> float | None:
    """Seconds that training waited for batches, also in earlier parts of a continued run; None if that is not known."""
    clock = trainer.watch
    if not isinstance(clock, DataClock) or not clock.batches:
        return None
    return min(clock.seconds / clock.batches * times.steps, times.train_seconds)


def step_costs(trainer: Trainer, train: Batches) -> StepCosts | None:
    """What a training step must do at least; None for a model whose loss cannot be computed on one batch alone."""
    batch = next(iter(train.ordered(train.batch_size, False, 0)))
    try:
        return count_step(trainer.model, batch)
    except Exception as error:  # a model folder's own code may do anything, and its run is finished
        logger.warning(
            "The operations of a step cannot be counted: %s", str(error).splitlines()[0] if str(error) else error
        )
        return None


def limits_of(trainer: Trainer, may_measure: bool) -> Ceilings | None:
    """The ceilings of the trainer's device at the precision of its matrix products."""
    return ceilings(trainer.device, trainer.settings.precision, may_measure)


def _against_ceilings(costs: StepCosts | None, limits: Ceilings | None, steps_per_second: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if costs is not None:
        found["step"] = {
            **dataclasses.asdict(costs),
            "total_flops": costs.total_flops,
            "total_bytes": costs.total_bytes,
        }
        found["flops_per_second"] = costs.total_flops * steps_per_second
        found["bytes_per_second"] = costs.total_bytes * steps_per_second
    if limits is not None:
        found["ceilings"] = dataclasses.asdict(limits)
    if costs is not None and limits is not None:
        found["shares_of_ceilings"] = {
            "flops": found["flops_per_second"] / limits.flops_per_second,
            "bytes": found["bytes_per_second"] / limits.bytes_per_second,
            "floor": costs.floor_seconds(limits) * steps_per_second,
        }
    return found


def _log(report: dict[str, Any]) -> None:
    shares = ", ".join(f"{part} {share:.1%}" for part, share in report["shares"].items() if share is not None)
    logger.info(
        "Speed: %s rows/s in training, %s rows/s in evaluation; time: %s",
        f"{report['train_rows_per_second']:,.0f}",
        f"{report['evaluate_rows_per_second']:,.0f}",
        shares,
    )
    if "flops_per_second" not in report:
        return
    rates = f"{report['flops_per_second'] / 1e9:.3g} GFLOP/s, {report['bytes_per_second'] / 1e9:.3g} GB/s"
    if (of := report.get("shares_of_ceilings")) is None:
        logger.info("Steps: at least %s; this machine's ceilings are not measured", rates)
        return
    logger.info("Steps: at least %s, %.1f%% and %.1f%% of this machine's ceilings", rates, *_percent(of))


def _percent(of: dict[str, float]) -> tuple[float, float]:
    return 100 * of["flops"], 100 * of["bytes"]
