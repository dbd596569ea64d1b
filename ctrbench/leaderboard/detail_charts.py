# SPDX-License-Identifier: Apache-2.0
"""The charts of one run looked at closely: calibration, importance of the fields, and heat maps of field pairs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from ctrbench.charts import LABEL_WIDTH, Plot, Scale, cut, drawing, is_number, number, tag, text_at
from ctrbench.leaderboard.records import Details

# Heat maps of so many fields have their values printed.
MAX_PRINTED = 16


def calibration_error(details: Details) -> float | None:
    """Expected calibration error: sum over bins of rows |predicted - observed| / all rows; None without bins."""
    bins = [b for b in details.calibration if is_number(b["predicted"]) and is_number(b["observed"])]
    rows = sum(b["rows"] for b in bins)
    return sum(b["rows"] * abs(b["predicted"] - b["observed"]) for b in bins) / rows if rows else None


def calibration_chart(details: Details) -> Markup | None:
    """The observed click rate of each bin against the predicted one, with the 95% interval of a rate of that many rows."""
    bins = [b for b in details.calibration if is_number(b["predicted"]) and is_number(b["observed"])]
    if not bins:
        return None
    most = max(max(b["predicted"], b["observed"]) for b in bins)
    end = 1.0 if most > 0.5 else (most * 1.05 or 1.0)
    plot = Plot(
        Scale(0.0, end), Scale(0.0, end), "predicted click rate", "observed click rate", width=480.0, height=440.0
    )
    (x0, y0), (x1, y1) = plot.at(0.0, 0.0), plot.at(end, end)
    marks = [tag("path", d=f"M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}", class_="diagonal")]
    corners = [plot.at(b["predicted"], b["observed"]) for b in bins]
    if len(corners) > 1:
        marks += [tag("path", d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in corners), class_="curve")]
    for b, (x, y) in zip(bins, corners, strict=True):
        low, high = wilson_interval(b["observed"], b["rows"])
        ends = [plot.at(b["predicted"], end)[1] for end in (low, high)]
        title = f"{b['rows']:,.0f} rows\npredicted {b['predicted']:.4f}\nobserved {b['observed']:.4f} ({low:.4f} to {high:.4f})"
        shapes = [tag("path", d=f"M{x:.1f} {ends[0]:.1f}V{ends[1]:.1f}", class_="whisker")]
        shapes += [tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=4)]
        marks += [tag("g", tag("title", title), *shapes, class_="p")]
    return plot.draw("Observed against predicted click rate", *marks)


def wilson_interval(rate: float, rows: float) -> tuple[float, float]:
    """95% interval of a rate among so many rows (Wilson, 1927), which has a width at 0 and 1 too."""
    z = 1.96
    if rows <= 0:
        return 0.0, 1.0
    middle = (rate + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z * math.sqrt(rate * (1 - rate) / rows + z * z / (4 * rows * rows)) / (1 + z * z / rows)
    return max(middle - half, 0.0), min(middle + half, 1.0)


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """A matrix as colours.

    Attributes:
        svg: the drawing.
        strongest: the value of the deepest colour.
        is_signed: whether colours tell negative values from positive ones.
    """

    svg: Markup
    strongest: float
    is_signed: bool


def strongest_of(matrices: Sequence[Sequence[Sequence[float]]], has_diagonal: bool = True) -> float:
    """The largest absolute value, for one scale of several heat maps."""
    cells = ((i, k, v) for m in matrices for i, line in enumerate(m) for k, v in enumerate(line))
    return max((abs(v) for i, k, v in cells if is_number(v) and (has_diagonal or i != k)), default=0.0)


def heat_map(
    matrix: Sequence[Sequence[float]],
    fields: Sequence[str],
    order: Sequence[int],
    label: str,
    strongest: float,
    has_diagonal: bool = True,
    is_small: bool = False,
) -> HeatMap:
    """A cell for each field pair, the deeper the stronger; values are printed where fields are few, and tooltips always.

    Args:
        matrix: (F, F).
        fields: names of the F fields.
        order: in which the fields are shown.
        label: what the map shows.
        strongest: the value of the deepest colour.
        has_diagonal: whether a pair of a field with itself means anything.
        is_small: one of several beside each other: smaller cells, no values.
    """
    is_printed = not is_small and len(order) <= MAX_PRINTED
    side = 46.0 if is_printed else max(7.0, min(20.0, 190 / max(len(order), 1))) if is_small else 18.0
    names = [cut(fields[i], 14 if is_small else 20) for i in order]
    room = 10 + LABEL_WIDTH * max(map(len, names), default=0)
    has_names = side >= 11
    left = top = room if has_names else 2.0
    escaped = [escape(fields[i]) for i in order]
    cells, texts, is_signed = [], [], False
    for row, i in enumerate(order):
        for column, k in enumerate(order):
            value = matrix[i][k]
            if not is_number(value) or (i == k and not has_diagonal):
                continue
            is_signed = is_signed or value < 0
            depth = min(abs(value) / strongest, 1.0) if strongest > 0 else 0.0
            x, y = left + column * side, top + row * side
            look = ' class="n"' if value < 0 else ""
            place = f'x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}"'
            title = f"<title>{escaped[row]}, {escaped[column]}: {number(value)}</title>"
            cells.append(f'<rect {place} fill-opacity="{depth:.2f}"{look}>{title}</rect>')
            if is_printed:
                class_ = "middle deep" if depth > 0.85 else "middle half" if depth > 0.5 else "middle"
                texts.append(text_at(x + side / 2, y + side / 2 + 4, _printed(value, strongest), class_))
    for row, (i, name) in enumerate(zip(order, names, strict=True)) if has_names else ():
        middle = (row + 0.5) * side + 4
        texts.append(text_at(left - 6, top + middle, name, "end name", fields[i]))
        turned = f"translate({left + middle:.1f} {top - 6:.1f}) rotate(-90)"
        texts.append(tag("text", tag("title", fields[i]), name, transform=turned, class_="name"))
    size = len(order) * side
    frame = tag("rect", x=f"{left:.1f}", y=f"{top:.1f}", width=f"{size:.1f}", height=f"{size:.1f}", class_="frame")
    marks = [frame, tag("g", *map(Markup, cells), class_="cells"), *texts]
    return HeatMap(drawing(left + size + 2, top + size + 2, label, "heat", *marks), strongest, is_signed)


def _printed(value: float, strongest: float) -> str:
    """As many decimals as two digits of the strongest value take."""
    decimals = max(0, 1 - math.floor(math.log10(strongest))) if strongest > 0 else 0
    return f"{round(value, decimals) + 0.0:.{decimals}f}" if decimals <= 4 else f"{value:.0e}"
