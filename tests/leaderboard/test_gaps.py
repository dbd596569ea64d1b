# SPDX-License-Identifier: Apache-2.0
"""Which published gaps show here as well."""

from __future__ import annotations

from typing import Any

import pytest
from scipy import stats

from ctrbench.leaderboard.gaps import find_gaps, to_markdown
from ctrbench.leaderboard.records import Row, Status, Table
from ctrbench.leaderboard.statistics import compare, summarize

SEEDS = range(5)


def row(expid: str, values: dict[int, float], published: dict[str, float], metric: str = "AUC", **rest: Any) -> Row:
    summaries = {("test", metric): summarize(values)}
    return Row("d", expid, expid, expid, (), summaries, Status.RECORDED, (), None, "", published_in=published, **rest)


def table(*rows: Row, metric: str = "AUC") -> Table:
    values = {r.expid: r.summaries["test", metric].values for r in rows if r.is_comparable}
    return Table("d", metric, "test", rows, tuple(compare(values)), "h")


def around(mean: float) -> dict[int, float]:
    return {seed: mean + 1e-4 * (seed - 2) for seed in SEEDS}


def noisy(mean: float) -> dict[int, float]:
    return {seed: mean + off for seed, off in zip(SEEDS, (0.01, -0.01, 0.02, -0.02, 0.0), strict=True)}


ROWS = (
    row("Best", around(0.905), {"paper": 0.908, "logs": 0.9}),
    row("Worse", {s: v + 1e-5 * s * s for s, v in around(0.9).items()}, {"paper": 0.906}),
    row("Reversed", {s: v + 1e-5 * s * s for s, v in around(0.91).items()}, {"paper": 0.904}),
    row("Same", noisy(0.904), {"paper": 0.907, "logs": 0.8}),
    row("Not", noisy(0.906), {"paper": 0.9075}),
    row("Alone", around(0.8), {"bars": 0.7}),
    row("Unpublished", around(0.7), {}),
    row("Foreign", around(0.6), {"paper": 0.99}, is_comparable=False),
    row("Tied", around(0.85), {"paper": 0.908}),
)


def test_the_gaps_of_each_source() -> None:
    """The best of a source against its others, the largest gap first."""
    found = find_gaps(table(*ROWS))
    assert [(g.source, g.better, g.worse, round(g.published, 4), g.verdict) for g in found] == [
        ("logs", "Best", "Same", 0.1, "same direction, not significant"),
        ("paper", "Best", "Reversed", 0.004, "reversed"),
        ("paper", "Best", "Worse", 0.002, "reproduced"),
        ("paper", "Best", "Same", 0.001, "same direction, not significant"),
        ("paper", "Best", "Not", 0.0005, "not reproduced"),
    ]
    by_name = {r.expid: r.summaries["test", "AUC"].values for r in ROWS}
    for gap in found:
        first, second = ([by_name[name][s] for s in SEEDS] for name in (gap.better, gap.worse))
        test = stats.ttest_rel(first, second)
        interval = test.confidence_interval(0.95)
        assert gap.ours.first == gap.better and gap.ours.second == gap.worse
        assert (gap.ours.low, gap.ours.high) == pytest.approx((interval.low, interval.high), abs=1e-12)
        assert gap.ours.p == pytest.approx(test.pvalue, abs=1e-12)
    # Holm's correction over the four pairs that are asked, one of them by two sources.
    by_pair = sorted({(gap.ours.p, gap.worse) for gap in found})
    highest = 0.0
    for rank, (p, worse) in enumerate(by_pair):
        highest = max(highest, min(1.0, (4 - rank) * p))
        assert next(gap.ours.adjusted_p for gap in found if gap.worse == worse) == pytest.approx(highest, abs=1e-12)


def test_rows_in_another_order_give_the_same() -> None:
    key = [(g.source, g.better, g.worse, g.verdict, g.ours.difference) for g in find_gaps(table(*ROWS[:-1]))]
    again = [(g.source, g.better, g.worse, g.verdict, g.ours.difference) for g in find_gaps(table(*ROWS[-2::-1]))]
    assert [k[:4] for k in key] == [k[:4] for k in again]
    assert [k[4] for k in key] == pytest.approx([k[4] for k in again], abs=1e-15)


def test_a_metric_that_is_better_when_it_is_smaller() -> None:
    rows = (
        row("Low", around(0.30), {"paper": 0.29}, "logloss"),
        row("High", {s: v + 1e-5 * s * s for s, v in around(0.31).items()}, {"paper": 0.30}, "logloss"),
        row("Lowest", {s: v - 1e-5 * s * s for s, v in around(0.25).items()}, {"paper": 0.32}, "logloss"),
    )
    found = find_gaps(table(*rows, metric="logloss"))
    assert [(g.better, g.worse, round(g.published, 3), g.verdict) for g in found] == [
        ("Low", "Lowest", -0.03, "reversed"),
        ("Low", "High", -0.01, "reproduced"),
    ]


def test_markdown() -> None:
    lines = to_markdown(table(*ROWS)).splitlines()
    assert lines[0] == "| source | gap | published | here, 95% interval | p | verdict |"
    assert len(lines) == 7 and len({line.count("|") for line in lines}) == 1
    gap = find_gaps(table(*ROWS))[2]
    interval = f"{gap.ours.difference:+.6f} ({gap.ours.low:+.6f} .. {gap.ours.high:+.6f})"
    assert lines[4] == f"| paper | Best - Worse | +0.0020 | {interval} | < 0.001 | reproduced |"
    assert to_markdown(table(*ROWS[5:7])) == ""
