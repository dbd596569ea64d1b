# SPDX-License-Identifier: Apache-2.0
"""The columns of encoded and of raw data in one form, so that both are counted by the same code."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import polars as pl

from ctrbench.dataset_lookup import EncodedDataset
from ctrbench.errors import ConfigError, DataError, did_you_mean

LABELS = ("label", "click", "is_click", "clicked", "clk", "target", "y")
RAW = "raw rows"
BLOCK_ROWS = 1 << 16
_SAMPLE_ROWS = 10_000  # that tell the type of a raw column


@dataclasses.dataclass(frozen=True)
class Column:
    """What a field is; `vocab_size` and `oov` (the id of unknown tokens) only where ids are made."""

    name: str
    kind: str
    vocab_size: int | None = None
    oov: int | None = None
    width: int | None = None


@dataclasses.dataclass(frozen=True)
class Values:
    """A block of a column.

    Attributes:
        missing: (n,) rows without a value.
        keys: (n,) values of a categorical or meta column, integers; of a sequence, its lengths.
        numbers: (n,) of a numeric column, nan where missing.
        tokens: (m,) of a sequence, all rows after one another.
        row: (n,) or (n, width), to compare rows by.
    """

    missing: np.ndarray
    row: np.ndarray
    keys: np.ndarray | None = None
    numbers: np.ndarray | None = None
    tokens: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Block:
    """Consecutive rows of a split."""

    columns: dict[str, Values]
    labels: np.ndarray | None


class Source(Protocol):
    """Data to inspect.

    Attributes:
        kind: what to call it.
        columns: its fields.
        label: its label column.
        rows: by split.
        labelled: splits that have labels.
        is_columnar: whether reading some columns costs less than reading all.
    """

    kind: str
    columns: list[Column]
    label: str | None
    rows: dict[str, int]
    labelled: list[str]
    is_columnar: bool

    def blocks(self, split: str, names: Sequence[str]) -> Iterator[Block]:
        """The columns `names` and the labels of a split, in order."""
        ...


class EncodedSource:
    """Ids with their feature map: built here or by FuxiCTR."""

    is_columnar = True

    def __init__(self, dataset: EncodedDataset):
        feature_map = dataset.feature_map()
        self.kind = "built here" if dataset.is_built_here else "encoded by FuxiCTR"
        self.label = feature_map.labels[0]
        self._splits = {split: dataset.open(split) for split in dataset.splits}
        self.rows = {split: opened.num_rows for split, opened in self._splits.items()}
        self.labelled = [split for split, opened in self._splits.items() if self.label in opened.columns]
        self.columns = []
        for name in feature_map.split_features:
            spec = feature_map.features[name]
            size = spec.get("vocab_size")
            oov = spec.get("oov_idx", size - 1 if size else None)
            self.columns.append(Column(name, spec["type"], size, oov, spec.get("max_len")))
        for opened in self._splits.values():
            opened.check_has([c.name for c in self.columns], "these files and feature_map.json are not of one dataset")
        self._by_name = {column.name: column for column in self.columns}

    def blocks(self, split: str, names: Sequence[str]) -> Iterator[Block]:
        """The columns `names` and the labels of a split, in order."""
        labels = [self.label] if split in self.labelled else []
        for block in self._splits[split].blocks([*names, *labels]):
            for name in names:
                self._check_ids(name, block.columns[name], block.file)
            columns = {name: _encoded(self._by_name[name], block.columns[name]) for name in names}
            yield Block(columns, block.columns[self.label].astype(np.float64) if labels else None)

    def _check_ids(self, name: str, values: np.ndarray, file: Path) -> None:
        size = self._by_name[name].vocab_size
        if size is not None and values.size and not (values.min() >= 0 and values.max() < size):
            raise DataError(
                f"{file}: column '{name}' holds ids outside 0..{size - 1}: it is not of this feature_map.json"
            )


def _encoded(column: Column, values: np.ndarray) -> Values:
    if column.kind == "numeric":
        numbers = values.astype(np.float64)
        return Values(np.isnan(numbers), values, numbers=numbers)
    if values.ndim == 2:
        empty = np.asarray(~values.any(axis=1))
        if column.kind == "embedding":
            return Values(empty, values)
        return Values(empty, values, keys=(values != 0).sum(axis=1), tokens=values[values != 0].astype(np.int64))
    missing = np.zeros(len(values), bool) if column.kind == "meta" else np.asarray(values == 0)
    return Values(missing, values, keys=values.astype(np.int64))


class RawSource:
    """CSV or Parquet rows as they come; tokens are told apart by 64-bit hashes.

    Args:
        files: by split.
        label: its column; by default one that is named so.
        sep: separator of CSV files.
        kinds: type of each column that is to be read, where a dataset section tells it.
        splitters: of sequences that are text, where a section tells them.
    """

    def __init__(
        self,
        files: Mapping[str, list[Path]],
        label: str | None = None,
        sep: str = ",",
        kinds: Mapping[str, str] | None = None,
        splitters: Mapping[str, str] | None = None,
    ):
        self.kind, self._files, self._sep = RAW, dict(files), sep
        self.is_columnar = all(file.suffix == ".parquet" for paths in files.values() for file in paths)
        schemas = {split: self._scan(paths).collect_schema() for split, paths in self._files.items()}
        first = next(iter(schemas.values()))
        self.label = label or next((name for name in first if name.lower() in LABELS), None)
        if label is not None and label not in first:
            raise ConfigError(
                f"--label {label}: no such column{did_you_mean(label, first)}; there are {', '.join(first)}"
            )
        self.labelled = [split for split, schema in schemas.items() if self.label in schema]
        counted = {split: self._scan(paths).select(pl.len()).collect() for split, paths in self._files.items()}
        self.rows = {split: int(frame.item()) for split, frame in counted.items()}
        if empty := next((split for split, count in self.rows.items() if not count), None):
            raise DataError(f"{self._files[empty][0]}: no rows: nothing to inspect")
        self._splitters = dict(splitters or {})
        self.columns = self._columns(first, kinds)
        for split, schema in schemas.items():
            if absent := next((c.name for c in self.columns if c.name not in schema), None):
                raise DataError(f"{self._files[split][0]}: column '{absent}' is missing{did_you_mean(absent, schema)}")

    def _scan(self, files: Sequence[Path]) -> pl.LazyFrame:
        try:
            if files[0].suffix == ".parquet":
                scan = pl.scan_parquet(files)
            else:
                scan = pl.scan_csv(files, separator=self._sep, infer_schema=False)
            scan.collect_schema()
            return scan
        except (pl.exceptions.PolarsError, OSError) as error:
            raise _unreadable(files[0], error) from None

    def _columns(self, schema: Mapping[str, pl.DataType], kinds: Mapping[str, str] | None) -> list[Column]:
        """Text of digits with a point is numeric, lists and text with ^ are sequences, all else is categorical."""
        sample = self._scan(next(iter(self._files.values()))).head(_SAMPLE_ROWS).collect()
        columns = []
        for name, dtype in schema.items():
            if name == self.label or (kinds is not None and name not in kinds):
                continue
            kind = kinds[name] if kinds is not None else _kind_of(sample[name])
            if isinstance(dtype, pl.List | pl.Array) and kind not in ("sequence", "embedding"):
                kind = "sequence"
            if kind == "sequence" and dtype == pl.String:
                self._splitters.setdefault(name, "^")
            columns.append(Column(name, kind))
        return columns

    def blocks(self, split: str, names: Sequence[str]) -> Iterator[Block]:
        """The columns `names` and the labels of a split, in order."""
        labels = [str(self.label)] if split in self.labelled else []
        kinds = {column.name: column.kind for column in self.columns}
        scan = self._scan(self._files[split]).select([*names, *labels])
        try:
            for frame in scan.collect_batches(chunk_size=BLOCK_ROWS, maintain_order=True):
                columns = {name: _raw(frame[name], kinds[name], self._splitters.get(name)) for name in names}
                found = frame[labels[0]].cast(pl.Float64, strict=False) if labels else None
                if found is not None and found.null_count():
                    raise DataError(
                        f"{self._files[split][0]}: label column '{self.label}' holds values that are not numbers: "
                        "name another with --label"
                    )
                if frame.height:
                    yield Block(columns, None if found is None else found.to_numpy())
        except (pl.exceptions.PolarsError, OSError) as error:
            raise _unreadable(self._files[split][0], error) from None


def _kind_of(sample: pl.Series) -> str:
    if isinstance(sample.dtype, pl.List | pl.Array):
        return "embedding" if sample.dtype.inner.is_float() else "sequence"
    if sample.dtype.is_float():
        return "numeric"
    if sample.dtype != pl.String:
        return "categorical"
    present = sample.filter(sample.fill_null("") != "")
    if present.str.contains("^", literal=True).mean() or 0:
        return "sequence"
    is_number = present.cast(pl.Float64, strict=False).is_not_null().all() and len(present)
    return "numeric" if is_number and present.str.contains(r"[.eE]").any() else "categorical"


def _raw(series: pl.Series, kind: str, splitter: str | None) -> Values:
    if kind == "numeric":
        numbers = series.cast(pl.Float64, strict=False).fill_null(np.nan).to_numpy()
        return Values(np.isnan(numbers), numbers, numbers=numbers)
    if kind == "embedding":
        is_empty = series.is_null().to_numpy()
        return Values(is_empty, series.hash().to_numpy())
    if kind == "sequence":
        splitter = splitter if series.dtype == pl.String else None
        lists = series.fill_null("").str.split(splitter) if splitter else series
        if isinstance(lists.dtype, pl.Array):
            lists = lists.arr.to_list()
        tokens = lists.explode().drop_nulls()
        lengths = lists.list.len().fill_null(0).to_numpy().astype(np.int64)
        if splitter:
            tokens = tokens.filter(tokens != "")
            lengths = np.where((series.fill_null("") == "").to_numpy(), 0, lengths)
        return Values(lengths == 0, series.hash().to_numpy(), keys=lengths, tokens=tokens.hash().to_numpy())
    missing = series.is_null()
    if series.dtype == pl.String:
        missing = missing | (series.fill_null("") == "")
    keys = np.where(missing.to_numpy(), np.uint64(0), series.hash().to_numpy())
    return Values(missing.to_numpy(), keys, keys=keys)


def _unreadable(file: Path, error: Exception) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DataError(f"{file}: cannot be read: {reason}: check --sep and the file itself")
