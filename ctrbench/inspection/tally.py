# SPDX-License-Identifier: Apache-2.0
"""Rows and positive labels by value, added up block by block, and what they tell of the label."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

PRIOR_ROWS = 10.0  # rows of the overall label rate that every value is given, so that rare values say little
_COMPACT = 1 << 22  # entries that may wait before equal keys are put together


class DenseTally:
    """Of values 0 .. size-1.

    Attributes:
        keys, rows, positives: (K,) of the values that occur.
    """

    def __init__(self, size: int):
        self._rows = np.zeros(size, np.int64)
        self._positives = np.zeros(size)

    def add(self, values: np.ndarray, labels: np.ndarray | None) -> None:
        """Add values (n,) and their labels."""
        self._rows += np.bincount(values, minlength=len(self._rows))
        if labels is not None:
            self._positives += np.bincount(values, labels, minlength=len(self._rows))

    @property
    def keys(self) -> np.ndarray:
        return np.flatnonzero(self._rows)

    @property
    def rows(self) -> np.ndarray:
        return np.asarray(self._rows[self.keys])

    @property
    def positives(self) -> np.ndarray:
        return np.asarray(self._positives[self.keys])


class SparseTally:
    """Of any 64-bit values, such as hashes of tokens; memory grows with the distinct ones.

    Attributes:
        keys, rows, positives: (K,), keys ascending.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._waiting = 0

    def add(self, values: np.ndarray, labels: np.ndarray | None) -> None:
        """Add values (n,) and their labels."""
        keys, inverse, rows = np.unique(values, return_inverse=True, return_counts=True)
        positives = np.zeros(len(keys)) if labels is None else np.bincount(inverse, labels, minlength=len(keys))
        self._parts.append((keys, rows, positives))
        self._waiting += len(keys)
        if len(self._parts) > 1 and self._waiting > max(_COMPACT, 2 * len(self._parts[0][0])):
            self._compact()

    def _compact(self) -> None:
        if len(self._parts) != 1:
            empty = (np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0))
            keys, rows, positives = (np.concatenate(parts) for parts in zip(*(self._parts or [empty]), strict=True))
            merged, inverse = np.unique(keys, return_inverse=True)
            sums = [np.bincount(inverse, values, minlength=len(merged)) for values in (rows, positives)]
            self._parts = [(merged, sums[0].astype(np.int64), sums[1])]
        self._waiting = len(self._parts[0][0])

    @property
    def keys(self) -> np.ndarray:
        self._compact()
        return self._parts[0][0]

    @property
    def rows(self) -> np.ndarray:
        self._compact()
        return self._parts[0][1]

    @property
    def positives(self) -> np.ndarray:
        self._compact()
        return self._parts[0][2]


Tally = DenseTally | SparseTally


def known_share(tally: Tally, known: Tally) -> float:
    """Share of the rows of `tally` whose value `known` has."""
    return float(tally.rows[np.isin(tally.keys, known.keys)].sum() / max(tally.rows.sum(), 1))


def auc_alone(fitted: Tally, checked: Tally) -> float | None:
    """AUC of the label rates of `fitted` as scores of the rows of `checked`; None without labels of both kinds.

    A value's rate is (positives + PRIOR_ROWS * overall rate) / (rows + PRIOR_ROWS); values that `fitted` lacks have the
    overall rate.
    """
    if not len(fitted.keys) or not len(checked.keys):
        return None
    overall = fitted.positives.sum() / fitted.rows.sum()
    rates = (fitted.positives + PRIOR_ROWS * overall) / (fitted.rows + PRIOR_ROWS)
    places = np.minimum(np.searchsorted(fitted.keys, checked.keys), len(fitted.keys) - 1)
    scores = np.where(fitted.keys[places] == checked.keys, rates[places], overall)
    return auc_of_groups(scores, checked.rows, checked.positives)


def auc_of_groups(scores: np.ndarray, rows: np.ndarray, positives: np.ndarray) -> float | None:
    """AUC of groups of rows with one score each; ties count half."""
    _, inverse = np.unique(scores, return_inverse=True)
    above = np.bincount(inverse, positives)
    below = np.bincount(inverse, rows - positives)
    pairs = above.sum() * below.sum()
    if pairs <= 0:
        return None
    return float((above * (np.cumsum(below) - below / 2)).sum() / pairs)


class Sample:
    """About `size` numbers spread evenly over a column, to set the edges of its intervals."""

    def __init__(self, num_rows: int, size: int = 200_000):
        self._step = max(1, num_rows // size)
        self._parts: list[np.ndarray] = []

    def add(self, numbers: np.ndarray) -> None:
        """Add a block; what is not a number is left out."""
        kept = numbers[:: self._step]
        self._parts.append(kept[np.isfinite(kept)])

    def _values(self) -> np.ndarray:
        return np.concatenate(self._parts) if self._parts else np.zeros(0)

    def histogram(self, count: int = 24) -> tuple[np.ndarray, np.ndarray]:
        """Numbers in `count` intervals of equal width between the 1st and the 99th percentile, and the ends of these."""
        values = self._values()
        if not len(values):
            return np.zeros(0, np.int64), np.zeros(1)
        ends = tuple(np.quantile(values, (0.01, 0.99)))
        return np.histogram(values, count, ends if ends[1] > ends[0] else (ends[0] - 0.5, ends[0] + 0.5))

    def edges(self, count: int = 32) -> np.ndarray:
        """Quantiles that cut the numbers into at most `count` intervals."""
        values = self._values()
        return np.unique(np.quantile(values, np.linspace(0, 1, count + 1)[1:-1])) if len(values) else np.zeros(0)


def mixed(values: np.ndarray) -> np.ndarray:
    """64-bit values with their bits well mixed (the finaliser of splitmix64)."""
    x = values.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def row_hashes(columns: list[np.ndarray]) -> np.ndarray:
    """(n,) hashes of rows of columns (n,) or (n, width); the order of the columns matters."""
    total = np.zeros(len(columns[0]), np.uint64)
    step: Callable[[int], np.uint64] = lambda k: np.uint64((k * 0x9E3779B97F4A7C15) % (1 << 64))  # noqa: E731
    number = 1
    for column in columns:
        for values in column.reshape(len(column), -1).T:
            bits = (values + 0.0).astype(np.float64).view(np.uint64) if values.dtype.kind == "f" else values
            total = mixed(total ^ mixed(bits.astype(np.uint64) + step(number)))
            number += 1
    return total
