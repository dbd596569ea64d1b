# SPDX-License-Identifier: Apache-2.0
"""An inspection as one self-contained HTML page with small drawings, in the look of the leaderboard's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ctrbench.charts import drawing, number, tag
from ctrbench.files import write_text
from ctrbench.inspection.findings import LEAKING_AUC
from ctrbench.inspection.records import WARNING, Bar, Field, Inspection, Part
from ctrbench.inspection.text import count_text, number_text, share_text

_WIDTH, _HEIGHT = 168.0, 38.0  # of a drawing in the table
_FEW_ROWS = 0.005  # share of the rows below which a label rate sets no scale
_LOWEST_AUC = 0.5


def write_page(path: Path, found: Inspection) -> None:
    """Write the page to `path`, atomically."""
    write_text(path, render_page(found))


def render_page(found: Inspection) -> str:
    """The HTML of an inspection."""
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader([here, here.parent / "leaderboard"]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(share=share_text, count=count_text, decimals=number_text)
    highest = _highest_rate(found)
    overall = next(iter(found.label_rates.values()), None)
    fields = [_field(found, field, overall, highest) for field in found.fields]
    parts = [part for field in found.fields for part in field.parts.values()]
    return environment.get_template("inspection.html.j2").render(
        found=found,
        first=next(iter(found.rows)),
        warning=WARNING,
        fields=fields,
        splits=list(found.rows),
        highest=number(highest) if overall is not None else None,
        has_missing=any(part.missing is not None for part in parts),
        oov_splits=[s for s in found.rows if any(f.parts[s].oov is not None for f in found.fields if s in f.parts)],
        has_ids=any(field.vocab_size for field in found.fields),
        has_full=any(part.full is not None for part in parts),
        leaking_auc=LEAKING_AUC,
        has_lengths=any(part.longest is not None for part in parts),
        num_warnings=sum(finding.level == WARNING for finding in found.findings),
    )


def _highest_rate(found: Inspection) -> float:
    """The end of the scale of label rates, the same for all fields."""
    first = next(iter(found.rows.values()))
    bars = [bar for field in found.fields for bar in field.shape if bar.label_rate is not None]
    rates = [bar.label_rate or 0.0 for bar in bars if bar.rows >= _FEW_ROWS * first]
    return max([*rates, *found.label_rates.values(), 1e-9])


def _field(found: Inspection, field: Field, overall: float | None, highest: float) -> dict[str, Any]:
    parts = [field.parts.get(split, Part()) for split in found.rows]
    shape = field.histogram or field.shape
    leaks = any(f.level == WARNING and f"'{field.name}'" in f.text for f in found.findings)
    return {
        "field": field,
        "parts": parts,
        "first": parts[0],
        "leaks": leaks,
        "rows": rows_drawing(field, shape) if shape else None,
        "rates": rates_drawing(field, overall, highest) if overall is not None and len(field.shape) > 1 else None,
        "auc": auc_drawing(field) if field.auc is not None else None,
    }


def rows_drawing(field: Field, bars: Sequence[Bar]) -> Markup:
    """Rows by value, interval or length, as bars."""
    most, step = max(bar.rows for bar in bars) or 1, _WIDTH / max(len(bars), 8)
    marks = []
    for i, bar in enumerate(bars):
        height = (_HEIGHT - 2) * bar.rows / most
        title = tag("title", f"{bar.name}: {bar.rows:,} rows")
        marks.append(
            tag(
                "rect",
                title,
                x=f"{i * step:.1f}",
                y=f"{_HEIGHT - height:.1f}",
                width=f"{max(step - 1, 0.8):.1f}",
                height=f"{height:.1f}",
            )
        )
    marks.append(tag("path", d=f"M0 {_HEIGHT}H{_WIDTH}", class_="axis"))
    return drawing(_WIDTH, _HEIGHT + 1, f"rows of {field.name}", "spark", *marks)


def rates_drawing(field: Field, overall: float, highest: float) -> Markup:
    """Label rates of the same groups as dots, and the overall rate as a line."""
    step = _WIDTH / max(len(field.shape), 8)

    def height(rate: float) -> float:
        return _HEIGHT - 3 - (_HEIGHT - 6) * min(rate / highest, 1.0)

    marks = [tag("path", d=f"M0 {height(overall):.1f}H{_WIDTH}", class_="overall")]
    for i, bar in enumerate(field.shape):
        if bar.label_rate is None:
            continue
        title = tag("title", f"{bar.name}: label rate {bar.label_rate:.4f} of {bar.rows:,} rows")
        marks.append(tag("circle", title, cx=f"{(i + 0.5) * step:.1f}", cy=f"{height(bar.label_rate):.1f}", r=2.2))
    return drawing(_WIDTH, _HEIGHT + 1, f"label rates of {field.name}", "spark", *marks)


def auc_drawing(field: Field) -> Markup:
    """The AUC of a field alone, from 0.5 to 1."""
    assert field.auc is not None
    width, height = 90.0, 12.0
    end = width * min(max((field.auc - _LOWEST_AUC) / (1 - _LOWEST_AUC), 0.0), 1.0)
    marks = [
        tag("rect", x=0, y=0, width=width, height=height, class_="track"),
        tag("rect", x=0, y=0, width=f"{end:.1f}", height=height),
    ]
    return drawing(width, height, f"AUC {field.auc:.4f}", "spark", *marks)
