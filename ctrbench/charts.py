# SPDX-License-Identifier: Apache-2.0
"""What the charts of all pages are drawn with: numbers as text, axes, and SVG elements, all of them pure functions."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from markupsafe import Markup, escape

Tick = tuple[float, str]  # place on the axis from 0 to 1, label

LABEL_WIDTH = 7.0  # of a character of a label; an estimate, since nothing here measures text


# --- numbers and ticks


def number(value: float) -> str:
    """A number in four digits, as people write it: 0.9081, 1e-3, 256."""
    if isinstance(value, int) and abs(value) < 1_000_000:
        return str(value)
    if value == 0 or 0.01 <= abs(value) < 1_000_000:
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def exact(value: Any) -> str:
    """A value of a configuration in full: strings as they are, everything else as YAML's flow style has it."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def brief(value: Any) -> str:
    """As `exact`, but numbers in four digits."""
    return number(value) if is_number(value) else exact(value)


def cut(text: str, room: int) -> str:
    """`text` in at most `room` characters: its middle goes first, since names that begin alike end differently."""
    if len(text) <= room:
        return text
    return f"{text[: room // 2]}…{text[len(text) - (room - room // 2 - 1) :]}"


def linear_ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[tuple[float, str]]:
    """About `count` round values from `low` to `high` with labels of equal precision."""
    if high <= low:
        return [(low, number(low))]
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    values = [k * step for k in range(first, last + 1)]
    return [(v, number(v) if decimals > 9 else f"{v:.{decimals}f}") for v in values]


def log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten from `low` to `high`; where these are too few, their 2- and 5-folds too."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        values = [f * 10.0**e for e in exponents for f in factors]
        values = [v for v in values if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)]
        if len(values) > 2:
            break
    return [(v, number(float(f"{v:.4g}"))) for v in values]


def spaced(ticks: Sequence[Tick], gap: float) -> list[Tick]:
    """The ticks that stay at least `gap` apart: both ends first, then the others in order."""
    kept: list[Tick] = []
    for tick in [*ticks[:1], *ticks[-1:], *ticks[1:-1]]:
        if all(abs(tick[0] - other[0]) >= gap for other in kept):
            kept.append(tick)
    return sorted(kept)


@dataclasses.dataclass(frozen=True)
class Scale:
    """A range of numbers on an axis; what lies outside is placed at the nearer end."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """From 0 to 1; the middle where the range is one point."""
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value or 0))
        return 0.5 if high <= low else min(max((at - low) / (high - low), 0.0), 1.0)


def visible_range(values: Iterable[float], direction: str) -> tuple[float, float]:
    """The range to draw: all values but those far out on the bad side, which would flatten all others.

    Far out is more than three interquartile ranges beyond the worse quartile, among eight values or more.
    """
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    if len(ordered) >= 8:
        first, _, third = statistics.quantiles(ordered, n=4)
        reach = 3 * (third - first)
        if reach > 0 and direction == "max":
            low = next(v for v in ordered if v >= first - reach)
        elif reach > 0:
            high = next(v for v in reversed(ordered) if v <= third + reach)
    return low, high


def is_number(value: object) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def text_width(text: str) -> float:
    """About how wide a label is, in a wide sans-serif font of 12 pixels."""
    groups = (("MWmw@%", 11.0), ("ijlI|'.,:", 3.6), ("frt ", 4.8))
    return sum(next((width for group, width in groups if c in group), 8.3 if c.isupper() else 7.4) for c in text)


# --- SVG


def tag(name: str, *children: str, **attributes: object) -> Markup:
    """An element; attributes and text are escaped, `class_` and `stroke_width` stand for class and stroke-width."""
    pairs = "".join(f' {key.strip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{pairs}>{''.join(map(escape, children))}</{name}>")


def line_through(points: Sequence[tuple[float, float]]) -> list[Markup]:
    """A line, below it a wide invisible one of class "hit" that makes its tooltip easy to get."""
    d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return [tag("path", d=d, class_="hit"), tag("path", d=d)]


def text_at(x: float, y: float, text: str, class_: str = "", full: str = "") -> Markup:
    """Text on its base line; `full` is shown as a tooltip where it says more."""
    title = [tag("title", full)] if full and full != text else []
    return tag("text", *title, text, x=f"{x:.1f}", y=f"{y:.1f}", class_=class_)


def drawing(width: float, height: float, label: str, class_: str, *children: Markup) -> Markup:
    """An SVG; `label` is what screen readers say of it."""
    view = f"0 0 {width:.0f} {height:.0f}"
    return tag("svg", *children, viewBox=view, width=f"{width:.0f}", class_=class_, role="group", aria_label=label)


@dataclasses.dataclass(frozen=True)
class Chart:
    """A drawing and what to say of it below."""

    svg: Markup
    hidden: int = 0  # values beyond the axis, drawn at its end


@dataclasses.dataclass(frozen=True)
class Plot:
    """The frame of a chart of two numeric axes; `x_text` writes the numbers of the lower one."""

    x: Scale
    y: Scale
    x_label: str
    y_label: str
    whole_x: bool = False
    x_text: Callable[[float], str] | None = None
    width: float = 560.0
    height: float = 330.0

    top, right = 34.0, 22.0

    @property
    def foot(self) -> float:
        """Where the x axis lies, above room for the larger type of narrow screens."""
        return self.height - 52

    @property
    def left(self) -> float:
        """The labels' room."""
        return 20 + 8.6 * max((len(text) for _, text in linear_ticks(self.y.low, self.y.high)), default=0)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point is drawn."""
        across = self.width - self.left - self.right
        return self.left + across * self.x.place(x), self.foot - (self.foot - self.top) * self.y.place(y)

    def draw(self, label: str, *marks: Markup) -> Markup:
        """The frame with `marks` in it."""
        left, foot, end, parts = f"{self.left:.1f}", self.foot, self.width - self.right, []
        for value, text in linear_ticks(self.y.low, self.y.high):
            y = self.at(self.x.low, value)[1]
            parts += [tag("path", d=f"M{left} {y:.1f}H{end}", class_="grid")]
            parts += [text_at(self.left - 8, y + 4, text, "end")]
        for value, text in self._x_ticks():
            x = self.at(value, self.y.low)[0]
            parts += [tag("path", d=f"M{x:.1f} {foot}v5", class_="axis"), text_at(x, foot + 20, text, "middle")]
        parts += [tag("path", d=f"M{left} {foot}H{end}", class_="axis")]
        parts += [text_at((self.left + end) / 2, self.height - 8, self.x_label, "middle name")]
        parts += [text_at(6, 16, self.y_label, "name")]
        return drawing(self.width, self.height, label, "plot", *parts, *marks)

    def _x_ticks(self) -> list[tuple[float, str]]:
        ticks = (
            log_ticks(self.x.low, self.x.high)
            if self.x.log
            else linear_ticks(self.x.low, self.x.high, whole=self.whole_x)
        )
        return [(value, self.x_text(value)) for value, _ in ticks] if self.x_text else ticks


def padded(low: float, high: float, log: bool = False) -> Scale:
    """A scale with a little room at both ends."""
    if log:
        room = (high / low) ** 0.04 if high > low else 1.5
        return Scale(low / room, high * room, log=True)
    room = (high - low) * 0.04 or abs(low) * 0.01 or 1.0
    return Scale(low - room, high + room)


# --- labels beside points

_DIRECTIONS = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1))
_REACHES = (9.0, 14.0, 22.0, 34.0, 48.0, 64.0, 84.0, 110.0)
_HEIGHT = 14.0  # of a line of text


@dataclasses.dataclass(frozen=True)
class Box:
    """A rectangle."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The area that both cover."""
        if self.right <= other.left or other.right <= self.left or self.bottom <= other.top or other.bottom <= self.top:
            return 0.0
        across = min(self.right, other.right) - max(self.left, other.left)
        return across * (min(self.bottom, other.bottom) - max(self.top, other.top))

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """Its point that is nearest to (x, y)."""
        return min(max(x, self.left), self.right), min(max(y, self.top), self.bottom)


def label_boxes(
    points: Sequence[tuple[float, float]], widths: Sequence[float], area: Box, obstacles: Sequence[Box] = ()
) -> list[Box]:
    """Where labels of the given widths go beside their points.

    Each label takes the place that is nearest to its point and clear of the points, of the other labels and of the lines
    that lead to these; where nothing is clear, the place where it covers least. A few rounds let early labels give way to
    later ones. The same points give the same places.

    Args:
        points: (x, y) of each point.
        widths: of the labels.
        area: that they must not leave.
        obstacles: what else they keep clear of.
    """
    marks = [*(Box(x - 5, y - 5, x + 5, y + 5) for x, y in points), *obstacles]
    placed: dict[int, Box] = {}
    for _ in range(4):
        for i, (x, y) in enumerate(points):
            others = [box for k, box in placed.items() if k != i]
            lines = [_samples(points[k], box) for k, box in placed.items() if k != i]
            best = math.inf
            for reach in _REACHES:
                if best <= reach / 2:  # nothing farther away can be better
                    break
                for box in (_beside(x, y, widths[i], reach, to) for to in _DIRECTIONS):
                    if (cost := _cost(box, (x, y), marks, others, lines, area)) < best:
                        best, placed[i] = cost, box
    return [placed[i] for i in range(len(points))]


def _beside(x: float, y: float, width: float, reach: float, to: tuple[int, int]) -> Box:
    left = x + reach if to[0] > 0 else x - reach - width if to[0] < 0 else x - width / 2
    top = y + reach * 0.7 if to[1] > 0 else y - reach * 0.7 - _HEIGHT if to[1] < 0 else y - _HEIGHT / 2
    return Box(left, top, left + width, top + _HEIGHT)


def _samples(point: tuple[float, float], box: Box) -> list[Box]:
    """The line from a point to its label, as small boxes along it."""
    (x, y), (to_x, to_y) = point, box.nearest(*point)
    steps = int(math.hypot(to_x - x, to_y - y) / 6)
    along = [(x + (to_x - x) * k / steps, y + (to_y - y) * k / steps) for k in range(1, steps)]
    return [Box(at_x - 1, at_y - 1, at_x + 1, at_y + 1) for at_x, at_y in along]


def _cost(
    box: Box,
    point: tuple[float, float],
    marks: Sequence[Box],
    others: Sequence[Box],
    lines: Sequence[Sequence[Box]],
    area: Box,
) -> float:
    (x, y), (to_x, to_y) = point, box.nearest(*point)
    outside = (box.right - box.left) * _HEIGHT - box.overlap(area)
    cost = math.hypot(to_x - x, to_y - y) + 8 * outside
    cost += sum(3 * box.overlap(mark) for mark in marks) + sum(4 * box.overlap(other) for other in others)
    cost += sum(10 * bool(box.overlap(part)) for line in lines for part in line)
    mine = _samples(point, box)
    return cost + sum(10 * bool(part.overlap(other)) for part in mine for other in [*others, *marks])
