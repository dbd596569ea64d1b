# SPDX-License-Identifier: Apache-2.0
"""The intervals and the cost charts of a leaderboard's table as SVG: pure functions from its rows to marks.

Marks have the classes that `look_of` gives to their row; the k-th row has the id `<anchor>-<k>` on the page.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence

from markupsafe import Markup

from ctrbench.charts import (
    Box,
    Chart,
    Plot,
    Scale,
    cut,
    drawing,
    is_number,
    label_boxes,
    linear_ticks,
    number,
    padded,
    tag,
    text_at,
    text_width,
    visible_range,
)
from ctrbench.leaderboard.records import LOSSES, Comparison, Row, Status, Summary, Table
from ctrbench.leaderboard.statistics import LEVEL

WIDTH, HEIGHT = 230.0, 26.0  # of an interval
_MARGIN = 10.0  # of its scale at both ends: the room of an arrow


def best_of(table: Table) -> Row | None:
    """The row that the others are compared with."""
    return next((row for row in table.rows if row.is_comparable), None)


def direction_of(metric: str) -> str:
    """Whether a metric is better when it is larger ("max") or smaller ("min")."""
    return "min" if metric in LOSSES else "max"


def is_significant(p: float) -> bool:
    """Whether a difference is told from none, at the level of the intervals."""
    return p <= 1 - LEVEL + 1e-12


def short_names(table: Table) -> list[str]:
    """The rows' labels without the dataset's name, or other words that end all of them, unless two become the same."""
    labels = [row.label for row in table.rows]
    names = [label.removesuffix(f"_{table.dataset_id}") for label in labels]
    if names == labels:
        words = [label.split("_") for label in labels]
        while len(words) > 1 and all(len(w) > 1 for w in words) and len({w[-1] for w in words}) == 1:
            words = [w[:-1] for w in words]
        names = ["_".join(w) for w in words]
    return names if len(set(names)) == len(names) and all(names) else labels


def tested(table: Table, row: Row) -> Comparison | None:
    """The comparison of a row with the best one; None for the best one itself, and where there is none to speak of."""
    pair = table.against_best(row) if row is not best_of(table) else None
    return pair if pair and is_number(pair.p) and is_number(pair.adjusted_p) else None


def look_of(table: Table, row: Row) -> str:
    """Classes of a row: best, tied (not to be told from the best), unproven, strange (trained on other data)."""
    pair = tested(table, row)
    looks = {
        "best": row is best_of(table),
        "tied": pair is not None and not is_significant(pair.adjusted_p),
        "unproven": row.status is Status.UNPROVEN,
        "strange": not row.is_comparable,
    }
    return " ".join(name for name, is_so in looks.items() if is_so)


def interval_of(summary: Summary | None) -> tuple[float, float] | None:
    """Its 95% interval; None if it has none."""
    if summary is None or summary.low is None or summary.high is None:
        return None
    return (summary.low, summary.high) if is_number(summary.low) and is_number(summary.high) else None


# --- intervals


@dataclasses.dataclass(frozen=True)
class IntervalColumn:
    """Means, intervals, seeds and published values of a table's rows on one scale.

    Attributes:
        scale: of all rows.
        band: the interval of the best row, shaded in every row to compare with.
        hidden: how many means lie beyond the scale.
    """

    scale: Scale
    band: tuple[float, float] | None
    hidden: int

    def axis(self) -> Markup:
        """The scale, for the head of the column."""
        parts = [tag("path", d=f"M0 21.5H{WIDTH:.0f}", class_="axis")]
        for value, text in linear_ticks(self.scale.low, self.scale.high, count=3):
            x, room = self.at(value), 3.6 * len(text)
            parts += [tag("path", d=f"M{x:.1f} 16v5", class_="axis")]
            parts += [text_at(min(max(x, room), WIDTH - room), 12, text, "middle")]
        return drawing(WIDTH, 22, "scale of the intervals", "interval", *parts)

    def at(self, value: float) -> float:
        """Where a value is drawn; at the nearer end of the scale if it lies beyond."""
        return _MARGIN + (WIDTH - 2 * _MARGIN) * self.scale.place(value)

    def draw(self, summary: Summary | None, published: float | None, words: str) -> Markup:
        """One row; `words` say the same."""
        parts = [tag("title", words)]
        if self.band:
            low, high = map(self.at, self.band)
            parts += [tag("rect", x=f"{low:.1f}", y=0, width=f"{max(high - low, 1):.1f}", height=HEIGHT, class_="band")]
        if published is not None and is_number(published):
            x = self.at(published)
            inside = tag("path", d=f"M{x:.1f} 7V{HEIGHT}M{x - 4:.1f} 1h8l-4 6z", class_="published")
            parts += [inside if self._is_inside(published) else self._arrow(published, 5, "published")]
        if summary and is_number(summary.mean):
            parts += self._marks(summary)
        return drawing(WIDTH, HEIGHT, words, "interval", *parts)

    def _marks(self, summary: Summary) -> list[Markup]:
        parts: list[Markup] = []
        interval = interval_of(summary)
        if interval and interval[0] <= self.scale.high and interval[1] >= self.scale.low:
            caps = "".join(f"M{self.at(end):.1f} 10v8" for end in interval if self._is_inside(end))
            parts += [
                tag("path", d=f"M{self.at(interval[0]):.1f} 14H{self.at(interval[1]):.1f}{caps}", class_="whisker")
            ]
        values = [v for v in summary.values.values() if is_number(v) and self._is_inside(v)]
        for value in values if len(summary.values) > 1 else ():
            parts += [tag("circle", cx=f"{self.at(value):.1f}", cy=22, r=1.7, class_="seed")]
        if self._is_inside(summary.mean):
            return [*parts, tag("circle", cx=f"{self.at(summary.mean):.1f}", cy=14, r=4, class_="mean")]
        return [*parts, self._arrow(summary.mean, 14, "mean")]

    def _arrow(self, value: float, y: float, class_: str) -> Markup:
        """At the end of the scale, for what lies beyond it."""
        start, to = (7.0, -6) if value < self.scale.low else (WIDTH - 7, 6)
        return tag("path", d=f"M{start:.0f} {y - 4:.0f}v8l{to} -4z", class_=f"{class_} out")

    def _is_inside(self, value: float) -> bool:
        return self.scale.low <= value <= self.scale.high


def interval_column(table: Table) -> IntervalColumn | None:
    """A scale on which the rows differ: neither a far outlier nor a very wide interval sets it. None without a value."""
    summaries = [s for row in table.rows if (s := row.summary(table.split, table.metric)) and is_number(s.mean)]
    if not summaries:
        return None
    low, high = visible_range([s.mean for s in summaries], direction_of(table.metric))
    shown = [s for s in summaries if low <= s.mean <= high]
    intervals = [interval for s in shown if (interval := interval_of(s))]
    reach = max(high - low, statistics.median(b - a for a, b in intervals) if intervals else 0.0)
    published = [
        row.published.metrics.get(table.metric)
        for row in table.rows
        if row.published and row.summary(table.split, table.metric) in shown
    ]
    wanted = [value for s in shown for value in s.values.values()] + [end for ends in intervals for end in ends]
    # What lies farther out than that moves the end of the scale no farther.
    wanted = [min(max(v, low - reach), high + reach) for v in (*wanted, *published) if v is not None and is_number(v)]
    scale = padded(min([low, *wanted]), max([high, *wanted]))
    best = best_of(table)
    band = interval_of(best.summary(table.split, table.metric)) if best else None
    return IntervalColumn(scale, band, len(summaries) - sum(scale.low <= s.mean <= scale.high for s in summaries))


# --- the metric against a cost


@dataclasses.dataclass(frozen=True)
class _Point:
    place: int  # in the table
    row: Row
    name: str
    cost: float
    summary: Summary


def cost_chart(
    table: Table, cost: Callable[[Row], float], label: str, anchor: str, text: Callable[[float], str] = number
) -> Chart | None:
    """A labelled point for each row, its metric against what it costs, and the front that no row beats in both; None if
    there are less than two.

    Args:
        table: whose rows.
        cost: of a row; rows where it is no number are left out.
        label: of the cost.
        anchor: of the rows on the page.
        text: how a cost is written.
    """
    points = []
    for i, (row, name) in enumerate(zip(table.rows, short_names(table), strict=True)):
        summary = row.summary(table.split, table.metric)
        if summary and is_number(summary.mean) and is_number(cost(row)):
            points.append(_Point(i, row, name, cost(row), summary))
    if len(points) < 2:
        return None
    costs, means = [p.cost for p in points], [p.summary.mean for p in points]
    low, high = visible_range(means, direction_of(table.metric))
    is_log = min(costs) > 0 and max(costs) >= 10 * min(costs)
    across, up = padded(min(costs), max(costs), is_log), padded(low, high)
    plot = Plot(across, up, label, f"{table.split} {table.metric}", x_text=text, width=640.0, height=430.0)
    captions = []
    for p in points:
        beyond = (
            "" if low <= p.summary.mean <= high else f" {'↓' if p.summary.mean < low else '↑'} {p.summary.mean:.3f}"
        )
        captions.append(cut(p.name, 26) + beyond)
    area = Box(plot.left + 4, plot.top - 12, plot.width - 4, plot.foot - 2)
    # The best one's is bold.
    widths = [
        text_width(c) * (1.1 if p.row is best_of(table) else 1.0) + 2 for p, c in zip(points, captions, strict=True)
    ]
    places = [plot.at(p.cost, p.summary.mean) for p in points]
    whiskers = [(p.cost, ends) for p in points if (ends := interval_of(p.summary))]
    lines = [
        Box(plot.at(x, b)[0] - 1, plot.at(x, b)[1], plot.at(x, b)[0] + 1, plot.at(x, a)[1]) for x, (a, b) in whiskers
    ]
    boxes = label_boxes(places, widths, area, lines)
    marks = [_front(points, plot, table.metric)]
    for p, caption, box in zip(points, captions, boxes, strict=True):
        title = f"{p.row.label}\n{table.split} {table.metric} {p.summary.mean:.6f}\n{label}: {text(p.cost)}"
        is_left = box.right <= plot.at(p.cost, p.summary.mean)[0]
        words = text_at(box.right if is_left else box.left, box.bottom - 3, caption, "end" if is_left else "")
        shapes = [tag("title", title), *_point(p, plot, box), words]
        # Not in the tab order: the table leads to the same.
        marks += [tag("a", *shapes, href=f"#{anchor}-{p.place}", class_=f"p {look_of(table, p.row)}", tabindex=-1)]
    svg = plot.draw(f"{table.split} {table.metric} against {label}", *marks)
    return Chart(svg, sum(not low <= mean <= high for mean in means))


def _point(point: _Point, plot: Plot, box: Box) -> list[Markup]:
    """Its mark, its interval, and a line to its label where that is farther away."""
    x, y = plot.at(point.cost, point.summary.mean)
    to_x, to_y = box.nearest(x, y)
    shapes = []
    if math.hypot(to_x - x, to_y - y) > 13:
        shapes += [tag("path", d=f"M{x:.1f} {y:.1f}L{to_x:.1f} {to_y:.1f}", class_="lead")]
    if interval := interval_of(point.summary):
        low, high = (plot.at(point.cost, end)[1] for end in interval)
        shapes += [tag("path", d=f"M{x:.1f} {low:.1f}V{high:.1f}", class_="whisker")]
    if not plot.y.low <= point.summary.mean <= plot.y.high:  # an arrow at the end of the axis
        turn = 1 if point.summary.mean < plot.y.low else -1
        return [*shapes, tag("path", d=f"M{x - 5:.1f} {y - 4 * turn:.1f}h10l-5 {7 * turn}z", class_="out")]
    if point.row.is_comparable:
        return [*shapes, tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=4.5)]
    return [*shapes, tag("rect", x=f"{x - 4:.1f}", y=f"{y - 4:.1f}", width=8, height=8)]


def _front(points: Sequence[_Point], plot: Plot, metric: str) -> Markup:
    """Steps through the comparable rows that are better than all that cost no more."""
    sign = -1 if direction_of(metric) == "max" else 1
    path, best = "", math.inf
    for p in sorted(points, key=lambda p: (p.cost, sign * p.summary.mean)):
        if p.row.is_comparable and sign * p.summary.mean < best:
            best = sign * p.summary.mean
            x, y = plot.at(p.cost, p.summary.mean)
            path += f"H{x:.1f}V{y:.1f}" if path else f"M{x:.1f} {y:.1f}"
    return tag("path", d=f"{path}H{plot.width - plot.right:.1f}", class_="front") if path else Markup("")
