# SPDX-License-Identifier: Apache-2.0
"""Encoded splits in FuxiCTR's forms (H5, Parquet, npz; one file or a folder of blocks), read block by block.

All three hold one array per column, (N,) or (N, width), under the column's name, in any order. Reading takes a block of
rows of the wanted columns at a time, also from a compressed npz file. Nothing is ever unpickled.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
import polars as pl

from ctrbench.errors import DataError, did_you_mean

FORMATS = ("h5", "parquet", "npz")
BLOCK_ROWS = 1 << 16
_PLAIN_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, EOFError)
_READ_ERRORS: tuple[type[Exception], ...] = (*_PLAIN_ERRORS, zipfile.BadZipFile, pl.exceptions.PolarsError)


@dataclass(frozen=True)
class EncodedBlock:
    """Consecutive rows of one file: columns (n,) or (n, width). Row numbers in messages count from 1."""

    columns: dict[str, np.ndarray]
    file: Path
    first_row: int

    def place(self, offset: int, column: str) -> str:
        """`file: row R, column 'x'` of the row at `offset` in this block."""
        return f"{self.file}: row {self.first_row + offset + 1}, column '{column}'"


class EncodedSplit:
    """One split: a file, or the blocks of a folder in the order of their numbers.

    Args:
        files: from `encoded_files`.

    Attributes:
        columns: names that every file has.
        num_rows: of all files.

    Raises:
        DataError: a file is no such file, or its columns have different lengths.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)
        found = [_guarded(file, _READERS[file.suffix[1:]][0], file) for file in self.files]
        self.columns = [name for name in found[0] if all(name in rows for rows in found)]
        if not self.columns:
            raise DataError(f"{self.files[0]}: it holds no column: export or build it again")
        self.num_rows = 0
        for file, rows in zip(self.files, found, strict=True):
            counts = {rows[name] for name in self.columns}
            if len(counts) != 1:
                raise DataError(f"{file}: its columns have different numbers of rows: export or build it again")
            self.num_rows += counts.pop()

    def check_has(self, names: Sequence[str], remedy: str) -> None:
        """Raise DataError for the first of `names` that a file lacks."""
        for name in names:
            if name not in self.columns:
                hint = did_you_mean(name, self.columns)
                raise DataError(f"{self.files[0]}: column '{name}' is missing{hint}: {remedy}")

    def blocks(self, names: Sequence[str], rows: int = BLOCK_ROWS) -> Iterator[EncodedBlock]:
        """The columns `names` of all rows in order, about `rows` at a time.

        Raises:
            DataError: a damaged file, a missing value, or a column that holds neither numbers nor lists of one length.
        """
        for file in self.files:
            read = _READERS[file.suffix[1:]][1](file, list(names), rows)
            first = 0
            while (columns := _guarded(file, lambda reading: next(reading, None), read)) is not None:
                block = EncodedBlock({n: _numbers(file, n, columns[n], first) for n in names}, file, first)
                yield block
                first += len(block.columns[names[0]])


def encoded_files(path: Path, data_format: str) -> list[Path]:
    """`path` itself, or the blocks of the folder `path`, part_2 before part_10.

    Raises:
        DataError: there is nothing of that format.
    """
    if path.is_dir():
        files = sorted(path.glob(f"*.{data_format}"), key=_natural)
        if not files:
            raise DataError(f"{path}: the folder holds no *.{data_format} file")
        return files
    if path.suffix != f".{data_format}":
        raise DataError(f"{path}: must end in .{data_format}, as data_format is {data_format}")
    return [path]


def _natural(path: Path) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _guarded(file: Path, action: Callable[[Any], Any], argument: Any) -> Any:
    """`action(argument)` with what the libraries raise turned into one line that names the file."""
    try:
        return action(argument)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{file}: no such file: correct the path in dataset_config") from None
    except _READ_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        kind = {"h5": "an H5", "parquet": "a Parquet", "npz": "an npz"}[file.suffix[1:]]
        raise DataError(f"{file}: damaged, or not {kind} file ({reason}): copy or export it again") from None


def _numbers(file: Path, name: str, values: np.ndarray | pl.Series, first_row: int) -> np.ndarray:
    if isinstance(values, pl.Series):
        values = _from_series(file, name, values, first_row)
    if values.dtype.kind not in "biuf" or values.ndim > 2:
        raise DataError(f"{file}: column '{name}' holds {_kind(values)}, not ids or numbers: it is not encoded data")
    return values.astype(np.uint8) if values.dtype.kind == "b" else values


def _kind(values: np.ndarray) -> str:
    return f"arrays of {values.ndim - 1} dimensions" if values.dtype.kind in "biuf" else str(values.dtype)


def _from_series(file: Path, name: str, series: pl.Series, first_row: int) -> np.ndarray:
    """(n,) or, of lists of one length, (n, width)."""

    def place(row: int) -> str:
        return f"{file}: row {first_row + row + 1}, column '{name}'"

    if isinstance(series.dtype, pl.BaseExtension):  # Ray writes arrays as an extension type around lists
        series = series.ext.storage()
    if isinstance(series.dtype, pl.Array):
        series = series.arr.to_list()
    if series.null_count():
        raise DataError(f"{place(series.is_null().arg_true()[0])}: the value is missing: encoded data has none")
    if not isinstance(series.dtype, pl.List):
        if not (series.dtype.is_numeric() or series.dtype == pl.Boolean):
            raise DataError(f"{file}: column '{name}' holds {series.dtype}, not ids or numbers: it is not encoded data")
        return np.asarray(series.to_numpy())
    lengths = series.list.len().to_numpy()
    wrong = np.flatnonzero(lengths != lengths[0])
    if len(wrong) or not lengths[0]:
        row = int(wrong[0]) if len(wrong) else 0
        raise DataError(
            f"{place(row)}: a list of {lengths[row]} values where the first row has {lengths[0]}: "
            "encoded sequences are padded to one length"
        )
    flat = series.explode()
    if flat.null_count():
        row = int(flat.is_null().arg_true()[0]) // int(lengths[0])
        raise DataError(f"{place(row)}: a value of the list is missing: encoded data has none")
    return np.asarray(flat.to_numpy()).reshape(len(lengths), -1)


# --- the formats: rows by column, and blocks


def _h5_rows(path: Path) -> dict[str, int]:
    with h5py.File(path, "r") as file:
        return {name: len(column) for name, column in file.items() if isinstance(column, h5py.Dataset)}


def _h5_blocks(path: Path, names: list[str], rows: int) -> Iterator[dict[str, np.ndarray]]:
    with h5py.File(path, "r") as file:
        for start in range(0, len(file[names[0]]), rows):
            yield {name: np.asarray(file[name][start : start + rows]) for name in names}


def _parquet_rows(path: Path) -> dict[str, int]:
    scan = pl.scan_parquet(path)
    count = int(scan.select(pl.len()).collect().item())
    return dict.fromkeys(scan.collect_schema().names(), count)


def _parquet_blocks(path: Path, names: list[str], rows: int) -> Iterator[dict[str, pl.Series]]:
    scan = pl.scan_parquet(path).select(names)
    for frame in scan.collect_batches(chunk_size=rows, maintain_order=True):
        if frame.height:
            yield {name: frame[name] for name in names}


def _npz_rows(path: Path) -> dict[str, int]:
    found = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            with archive.open(member) as stream:
                found[member.removesuffix(".npy")] = _npy_header(stream)[0][0]
    return found


def _npz_blocks(path: Path, names: list[str], rows: int) -> Iterator[dict[str, np.ndarray]]:
    with ExitStack() as stack:
        archive = stack.enter_context(zipfile.ZipFile(path))
        columns = {name: _NpyColumn(stack.enter_context(archive.open(f"{name}.npy"))) for name in names}
        while block := {name: column.read(rows) for name, column in columns.items()}:
            if not len(block[names[0]]):
                return
            yield block


class _NpyColumn:
    """One array of an npz file, read row by row as the archive is unpacked."""

    def __init__(self, stream: IO[bytes]):
        self._stream = stream
        (self._left, *tail), is_fortran, self._dtype = _npy_header(stream)
        self._tail = tuple(tail)
        self._whole: np.ndarray | None = None
        if is_fortran and tail:  # column after column: rows are there only once all is read
            flat = np.frombuffer(stream.read(), self._dtype)
            self._whole = flat.reshape((*reversed(self._tail), self._left)).T

    def read(self, rows: int) -> np.ndarray:
        """The next `rows` rows, fewer at the end."""
        rows = min(rows, self._left)
        self._left -= rows
        if self._whole is not None:
            block, self._whole = self._whole[:rows], self._whole[rows:]
            return block
        size = rows * self._dtype.itemsize * int(np.prod(self._tail, dtype=np.int64))
        content = self._stream.read(size)
        if len(content) != size or (not self._left and self._stream.read(1)):  # the end checks the archive's CRC
            raise EOFError("an array has another size than its header says")
        return np.frombuffer(content, self._dtype).reshape(rows, *self._tail)


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"an array of format {version}")
    shape, is_fortran, dtype = readers[version](stream)
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which are never loaded")
    if not shape:
        raise ValueError("an array without rows")
    return shape, is_fortran, dtype


_READERS: dict[str, tuple[Callable[[Path], dict[str, int]], Callable[[Path, list[str], int], Iterator[Any]]]] = {
    "h5": (_h5_rows, _h5_blocks),
    "parquet": (_parquet_rows, _parquet_blocks),
    "npz": (_npz_rows, _npz_blocks),
}
