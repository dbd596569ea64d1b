# SPDX-License-Identifier: Apache-2.0
"""Encode the raw rows of every split with what was fitted and store them; a second thread writes."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import polars as pl

from ctrbench.counting import flat_tokens, tokens_of
from ctrbench.errors import DataError
from ctrbench.fitting import Fitted
from ctrbench.interning import Coded, TokenIds
from ctrbench.items import SOURCE, item_dataset, split_dataset, write_items
from ctrbench.rawdata import Block, RawReader
from ctrbench.schema import DatasetConfig, FeatureColumn
from ctrbench.sources import RawRows
from ctrbench.spill import CodedBlock, Spill
from ctrbench.splits import name_files, no_rows
from ctrbench.storage import SplitWriter, column_specs, smallest_int
from ctrbench.vocabulary import pad_sequences

Arrays = dict[str, np.ndarray]  # (n,) or (n, width) by column, of the rows of a block

_BLOCKS_IN_FLIGHT = 2  # encoded blocks that may wait for the writing thread


class SplitEncoder:
    """Turns blocks into the arrays of the files of one table.

    Args:
        dataset: the configuration of the table: `split_dataset` or `item_dataset`.
        fitted: complete.
        encoders: those of this table.
    """

    def __init__(self, dataset: DatasetConfig, fitted: Fitted, encoders: Mapping[str, TokenIds]):
        self._columns = [column for column in dataset.feature_cols if column.active]
        self._labels = [label.name for label in dataset.label_col]
        self._fitted, self._encoders = fitted, encoders

    def arrays(self, coded: CodedBlock) -> Arrays:
        """Arrays (n,) or (n, width) of the file's columns."""
        block = coded.block
        arrays: Arrays = {}
        for column in self._columns:
            name = column.name
            if name in coded.coded:
                arrays[name] = self._ids(column, coded.coded[name])
            elif name in self._fitted.histories:
                arrays[name] = self._given_history(column, block)
            elif column.type == "sequence":
                arrays[name] = self._given_sequence(column, block)
            elif column.type == "embedding":
                arrays[name] = self._vectors(column, block)
            elif column.type == "numeric":
                shift, scale = self._fitted.scalers.get(name, (0.0, 1.0))
                values = block.frame[name].cast(pl.Float64).to_numpy()
                arrays[name] = ((values - shift) / scale).astype(np.float32)
            else:
                arrays[name] = self._given_ids(column, block)
        for name in self._labels:
            if name in block.frame.columns:
                arrays[name] = block.frame[name].cast(pl.Float32).to_numpy()
        return arrays

    def _ids(self, column: FeatureColumn, coded: Coded) -> np.ndarray:
        ids = self._encoders[column.name].of(coded)
        return ids if coded.lengths is None else self._padded(column, ids, coded.lengths)

    def _padded(self, column: FeatureColumn, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        padding = "pre" if column.name in self._fitted.histories else column.padding
        return pad_sequences(ids, lengths, self._fitted.feature_map.features[column.name]["max_len"], padding)

    def _given_sequence(self, column: FeatureColumn, block: Block) -> np.ndarray:
        lists = block.frame.select(tokens_of(column, block.frame.schema[column.name])).to_series()
        flat, lengths = flat_tokens(lists)
        missing = flat == ("" if column.fill_na is None else str(column.fill_na))
        ids = flat.cast(pl.Int64, strict=False).set(missing, 0)
        rows = np.repeat(np.arange(len(lengths)), lengths)
        return self._padded(column, self._in_range(column, block, flat, ids, rows), lengths)

    def _given_history(self, column: FeatureColumn, block: Block) -> np.ndarray:
        """Item ids of a history, with the zeros that pad it on the left."""
        flat, lengths = flat_tokens(block.frame[column.name])
        width = self._fitted.feature_map.features[column.name]["max_len"]
        wrong = np.flatnonzero((lengths != 0) & ((lengths < width) | (lengths > width) & (column.max_len == 0)))
        if len(wrong):
            raise DataError(
                f"{block.place(int(wrong[0]), column.name)}: the history has {lengths[wrong[0]]} slots, "
                f"{'max_len is' if column.max_len else 'the longest has'} {width}: pad it with 0 on the left"
                f"{', or correct max_len' if column.max_len else ''}"
            )
        rows = np.repeat(np.arange(len(lengths)), lengths)
        return self._padded(column, self._in_range(column, block, flat, flat, rows), lengths)

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


def encoded_blocks(
    dataset: DatasetConfig, rows: RawRows, spill: Spill, fitted: Fitted
) -> Callable[[str], Iterator[Arrays]]:
    """What gives the encoded blocks of a source: from `spill` where counting has left them, otherwise from the raw rows."""
    encoder = SplitEncoder(split_dataset(dataset), fitted, fitted.encoders)

    def of(source: str) -> Iterator[Arrays]:
        coded = spill.blocks(source) if source in spill else map(CodedBlock, rows.blocks(source))
        return map(encoder.arrays, coded)

    return of


def write_splits(
    rows: RawRows, blocks: Callable[[str], Iterator[Arrays]], fitted: Fitted, folder: Path
) -> dict[str, int]:
    """Write `<split>.h5` of every split, without the features of the item table; returns their rows.

    A second thread writes while this one encodes; at most two blocks wait between them.

    Args:
        rows: the plan of the splits, and which of them have labels.
        blocks: gives the encoded blocks of a source, in order.
        fitted: complete.
        folder: of the dataset.
    """
    plan, num_rows = rows.plan, dict.fromkeys(rows.plan.splits, 0)
    for source in plan.sources:
        targets = ["train", *(s for s in plan.splits if s not in plan.sources)] if source == "train" else [source]
        start, first_row = time.perf_counter(), 0
        with ExitStack() as stack:
            has_labels = bool(rows.labels[source])
            specs = column_specs(fitted.feature_map, has_labels=has_labels, meta_sizes=fitted.meta_sizes)
            checksum = fitted.feature_map.content_hash()
            writers = {
                split: stack.enter_context(SplitWriter(folder / f"{split}.h5", specs, feature_map_hash=checksum))
                for split in targets
            }
            thread = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="split-writer"))
            waiting: deque[Future[None]] = deque()
            for arrays in blocks(source):
                length = len(next(iter(arrays.values())))
                parts = [(writers[s], mask) for s, mask in plan.parts(source, length, first_row)]
                waiting.append(thread.submit(_write, arrays, parts))
                while len(waiting) > _BLOCKS_IN_FLIGHT:
                    waiting.popleft().result()
                first_row += length
            for future in waiting:
                future.result()
        for split in targets:
            num_rows[split] = writers[split].num_rows
            logging.info("Build %s: %d rows in %.1f s", split, num_rows[split], time.perf_counter() - start)
    return num_rows


def encode_items(dataset: DatasetConfig, files: Sequence[Path], spill: Spill, fitted: Fitted, folder: Path) -> None:
    """Write items.h5 from the rows of `item_info`."""
    table = item_dataset(dataset)
    encoder, names = SplitEncoder(table, fitted, fitted.item_encoders), [c.name for c in table.feature_cols]
    if SOURCE in spill:
        blocks = [encoder.arrays(block) for block in spill.blocks(SOURCE)]
    else:
        reader = RawReader(table, ids_given=not dataset.rebuild_dataset)
        blocks = [encoder.arrays(CodedBlock(block)) for block in reader.blocks(files, names)]
    if not blocks:
        raise no_rows(files)
    columns = {name: np.concatenate([block[name] for block in blocks]) for name in names}
    write_items(folder, fitted.feature_map, columns, name_files(files))


def _write(arrays: Mapping[str, np.ndarray], parts: list[tuple[SplitWriter, np.ndarray | None]]) -> None:
    for writer, mask in parts:
        writer.append(arrays if mask is None else {name: values[mask] for name, values in arrays.items()})
