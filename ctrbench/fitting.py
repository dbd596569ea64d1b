# SPDX-License-Identifier: Apache-2.0
"""Fit vocabularies and scalers in one pass over the raw rows and complete the feature map."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ctrbench.errors import DataError
from ctrbench.features import FeatureMap
from ctrbench.files import atomic_path
from ctrbench.items import history_columns, item_dataset, key_column, split_dataset
from ctrbench.rawdata import RawReader
from ctrbench.schema import DatasetConfig, FeatureColumn
from ctrbench.splits import SplitPlan, name_files, no_rows
from ctrbench.vocabulary import Encoder, TokenCounter, Vocabulary, load_pretrained_keys


@dataclass
class Moments:
    """Count, mean, spread and range of a numeric column that comes block by block."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean
    low: float = math.inf
    high: float = -math.inf

    def add(self, values: np.ndarray) -> None:
        """Add values (n,), n > 0, by the parallel form of Welford's update (Chan et al. 1979)."""
        mean, count = float(values.mean()), self.count + len(values)
        distance = mean - self.mean
        self.squares += float(((values - mean) ** 2).sum()) + distance**2 * self.count * len(values) / count
        self.mean += distance * len(values) / count
        self.count = count
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))

    def shift_and_scale(self, normalizer: str) -> tuple[float, float]:
        """(shift, scale) of (x - shift) / scale; a constant column has scale 1."""
        if normalizer == "StandardScaler":
            return self.mean, math.sqrt(self.squares / self.count) or 1.0
        return self.low, (self.high - self.low) or 1.0


@dataclass
class Fitted:
    """All that encoding needs.

    Attributes:
        feature_map: complete.
        vocabularies: by categorical and sequence feature; shared ones are one object.
        encoders: by categorical, sequence and remapped meta feature; empty for ids that are given.
        scalers: (shift, scale) by numeric feature with a normalizer.
        meta_sizes: number of ids by meta feature whose ids are made here.
        histories: meta features that are lists of item ids.
    """

    feature_map: FeatureMap
    vocabularies: dict[str, Vocabulary] = field(default_factory=dict)
    encoders: dict[str, Encoder] = field(default_factory=dict)
    scalers: dict[str, tuple[float, float]] = field(default_factory=dict)
    meta_sizes: dict[str, int] = field(default_factory=dict)
    histories: list[str] = field(default_factory=list)


def tokens_of(column: FeatureColumn, dtype: pl.DataType) -> pl.Expr:
    """A sequence column as List(String): text is split, lists are taken as they are."""
    if isinstance(dtype, pl.List):
        return pl.col(column.name)
    if column.splitter is None:  # as str.split(None) does
        return pl.col(column.name).str.extract_all(r"\S+")
    return pl.col(column.name).str.split(column.splitter)


def _explode(lists: pl.Expr) -> pl.Expr:
    return lists.filter(lists.list.len() > 0).explode()


class Statistics:
    """One pass over the raw rows: token counts, longest sequences and numeric moments."""

    def __init__(self, columns: list[FeatureColumn], *, ids_given: bool, histories: Collection[str] = ()):
        fitted = [column for column in columns if not ids_given]
        self._tokens = [c for c in fitted if c.type in ("categorical", "sequence")]
        self._meta = [c for c in fitted if c.type == "meta" and c.remap and c.name not in histories]
        self._lengths = [c for c in columns if (c.type == "embedding" and c.pretrain_dim is None)]
        self._lengths += [c for c in columns if c.name in histories and c.max_len == 0]
        self._lengths += [c for c in fitted if c.type == "sequence" and c.max_len == 0]
        self._numeric = [c for c in fitted if c.type == "numeric" and c.normalizer]
        self.counters = {c.name: TokenCounter() for c in self._tokens + self._meta}
        self.lengths = {c.name: 0 for c in self._lengths}
        self.moments = {c.name: Moments() for c in self._numeric}

    def wanted(self, source: str) -> list[str]:
        """Columns to read of one source; vocabularies are fitted on train alone, ids of meta columns on all splits."""
        columns = self._meta
        if source == "train":
            columns = [*self._meta, *self._tokens, *self._lengths, *self._numeric]
        return list(dict.fromkeys(column.name for column in columns))

    def add(self, split: str, frame: pl.DataFrame) -> None:
        """Count the rows of `frame`."""
        lazy = frame.lazy()
        columns = self._meta + (self._tokens if split == "train" else [])
        queries = []
        for column in columns:
            tokens = pl.col(column.name)
            if column.type == "sequence":
                tokens = _explode(tokens_of(column, frame.schema[column.name]))
            queries.append(TokenCounter.query(lazy, tokens))
        for column, counts in zip(columns, pl.collect_all(queries, engine="streaming"), strict=True):
            self.counters[column.name].add(counts)
        if split != "train":
            return
        for column in self._lengths:
            lists = pl.col(column.name)  # of an embedding or a history
            if column.type == "sequence":
                lists = tokens_of(column, frame.schema[column.name])
            longest = frame.select(lists.list.len().max()).item() or 0
            self.lengths[column.name] = max(self.lengths[column.name], int(longest))
        for column in self._numeric:
            self.moments[column.name].add(frame[column.name].cast(pl.Float64).to_numpy())


def fit(
    dataset: DatasetConfig,
    reader: RawReader,
    plan: SplitPlan,
    folder: Path,
    root: Path,
    item_files: Sequence[Path] = (),
) -> Fitted:
    """Fit everything and complete the feature map, exactly as FuxiCTR's FeatureProcessor numbers it.

    Vocabularies and scalers are fitted on the training split alone, those of item features on the item table.

    Raises:
        DataError: the raw data cannot be read or a column keeps no token.
    """
    columns = [column for column in dataset.feature_cols if column.active]
    ids_given = not dataset.rebuild_dataset
    start, train = time.perf_counter(), plan.sources["train"]
    histories = history_columns(dataset, reader, train)
    in_splits = [column for column in split_dataset(dataset).feature_cols if column.active]
    statistics = Statistics(in_splits, ids_given=ids_given, histories=histories)
    for source, files in plan.sources.items():
        wanted, first_row = statistics.wanted(source), 0
        if not wanted:
            continue
        for block in reader.blocks(files, wanted):
            for split, mask in plan.parts(source, block.frame.height, first_row):
                statistics.add(split, block.frame if mask is None else block.frame.filter(pl.Series(mask)))
            first_row += block.frame.height
        if source == "train" and not first_row:
            raise no_rows(files)
    fitted = Fitted(FeatureMap(dataset.dataset_id, str(folder)), histories=histories)
    fitted.feature_map.labels = [label.name for label in dataset.label_col]
    in_table, item_statistics = _item_statistics(dataset, item_files)
    for column in columns:
        if column.name in in_table:
            _fit_column(in_table[column.name], dataset, item_statistics, fitted, name_files(item_files))
        else:
            _fit_column(column, dataset, statistics, fitted, name_files(train))
    _finish_histories(fitted, dataset, columns)
    for column in columns:
        if column.pretrained_emb is not None:
            _add_pretrained(column, fitted, folder, root)
    _finish_sizes(fitted, columns, ids_given)
    logging.info("Fit feature map: %d features in %.1f s", len(columns), time.perf_counter() - start)
    return fitted


def _item_statistics(dataset: DatasetConfig, files: Sequence[Path]) -> tuple[dict[str, FeatureColumn], Statistics]:
    """The columns of the item table by name, and their statistics."""
    if key_column(dataset) is None:
        return {}, Statistics([], ids_given=True)
    table, ids_given = item_dataset(dataset), not dataset.rebuild_dataset
    statistics = Statistics(table.feature_cols, ids_given=ids_given)
    if wanted := statistics.wanted("train"):
        for block in RawReader(table, ids_given=ids_given).blocks(files, wanted):
            statistics.add("train", block.frame)
    return {column.name: column for column in table.feature_cols}, statistics


def _finish_histories(fitted: Fitted, dataset: DatasetConfig, columns: list[FeatureColumn]) -> None:
    """Name the table's key in the feature map, and give every history its width and the items' numbering."""
    if (key := key_column(dataset)) is None:
        return
    fitted.feature_map.item_key = key.name
    for column in columns:
        if column.name in fitted.histories:
            if column.dtype != key.dtype:
                raise DataError(
                    f"dataset_config: {dataset.dataset_id}.feature_cols.{column.name}.dtype: it holds ids of "
                    f"'{key.name}', so it must be {key.dtype}, got {column.dtype}"
                )
            fitted.vocabularies[column.name] = fitted.vocabularies[key.name]


def _fit_column(
    column: FeatureColumn, dataset: DatasetConfig, statistics: Statistics, fitted: Fitted, where: str
) -> None:
    """Add one column's entry to the feature map and what its encoding needs."""
    features, name, ids_given = fitted.feature_map.features, column.name, not dataset.rebuild_dataset
    place = f"{where}: column '{name}'"
    if column.type == "meta":
        features[name] = {"type": "meta"}
        if name in fitted.histories:
            features[name]["max_len"] = max(1, column.max_len or statistics.lengths[name])
        if name in statistics.counters:
            counts = statistics.counters[name].counts()
            vocabulary = Vocabulary.fit(counts, min_count=1, na_value="", remap=True, where=place)
            fitted.encoders[name] = vocabulary.encoder()
            fitted.meta_sizes[name] = vocabulary.size
        return
    spec: dict[str, Any] = {"source": column.source, "type": column.type}
    if column.encoder is not None:
        spec["feature_encoder"] = column.encoder
    if column.embedding_dim is not None:
        spec["embedding_dim"] = column.embedding_dim
    features[name] = spec
    if column.type == "embedding":
        spec["pretrain_dim"] = column.pretrain_dim or statistics.lengths[name]
        if not spec["pretrain_dim"]:
            raise DataError(
                f"{place} of type embedding holds no vector: correct the data or set the column active: false"
            )
    elif column.type == "numeric":
        if column.normalizer and not ids_given:
            fitted.scalers[name] = statistics.moments[name].shift_and_scale(column.normalizer)
    else:
        if column.emb_output_dim is not None:
            spec["emb_output_dim"] = column.emb_output_dim
        vocabulary = _given(column) if ids_given else _fit_vocabulary(column, dataset, statistics, place)
        if column.share_embedding is not None:
            spec["share_embedding"] = column.share_embedding
            shared = fitted.vocabularies[column.share_embedding]
            shared.merge(vocabulary)
            vocabulary = shared
        fitted.vocabularies[name] = vocabulary
        spec["padding_idx"] = 0
        if column.pretrained_emb is not None:
            spec["oov_idx"] = vocabulary.oov
        if column.type == "sequence":
            # A list column may be empty throughout; FuxiCTR sees one empty token there.
            spec["max_len"] = column.max_len or max(1, statistics.lengths[name])
        spec["vocab_size"] = vocabulary.size


def _fit_vocabulary(column: FeatureColumn, dataset: DatasetConfig, statistics: Statistics, place: str) -> Vocabulary:
    return Vocabulary.fit(
        statistics.counters[column.name].counts(),
        min_count=column.min_categr_count or dataset.min_categr_count,
        # FuxiCTR drops the token of missing values only when fill_na names it; the default of integers, 0, stays.
        na_value="" if column.fill_na is None else str(column.fill_na) if column.type == "sequence" else column.fill_na,
        remap=column.remap,
        where=place,
    )


def _given(column: FeatureColumn) -> Vocabulary:
    """The vocabulary of ids that the data holds already: 0 .. vocab_size-2 stand for themselves, the last is OOV."""
    assert column.vocab_size is not None
    ids = np.arange(1, column.vocab_size - 1)
    return Vocabulary(pl.Series(ids, dtype=pl.Int64), ids, remap=False)


def _add_pretrained(column: FeatureColumn, fitted: Fitted, folder: Path, root: Path) -> None:
    """Copy a pretrained file beside the feature map and append its unknown keys to the vocabulary."""
    assert column.pretrained_emb is not None
    path = root / column.pretrained_emb
    vocabulary, spec = fitted.vocabularies[column.name], fitted.feature_map.features[column.name]
    dtype = vocabulary.tokens.dtype
    vocabulary.expand(load_pretrained_keys(path, dtype, column.pretrain_dim, f"column '{column.name}'"))
    copy = folder / f"pretrained_{column.name}{path.suffix}"
    with atomic_path(copy) as partial:
        shutil.copyfile(path, partial)
    if column.pretrain_dim is not None:
        spec["pretrain_dim"] = column.pretrain_dim
    spec |= {
        "pretrained_emb": copy.name,
        "freeze_emb": column.freeze_emb,
        "pretrain_usage": column.pretrain_usage,
    }


def _finish_sizes(fitted: Fitted, columns: list[FeatureColumn], ids_given: bool) -> None:
    """Sizes and encoders, once sharing and pretrained keys have settled every vocabulary."""
    encoders: dict[int, Encoder] = {}
    for column in columns:
        vocabulary = fitted.vocabularies.get(column.name)
        if vocabulary is None:
            continue
        spec = fitted.feature_map.features[column.name]
        if column.type == "meta":
            fitted.meta_sizes[column.name] = vocabulary.size
        else:
            spec["vocab_size"] = vocabulary.size
        if "oov_idx" in spec:
            spec["oov_idx"] = vocabulary.oov
        if not ids_given:
            if id(vocabulary) not in encoders:
                encoders[id(vocabulary)] = vocabulary.encoder()
            fitted.encoders[column.name] = encoders[id(vocabulary)]
    fitted.feature_map.refresh_counts()
