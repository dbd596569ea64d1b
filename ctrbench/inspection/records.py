# SPDX-License-Identifier: Apache-2.0
"""What an inspection finds, as plain data."""

from __future__ import annotations

import dataclasses
from typing import Any

WARNING, NOTE = "warning", "note"


@dataclasses.dataclass(frozen=True)
class Part:
    """A field in one split.

    Attributes:
        distinct: values, padding and out-of-vocabulary left out; None for numbers and vectors.
        missing: share of rows without a value; None where the data does not tell it.
        oov: share of rows (of tokens, in sequences) that are out of vocabulary; in raw files, that training never shows.
        mean_length: tokens of a row.
        longest: tokens of a row.
        full: share of rows whose sequence fills its width, of which some were cut.
    """

    distinct: int | None = None
    missing: float | None = None
    oov: float | None = None
    mean_length: float | None = None
    longest: int | None = None
    full: float | None = None


@dataclasses.dataclass(frozen=True)
class Bar:
    """A group of a field's training rows: a value, an interval of numbers or a length."""

    name: str
    rows: int
    label_rate: float | None


@dataclasses.dataclass(frozen=True)
class Field:
    """A column other than the label.

    Attributes:
        kind: categorical, numeric, sequence, embedding or meta.
        vocab_size: ids of the feature map; None in raw files.
        auc: of the field alone, its label rates in training as scores of the rows of another split.
        parts: by split.
        shape: the training rows by value (most frequent first), interval or length, with their label rates.
        histogram: of numbers, in intervals of equal width between the 1st and the 99th percentile of a sample.
        is_identifier: hardly any value comes twice.
    """

    name: str
    kind: str
    vocab_size: int | None
    auc: float | None
    parts: dict[str, Part]
    shape: list[Bar]
    histogram: list[Bar] = dataclasses.field(default_factory=list)
    is_identifier: bool = False


@dataclasses.dataclass(frozen=True)
class Repeats:
    """Rows of a split that training has too, equal in every field but identifiers.

    Attributes:
        share: of the split's rows.
        same_label: share of these whose label is that of a twin too; None without labels.
        within_train: share of the training rows that have a twin among the others, to compare with.
    """

    share: float
    same_label: float | None
    within_train: float


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line about what may leak or mislead."""

    level: str
    text: str


@dataclasses.dataclass(frozen=True)
class Inspection:
    """All that was found.

    Attributes:
        name: the dataset, as it was named.
        source: what kind of data it is.
        label: the column; None where there is none.
        rows: by split.
        label_rates: mean label by split, of those with labels.
        checked_on: the rows that `auc` of a field is measured on.
        fields: in their order.
        repeats: by split.
        findings: warnings first.
    """

    name: str
    source: str
    label: str | None
    rows: dict[str, int]
    label_rates: dict[str, float]
    checked_on: str | None
    fields: list[Field]
    repeats: dict[str, Repeats]
    findings: list[Finding]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return dataclasses.asdict(self)
