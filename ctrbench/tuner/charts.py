# SPDX-License-Identifier: Apache-2.0
"""The charts of a sweep as SVG: pure functions from records to marks."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup

from ctrbench.charts import (
    LABEL_WIDTH,
    Chart,
    Plot,
    Scale,
    Tick,
    brief,
    cut,
    drawing,
    exact,
    is_number,
    line_through,
    linear_ticks,
    log_ticks,
    number,
    padded,
    spaced,
    tag,
    text_at,
    visible_range,
)
from ctrbench.tuner.records import SweepSummary, TrialRecord

ENDED = ("complete", "pruned", "failed")
STATES = (*ENDED, "running", "waiting")
_GAP = 0.055  # of the height of an axis: a line of text


def _mark(trial: TrialRecord, look: str, tooltip: str, *shapes: Markup) -> Markup:
    """Shapes of one trial: they show `tooltip` and lead to the trial's row in the table."""
    # Not in the tab order: with hundreds of trials it would bury the rest of the page, and the table says the same.
    return tag("a", tag("title", tooltip), *shapes, href=f"#trial-{trial.index}", class_=f"t {look}", tabindex=-1)


def parallel_coordinates(sweep: SweepSummary, looks: dict[int, str]) -> Chart | None:
    """One vertical axis per key that takes several values, and the objective's; None when there is nothing to draw."""
    trials = [
        t for t in sorted(sweep.trials, key=best_first(sweep), reverse=True) if t.index in looks
    ]  # the best on top
    objectives = [t.objective for t in trials if t.objective is not None]
    keys = dict.fromkeys(key for trial in trials for key in trial.values)
    columns = {key: [trial.values.get(key) for trial in trials] for key in keys}
    axes = [(k, *key_axis(vs, k in sweep.log_keys)) for k, vs in columns.items() if len(set(map(exact, vs))) > 1]
    if not axes or not objectives:
        return None
    scale = Scale(*visible_range(objectives, sweep.direction))
    step = min(max(1010 / len(axes), 112), 250)
    names = [(k, ticks) for k, _, ticks in axes] + [(sweep.objective, _ticks(scale, "{:.6f}".format))]
    room = int((step - 14) / LABEL_WIDTH)
    left, top, height = 16.0, 20.0 + 13 * max(len(_wrapped(name, room)) for name, _ in names), 262.0
    frame, marks = [], []
    for i, (name, ticks) in enumerate(names):
        frame += _axis(left + i * step, top, height, name, ticks, room)
    for trial in trials:
        places = [place(trial.values.get(key)) for key, place, _ in axes]
        places += [] if trial.objective is None else [scale.place(trial.objective)]  # a pruned line ends before
        points = [(left + i * step, top + height * (1 - place)) for i, place in enumerate(places)]
        settings = "".join(f"\n{key} = {brief(value)}" for key, value in trial.values.items())
        marks += [_mark(trial, looks[trial.index], _caption(trial, sweep) + settings, *line_through(points))]
    width = left + step * len(axes) + max(100, step / 2)
    svg = drawing(width, top + height + 14, "Parallel coordinates of the trials", "wide", *marks, *frame)
    return Chart(svg, sum(not scale.low <= value <= scale.high for value in objectives))


def _axis(x: float, top: float, height: float, name: str, ticks: list[Tick], room: int) -> list[Markup]:
    lines = reversed(_wrapped(name, room))
    parts = [text_at(x, top - 12 - 13 * i, line, "name", name) for i, line in enumerate(lines)]
    parts += [tag("path", d=f"M{x:.1f} {top}v{height}", class_="axis")]
    for place, text in ticks:
        y = top + height * (1 - place)
        short = text if len(text) <= room else cut(text.replace(", ", ","), room)
        parts += [tag("path", d=f"M{x:.1f} {y:.1f}h4", class_="axis"), text_at(x + 7, y + 4, short, "", text)]
    return parts


def _wrapped(name: str, room: int) -> list[str]:
    """A key in up to three lines, broken where its words end."""
    lines = [""]
    for word in re.findall(r"[^_./\s-]+[_./\s-]*|[_./\s-]+", name):
        lines = [*lines[:-1], lines[-1] + word] if len(lines[-1] + word) <= room else [*lines, word]
    lines = [cut(line, room) for line in lines if line]
    return lines if len(lines) <= 3 else [*lines[:2], cut(lines[2] + "…", room)]


def key_axis(values: Sequence[Any], log: bool = False) -> tuple[Callable[[Any], float], list[Tick]]:
    """How a key's values lie on its axis, and the axis's ticks: numbers by size, anything else evenly spaced."""
    if not all(map(is_number, values)):
        texts = sorted({exact(value) for value in values}, key=_natural)
        places = {text: (i + 0.5) / len(texts) for i, text in enumerate(texts)}
        return lambda value: places[exact(value)], spaced([(place, text) for text, place in places.items()], _GAP)
    scale = Scale(min(values), max(values), log and min(values) > 0)
    if len(distinct := sorted(set(values))) <= 6:
        return scale.place, spaced([(scale.place(v), number(v)) for v in distinct], _GAP)
    whole = all(isinstance(value, int) for value in values)
    return scale.place, _ticks(scale, number, whole)


def _ticks(scale: Scale, text: Callable[[float], str], whole: bool = False) -> list[Tick]:
    """Both ends in `text`, and round values between them."""
    low, high = scale.low, scale.high
    inner = log_ticks(low, high) if scale.log else linear_ticks(low, high, whole=whole)
    ends = [(scale.place(low), text(low)), (scale.place(high), text(high))]
    return spaced([ends[0], *((scale.place(v), label) for v, label in inner), ends[1]], _GAP)


def best_so_far(sweep: SweepSummary, looks: dict[int, str], against: str) -> Chart | None:
    """The best objective up to each ended trial, against their number ("trials") or the "seconds" that they took."""
    ended = sorted((t for t in sweep.trials if t.state in ENDED), key=lambda t: (t.finished or math.inf, t.index))
    by_trial = against == "trials"
    steps = list(itertools.accumulate(1.0 if by_trial else seconds_of(trial) for trial in ended))
    done = [(x, t.objective) for x, t in zip(steps, ended, strict=True) if t.objective is not None]
    if not done:
        return None
    low, high = visible_range([value for _, value in done], sweep.direction)
    label = "trials, in the order in which they ended" if by_trial else "seconds of training and evaluation, in total"
    plot = Plot(Scale(1 if by_trial else 0, steps[-1]), padded(low, high), label, sweep.objective, whole_x=by_trial)
    bests = itertools.accumulate((value for _, value in done), max if sweep.direction == "max" else min)
    corners = [plot.at(x, best) for (x, _), best in zip(done, bests, strict=True)]
    path = "M{:.1f} {:.1f}".format(*corners[0]) + "".join(f"H{x:.1f}V{y:.1f}" for x, y in corners[1:])
    marks = [tag("path", d=f"{path}H{plot.at(steps[-1], low)[0]:.1f}", class_="best-so-far")]
    radius = 3.5 if len(done) <= 150 else 2.5
    for x, trial in sorted(zip(steps, ended, strict=True), key=lambda pair: "best" in looks.get(pair[1].index, "")):
        look, caption = looks.get(trial.index, "failed"), _caption(trial, sweep)
        across, down = plot.at(x, low if trial.objective is None else trial.objective)
        if trial.objective is None:  # no value, but it took its time: a stroke on the axis
            marks += [
                _mark(trial, f"rug {look}", caption, *line_through([(across, plot.foot), (across, plot.foot - 8)]))
            ]
        else:
            marks += [_mark(trial, look, caption, tag("circle", cx=f"{across:.1f}", cy=f"{down:.1f}", r=radius))]
    svg = plot.draw(f"Best {sweep.objective} so far against {label}", *marks)
    return Chart(svg, sum(not low <= value <= high for _, value in done))


def validation_curves(sweep: SweepSummary, looks: dict[int, str]) -> Chart | None:
    """The monitored value after each evaluation, a line per trial that has any."""
    trials = [t for t in sorted(sweep.trials, key=best_first(sweep), reverse=True) if t.index in looks]
    # A diverged trial may have values that are no numbers.
    curves = [[(i, v) for i, v in enumerate(trial.curve, start=1) if math.isfinite(v)] for trial in trials]
    values = [value for curve in curves for _, value in curve]
    if not values:
        return None
    low, high = visible_range(values, sweep.direction)
    longest = max(len(trial.curve) for trial in trials)
    plot = Plot(Scale(1, longest), padded(low, high), "evaluation", sweep.objective, whole_x=True)
    marks = []
    for trial, curve in zip(trials, curves, strict=True):
        points = [plot.at(i, value) for i, value in curve]
        dot = [tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=3.5) for x, y in points if len(points) == 1]
        shapes = line_through(points) if len(points) > 1 else dot
        marks += [_mark(trial, looks[trial.index], _caption(trial, sweep), *shapes)] if shapes else []
    svg = plot.draw(f"{sweep.objective} after each evaluation", *marks)
    return Chart(svg, sum(not low <= value <= high for value in values))


def best_first(sweep: SweepSummary) -> Callable[[TrialRecord], tuple[int, float, int]]:
    """A sort key: complete trials by objective, then the others by state."""
    sign = -1 if sweep.direction == "max" else 1
    return lambda trial: (STATES.index(trial.state), sign * (trial.objective or 0.0), trial.index)


def seconds_of(trial: TrialRecord) -> float:
    """Training and evaluation over all seeds; of a trial without a finished run, the time from start to end."""
    if trial.seeds or trial.started is None or trial.finished is None:
        return sum(seed.train_seconds + seed.evaluate_seconds for seed in trial.seeds)
    return max(trial.finished - trial.started, 0.0)


def _caption(trial: TrialRecord, sweep: SweepSummary) -> str:
    value = trial.state if trial.objective is None else f"{sweep.objective} {trial.objective:.6f}"
    return f"{trial.expid}\n{value}"


def _natural(text: str) -> list[tuple[bool, int, str]]:
    # [8] before [16], as people count
    return [
        (not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.findall(r"[0-9]+|[^0-9]+", text)
    ]
