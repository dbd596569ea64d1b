# SPDX-License-Identifier: Apache-2.0
"""The learning curves of a leaderboard's table: a small panel for each experiment, all on one scale."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from markupsafe import Markup

from ctrbench.charts import Scale, drawing, is_number, linear_ticks, padded, tag, text_at, visible_range
from ctrbench.leaderboard.charts import direction_of, look_of, short_names
from ctrbench.leaderboard.records import Row, Run, Table

# What a line of metrics.jsonl has besides metrics.
_NO_METRICS = ("epoch", "step", "train_loss", "learning_rate", "train_seconds", "evaluate_seconds")
# The drawing of a panel, and in it the frame that the curves are clipped to.
_WIDTH, _HEIGHT = 250.0, 142.0
_LEFT, _TOP, _ACROSS, _DOWN = 46.0, 6.0, 198.0, 112.0

Curve = list[tuple[float, float]]  # (epochs, value) after each evaluation


@dataclasses.dataclass(frozen=True)
class Panel:
    """The learning curves of one experiment.

    Attributes:
        name: of the experiment, without what all names end in.
        label: its full name.
        look: its classes.
        picks: (seed, epoch, value) that was selected, where the curve has it.
        is_own: whether its scale is its own.
        svg: the drawing.
    """

    name: str
    label: str
    look: str
    picks: list[tuple[int, float, float]]
    is_own: bool
    svg: Markup

    @property
    def epochs(self) -> str:
        """The selected epochs, in words."""
        found = [epoch for _, epoch, _ in self.picks]
        return f"{min(found):.3g}" if min(found) == max(found) else f"{min(found):.3g}–{max(found):.3g}"


@dataclasses.dataclass(frozen=True)
class LearningCurves:
    """The panels of a table.

    Attributes:
        metric: what they show, in words.
        shared: the mean curves of all experiments, which every panel on the common scale shows behind its own.
        panels: one for each experiment that has a curve.
    """

    metric: str
    shared: Markup
    panels: list[Panel]


def learning_curves(table: Table, anchor: str) -> LearningCurves | None:
    """A line for each seed, with a dot at the selected epoch; None if no run has a curve.

    The scale shows where the curves end up: the worst fifth of all evaluations, mostly first epochs, may lie beyond it. An
    experiment that ends up far off gets a scale of its own.
    """
    metric = _metric(table)
    curves = [[_curve(run, metric) for run in row.runs] for row in table.rows]
    direction = "min" if metric == "train_loss" else direction_of(metric)
    picks = [_picks(row, of_it, direction) for row, of_it in zip(table.rows, curves, strict=True)]
    if not any(curve for of_it in curves for curve in of_it):
        return None
    ends = [_end(of_it, chosen) for of_it, chosen in zip(curves, picks, strict=True)]
    low, high = visible_range([end for end in ends if end is not None], direction)
    is_own = [end is not None and not low <= end <= high for end in ends]
    common = _scale(
        [c for of_it, own in zip(curves, is_own, strict=True) if not own for c in of_it], low, high, direction
    )
    epochs = [x for of_it in curves for curve in of_it for x, _ in curve]
    across = Scale(min(1.0, *epochs), max(epochs))
    means = [list(_mean_line(of_it)) for of_it, own in zip(curves, is_own, strict=True) if not own]
    behind = tag(
        "g", *(_path(across, common, line) for line in means if len(line) > 1), id=f"{anchor}-curves", class_="others"
    )
    panels = []
    for i, (row, name, own) in enumerate(zip(table.rows, short_names(table), is_own, strict=True)):
        end = ends[i]
        if end is not None:
            up = _scale(curves[i], end, end, direction) if own else common
            svg = _panel(across, up, curves[i], picks[i], row.label, "" if own else f"{anchor}-curves")
            panels.append(Panel(name, row.label, look_of(table, row), picks[i], own, svg))
    words = "training loss" if metric == "train_loss" else f"validation {metric}"
    return LearningCurves(words, tag("svg", tag("defs", behind), width=0, height=0, aria_hidden="true"), panels)


def _metric(table: Table) -> str:
    """The table's metric, or else what was monitored, or else the training loss."""
    names = {name: None for row in table.rows for run in row.runs for line in run.curve for name in line}
    logged = [name for name in names if name not in _NO_METRICS]
    if table.metric in logged:
        return table.metric
    return logged[0] if logged else "train_loss"


def _curve(run: Run, metric: str) -> Curve:
    """Epochs are those of the log, with fractions where there are several evaluations in each."""
    lines = [line for line in run.curve if is_number(line.get("epoch")) and is_number(line.get(metric))]
    rates = [line["step"] / line["epoch"] for line in lines if is_number(line.get("step")) and line["epoch"] > 0]
    steps = max(rates, default=0.0) if len(rates) == len(lines) else 0.0
    return [(line["step"] / steps if steps else float(line["epoch"]), float(line[metric])) for line in lines]


def _picks(row: Row, curves: Sequence[Curve], direction: str) -> list[tuple[int, float, float]]:
    """The evaluations whose weights were kept: the best ones of the best epochs."""
    found = []
    for run, curve in zip(row.runs, curves, strict=True):
        best: Any = run.report.get("best_epoch")
        of_it = [(y, x) for x, y in curve if is_number(best) and math.ceil(x - 1e-6) == best]
        if of_it:
            y, x = max(of_it) if direction == "max" else min(of_it)
            found.append((run.seed, x, y))
    return found


def _end(curves: Sequence[Curve], picks: Sequence[tuple[int, float, float]]) -> float | None:
    """Where an experiment ends up: the mean of its selected values, or else of its last ones."""
    values = [y for *_, y in picks] or [curve[-1][1] for curve in curves if curve]
    return statistics.fmean(values) if values else None


def _scale(curves: Sequence[Curve], low: float, high: float, direction: str) -> Scale:
    ordered = sorted((y for curve in curves for _, y in curve), reverse=direction == "min")  # the worst first
    worst, best = ordered[len(ordered) // 5], ordered[-1]
    return padded(min(low, worst, best), max(high, worst, best))


def _mean_line(curves: Sequence[Curve]) -> Iterator[tuple[float, float]]:
    """The mean over the seeds that got that far."""
    for i in range(max(map(len, curves))):
        there = [curve[i] for curve in curves if len(curve) > i]
        yield statistics.fmean(x for x, _ in there), statistics.fmean(y for _, y in there)


def _place(across: Scale, up: Scale, x: float, y: float) -> tuple[float, float]:
    """In the frame. Values beyond the scale stay beyond, so that lines keep their slope, but within what SVG can draw."""
    share = min(max((y - up.low) / (up.high - up.low), -50.0), 50.0)
    return 5 + (_ACROSS - 10) * across.place(x), _DOWN * (1 - share)


def _path(across: Scale, up: Scale, line: Sequence[tuple[float, float]], class_: str = "") -> Markup:
    return tag("path", d="M" + "L".join("{:.1f} {:.1f}".format(*_place(across, up, *p)) for p in line), class_=class_)


def _panel(
    across: Scale,
    up: Scale,
    curves: Sequence[Curve],
    picks: Sequence[tuple[int, float, float]],
    label: str,
    behind: str,
) -> Markup:
    foot = _TOP + _DOWN
    frame = []
    for value, text in linear_ticks(up.low, up.high, count=6):
        y = _TOP + _place(across, up, across.low, value)[1]
        frame += [tag("path", d=f"M{_LEFT} {y:.1f}h{_ACROSS}", class_="grid"), text_at(_LEFT - 5, y + 4, text, "end")]
    for value, text in linear_ticks(across.low, across.high, count=4, whole=True):
        x = _LEFT + _place(across, up, value, up.low)[0]
        frame += [tag("path", d=f"M{x:.1f} {foot}v4", class_="axis"), text_at(x, foot + 17, text, "middle")]
    frame += [tag("path", d=f"M{_LEFT} {foot}h{_ACROSS}", class_="axis")]
    marks = [tag("use", href=f"#{behind}")] if behind else []
    marks += [_path(across, up, curve, "curve") for curve in curves if len(curve) > 1]
    dots = [(3.2, "pick", x, y) for _, x, y in picks]
    dots += [(1.8, "seed", *curve[0]) for curve in curves if len(curve) == 1]
    for radius, class_, *point in dots:
        x, y = _place(across, up, *point)
        marks += [tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=radius, class_=class_)]
    inner = tag("svg", *marks, x=_LEFT, y=_TOP, width=_ACROSS, height=_DOWN)  # clips
    return drawing(_WIDTH, _HEIGHT, f"Learning curves of {label}", "panel", *frame, inner)
