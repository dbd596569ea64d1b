# SPDX-License-Identifier: Apache-2.0
"""item_emb_d128 of MicroLens_1M_x1 from the raw vectors of item_feature.parquet: a PCA of BERT and CLIP side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
from rawfile import RawFile
from scipy.linalg import eigh

from ctrbench.errors import DataError

COMPONENTS, BLOCK_ROWS = 128, 4096
SOURCES = {"BERT": 768, "CLIP": 1024}


@dataclass(frozen=True)
class Pca:
    """Embeddings (I, 128), row 0 all zeros; the share of the variance they keep; the columns that they come from."""

    embeddings: np.ndarray
    explained_variance: float
    columns: list[str]


def rebuild(file: RawFile, num_items: int) -> Pca:
    """The first 128 principal components of the centred vectors x = [BERT (768), CLIP (1024)] of items 1..I-1.

    With m the mean and C = sum (x - m)(x - m)^T = U diag(s) U^T, s descending, an item gets U[:, :128]^T (x - m). The
    entry of largest size in each column of U is made positive, so that the same file gives the same signs everywhere.
    C (1792, 1792) adds up in float64 over blocks of rows; the file is read twice. Item 0 need not be in the file.

    Raises:
        DataError: the file lacks an item or a column of either width, or holds values that are not finite.
    """
    columns = _raw_columns(file)
    file.check_columns({"item_id": "integer"} | dict.fromkeys(columns, "numbers"))
    width = sum(SOURCES.values())
    total, product, is_known = np.zeros(width), np.zeros((width, width)), np.zeros(num_items, bool)
    for ids, vectors in _vectors(file, columns, num_items, is_known):
        kept = vectors[ids > 0]
        total += kept.sum(0)
        product += kept.T @ kept
    if len(missing := np.flatnonzero(~is_known[1:]) + 1):
        raise DataError(f"{file.path}: item {missing[0]} is missing ({len(missing):,} items in all): {file.again}")
    if num_items <= COMPONENTS + 1:
        raise DataError(
            f"{file.path}: {COMPONENTS} components need more than {COMPONENTS} items, got {num_items - 1}: "
            "leave out --rebuild-embeddings"
        )
    mean = total / (num_items - 1)
    covariance = product / (num_items - 1) - np.outer(mean, mean)
    size, vector = eigh(covariance, subset_by_index=(width - COMPONENTS, width - 1))
    size, vector = size[::-1], vector[:, ::-1]
    vector = vector * np.sign(vector[np.abs(vector).argmax(0), np.arange(COMPONENTS)])
    embeddings = np.zeros((num_items, COMPONENTS), np.float32)
    for ids, vectors in _vectors(file, columns, num_items, np.zeros(num_items, bool)):
        embeddings[ids] = (vectors - mean) @ vector
    embeddings[0] = 0
    return Pca(embeddings, float(size.sum() / np.trace(covariance)), columns)


def _vectors(
    file: RawFile, columns: list[str], num_items: int, is_known: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids and vectors (n, 1792) block by block; marks the ids in `is_known`."""
    for block in file.blocks(["item_id", *columns], BLOCK_ROWS):
        ids = block.integers("item_id", 0, num_items - 1)
        is_repeated = is_known[ids] | ~block.frame["item_id"].is_first_distinct().to_numpy()
        block.refuse("item_id", is_repeated, "an id that no earlier row has", ids)
        is_known[ids] = True
        yield (
            ids,
            np.hstack([block.numbers(name, width) for name, width in zip(columns, SOURCES.values(), strict=True)]),
        )


def _raw_columns(file: RawFile) -> list[str]:
    """The names of the 768-wide and the 1024-wide column, told by the first row: only the widths are known for sure."""
    schema = file.schema()
    lists = [name for name, dtype in schema.items() if isinstance(dtype, pl.List | pl.Array) and dtype.inner.is_float()]
    first = file.read(lists, rows=1).frame.cast(pl.List(pl.Float64)) if lists else pl.DataFrame()
    widths = {name: first[name].list.len().sum() for name in lists}
    columns = []
    for source, width in SOURCES.items():
        names = [name for name, found in widths.items() if found == width]
        if len(names) != 1:
            found = ", ".join(f"{name} ({width})" for name, width in widths.items()) or "none"
            raise DataError(
                f"{file.path}: expected one column with lists of {width} numbers ({source}), got {len(names)}; "
                f"the columns with lists of numbers: {found}: {file.again}"
            )
        columns += names
    return columns
