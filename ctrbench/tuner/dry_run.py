# SPDX-License-Identifier: Apache-2.0
"""`--dry-run`: the trials of a sweep, each checked, with the memory and time that they will take."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ctrbench.config import Experiment
from ctrbench.errors import ConfigError
from ctrbench.estimate import Estimate, estimate
from ctrbench.tuner.definition import Sweep
from ctrbench.tuner.display import duration
from ctrbench.tuner.space import Values
from ctrbench.validation import missing_data
from ctrbench.yamlfile import shown

# More trials than these are counted, not shown.
MAX_SHOWN = 200


def describe(sweep: Sweep, gpus: list[int]) -> tuple[list[str], list[str]]:
    """The lines that a dry run prints, and the problems it found."""
    if sweep.config.sampler == "tpe" or (sweep.config.sampler == "random" and sweep.config.num_trials is None):
        return _describe_open(sweep, gpus)
    lines = [f"{sweep.name}: {sweep.config.sampler} of {len(sweep.plan)} trials; {sweep.folder}"]
    problems: list[str] = []
    tuned = [dimension.key for dimension in sweep.space.dimensions if not dimension.is_single]
    found: list[Estimate] = []
    for index, values, experiment, problem in _trials(sweep):
        if experiment is None:
            problems.append(f"trial {index + 1} ({_shown(values, tuned)}): {problem}")
            continue
        try:
            estimated = estimate(experiment, gpus[0] if not found else None)
        except ConfigError as error:
            problems.append(f"{experiment.expid}: {error}")
            continue
        found.append(estimated)
        if len(found) <= MAX_SHOWN:
            lines.append(f"  {experiment.expid}  {_shown(values, tuned)}{_size(estimated)}")
    if len(found) > MAX_SHOWN:
        lines.append(f"  ... {len(found) - MAX_SHOWN} more")
    return [*lines, *_totals(sweep, found, len(found), gpus)], problems


def _describe_open(sweep: Sweep, gpus: list[int]) -> tuple[list[str], list[str]]:
    """A search whose settings are drawn as it goes: the space, and the estimate of its first values."""
    count = sweep.config.num_trials
    what = f"{count} trials" if count else f"trials for {sweep.config.timeout:.0f} s"
    lines = [f"{sweep.name}: {sweep.config.sampler}, {what}, drawn as results come in; {sweep.folder}"]
    for dimension in sweep.space.dimensions:
        if dimension.range is None:
            lines.append(f"  {dimension.key}: one of {', '.join(map(shown, dimension.choices))}")
        else:
            scale = " on a log scale" if dimension.range.log else ""
            step = f" in steps of {dimension.range.step:g}" if dimension.range.step else ""
            lines.append(f"  {dimension.key}: {dimension.range.low:g} to {dimension.range.high:g}{step}{scale}")
    values = {dimension.key: dimension.first for dimension in sweep.space.dimensions}
    try:
        estimated = estimate(sweep.experiment(0, values), gpus[0])
    except ConfigError as error:
        return lines, [f"its first values: {problem}" for problem in error.problems]
    return [*lines, *_totals(sweep, [estimated], count or 0, gpus)], []


def _trials(sweep: Sweep) -> Iterator[tuple[int, Values, Experiment | None, str]]:
    for number in range(len(sweep.plan)):
        setting = sweep.plan.get(number)
        assert setting is not None
        index, values = setting
        try:
            yield index, values, sweep.experiment(index, values), ""
        except ConfigError as error:
            yield index, values, None, "; ".join(error.problems)


def _totals(sweep: Sweep, found: list[Estimate], count: int, gpus: list[int]) -> list[str]:
    known = [e for e in found if e.model_bytes is not None and e.data_bytes is not None]
    if not known:
        missing = missing_data(sweep.base.dataset, sweep.base.root)
        why = f"its data is missing: {', '.join(missing.values())}" if missing else "the sweep does that first"
        return [f"memory and time: not known before {sweep.base_dataset_id} is built ({why})"]
    largest = max((e.model_bytes or 0) + (e.data_bytes or 0) for e in known)
    sharing = max(gpus.count(gpu) for gpu in gpus)
    lines = [
        f"memory: up to {_bytes(largest)} per trial for model, optimizer and data, beside activations"
        + (f"; {sharing} trials share a device: {_bytes(sharing * largest)}" if sharing > 1 else "")
    ]
    timed = next((e for e in known if e.epoch_seconds is not None), None)
    if timed is None or timed.epoch_seconds is None or not count:
        return lines
    epochs, seeds = sweep.base.training.epochs, len(sweep.seeds)
    # A slot has its share of the cores; steps were timed alone.
    rounds = math.ceil(count / len(gpus))
    epoch = timed.epoch_seconds
    lines.append(
        f"time: about {duration(epoch)} for an epoch of the first trial ({timed.num_rows:,} rows, steps timed on random "
        f"rows), so at most {duration(rounds * seeds * epochs * epoch)} for {count * seeds} runs of {epochs} epochs on "
        f"{len(gpus)} slots; early stopping and pruning shorten it"
    )
    return lines


def _shown(values: Values, keys: list[str]) -> str:
    return "  ".join(f"{key}={shown(values[key])}" for key in keys)


def _size(estimated: Estimate) -> str:
    if estimated.parameters is None or estimated.model_bytes is None or estimated.data_bytes is None:
        return ""
    return f"  {estimated.parameters:,} parameters, {_bytes(estimated.model_bytes + estimated.data_bytes)}"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"
