# SPDX-License-Identifier: Apache-2.0
"""Which raw rows make up the training, validation and test splits."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ctrbench.errors import DataError
from ctrbench.rawdata import RawReader
from ctrbench.schema import DatasetConfig

SPLITS = ("train", "valid", "test")


@dataclass
class SplitPlan:
    """Which raw rows make up which split.

    Attributes:
        sources: raw files by the key that names them (train, valid, test).
        assignment: index into SPLITS of each row of the train files, when valid or test rows are cut out of them.
    """

    sources: dict[str, list[Path]]
    assignment: np.ndarray | None = None

    @property
    def splits(self) -> list[str]:
        """Splits that will exist."""
        cut = set() if self.assignment is None else {SPLITS[i] for i in np.unique(self.assignment)}
        return [split for split in SPLITS if split in self.sources or split in cut]

    def parts(self, source: str, num_rows: int, first_row: int) -> Iterator[tuple[str, np.ndarray | None]]:
        """The splits that `num_rows` rows from `first_row` of `source` on belong to, each with a mask (None: all)."""
        if source != "train" or self.assignment is None:
            yield source, None
            return
        codes = self.assignment[first_row : first_row + num_rows]
        for code, split in enumerate(SPLITS):
            mask = codes == code
            if mask.any():
                yield split, mask


def plan_splits(dataset: DatasetConfig, reader: RawReader, sources: dict[str, list[Path]]) -> SplitPlan:
    """Cut validation and test rows out of the training rows where valid_size and test_size ask for it."""
    plan = SplitPlan(sources)
    if not (dataset.valid_size or dataset.test_size):
        return plan
    total = sum(reader.count_rows(sources["train"]))
    if dataset.n_rows is not None and len(sources["train"]) == 1:
        total = min(total, dataset.n_rows)
    if not total:
        raise no_rows(sources["train"])
    num_test, num_valid = (_num_rows(size, total) for size in (dataset.test_size, dataset.valid_size))
    num_train = total - num_test - num_valid
    if num_train < 1 or (dataset.test_size and not num_test) or (dataset.valid_size and not num_valid):
        raise DataError(
            f"{sources['train'][0]}: {total} rows cannot give {num_valid} rows of validation and {num_test} of test "
            "and leave some to train on: change valid_size and test_size"
        )
    order = np.arange(total)
    if dataset.split_type == "random":
        np.random.default_rng(dataset.split_seed).shuffle(order)
    # As FuxiCTR cuts: the last rows are the test split, those before them the validation split.
    plan.assignment = np.zeros(total, np.uint8)
    plan.assignment[order[num_train : num_train + num_valid]] = SPLITS.index("valid")
    plan.assignment[order[num_train + num_valid :]] = SPLITS.index("test")
    return plan


def _num_rows(size: float, total: int) -> int:
    return int(total * size) if size < 1 else int(size)


def no_rows(files: Collection[Path]) -> DataError:
    """The error for a split without a data row."""
    return DataError(f"{name_files(files)}: no rows: the split is empty; prepare the data again")


def name_files(files: Collection[Path]) -> str:
    first = next(iter(files))
    return str(first) if len(files) == 1 else f"{first} and {len(files) - 1} more"
