# SPDX-License-Identifier: Apache-2.0
"""Count a dataset: a pass over each column of encoded data, one over all columns of CSV; then one that compares rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from ctrbench.inspection.findings import find
from ctrbench.inspection.records import Bar, Field, Inspection, Part, Repeats
from ctrbench.inspection.sources import RAW, Column, Source, Values
from ctrbench.inspection.tally import DenseTally, Sample, SparseTally, Tally, auc_alone, known_share, row_hashes

MAX_HASHES = 10_000_000  # rows that are compared with each other; of more, an even part is
IDENTIFIER = 0.9  # distinct values per row from which a field names rows
_BARS = 24


def inspect_source(source: Source, name: str) -> Inspection:
    """All that is to know of a dataset.

    Memory holds a block of rows, the tallies of one field (of all fields, in CSV) and a hash of at most `MAX_HASHES` rows.

    Raises:
        DataError: data that cannot be read.
    """
    others = [split for split in source.labelled if split != "train"]
    checked_on = others[0] if others and "train" in source.labelled else None
    if checked_on is None and source.labelled:
        checked_on = f"every other row of {source.labelled[0]}"
    rates: dict[str, float] = {}
    groups = [[column] for column in source.columns] if source.is_columnar else [list(source.columns)]
    fields = [field for group in groups for field in _measure(source, group, checked_on, rates)]
    if not fields:
        _measure(source, [], None, rates)
    repeats = _repeats(source, [field.name for field in fields if not field.is_identifier])
    order = {column.name: place for place, column in enumerate(source.columns)}
    fields.sort(key=lambda field: order[field.name])
    found = Inspection(name, source.kind, source.label, source.rows, rates, checked_on, fields, repeats, [])
    return dataclasses.replace(found, findings=find(found))


# --- fields


@dataclasses.dataclass
class _Counts:
    """A field in one split, or in one half of a split."""

    values: Tally  # values, intervals or lengths
    tokens: Tally | None
    missing: int = 0

    def add(self, column: Column, values: Values, labels: np.ndarray | None, edges: np.ndarray) -> None:
        self.missing += int(values.missing.sum())
        if values.numbers is not None:  # the last interval is that of missing numbers
            interval = np.searchsorted(edges, np.nan_to_num(values.numbers), side="right")
            self.values.add(np.where(values.missing, len(edges) + 1, interval), labels)
        elif values.keys is not None:
            self.values.add(values.keys, labels)
        if values.tokens is not None and self.tokens is not None:
            self.tokens.add(values.tokens, None)


def _empty(column: Column, edges: np.ndarray) -> _Counts:
    tokens: Tally | None = None
    if column.kind == "sequence":
        tokens = DenseTally(column.vocab_size) if column.vocab_size else SparseTally()
    if column.kind == "numeric":
        return _Counts(DenseTally(len(edges) + 2), tokens)
    if column.kind == "categorical" and column.vocab_size:
        return _Counts(DenseTally(column.vocab_size), tokens)
    return _Counts(SparseTally(), tokens)


def _measure(source: Source, columns: Sequence[Column], checked_on: str | None, rates: dict[str, float]) -> list[Field]:
    samples = _samples(source, [column for column in columns if column.kind == "numeric"])
    edges = {name: sample.edges() for name, sample in samples.items()}
    nothing = np.zeros(0)
    counts: dict[tuple[str, str], _Counts] = {}
    halves: dict[tuple[str, int], _Counts] = {}
    names, first = [column.name for column in columns], next(iter(source.rows))
    is_halved = checked_on is not None and checked_on not in source.rows
    for split in source.rows:
        for column in columns:
            counts[split, column.name] = _empty(column, edges.get(column.name, nothing))
            if is_halved and split == source.labelled[0]:
                for half in (0, 1):
                    halves[column.name, half] = _empty(column, edges.get(column.name, nothing))
        positives, start = 0.0, 0
        for block in source.blocks(split, names):
            labels = block.labels
            for column in columns:
                values, cut = block.columns[column.name], edges.get(column.name, nothing)
                counts[split, column.name].add(column, values, labels, cut)
                for half in (0, 1) if (column.name, 0) in halves and split == source.labelled[0] else ():
                    chosen = slice((half - start) % 2, None, 2)
                    part = _every_other(values, chosen)
                    halves[column.name, half].add(column, part, None if labels is None else labels[chosen], cut)
            if labels is not None:
                positives += float(labels.sum())
                start += len(labels)
        if split in source.labelled:
            rates[split] = positives / source.rows[split]
    made = []
    for column in columns:
        auc = None
        if checked_on is not None and column.kind != "embedding":
            pair = (counts["train", column.name], counts[checked_on, column.name]) if not is_halved else None
            fitted, checked = pair or (halves[column.name, 0], halves[column.name, 1])
            auc = auc_alone(fitted.values, checked.values)
        parts = {split: counts[split, column.name] for split in source.rows}
        field = _field(source, column, parts, edges.get(column.name, nothing), auc, first)
        if column.name in samples:
            field = dataclasses.replace(field, histogram=_histogram(samples[column.name]))
        made.append(field)
    return made


def _histogram(sample: Sample) -> list[Bar]:
    rows, ends = sample.histogram()
    return [Bar(f"{ends[i]:.4g} … {ends[i + 1]:.4g}", int(count), None) for i, count in enumerate(rows)]


def _every_other(values: Values, chosen: slice) -> Values:
    keys, numbers = values.keys, values.numbers
    return Values(
        values.missing[chosen],
        values.row[:0],
        None if keys is None else keys[chosen],
        None if numbers is None else numbers[chosen],
    )


def _samples(source: Source, columns: Sequence[Column]) -> dict[str, Sample]:
    """Numbers of the first split, by numeric column."""
    if not columns:
        return {}
    split, names = next(iter(source.rows)), [column.name for column in columns]
    samples = {name: Sample(source.rows[split]) for name in names}
    for block in source.blocks(split, names):
        for name in names:
            numbers = block.columns[name].numbers
            assert numbers is not None
            samples[name].add(numbers)
    return samples


def _field(
    source: Source, column: Column, counts: dict[str, _Counts], edges: np.ndarray, auc: float | None, first: str
) -> Field:
    parts = {split: _part(source, column, counted, counts[first], split == first) for split, counted in counts.items()}
    of_first = counts[first]
    rows = source.rows[first]
    is_identifier = (
        column.kind in ("categorical", "meta") and rows >= 100 and len(of_first.values.keys) > IDENTIFIER * rows
    )
    shape = _shape(column, of_first.values, edges, first in source.labelled)
    return Field(column.name, column.kind, column.vocab_size, auc, parts, shape, is_identifier=is_identifier)


def _part(source: Source, column: Column, counts: _Counts, train: _Counts, is_first: bool) -> Part:
    rows = max(int(counts.values.rows.sum()), 1)
    missing: float | None = counts.missing / rows
    if column.kind == "embedding":
        return Part(missing=None if not counts.missing else missing)
    if column.kind == "numeric":
        return Part(missing=missing if source.kind == RAW or counts.missing else None)
    tally = counts.tokens if column.kind == "sequence" else counts.values
    known = train.tokens if column.kind == "sequence" else train.values
    assert tally is not None and known is not None
    keys, total = tally.keys, max(int(tally.rows.sum()), 1)
    oov: float | None = None
    if column.oov is not None:
        oov = float(tally.rows[keys == column.oov].sum() / total)
    elif (source.kind == RAW or column.kind == "meta") and not is_first:
        oov = 1 - known_share(tally, known)
    special = {0, column.oov} if column.vocab_size else {0} if source.kind == RAW else set()
    distinct = len(keys) - sum(int(key is not None and key in keys) for key in special)
    if column.kind != "sequence":
        # Only padding tells a missing token from an unknown one; FuxiCTR's ids do not.
        return Part(distinct, missing if source.kind == RAW or counts.missing else None, oov)
    lengths, of_length = counts.values.keys.astype(np.int64), counts.values.rows
    longest = int(lengths.max()) if len(lengths) else 0
    full = float(of_length[lengths == column.width].sum() / rows) if column.width else None
    return Part(distinct, missing, oov, float((lengths * of_length).sum() / rows), longest, full)


def _shape(column: Column, tally: Tally, edges: np.ndarray, has_labels: bool) -> list[Bar]:
    keys, rows, positives = tally.keys, tally.rows, tally.positives
    if column.kind == "embedding" or not len(keys):
        return []
    rates = [float(p / r) if has_labels else None for p, r in zip(positives, rows, strict=True)]
    if column.kind == "numeric":
        ends = ["−∞", *(f"{edge:.4g}" for edge in edges), "∞"]
        names = [f"{ends[k]} … {ends[k + 1]}" if k <= len(edges) else "missing" for k in keys]
        return [Bar(names[i], int(rows[i]), rates[i]) for i in range(len(keys))]
    if column.kind == "sequence":
        return _merged([(int(k), int(r), float(p)) for k, r, p in zip(keys, rows, positives, strict=True)], has_labels)
    order = np.argsort(-rows, kind="stable")[:_BARS]
    return [Bar(_key_name(column, keys[i], place), int(rows[i]), rates[i]) for place, i in enumerate(order, 1)]


def _key_name(column: Column, key: int, place: int) -> str:
    if not column.vocab_size:
        return "missing" if key == 0 and column.kind == "categorical" else f"{place}. most frequent"
    return "padding" if key == 0 else "out of vocabulary" if key == column.oov else f"id {key}"


def _merged(lengths: list[tuple[int, int, float]], has_labels: bool) -> list[Bar]:
    """Lengths put together to at most `_BARS` intervals of one width."""
    step = math.ceil((lengths[-1][0] + 1) / _BARS)
    groups: dict[int, list[tuple[int, float]]] = {}
    for length, rows, positives in lengths:
        groups.setdefault(length // step, []).append((rows, positives))
    bars = []
    for group in range(lengths[-1][0] // step + 1):
        rows, positives = (sum(values) for values in zip(*groups.get(group, [(0, 0.0)]), strict=True))
        name = f"{group * step}" if step == 1 else f"{group * step} … {group * step + step - 1}"
        bars.append(Bar(f"length {name}", int(rows), float(positives / rows) if has_labels and rows else None))
    return bars


# --- rows


def _repeats(source: Source, names: Sequence[str]) -> dict[str, Repeats]:
    """Rows that two splits share. A hash of a row's fields, its lowest bit the label, stands for the row."""
    others = [split for split in source.rows if split != "train"]
    if "train" not in source.rows or not others or not names:
        return {}
    keep_one_of = math.ceil(sum(source.rows.values()) / MAX_HASHES)
    train = np.sort(_hashes(source, "train", names, keep_one_of))
    if not len(train):
        return {}
    fields = train >> np.uint64(1)
    _, twins = np.unique(fields, return_counts=True)
    within = float(twins[twins > 1].sum() / len(train))
    found = {}
    for split in others:
        rows = _hashes(source, split, names, keep_one_of)
        is_twin = np.isin(rows >> np.uint64(1), fields)
        same = float(np.isin(rows[is_twin], train).mean()) if is_twin.any() and split in source.labelled else None
        found[split] = Repeats(float(is_twin.mean()) if len(rows) else 0.0, same, within)
    return found


def _hashes(source: Source, split: str, names: Sequence[str], keep_one_of: int) -> np.ndarray:
    kept = []
    for block in source.blocks(split, names):
        hashes = row_hashes([block.columns[name].row for name in names])
        labels = np.zeros(len(hashes), np.uint64) if block.labels is None else (block.labels > 0).astype(np.uint64)
        chosen = (hashes >> np.uint64(32)) % np.uint64(keep_one_of) == 0
        kept.append(((hashes & ~np.uint64(1)) | labels)[chosen])
    return np.concatenate(kept)
