# SPDX-License-Identifier: Apache-2.0
"""From counts to what deserves a look: what leaks, and what a model could not learn from."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ctrbench.inspection.records import NOTE, WARNING, Field, Finding, Inspection

LEAKING_AUC, STRONG_AUC = 0.9, 0.8
REPEATED = 0.001  # share of repeated rows that counts for nothing
HIGH_OOV = 0.2


def find(found: Inspection) -> list[Finding]:
    """All findings, warnings first."""
    every = [*_labels(found), *_rows(found)]
    for field in found.fields:
        every += _alone(found, field)
        every += _identifiers(field)
        every += _values(found, field)
    return sorted(every, key=lambda finding: finding.level != WARNING)


def _labels(found: Inspection) -> Iterator[Finding]:
    if found.label is None:
        yield Finding(NOTE, "no label column: what predicts it cannot be told; name it with --label")
    rates = found.label_rates
    for split, rate in rates.items():
        if rate in (0.0, 1.0):
            yield Finding(WARNING, f"every label of {split} is {rate:g}")
    if "train" not in rates or not 0 < rates["train"] < 1:
        return
    for split, rate in rates.items():
        error = math.sqrt(rates["train"] * (1 - rates["train"]) * (1 / found.rows[split] + 1 / found.rows["train"]))
        if abs(rate - rates["train"]) > max(5 * error, 0.1 * rates["train"]):
            yield Finding(
                NOTE,
                f"label rate of {split} is {rate:.4f}, of train {rates['train']:.4f}: not a random split of the same rows",
            )


def _rows(found: Inspection) -> Iterator[Finding]:
    for split, repeats in found.repeats.items():
        if repeats.share <= REPEATED:
            continue
        labels = f", {repeats.same_label:.0%} of them with its label" if repeats.same_label is not None else ""
        text = f"{repeats.share:.2%} of the {split} rows are rows of train{labels}"
        # Rows that train itself holds twice come twice in any split of it.
        if repeats.share > 1.5 * repeats.within_train:
            twins = f"{repeats.within_train:.2%}" if repeats.within_train else "none"
            yield Finding(WARNING, f"{text}, while {twins} of the train rows have a twin in train")
        else:
            yield Finding(NOTE, f"{text}, as {repeats.within_train:.2%} of the train rows are of other train rows")


def _alone(found: Inspection, field: Field) -> Iterator[Finding]:
    if field.auc is None or field.auc < STRONG_AUC:
        return
    what = "length of field" if field.kind == "sequence" else "field"
    text = f"{what} '{field.name}' alone predicts the label: AUC {field.auc:.4f} on {found.checked_on}"
    if field.auc >= LEAKING_AUC:
        yield Finding(WARNING, f"{text}: is it known before the click?")
    else:
        yield Finding(NOTE, text)


def _identifiers(field: Field) -> Iterator[Finding]:
    if not field.is_identifier:
        return
    shared = {split: 1 - part.oov for split, part in field.parts.items() if split != "train" and part.oov is not None}
    text = f"field '{field.name}' names rows: hardly any of its values comes twice"
    repeated = [f"{share:.1%} of the {split} rows" for split, share in shared.items() if share > 0.001]
    if repeated:
        yield Finding(WARNING, f"{text} in train, yet {' and '.join(repeated)} have one that train has")
    else:
        yield Finding(NOTE, text)


def _values(found: Inspection, field: Field) -> Iterator[Finding]:
    first = next(iter(field.parts.values()))
    if len(field.shape) == 1 and field.kind != "meta":
        yield Finding(NOTE, f"field '{field.name}' has one value in all rows of {next(iter(found.rows))}")
    elif first.missing is not None and first.missing > 0.5:
        yield Finding(NOTE, f"field '{field.name}' is missing in {first.missing:.1%} of the rows")
    for split, part in field.parts.items():
        if split == "train" or part.oov is None or field.is_identifier or field.kind == "meta":
            continue
        if part.oov > HIGH_OOV and part.oov > 2 * (first.oov or 0):
            of = "tokens" if field.kind == "sequence" else "rows"
            yield Finding(NOTE, f"field '{field.name}': {part.oov:.1%} of the {split} {of} are out of vocabulary")
