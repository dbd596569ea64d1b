# SPDX-License-Identifier: Apache-2.0
"""What checkpoints and checksums cost a run that nothing happens to."""

from __future__ import annotations

import random
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from soak_kills import SIDES, make_raw, overrides_of
from soak_outcome import ROOT, Outcome, timed

# What writes or compares, by module; sealing a run hashes its files once more.
PARTS = {
    "checkpoints": tuple(("ctrbench.trainer", name) for name in ("save_checkpoint", "save_weights", "load_weights")),
    "checksums of the data": (("ctrbench.storage", "_verify"),),
    "hashes of the run": (("ctrbench.run", "seal"),),
}
LARGE = 60 << 20


def soak(
    count: int,
    seed: int,
    folder: Path,
    side: str = "resident",
    overrides: tuple[str, ...] = (),
    limit: float | None = None,
) -> Outcome:
    """Time so many runs of 6,000 rows with the parts that serve reliability counted apart.

    Args:
        count: how many.
        seed: of the runs.
        folder: an empty one.
        side: of `soak_kills`, with its frequent checkpoints left out.
        overrides: further `--set` values, such as the files of another dataset.
        limit: share of a run's time that is too much; None only measures: a tiny run is over in seconds, in which a few
            files that are put on disk weigh.
    """
    outcome = Outcome(
        "cost without faults", "checkpoints and checksums together take under 3% of a run's time on ML-1M"
    )
    make_raw(folder / "raw", rows=6000)
    with timed(outcome):
        for number in range(count):
            total, parts = _timed_run(folder, side, overrides, seed + number)
            share = sum(parts.values()) / total
            shown = ", ".join(f"{name} {100 * seconds / total:.2f}%" for name, seconds in parts.items())
            outcome.add("run", f"{100 * share:.2f}% of a run" if limit is not None and share >= limit else None)
            outcome.notes.append(f"run of {total:.2f} s: {100 * share:.2f}% ({shown})")
        block = random.Random(seed).randbytes(LARGE)
        started = time.process_time()
        zlib.crc32(block)
        outcome.notes.append(
            f"CRC-32 of {LARGE >> 20} MiB: {1000 * (time.process_time() - started):.0f} ms of CPU time"
        )
    return outcome


def _timed_run(folder: Path, side: str, overrides: tuple[str, ...], seed: int) -> tuple[float, dict[str, float]]:
    import importlib

    from ctrbench.config import load_experiment
    from ctrbench.run import Session, run

    expid = SIDES[side][0]
    zoo = ROOT / "model_zoo" / expid.split("_")[0]
    values = [v for v in overrides_of(side, folder / "raw", folder / "data", folder / "runs") if "_every" not in v]
    experiment = load_experiment(zoo / "config", expid, zoo, [*values, "eval_steps=null", *overrides], seed)
    seconds = dict.fromkeys(PARTS, 0.0)
    kept: list[tuple[Any, str, Any]] = []
    for part, functions in PARTS.items():
        for module_name, name in functions:
            module = importlib.import_module(module_name)
            kept.append((module, name, getattr(module, name)))
            setattr(module, name, _counted(getattr(module, name), seconds, part))
    started = time.perf_counter()
    try:
        run(experiment, fresh=True, session=Session(is_quiet=True))
    finally:
        for module, name, function in kept:
            setattr(module, name, function)
    return time.perf_counter() - started, seconds


def _counted(function: Callable[..., Any], seconds: dict[str, float], part: str) -> Callable[..., Any]:
    def counted(*arguments: Any, **keywords: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments, **keywords)
        finally:
            seconds[part] += time.perf_counter() - started

    return counted
