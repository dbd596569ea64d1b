# SPDX-License-Identifier: Apache-2.0
"""The search space: which values each key may take, which combinations are left out, and their order."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from ctrbench.tuner.schema import Between, Exclusion, Range
from ctrbench.validation import Where, validate
from ctrbench.yamlfile import shown

Values = dict[str, Any]
# A grid of more combinations than this is a mistake.
MAX_GRID = 1_000_000


@dataclasses.dataclass(frozen=True)
class Dimension:
    """The values of one key: a list of choices, or a range."""

    key: str
    choices: tuple[Any, ...] = ()
    range: Range | None = None

    def grid(self) -> list[Any]:
        """All values, in order."""
        if self.range is None:
            return list(self.choices)
        # In decimal, as the file says it: 0.1 three times is 0.3.
        low, high, step = (Decimal(str(x)) for x in (self.range.low, self.range.high, self.range.step or 1))
        values = [low + i * step for i in range(int((high - low) / step) + 1)]
        return [int(value) if self.range.is_whole else float(value) for value in values]

    def distribution(self) -> BaseDistribution:
        """The form that Optuna samples from. A choice that is not a scalar is named by its JSON text."""
        found = self.range
        if found is None:
            return CategoricalDistribution([_named(choice) for choice in self.choices])
        if found.is_whole:
            return IntDistribution(int(found.low), int(found.high), log=found.log, step=int(found.step or 1))
        step = None if found.step is None else float(found.step)
        return FloatDistribution(float(found.low), float(found.high), log=found.log, step=step)

    def value(self, sampled: Any) -> Any:
        """The value that Optuna's `sampled` stands for."""
        if self.range is None:
            names = [_named(choice) for choice in self.choices]
            return self.choices[_position(names, sampled)]
        # Twelve digits, so that the value is the same after it was written and read.
        return int(sampled) if self.range.is_whole else float(f"{sampled:.12g}")

    def sampled(self, value: Any) -> Any:
        """What Optuna calls `value`."""
        if self.range is None:
            return _named(value)
        return int(value) if self.range.is_whole else min(max(float(value), self.range.low), self.range.high)

    def may_be(self, value: Any) -> bool:
        """Whether `value` is one of its values."""
        if self.range is None:
            return any(_equal(choice, value) for choice in self.choices)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and self.range.low <= value <= self.range.high

    @property
    def first(self) -> Any:
        """The first choice, or the low end."""
        return self.choices[0] if self.range is None else self.range.low

    @property
    def is_single(self) -> bool:
        """Whether there is nothing to choose."""
        return len(self.choices) == 1 if self.range is None else self.range.low == self.range.high


@dataclasses.dataclass(frozen=True)
class Space:
    """All combinations of values but the excluded ones."""

    dimensions: tuple[Dimension, ...]
    exclusions: tuple[Exclusion, ...] = ()

    def allows(self, values: Mapping[str, Any]) -> bool:
        """Whether no exclusion matches all of these values."""
        return not any(
            all(key in values and _matches(values[key], wanted) for key, wanted in exclusion.condition.items())
            for exclusion in self.exclusions
        )

    def grid(self) -> Iterator[Values]:
        """All allowed combinations, the last key varying fastest."""
        keys = [dimension.key for dimension in self.dimensions]
        for values in itertools.product(*(dimension.grid() for dimension in self.dimensions)):
            setting = dict(zip(keys, values, strict=True))
            if self.allows(setting):
                yield setting

    def first(self) -> Values | None:
        """An allowed combination, the first of a grid; None if all are excluded."""
        if self.size() <= MAX_GRID:
            return next(self.grid(), None)
        return {dimension.key: dimension.first for dimension in self.dimensions}

    def size(self) -> float:
        """Number of combinations, excluded ones included; infinite where a range is continuous."""
        ranges = [dimension.range for dimension in self.dimensions]
        if any(r is not None and not r.is_whole and r.step is None and r.low < r.high for r in ranges):
            return math.inf
        return math.prod(len(dimension.grid()) for dimension in self.dimensions)

    def distributions(self) -> dict[str, BaseDistribution]:
        """By key, for those with more than one value."""
        return {d.key: d.distribution() for d in self.dimensions if not d.is_single}

    def from_sampled(self, sampled: Mapping[str, Any]) -> Values:
        """Values from Optuna's, completed by the keys with one value."""
        return {d.key: d.value(sampled[d.key]) if d.key in sampled else d.first for d in self.dimensions}

    def to_sampled(self, values: Mapping[str, Any]) -> Values:
        """Optuna's form of the values of the keys with more than one."""
        return {d.key: d.sampled(values[d.key]) for d in self.dimensions if not d.is_single}

    def restored(self, values: Mapping[str, Any]) -> Values:
        """Values that a store kept as JSON, with the space's own tuples where that left lists."""
        choices = {d.key: d.choices for d in self.dimensions}
        return {
            key: next((c for c in choices.get(key, ()) if _named(c) == _named(value)), value)
            if isinstance(value, list)
            else value
            for key, value in values.items()
        }

    @property
    def log_keys(self) -> frozenset[str]:
        """Keys that are searched, or listed, on a log scale."""
        found = {d.key for d in self.dimensions if d.range is not None and d.range.log}
        return frozenset(found | {d.key for d in self.dimensions if _is_geometric(d.choices)})


def parse_space(
    tuner_space: Mapping[str, Any],
    exclude: list[Exclusion],
    is_grid: bool,
    where: Callable[[str], str],
    problems: list[str],
) -> Space:
    """The space of a tuner file; what is wrong with it is added to `problems`."""
    dimensions = []
    for key, value in tuner_space.items():
        name = f"tuner_space.{key}"
        if isinstance(value, dict) and value.keys() & {"low", "high"}:
            dimension = _range(key, value, is_grid, where(name), problems)
        else:
            dimension = _choices(key, value, where(name), problems)
        if dimension is not None:
            dimensions.append(dimension)
    by_key = {dimension.key: dimension for dimension in dimensions}
    for number, exclusion in enumerate(exclude):
        for key, wanted in exclusion.condition.items():
            name = where(f"exclude[{number}].if.{key}")
            if key not in tuner_space:
                problems.append(f"{name}: '{key}' is not in tuner_space, so this excludes nothing")
            elif isinstance(wanted, dict) and key in by_key and wanted not in by_key[key].choices:
                validate(Between, wanted, Where(name), problems)
            elif key in by_key and not any(by_key[key].may_be(value) for value in _alternatives(wanted)):
                problems.append(f"{name}: '{key}' never has this value, so this excludes nothing, got {shown(wanted)}")
    return Space(tuple(dimensions), tuple(exclude))


def _range(key: str, value: dict[str, Any], is_grid: bool, where: str, problems: list[str]) -> Dimension | None:
    found: Range | None = validate(Range, value, Where(where), problems)
    if found is None:
        return None
    problem = None
    if found.low > found.high:
        problem = f"low is above high, got {shown(value)}"
    elif found.step is not None and (found.step <= 0 or found.log):
        problem = f"step must be positive and does not go with log, got {shown(value)}"
    elif found.log and found.low <= 0:
        problem = f"log needs low above 0, got {shown(value)}"
    elif is_grid and found.step is None and (not found.is_whole or found.log):
        problem = f"a grid needs a list of values or a step, got {shown(value)}: or set sampler: random or tpe"
    elif found.step and found.high > found.low and (found.high - found.low) / found.step > MAX_GRID:
        problem = f"step gives more than {MAX_GRID:,} values, got {shown(value)}"
    if problem:
        problems.append(f"{where}: {problem}")
        return None
    return Dimension(key, range=found)


def _choices(key: str, value: Any, where: str, problems: list[str]) -> Dimension | None:
    choices = value if isinstance(value, list) else [value]
    if not choices:
        problems.append(f"{where}: an empty list leaves nothing to try: give values, or delete the key")
        return None
    names = [json.dumps(choice, sort_keys=True, default=str) for choice in choices]
    twice = next((choice for choice, name in zip(choices, names, strict=True) if names.count(name) > 1), None)
    if len(set(names)) < len(names):
        problems.append(f"{where}: lists {shown(twice)} twice: keep one")
        return None
    return Dimension(key, tuple(choices))


def _named(choice: Any) -> Any:
    is_scalar = choice is None or isinstance(choice, bool | int | float | str)
    return choice if is_scalar else json.dumps(choice, sort_keys=True, default=str)


def _position(names: list[Any], sampled: Any) -> int:
    """Where `sampled` stands; 1, 1.0 and true are equal in Python but not the same choice."""
    exact = [i for i, name in enumerate(names) if type(name) is type(sampled) and name == sampled]
    return exact[0] if exact else names.index(sampled)


def _alternatives(wanted: Any) -> list[Any]:
    """The values that a condition names: a list names its elements, and itself where values are lists."""
    return [wanted, *wanted] if isinstance(wanted, list) else [wanted]


def _matches(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict) and wanted.keys() <= {"low", "high"} and not isinstance(value, dict):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        low, high = wanted.get("low"), wanted.get("high")
        return is_number and (low is None or low <= value) and (high is None or value <= high)
    return any(_equal(value, alternative) for alternative in _alternatives(wanted))


def _equal(one: Any, other: Any) -> bool:
    """Equal as YAML means it: `true` is not 1."""
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _is_geometric(choices: tuple[Any, ...]) -> bool:
    """Positive numbers that span more than a decade, as learning rates are listed."""
    numbers = [c for c in choices if isinstance(c, int | float) and not isinstance(c, bool)]
    return len(numbers) == len(choices) > 1 and min(numbers) > 0 and max(numbers) / min(numbers) >= 10
