# SPDX-License-Identifier: Apache-2.0
"""Intervals and tests, against scipy, scikit-learn and plain loops."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from ctrbench.leaderboard import statistics as module
from ctrbench.leaderboard.statistics import bootstrap_auc, compare, holm, summarize

VALUES = {2024: 0.9012, 2025: 0.9034, 2026: 0.8991, 2027: 0.9027}


def test_a_summary() -> None:
    found = summarize(VALUES)
    numbers = list(VALUES.values())
    assert found.values == VALUES
    assert found.mean == pytest.approx(statistics.fmean(numbers), abs=1e-15)
    assert found.deviation == pytest.approx(statistics.stdev(numbers), abs=1e-15)
    # t(0.975, 3 degrees of freedom), from a table
    half = 3.182446305284263 * statistics.stdev(numbers) / 2
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), abs=1e-12)
    error = statistics.stdev(numbers) / math.sqrt(4)
    low, high = stats.t.interval(0.95, 3, loc=statistics.fmean(numbers), scale=error)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)


def test_a_summary_of_one_seed_and_of_equal_ones() -> None:
    found = summarize({7: 0.5})
    assert (found.mean, found.deviation, found.low, found.high) == (0.5, None, None, None)
    found = summarize({1: 0.25, 2: 0.25})
    assert (found.mean, found.deviation, found.low, found.high) == (0.25, 0.0, 0.25, 0.25)


def test_pairs_are_compared_on_the_seeds_that_they_share() -> None:
    a = {1: 0.80, 2: 0.82, 3: 0.81, 4: 0.79}
    b = {2: 0.805, 3: 0.80, 4: 0.775, 5: 0.9}
    c = {1: 0.70, 9: 0.5}  # one seed in common with a, none with b
    d = {seed: value + 0.001 * seed for seed, value in a.items()}
    found = compare({"a": a, "b": b, "c": c, "d": d})
    assert [(x.first, x.second, x.num_seeds) for x in found] == [("a", "b", 3), ("a", "d", 4), ("b", "d", 3)]
    for x in found:
        first, second = ({"a": a, "b": b, "d": d}[name] for name in (x.first, x.second))
        shared = sorted(first.keys() & second.keys())
        test = stats.ttest_rel([first[s] for s in shared], [second[s] for s in shared])
        assert x.p == pytest.approx(test.pvalue, abs=1e-12)
        assert x.difference == pytest.approx(statistics.fmean(first[s] - second[s] for s in shared), abs=1e-15)
        interval = test.confidence_interval(0.95)
        assert (x.low, x.high) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert [x.adjusted_p for x in found] == pytest.approx(holm([x.p for x in found]), abs=0)


def test_pairs_without_spread() -> None:
    same = compare({"a": {1: 0.5, 2: 0.6}, "b": {1: 0.5, 2: 0.6}})[0]
    assert (same.difference, same.low, same.high, same.p, same.adjusted_p) == (0, 0, 0, 1, 1)
    shifted = compare({"a": {1: 0.75, 2: 0.5}, "b": {1: 0.5, 2: 0.25}})[0]
    assert (shifted.difference, shifted.p) == (0.25, 0)
    assert compare({}) == compare({"a": VALUES}) == []


def test_holm() -> None:
    # the example of Holm's step-down by hand: sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1
    assert holm([0.01, 0.04, 0.03, 0.02]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []
    generator = np.random.default_rng(0)
    for size in (1, 2, 5, 20):
        p = generator.random(size) ** 3
        order = np.argsort(p)
        expected = np.empty(size)
        for rank, index in enumerate(order):
            steps = [min(1.0, (size - k) * p[order[k]]) for k in range(rank + 1)]
            expected[index] = max(steps)
        assert holm(p.tolist()) == pytest.approx(expected.tolist(), abs=1e-15)


@pytest.mark.parametrize("levels", [None, 7, 1], ids=["no ties", "ties", "one score"])
def test_a_bootstrap_is_what_a_plain_loop_gives(levels: int | None) -> None:
    """The same draws, each resample written out and handed to scikit-learn."""
    generator = np.random.default_rng(1)
    rows, resamples = 80, 60
    label = (generator.random(rows) < 0.3).astype(float)
    score = generator.random(rows) if levels is None else generator.integers(0, levels, rows) / 7
    draws, by_score = np.random.default_rng(5), np.argsort(score, kind="stable")
    values = []
    for _ in range(resamples):
        chosen = by_score[draws.integers(0, rows, rows)]  # rows are numbered by their score
        values.append(roc_auc_score(label[chosen], score[chosen]))
    low, high = np.quantile(values, [0.025, 0.975])
    found = bootstrap_auc(label, score, seed=5, num_resamples=resamples)
    assert found == pytest.approx((low, high), abs=1e-12)
    assert found == bootstrap_auc(label, score, seed=5, num_resamples=resamples)
    if levels != 1:
        assert found != bootstrap_auc(label, score, seed=6, num_resamples=resamples) and low < high


def test_a_bootstrap_of_few_rows() -> None:
    """A resample of one class has no AUC and is left out; where all are, there is no interval."""
    label, score = np.array([1.0, 0.0, 0.0]), np.array([0.9, 0.4, 0.6])
    draws, by_score = np.random.default_rng(0), np.argsort(score)
    values = []
    for _ in range(40):
        chosen = by_score[draws.integers(0, 3, 3)]
        if 0 < label[chosen].sum() < 3:
            values.append(roc_auc_score(label[chosen], score[chosen]))
    assert len(values) < 40
    assert bootstrap_auc(label, score, 0, 40) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=1e-12)
    assert all(map(math.isnan, bootstrap_auc(np.ones(5), np.arange(5.0), 0, 10)))


def test_how_many_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE_ROWS", 50)
    generator = np.random.default_rng(2)
    for rows, count in ((50, module.NUM_RESAMPLES), (51, module.NUM_RESAMPLES_LARGE)):
        label, score = (generator.random(rows) < 0.4).astype(float), generator.random(rows)
        assert bootstrap_auc(label, score, 3) == bootstrap_auc(label, score, 3, count)


def test_the_interval_of_means_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    hits = 0
    for _ in range(1000):
        found = summarize(dict(enumerate(generator.normal(0.8, 0.01, 5))))
        assert found.low is not None and found.high is not None
        hits += found.low <= 0.8 <= found.high
    assert 930 <= hits <= 970


def test_no_difference_is_rarely_significant() -> None:
    """Holm's correction keeps the chance of any false claim among all pairs at 5%."""
    generator = np.random.default_rng(4)
    claims = 0
    for _ in range(100):
        values = {name: dict(enumerate(generator.normal(0, 1, 5))) for name in "abc"}
        found = compare(values)
        assert [(x.first, x.second) for x in found] == list(itertools.combinations("abc", 2))
        claims += any(x.adjusted_p < 0.05 for x in found)
    assert claims <= 12  # 5 expected, 3 deviations above
