# SPDX-License-Identifier: Apache-2.0
"""Fit vocabularies and scalers in one pass over the raw rows and complete the feature map."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ctrbench.counting import Statistics
from ctrbench.errors import DataError
from ctrbench.features import FeatureMap
from ctrbench.files import atomic_path
from ctrbench.interning import Interner, TokenIds
from ctrbench.items import SOURCE, item_dataset, key_column, split_dataset
from ctrbench.rawdata import RawReader
from ctrbench.schema import DatasetConfig, FeatureColumn
from ctrbench.sources import RawRows
from ctrbench.spill import Spill
from ctrbench.splits import name_files
from ctrbench.vocabulary import Vocabulary, load_pretrained_keys


@dataclass
class Fitted:
    """All that encoding needs.

    Attributes:
        feature_map: complete.
        vocabularies: by categorical and sequence feature; shared ones are one object.
        encoders: by categorical, sequence and remapped meta feature of the splits; empty for ids that are given.
        item_encoders: the same of the item table.
        scalers: (shift, scale) by numeric feature with a normalizer.
        meta_sizes: number of ids by meta feature whose ids are made here.
        histories: meta features that are lists of item ids.
    """

    feature_map: FeatureMap
    vocabularies: dict[str, Vocabulary] = field(default_factory=dict)
    encoders: dict[str, TokenIds] = field(default_factory=dict)
    item_encoders: dict[str, TokenIds] = field(default_factory=dict)
    scalers: dict[str, tuple[float, float]] = field(default_factory=dict)
    meta_sizes: dict[str, int] = field(default_factory=dict)
    histories: list[str] = field(default_factory=list)


def new_statistics(
    dataset: DatasetConfig, folder: Path, histories: Sequence[str], tokens_in_memory: int | None = None
) -> Statistics:
    """Statistics of the columns of the splits, with nothing counted yet."""
    columns = [column for column in split_dataset(dataset).feature_cols if column.active]
    ids_given = not dataset.rebuild_dataset
    return Statistics(columns, folder, ids_given=ids_given, histories=histories, tokens_in_memory=tokens_in_memory)


def count(rows: RawRows, statistics: Statistics, spill: Spill, num_threads: int | None = None) -> None:
    """Take the statistics of all sources; the rows that were read for it are kept in `spill`, by source, for encoding.

    Nothing is read where there is nothing to fit.

    Raises:
        DataError: the raw data cannot be read.
    """
    if not statistics.is_needed:
        return
    with ThreadPoolExecutor(num_threads or num_cores(), thread_name_prefix="columns") as threads:
        for source in rows.plan.sources:
            first_row = 0
            for block in rows.blocks(source):
                parts = dict(rows.plan.parts(source, block.frame.height, first_row))
                mask = parts.get("train", False)
                spill.append(source, statistics.add(block, True if mask is None else mask, threads))
                first_row += block.frame.height


def fit(
    dataset: DatasetConfig,
    statistics: Statistics,
    histories: list[str],
    spill: Spill,
    folder: Path,
    root: Path,
    files: Mapping[str, Sequence[Path]],
) -> Fitted:
    """Fit everything and complete the feature map, exactly as FuxiCTR's FeatureProcessor numbers it.

    Vocabularies and scalers are fitted on the training split alone, those of item features on the item table, whose rows
    are kept in `spill` for encoding.

    Args:
        dataset: its configuration.
        statistics: of the columns of the splits, from `count`.
        histories: meta features that are lists of item ids.
        spill: for the rows of the item table.
        folder: of the dataset.
        root: folder of relative paths.
        files: raw files by source.

    Raises:
        DataError: the item table cannot be read or a column keeps no token.
    """
    columns = [column for column in dataset.feature_cols if column.active]
    train, item_files = files["train"], files.get(SOURCE, ())
    with ThreadPoolExecutor(num_cores(), thread_name_prefix="columns") as threads:
        in_table, item_statistics = _item_statistics(dataset, item_files, spill, threads)
    fitted = Fitted(FeatureMap(dataset.dataset_id, str(folder)), histories=histories)
    fitted.feature_map.labels = [label.name for label in dataset.label_col]
    for column in columns:
        if column.name in in_table:
            _fit_column(in_table[column.name], dataset, item_statistics, fitted, name_files(item_files))
        else:
            _fit_column(column, dataset, statistics, fitted, name_files(train))
    _finish_histories(fitted, dataset, columns)
    for column in columns:
        if column.pretrained_emb is not None:
            _add_pretrained(column, fitted, folder, root)
    _finish_sizes(fitted, columns)
    _make_encoders(fitted, columns, statistics.interners, fitted.encoders)
    _make_encoders(fitted, columns, item_statistics.interners, fitted.item_encoders)
    return fitted


def _item_statistics(
    dataset: DatasetConfig, files: Sequence[Path], spill: Spill, threads: ThreadPoolExecutor
) -> tuple[dict[str, FeatureColumn], Statistics]:
    """The columns of the item table by name, and their statistics; its rows go to `spill`."""
    if key_column(dataset) is None:
        return {}, Statistics([], spill.folder, ids_given=True)
    table, ids_given = item_dataset(dataset), not dataset.rebuild_dataset
    scratch = spill.folder / SOURCE
    scratch.mkdir()
    statistics = Statistics(table.feature_cols, scratch, ids_given=ids_given)
    names = [column.name for column in table.feature_cols]
    if statistics.is_needed:
        for block in RawReader(table, ids_given=ids_given).blocks(files, names):
            spill.append(SOURCE, statistics.add(block, True, threads))
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
        elif name in statistics.interners:
            counts, distinct = statistics.interners[name].counts(1)
            vocabulary = Vocabulary.fit(
                counts, min_count=1, na_value="", remap=True, where=place, num_distinct=distinct
            )
            fitted.encoders[name] = statistics.interners[name].ids(vocabulary)
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
            fitted.scalers[name] = statistics.moments(name).shift_and_scale(column.normalizer)
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
    min_count = column.min_categr_count or dataset.min_categr_count
    counts, distinct = statistics.interners[column.name].counts(min_count)
    return Vocabulary.fit(
        counts,
        min_count=min_count,
        # FuxiCTR drops the token of missing values only when fill_na names it; the default of integers, 0, stays.
        na_value="" if column.fill_na is None else str(column.fill_na) if column.type == "sequence" else column.fill_na,
        remap=column.remap,
        where=place,
        num_distinct=distinct,
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


def _finish_sizes(fitted: Fitted, columns: list[FeatureColumn]) -> None:
    """Sizes, once sharing and pretrained keys have settled every vocabulary."""
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
    fitted.feature_map.refresh_counts()


def _make_encoders(
    fitted: Fitted, columns: list[FeatureColumn], interners: Mapping[str, Interner], encoders: dict[str, TokenIds]
) -> None:
    """What turns the codes of one table into ids."""
    for column in columns:
        if column.name not in interners or column.name in encoders:
            continue
        missing: Any = None
        if column.type == "sequence":
            missing = "" if column.fill_na is None else str(column.fill_na)
        elif column.type == "meta":  # a history
            missing = column.na_value
        encoders[column.name] = interners[column.name].ids(fitted.vocabularies[column.name], missing)


def num_cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
