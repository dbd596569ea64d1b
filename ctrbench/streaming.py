# SPDX-License-Identifier: Apache-2.0
"""A split that stays on disk: read ahead in the background, shuffled within a buffer, in the batches of `ctrbench.batches`.

An epoch takes the file in chunks of consecutive rows. Their order is drawn, as many as the buffer holds make a window, and
the rows of a window are drawn again. A buffer that covers the split is one window, whose order is that of resident data: the
same batches, row for row. Two windows are in memory, one that training reads and one that is being filled.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ctrbench.batches import Batch, Batches, epoch_generator, id_type
from ctrbench.errors import DataError
from ctrbench.features import FeatureMap
from ctrbench.forms import Columns, Form
from ctrbench.storage import SplitFile, open_split, stored_width

# Consecutive rows that are read at once and stay in one window: at most so many, and so many chunks in a window at least.
CHUNK_ROWS = 1 << 15
CHUNKS_PER_WINDOW = 32
# How long a thread waits before it looks whether it should stop.
_PATIENCE_SECONDS = 0.2


@dataclass(frozen=True)
class Window:
    """Rows that are in memory together.

    Attributes:
        chunks: the first row of each of its chunks, in the order in which they are read.
        num_rows: of all chunks.
        order: the order of its rows, (num_rows,); None for that in which they are read.
    """

    chunks: list[int]
    num_rows: int
    order: Tensor | None


@dataclass
class Buffer:
    """Memory for a window: ids (rows, columns) and reals (rows, columns) on the host."""

    ids: Tensor
    reals: Tensor


class StreamedBatches(Batches):
    """All rows of one split, of which two windows are in memory at a time.

    Args:
        path: an H5 split.
        feature_map: its columns.
        batch_size: rows of a batch; the last one of an epoch may be smaller and is kept.
        shuffle: draw a new order every epoch.
        seed: with the number of the epoch, this fixes the order.
        device: where the batches are wanted.
        labels_required: refuse a split without labels.
        form: what is made of the columns of a batch.
        buffer_rows: rows of a window.

    Raises:
        DataError: the file is missing or damaged or lacks a column.
    """

    def __init__(
        self,
        path: Path,
        feature_map: FeatureMap,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        labels_required: bool = True,
        form: Form = Columns(),  # noqa: B008 - frozen
        buffer_rows: int = 1 << 20,
    ):
        self.batch_size, self.shuffle, self.seed, self.form = batch_size, shuffle, seed, form
        self.epoch = self.first_batch = 0
        self.buffer_rows = buffer_rows
        self._chunk_rows = max(1, min(CHUNK_ROWS, buffer_rows // CHUNKS_PER_WINDOW))
        self._path, self._feature_map, self._device = path, feature_map, torch.device(device)
        with open_split(path, feature_map, labels_required=labels_required) as split:
            self.num_rows = split.num_rows
            names = [name for name in split.columns if name in feature_map.features or name in feature_map.labels]
            self._layout = {}
            widths = [0, 0]
            integers = []
            for name in sorted(names, key=lambda name: split.dtype(name).kind == "f"):  # ids first, as in resident data
                is_real = split.dtype(name).kind == "f"
                width = stored_width(feature_map.features[name]) if name in feature_map.features else None
                self._layout[name] = (is_real, widths[is_real], width)
                widths[is_real] += width or 1
                integers += [] if is_real else [name]
            self._id_type = id_type(largest(split, name) for name in integers if split.dtype(name).itemsize >= 4)
        self._num_ids, self._num_reals = widths

    @property
    def num_blocks(self) -> int:  # type: ignore[override]
        """Windows of an epoch."""
        return len(self._windows(self.epoch))

    def column(self, name: str) -> Tensor:
        with self._open() as split:
            column = self._buffer(0).reals if self._layout[name][0] else self._buffer(0).ids
            return torch.from_numpy(split.read(name).astype(column.numpy().dtype)).to(self._device)

    def plain_rows(self, numbers: Sequence[int]) -> Batch:
        wanted = [range(self.num_rows)[number] for number in numbers]
        buffer = self._buffer(len(wanted))
        with self._open() as split:
            for i, number in enumerate(wanted):
                self._fill(split, buffer, i, number, number + 1)
        return self._columns(buffer.ids.to(self._device), buffer.reals.to(self._device))

    def __iter__(self) -> Iterator[object]:
        first, self.first_batch = self.first_batch, 0
        skip = first * self.batch_size
        windows = self._windows(self.epoch)
        while windows and skip >= windows[0].num_rows:  # an epoch that goes on
            skip -= windows.pop(0).num_rows
        rest: list[tuple[Tensor, Tensor]] = []  # rows that wait for those of the next window
        for window, ids, reals in self._read_ahead(windows):
            order = window.order if window.order is None else window.order.to(ids.device)
            waiting = sum(len(part) for part, _ in rest)
            start, skip = skip, 0
            while start < window.num_rows:
                stop = min(start + self.batch_size - waiting, window.num_rows)
                rows = slice(start, stop) if order is None else order[start:stop]
                rest.append((_taken(ids, rows), _taken(reals, rows)))
                waiting += stop - start
                start = stop
                if waiting == self.batch_size:
                    yield self._batch(rest)
                    rest, waiting = [], 0
        if rest:
            yield self._batch(rest)
        self.epoch += 1

    def _batch(self, parts: list[tuple[Tensor, Tensor]]) -> object:
        ids, reals = (x[0] if len(parts) == 1 else torch.cat(x) for x in zip(*parts, strict=True))
        return self.form(self._columns(ids, reals))

    def _windows(self, epoch: int) -> list[Window]:
        generator = epoch_generator(self.seed, epoch)
        if self.buffer_rows >= self.num_rows:
            order = torch.randperm(self.num_rows, generator=generator) if self.shuffle else None
            return [Window(list(range(0, self.num_rows, self._chunk_rows)), self.num_rows, order)]
        chunks = list(range(0, self.num_rows, self._chunk_rows))
        if self.shuffle:
            chunks = [chunks[i] for i in torch.randperm(len(chunks), generator=generator).tolist()]
        at_once = self.buffer_rows // self._chunk_rows
        windows = []
        for first in range(0, len(chunks), at_once):
            part = chunks[first : first + at_once]
            num_rows = sum(min(self._chunk_rows, self.num_rows - start) for start in part)
            order = torch.randperm(num_rows, generator=generator) if self.shuffle else None
            windows.append(Window(part, num_rows, order))
        return windows

    def _read_ahead(self, windows: list[Window]) -> Iterator[tuple[Window, Tensor, Tensor]]:
        """Each window with its rows on the device, the next one being read meanwhile."""
        free: queue.Queue[Buffer] = queue.Queue()
        for _ in windows[:2]:
            free.put(self._buffer(max(window.num_rows for window in windows)))
        filled: queue.Queue[Buffer | BaseException] = queue.Queue()
        is_over = threading.Event()
        reader = threading.Thread(target=self._read, args=(windows, free, filled, is_over), daemon=True)
        reader.start()
        try:
            for window in windows:
                buffer = filled.get()
                if isinstance(buffer, BaseException):
                    raise buffer
                host = buffer.ids[: window.num_rows], buffer.reals[: window.num_rows]
                ids, reals = (x.to(self._device, non_blocking=True) for x in host)
                if self._device.type == "cuda":
                    torch.cuda.current_stream(self._device).synchronize()  # once a window: its buffer is free again
                    free.put(buffer)
                yield window, ids, reals
                if self._device.type != "cuda":
                    free.put(buffer)
        finally:
            is_over.set()
            reader.join()

    def _read(
        self,
        windows: list[Window],
        free: queue.Queue[Buffer],
        filled: queue.Queue[Buffer | BaseException],
        is_over: threading.Event,
    ) -> None:
        try:
            with self._open() as split:
                for window in windows:
                    while not is_over.is_set():
                        try:
                            buffer = free.get(timeout=_PATIENCE_SECONDS)
                            break
                        except queue.Empty:
                            continue
                    if is_over.is_set():
                        return
                    at = 0
                    for start in window.chunks:
                        stop = min(start + self._chunk_rows, self.num_rows)
                        self._fill(split, buffer, at, start, stop)
                        at += stop - start
                    filled.put(buffer)
        except BaseException as error:
            filled.put(error)

    def _fill(self, split: SplitFile, buffer: Buffer, at: int, start: int, stop: int) -> None:
        """Rows `start` to `stop` of the file into the rows of `buffer` from `at` on."""
        for name, (is_real, first, width) in self._layout.items():
            values = split.read(name, start, stop)
            if len(values) != stop - start:
                raise DataError(f"{self._path}: changed while it was read: build the dataset again")
            target = (buffer.reals if is_real else buffer.ids).numpy()
            target[at : at + stop - start, first : first + (width or 1)] = values.reshape(stop - start, -1)

    def _buffer(self, rows: int) -> Buffer:
        is_pinned = self._device.type == "cuda"
        return Buffer(
            torch.empty((rows, self._num_ids), dtype=self._id_type, pin_memory=is_pinned),
            torch.empty((rows, self._num_reals), dtype=torch.float32, pin_memory=is_pinned),
        )

    def _open(self) -> SplitFile:
        return open_split(self._path, self._feature_map, labels_required=False, verify=False)


def largest(split: SplitFile, name: str) -> int:
    """The largest absolute value of an integer column."""
    found = 0
    for start in range(0, split.num_rows, CHUNK_ROWS):
        found = max(found, int(np.abs(split.read(name, start, start + CHUNK_ROWS).astype(np.int64)).max()))
    return found


def _taken(rows: Tensor, which: slice | Tensor) -> Tensor:
    return rows[which].clone() if isinstance(which, slice) else rows.index_select(0, which)
