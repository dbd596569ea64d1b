# SPDX-License-Identifier: Apache-2.0
"""Which row belongs to which part of a random split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def stratified_folds(labels: np.ndarray, num_folds: int = 10, seed: int = 2018) -> np.ndarray:
    """The fold of each row, as StratifiedKFold(shuffle=True) of scikit-learn 0.19.1 made them; later versions differ.

    For each class on its own, the numbers 0 .. count - 1 are shuffled by a fresh generator of the same seed and cut into
    `num_folds` runs, of which the first count % num_folds are one longer.

    Args:
        labels: (n,) classes.

    Returns:
        (n,) uint8.
    """
    folds = np.empty(len(labels), np.uint8)
    for label in np.unique(labels):
        is_member = labels == label
        count = int(is_member.sum())
        order = np.arange(count, dtype=np.uint32)
        np.random.RandomState(seed).shuffle(order)
        sizes = np.full(num_folds, count // num_folds)
        sizes[: count % num_folds] += 1
        of_class = np.empty(count, np.uint8)
        of_class[order] = np.repeat(np.arange(num_folds, dtype=np.uint8), sizes)
        folds[is_member] = of_class
    return folds


def random_cuts(num_rows: int, seed: int) -> np.ndarray:
    """0 (train), 1 (valid) or 2 (test) for each row: 8:1:1 at random, with cuts at int(0.8 n) and int(0.9 n).

    One byte per row is all the memory that it takes.

    Returns:
        (num_rows,) uint8.
    """
    cuts = eighty_ten_ten(num_rows)
    split = np.repeat(np.arange(3, dtype=np.uint8), np.diff(cuts))
    np.random.RandomState(seed).shuffle(split)
    return split


def eighty_ten_ten(num_rows: int) -> Sequence[int]:
    """0, int(0.8 n), int(0.9 n), n."""
    return [0, int(0.8 * num_rows), int(0.9 * num_rows), num_rows]
