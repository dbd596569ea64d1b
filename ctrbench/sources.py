# SPDX-License-Identifier: Apache-2.0
"""The raw rows of a build: prepared blocks of every source with checked labels, read ahead by a thread."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ctrbench.errors import DataError
from ctrbench.items import split_dataset
from ctrbench.rawdata import Block, RawReader
from ctrbench.schema import DatasetConfig
from ctrbench.splits import SplitPlan, name_files, no_rows

T = TypeVar("T")


class RawRows:
    """The rows of all sources (the files of train, valid and test).

    Args:
        dataset: its configuration.
        reader: of its files.
        plan: which rows make up which split.
        task: binary_classification demands labels 0 and 1; a list has one task for each label.
        labels: label columns by source where they are known: these are then some of the rows of each source, or none.

    Attributes:
        labels: label columns by source: all, or none where the test split has none.
    """

    def __init__(
        self,
        dataset: DatasetConfig,
        reader: RawReader,
        plan: SplitPlan,
        task: str | Sequence[str],
        labels: Mapping[str, list[str]] | None = None,
    ):
        self.reader, self.plan = reader, plan
        self._features = [column.name for column in split_dataset(dataset).feature_cols if column.active]
        names = [label.name for label in dataset.label_col]
        tasks = [task] * len(names) if isinstance(task, str) else task
        self._binary = {name for name, t in zip(names, tasks, strict=False) if t == "binary_classification"}
        self._may_be_empty = labels is not None
        self.labels = labels or {source: self._labels_present(source, names) for source in plan.sources}

    def blocks(self, source: str) -> Iterator[Block]:
        """The prepared blocks of a source.

        Raises:
            DataError: a file cannot be read, holds a value that does not fit, or there is no row.
        """
        files, labels, is_empty = self.plan.sources[source], self.labels[source], not self._may_be_empty
        for block in ahead(self.reader.blocks(files, self._features + labels)):
            _check_labels(block, labels, self._binary)
            yield block
            is_empty = False
        if is_empty:
            raise no_rows(files)

    def _labels_present(self, source: str, labels: list[str]) -> list[str]:
        files = self.plan.sources[source]
        if source == "test" and any(self.reader.missing(file, labels) for file in files):
            logging.warning("%s has no label column: it can be predicted but not evaluated", name_files(files))
            return []
        return labels


def ahead(values: Iterator[T]) -> Iterator[T]:
    """The values of an iterator, of which a thread makes the next one while one is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as thread:
        waiting = thread.submit(next, values, None)
        while (value := waiting.result()) is not None:
            waiting = thread.submit(next, values, None)
            yield value


def _check_labels(block: Block, labels: Collection[str], binary: Collection[str]) -> None:
    """Refuse a label that is missing or, in a binary task, neither 0 nor 1."""
    for name in labels:
        values = block.frame[name]
        if values.null_count():
            row = values.is_null().arg_true()[0]
            raise DataError(
                f"{block.place(row, name)}: the label is missing: correct the row or give the label fill_na"
            )
        if name in binary and (rows := (~((values == 0) | (values == 1))).arg_true()).len():
            raise DataError(
                f"{block.place(rows[0], name)}: {values[rows[0]]:g} is not a binary label (0 or 1): "
                "correct the data, or set task: regression"
            )
