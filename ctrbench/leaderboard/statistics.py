# SPDX-License-Identifier: Apache-2.0
"""Intervals and tests: over seeds, between models on the same seeds, and over the rows of a test split."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ctrbench.leaderboard.records import Comparison, Summary

LEVEL = 0.95
# Resamples of a bootstrap; fewer of splits so large that the interval is narrow anyway.
NUM_RESAMPLES = 1000
NUM_RESAMPLES_LARGE = 200
LARGE_ROWS = 1_000_000


def summarize(values: Mapping[int, float]) -> Summary:
    """Mean, deviation and t interval of a metric over seeds (seed -> value)."""
    numbers = np.array(list(values.values()), dtype=float)
    mean = float(numbers.mean())
    if len(numbers) < 2:
        return Summary(dict(values), mean, None, None, None)
    deviation = float(numbers.std(ddof=1))
    low, high = _t_interval(numbers)
    return Summary(dict(values), mean, deviation, low, high)


def compare(values: Mapping[str, Mapping[int, float]]) -> list[Comparison]:
    """Paired t tests between all experiments (expid -> seed -> value) that share two seeds or more, Holm-corrected."""
    found: list[tuple[str, str, NDArray[np.float64], float]] = []
    for first, second in itertools.combinations(values, 2):
        seeds = sorted(values[first].keys() & values[second].keys())
        if len(seeds) < 2:
            continue
        differences = np.array([values[first][s] - values[second][s] for s in seeds])
        found.append((first, second, differences, _paired_p(differences)))
    adjusted = holm([p for *_, p in found])
    return [
        Comparison(first, second, len(d), float(d.mean()), *_t_interval(d), p, adjusted_p)
        for (first, second, d, p), adjusted_p in zip(found, adjusted, strict=True)
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the k-th smallest of m is multiplied by m - k + 1 and never falls below the one before."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def bootstrap_auc(
    label: NDArray[np.float64], score: NDArray[np.float64], seed: int = 0, num_resamples: int | None = None
) -> tuple[float, float]:
    """95% percentile bootstrap interval of the AUC over the rows of a split.

    A resample is a count for each row, so rows are sorted once: AUC = sum over tied scores of
    Q_i (P_above + P_i / 2) / (P Q), with P and Q the counts of positives and negatives.

    Args:
        label: (N,), 1 for a click.
        score: (N,).
        seed: of the resamples.
        num_resamples: how many.
    """
    if num_resamples is None:
        num_resamples = NUM_RESAMPLES if len(label) <= LARGE_ROWS else NUM_RESAMPLES_LARGE
    order = np.argsort(score, kind="stable")
    is_positive, ordered = label[order] > 0, score[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(num_resamples):
        count = np.bincount(generator.integers(0, len(label), len(label)), minlength=len(label))
        positives = np.add.reduceat(np.where(is_positive, count, 0), starts)
        negatives = np.add.reduceat(np.where(is_positive, 0, count), starts)
        above = positives.sum() - positives.cumsum()
        pairs = float(positives.sum()) * float(negatives.sum())
        if pairs:
            values.append(float((negatives * (above + positives / 2)).sum()) / pairs)
    if not values:
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def p_text(p: float) -> str:
    """A p value for people."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _paired_p(differences: NDArray[np.float64]) -> float:
    if np.ptp(differences) == 0:  # no spread to test against
        return 1.0 if differences[0] == 0 else 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def _t_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error
    return mean - half, mean + half
