# SPDX-License-Identifier: Apache-2.0
"""An inspection as aligned text."""

from __future__ import annotations

from collections.abc import Sequence

from ctrbench.inspection.records import WARNING, Field, Inspection, Part

DASH = "–"


def to_text(found: Inspection) -> str:
    """Splits, fields and findings, in tables whose columns are aligned."""
    splits = list(found.rows)
    lines = [f"{found.name}: {found.source}", ""]
    rates = [[s, f"{n:,}", number_text(found.label_rates.get(s), 4)] for s, n in found.rows.items()]
    lines += table(["split", "rows", "label rate"], rates, right_from=1)
    has_lengths = any(field.kind == "sequence" for field in found.fields)
    head = ["field", "type", "ids", "distinct"]
    head += [f"missing {split}" for split in splits] + [f"oov {split}" for split in splits]
    head += (["length", "longest", "full"] if has_lengths else []) + ["AUC alone"]
    rows = [_row(field, splits, has_lengths) for field in found.fields]
    used = [i for i in range(len(head)) if i < 2 or any(row[i] != DASH for row in rows)]
    lines += ["", *table([head[i] for i in used], [[row[i] for i in used] for row in rows], right_from=2)]
    if found.checked_on:
        lines += ["", f"AUC alone: label rates of train as scores of {found.checked_on}; of a sequence, by its length."]
    if found.findings:
        lines += [""] + [f"{'!' if f.level == WARNING else '-'} {f.text}" for f in found.findings]
    return "\n".join(lines)


def _row(field: Field, splits: Sequence[str], has_lengths: bool) -> list[str]:
    parts = [field.parts.get(split, Part()) for split in splits]
    first = parts[0]
    row = [field.name, field.kind, count_text(field.vocab_size), count_text(first.distinct)]
    row += [share_text(part.missing) for part in parts] + [share_text(part.oov) for part in parts]
    if has_lengths:
        row += [number_text(first.mean_length, 1), count_text(first.longest), share_text(first.full)]
    return [*row, number_text(field.auc, 4)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right_from: int) -> list[str]:
    """Lines of a table; columns from `right_from` on are set right."""
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    lines = []
    for line in [head, ["-" * width for width in widths], *rows]:
        cells = [
            text.ljust(width) if i < right_from else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def share_text(value: float | None) -> str:
    """A share in percent; what is there shows."""
    if value is None:
        return DASH
    return "0" if value == 0 else "<0.01%" if value < 1e-4 else f"{value:.2%}"


def count_text(value: int | None) -> str:
    """A count with separators."""
    return DASH if value is None else f"{value:,}"


def number_text(value: float | None, digits: int) -> str:
    """A number in so many decimals."""
    return DASH if value is None else f"{value:.{digits}f}"
