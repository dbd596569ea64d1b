# SPDX-License-Identifier: Apache-2.0
"""Which published gaps between models show here as well, on one split and the same seeds.

What is asked was fixed by the publications, so Holm's correction runs over these gaps, not over all pairs of a table.
"""

from __future__ import annotations

import dataclasses

from ctrbench.leaderboard.records import LOSSES, Comparison, Row, Table
from ctrbench.leaderboard.statistics import holm, p_text

ALPHA = 0.05


@dataclasses.dataclass(frozen=True)
class Gap:
    """A source's best model against another one of the same source.

    Attributes:
        source: where both were published.
        better: expid of the source's best model.
        worse: expid of the other one.
        published: the gap there.
        ours: the comparison here, first against second, corrected for the gaps of the table alone.
        verdict: in words.
    """

    source: str
    better: str
    worse: str
    published: float
    ours: Comparison
    verdict: str


def find_gaps(table: Table) -> list[Gap]:
    """The gaps of each source that published two or more of the table's rows, the largest first."""
    found: list[tuple[str, Row, Row, Comparison]] = []
    rows = [row for row in table.rows if row.is_comparable]
    sign = -1 if table.metric in LOSSES else 1
    for source in dict.fromkeys(source for row in rows for source in row.published_in):
        of_it = [row for row in rows if source in row.published_in]
        best = max(of_it, key=lambda row: sign * row.published_in[source])
        for row in of_it:
            ours = _oriented(table, best, row)
            if ours is not None and best.published_in[source] != row.published_in[source]:
                found.append((source, best, row, ours))
    pairs = {frozenset((ours.first, ours.second)): ours.p for *_, ours in found}  # two sources may ask the same
    adjusted = dict(zip(pairs, holm(list(pairs.values())), strict=True))
    gaps = []
    for source, best, row, ours in found:
        published = best.published_in[source] - row.published_in[source]
        ours = dataclasses.replace(ours, adjusted_p=adjusted[frozenset((ours.first, ours.second))])
        gaps.append(Gap(source, best.expid, row.expid, published, ours, _verdict(sign * published, ours, sign)))
    return sorted(gaps, key=lambda gap: -abs(gap.published))


def to_markdown(table: Table) -> str:
    """The gaps as a Markdown table; empty without any."""
    gaps = find_gaps(table)
    if not gaps:
        return ""
    lines = ["| source | gap | published | here, 95% interval | p | verdict |", "|---|---|---|---|---|---|"]
    for gap in gaps:
        ours = gap.ours
        p = p_text(ours.adjusted_p)
        here = f"{ours.difference:+.6f} ({ours.low:+.6f} .. {ours.high:+.6f})"
        lines.append(
            f"| {gap.source} | {gap.better} - {gap.worse} | {gap.published:+.4f} | {here} | {p} | {gap.verdict} |"
        )
    return "\n".join(lines)


def _oriented(table: Table, first: Row, second: Row) -> Comparison | None:
    for c in table.comparisons:
        if (c.first, c.second) == (first.expid, second.expid):
            return c
        if (c.first, c.second) == (second.expid, first.expid):
            return dataclasses.replace(
                c, first=c.second, second=c.first, difference=-c.difference, low=-c.high, high=-c.low
            )
    return None


def _verdict(published: float, ours: Comparison, sign: int) -> str:
    difference = sign * ours.difference
    if ours.adjusted_p < ALPHA:
        return "reproduced" if difference * published > 0 else "reversed"
    return "same direction, not significant" if difference * published > 0 else "not reproduced"
