# SPDX-License-Identifier: Apache-2.0
"""Encode the raw rows of every split with what was fitted and store them; a second thread writes."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ctrbench.errors import DataError
from ctrbench.fitting import Fitted, tokens_of
from ctrbench.items import item_dataset, split_dataset, write_items
from ctrbench.rawdata import Block, RawReader
from ctrbench.schema import DatasetConfig, FeatureColumn
from ctrbench.splits import SplitPlan, name_files, no_rows
from ctrbench.storage import SplitWriter, column_specs, smallest_int
from ctrbench.vocabulary import pad_sequences

_BLOCKS_IN_FLIGHT = 2  # encoded blocks that may wait for the writing thread


class SplitEncoder:
    """Turns prepared blocks into the arrays of the split files."""

    def __init__(self, dataset: DatasetConfig, fitted: Fitted, task: str | Sequence[str]):
        self._columns = [column for column in dataset.feature_cols if column.active]
        self._labels = [label.name for label in dataset.label_col]
        self._fitted = fitted
        tasks = [task] * len(self._labels) if isinstance(task, str) else task
        self._binary = {n for n, t in zip(self._labels, tasks, strict=False) if t == "binary_classification"}
        # Made once: every new expression would copy the vocabularies that it casts to.
        encoders = fitted.encoders
        made = [c.name for c in self._columns if c.type in ("categorical", "meta") and c.name in encoders]
        plain = [name for name in made if name not in fitted.histories]
        self._plain_codes = [encoders[name].codes(pl.col(name)).alias(name) for name in plain]

    def check_labels(self, block: Block) -> None:
        """Refuse a label that is missing or, in a binary task, neither 0 nor 1."""
        for name in self._labels:
            if name not in block.frame.columns:
                continue
            values = block.frame[name]
            if values.null_count():
                row = values.is_null().arg_true()[0]
                raise DataError(
                    f"{block.place(row, name)}: the label is missing: correct the row or give the label fill_na"
                )
            if name in self._binary and (rows := (~((values == 0) | (values == 1))).arg_true()).len():
                raise DataError(
                    f"{block.place(rows[0], name)}: {values[rows[0]]:g} is not a binary label (0 or 1): "
                    "correct the data, or set task: regression"
                )

    def codes(self, block: Block) -> dict[str, Any]:
        """The part of encoding that polars does, in parallel over columns; `arrays` completes it."""
        frame = block.frame
        coded = frame.select(self._plain_codes)
        result: dict[str, Any] = {name: coded[name] for name in coded.columns}
        for column in self._columns:
            if column.name in result:
                continue
            if column.name in self._fitted.histories:
                result[column.name] = self._history_codes(column, block)
            elif column.type == "sequence":
                result[column.name] = self._sequence_codes(column, block)
            elif column.type == "embedding":
                result[column.name] = self._vectors(column, block)
            elif column.type == "numeric":
                result[column.name] = frame[column.name].cast(pl.Float64)
            else:
                result[column.name] = self._given_ids(column, block)
        for name in self._labels:
            if name in frame.columns:
                result[name] = frame[name].cast(pl.Float32).to_numpy()
        return result

    def arrays(self, codes: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Arrays (n,) or (n, width) of the split file's columns from `codes`; numpy only, for the writing thread."""
        arrays = {}
        for name, value in codes.items():
            if isinstance(value, tuple):  # a sequence or a history: codes, which of them are missing, lengths
                flat, missing, lengths = value
                arrays[name] = self._padded(name, flat, missing, lengths)
            elif name in self._fitted.encoders:
                arrays[name] = self._fitted.encoders[name].ids(value)
            elif isinstance(value, pl.Series):
                shift, scale = self._fitted.scalers.get(name, (0.0, 1.0))
                arrays[name] = ((value.to_numpy() - shift) / scale).astype(np.float32)
            else:
                arrays[name] = value
        return arrays

    def _padded(self, name: str, flat: Any, missing: np.ndarray | None, lengths: np.ndarray) -> np.ndarray:
        ids = flat if isinstance(flat, np.ndarray) else self._fitted.encoders[name].ids(flat)
        if missing is not None:
            ids[missing] = 0
        padding = next(column.padding for column in self._columns if column.name == name)
        padding = "pre" if name in self._fitted.histories else padding
        return pad_sequences(ids, lengths, self._fitted.feature_map.features[name]["max_len"], padding)

    def _sequence_codes(self, column: FeatureColumn, block: Block) -> tuple[Any, np.ndarray | None, np.ndarray]:
        lists = block.frame.select(tokens_of(column, block.frame.schema[column.name])).to_series()
        lengths = lists.list.len().to_numpy().astype(np.int64)
        flat = lists.filter(lists.list.len() > 0).explode().rename("token")
        na_value = "" if column.fill_na is None else str(column.fill_na)
        missing = (flat == na_value).to_numpy()
        if column.name not in self._fitted.encoders:
            ids = flat.cast(pl.Int64, strict=False)
            rows = np.repeat(np.arange(len(lengths)), lengths)
            ids = ids.set(pl.Series(missing), 0)
            return self._in_range(column, block, flat, ids, rows), None, lengths
        codes = flat.to_frame().select(self._fitted.encoders[column.name].codes(pl.col("token"))).to_series()
        return codes, missing if missing.any() else None, lengths

    def _history_codes(self, column: FeatureColumn, block: Block) -> tuple[Any, np.ndarray | None, np.ndarray]:
        """Item ids of a history; where ids are given, with the zeros that pad it on the left."""
        lists = block.frame[column.name]
        lengths = lists.list.len().to_numpy().astype(np.int64)
        flat = lists.filter(lists.list.len() > 0).explode().rename("token")
        if column.name in self._fitted.encoders:
            missing = (flat == column.na_value).to_numpy()
            codes = flat.to_frame().select(self._fitted.encoders[column.name].codes(pl.col("token"))).to_series()
            return codes, missing if missing.any() else None, lengths
        width = self._fitted.feature_map.features[column.name]["max_len"]
        wrong = np.flatnonzero((lengths != 0) & ((lengths < width) | (lengths > width) & (column.max_len == 0)))
        if len(wrong):
            raise DataError(
                f"{block.place(int(wrong[0]), column.name)}: the history has {lengths[wrong[0]]} slots, "
                f"{'max_len is' if column.max_len else 'the longest has'} {width}: pad it with 0 on the left"
                f"{', or correct max_len' if column.max_len else ''}"
            )
        rows = np.repeat(np.arange(len(lengths)), lengths)
        return self._in_range(column, block, flat, flat, rows), None, lengths

    def _given_ids(self, column: FeatureColumn, block: Block) -> np.ndarray:
        """Ids that the data holds already."""
        values = block.frame[column.name]
        if column.type == "meta":
            ids = values.cast(pl.Int64, strict=False)
            if (rows := ids.is_null().arg_true()).len():
                raise DataError(
                    f"{block.place(rows[0], column.name)}: {values[rows[0]]!r} is not an integer id: set remap: true "
                    "and rebuild_dataset: true to have ids made"
                )
            return np.asarray(ids.to_numpy())
        return self._in_range(column, block, values, values, np.arange(len(values)))

    def _in_range(
        self, column: FeatureColumn, block: Block, values: pl.Series, ids: pl.Series, rows: np.ndarray
    ) -> np.ndarray:
        size = self._fitted.vocabularies[column.name].size
        bad = (ids.is_null() | (ids < 0) | (ids >= size)).arg_true()
        if len(bad):
            raise DataError(
                f"{block.place(int(rows[bad[0]]), column.name)}: {values[bad[0]]!r} is not an id from 0 to {size - 1} "
                f"(vocab_size {size}): correct vocab_size, or set rebuild_dataset: true to have ids made"
            )
        return np.asarray(ids.to_numpy().astype(smallest_int(size)))

    def _vectors(self, column: FeatureColumn, block: Block) -> np.ndarray:
        """(n, pretrain_dim) float32; a missing vector is zero."""
        width = self._fitted.feature_map.features[column.name]["pretrain_dim"]
        lists = block.frame[column.name]
        lengths = lists.list.len().to_numpy()
        wrong = np.flatnonzero((lengths != 0) & (lengths != width))
        if len(wrong):
            raise DataError(
                f"{block.place(int(wrong[0]), column.name)}: the vector has {lengths[wrong[0]]} numbers, "
                f"pretrain_dim is {width}: correct the data or pretrain_dim"
            )
        flat = lists.filter(pl.Series(lengths > 0)).explode()
        filled = np.flatnonzero(lengths > 0)
        broken = (flat.is_null() | ~flat.is_finite()).arg_true()
        if len(broken):
            row = int(filled[broken[0] // width])
            raise DataError(f"{block.place(row, column.name)}: the vector holds a value that is not a finite number")
        vectors = np.zeros((len(lengths), width), np.float32)
        vectors[filled] = flat.to_numpy().reshape(-1, width)
        return vectors


def encode(
    dataset: DatasetConfig, reader: RawReader, plan: SplitPlan, fitted: Fitted, folder: Path, task: str | Sequence[str]
) -> dict[str, int]:
    """Write `<split>.h5` of every split, without the features of the item table; returns their rows.

    A second thread writes while this one reads and encodes; at most two blocks wait between them.
    """
    dataset = split_dataset(dataset)
    encoder, num_rows = SplitEncoder(dataset, fitted, task), dict.fromkeys(plan.splits, 0)
    features = [column.name for column in dataset.feature_cols if column.active]
    for source, files in plan.sources.items():
        labels = _labels_present(dataset, reader, source, files)
        targets = ["train", *(s for s in plan.splits if s not in plan.sources)] if source == "train" else [source]
        start, first_row = time.perf_counter(), 0
        with ExitStack() as stack:
            specs = column_specs(fitted.feature_map, has_labels=bool(labels), meta_sizes=fitted.meta_sizes)
            checksum = fitted.feature_map.content_hash()
            writers = {
                split: stack.enter_context(SplitWriter(folder / f"{split}.h5", specs, feature_map_hash=checksum))
                for split in targets
            }
            thread = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="split-writer"))
            waiting: deque[Future[None]] = deque()
            for block in reader.blocks(files, features + labels):
                encoder.check_labels(block)
                parts = [(writers[s], mask) for s, mask in plan.parts(source, block.frame.height, first_row)]
                waiting.append(thread.submit(_write, encoder, encoder.codes(block), parts))
                while len(waiting) > _BLOCKS_IN_FLIGHT:
                    waiting.popleft().result()
                first_row += block.frame.height
            for future in waiting:
                future.result()
            if not first_row:
                raise no_rows(files)
        for split in targets:
            num_rows[split] = writers[split].num_rows
            logging.info("Build %s: %d rows in %.1f s", split, num_rows[split], time.perf_counter() - start)
    return num_rows


def encode_items(dataset: DatasetConfig, files: Sequence[Path], fitted: Fitted, folder: Path) -> None:
    """Write items.h5 from the rows of `item_info`."""
    table = item_dataset(dataset)
    encoder, names = SplitEncoder(table, fitted, ""), [column.name for column in table.feature_cols]
    reader = RawReader(table, ids_given=not dataset.rebuild_dataset)
    blocks = [encoder.arrays(encoder.codes(block)) for block in reader.blocks(files, names)]
    if not blocks:
        raise no_rows(files)
    columns = {name: np.concatenate([block[name] for block in blocks]) for name in names}
    write_items(folder, fitted.feature_map, columns, name_files(files))


def _write(encoder: SplitEncoder, codes: Mapping[str, Any], parts: list[tuple[SplitWriter, np.ndarray | None]]) -> None:
    arrays = encoder.arrays(codes)
    for writer, mask in parts:
        writer.append(arrays if mask is None else {name: values[mask] for name, values in arrays.items()})


def _labels_present(dataset: DatasetConfig, reader: RawReader, source: str, files: list[Path]) -> list[str]:
    """Label columns to read: all, or none where the test split has none."""
    labels = [label.name for label in dataset.label_col]
    if source == "test" and any(reader.missing(file, labels) for file in files):
        logging.warning("%s has no label column: it can be predicted but not evaluated", name_files(files))
        return []
    return labels
