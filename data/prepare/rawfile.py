# SPDX-License-Identifier: Apache-2.0
"""A published Parquet file, read in blocks and checked value by value; every problem is one line with its place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from ctrbench.errors import DataError, did_you_mean

LARGEST = 2**31 - 1  # what Int32 holds
_MEANINGS = {"integer": "integers", "label": "0 and 1", "integers": "lists of integers", "numbers": "lists of numbers"}


@dataclass(frozen=True)
class Block:
    """Some rows of one file, the first of which is row `first` (from 0)."""

    file: RawFile
    first: int
    frame: pl.DataFrame

    def refuse(self, column: str, is_wrong: np.ndarray, expected: str, got: pl.Series | np.ndarray) -> None:
        """Raise for the first wrong row, if there is one."""
        if is_wrong.any():
            row = int(is_wrong.argmax())
            self.fail(column, row, f"expected {expected}, got {got[row]}")

    def fail(self, column: str, row: int, problem: str) -> None:
        """Raise for one row of this block."""
        raise DataError(
            f"{self.file.path}: row {self.first + row + 1:,}, column '{column}': {problem}: {self.file.again}"
        )

    def integers(self, column: str, least: int, most: int = LARGEST) -> np.ndarray:
        """A column of integers, none missing, all from `least` to `most`."""
        raw = self.frame[column]
        values = raw.cast(pl.Int64, strict=False)
        is_wrong = ~values.is_between(least, most).fill_null(False).to_numpy()
        self.refuse(column, is_wrong, f"an integer from {least} to {most:,}", raw)
        return values.to_numpy()

    def padded(self, column: str, width: int, most: int) -> np.ndarray:
        """A column of `width` ids from 0 to `most` in each row, with zeros on the left only."""
        ids = self._matrix(column, width, pl.Int64)
        is_out = (ids < 0) | (ids > most)
        if is_out.any():
            row, slot = np.argwhere(is_out)[0]
            got = self.frame[column][int(row)][int(slot)]
            self.fail(column, int(row), f"expected ids from 0 to {most:,}, got {got} at place {slot + 1}")
        is_gap = (ids[:, 1:] == 0) & (ids[:, :-1] != 0)
        if is_gap.any():
            row, slot = (int(i) for i in np.argwhere(is_gap)[0])
            places = f"{ids[row, slot]} at place {slot + 1} and 0 at place {slot + 2}"
            self.fail(column, row, f"expected zeros on the left only, got {places}")
        return ids

    def numbers(self, column: str, width: int) -> np.ndarray:
        """A column of `width` finite numbers in each row."""
        values = self._matrix(column, width, pl.Float64)
        is_wrong = ~np.isfinite(values)
        if is_wrong.any():
            row, slot = (int(i) for i in np.argwhere(is_wrong)[0])
            self.fail(column, row, f"expected finite numbers, got {self.frame[column][row][slot]} at place {slot + 1}")
        return values

    def _matrix(self, column: str, width: int, dtype: type[pl.DataType]) -> np.ndarray:
        """Lists of one width as a matrix; a missing entry becomes -1 or NaN."""
        lists = self.frame[column]
        lists = lists.arr.to_list() if isinstance(lists.dtype, pl.Array) else lists
        length = lists.list.len()
        self.refuse(column, (length != width).fill_null(True).to_numpy(), f"a list of {width}", _lengths(length))
        values = lists.explode(empty_as_null=False).cast(dtype, strict=False)
        filled = values.fill_null(-1 if dtype == pl.Int64 else float("nan"))
        return filled.to_numpy().reshape(-1, width)


@dataclass(frozen=True)
class RawFile:
    """One file and what to do when it is not as it should be (`again`)."""

    path: Path
    again: str

    def schema(self) -> dict[str, pl.DataType]:
        """Names and types of the columns."""
        try:
            return dict(pl.scan_parquet(self.path).collect_schema())
        except (pl.exceptions.PolarsError, OSError) as error:
            raise self._unreadable(error) from None

    def check_columns(self, columns: dict[str, str]) -> list[str]:
        """Check that these columns are there, of these kinds (`integer`, `integers`, `numbers` or `label`).

        Returns:
            The names of all other columns.
        """
        present = self.schema()
        for name, kind in columns.items():
            if name not in present:
                near = did_you_mean(name, present.keys() - columns.keys())
                expected = f"expected {', '.join(columns)}, got {', '.join(present)}"
                raise DataError(f"{self.path}: column '{name}' is missing{near}: {expected}: {self.again}")
            if not _fits(present[name], kind):
                expected = f"expected {_MEANINGS[kind]}, got the type {present[name]}"
                raise DataError(f"{self.path}: column '{name}': {expected}: {self.again}")
        return [name for name in present if name not in columns]

    def blocks(self, columns: list[str], rows: int) -> Iterator[Block]:
        """All rows in order, in blocks of about `rows`."""
        first = 0
        try:
            scan = pl.scan_parquet(self.path).select(columns)
            for frame in scan.collect_batches(chunk_size=rows, maintain_order=True):
                yield Block(self, first, frame)
                first += frame.height
        except (pl.exceptions.PolarsError, OSError) as error:
            raise self._unreadable(error) from None

    def read(self, columns: list[str], rows: int | None = None) -> Block:
        """All rows at once, or the first `rows`."""
        try:
            return Block(self, 0, pl.read_parquet(self.path, columns=columns, n_rows=rows))
        except (pl.exceptions.PolarsError, OSError) as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> DataError:
        reason = str(error).strip().partition("\n")[0]
        return DataError(f"{self.path}: not a readable Parquet file ({reason}): {self.again}")


def _fits(dtype: pl.DataType, kind: str) -> bool:
    is_list = isinstance(dtype, pl.List | pl.Array)
    if is_list != (kind in ("integers", "numbers")):
        return False
    inner = dtype.inner if is_list else dtype
    return bool(
        inner.is_integer()
        or (kind in ("numbers", "label") and inner.is_float())
        or (kind == "label" and inner == pl.Boolean)
    )


def _lengths(length: pl.Series) -> pl.Series:
    return pl.select(
        pl.when(length.is_null()).then(pl.lit("none")).otherwise(pl.format("one of {}", length))
    ).to_series()
