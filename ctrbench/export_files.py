# SPDX-License-Identifier: Apache-2.0
"""Writers of encoded columns in FuxiCTR's forms. Memory holds a block of rows, however long the split is."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Protocol

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctrbench.storage import ColumnSpec

_COPY_BYTES = 1 << 20


class Writer(Protocol):
    """Takes the rows of one file block by block; the file is complete when `close` returns."""

    def append(self, columns: Mapping[str, np.ndarray]) -> None:
        """Add rows, (n,) or (n, width) by column."""

    def close(self) -> None:
        """Write what is left."""


class H5Writer:
    """FuxiCTR 2.0: one contiguous dataset per column at the root, without attributes."""

    def __init__(self, path: Path, specs: Sequence[ColumnSpec], num_rows: int):
        self._file = h5py.File(path, "w")
        self._first = 0
        for spec in specs:
            self._file.create_dataset(spec.name, shape=_shape(spec, num_rows), dtype=spec.dtype)

    def append(self, columns: Mapping[str, np.ndarray]) -> None:
        """Add rows."""
        count = len(next(iter(columns.values())))
        for name, values in columns.items():
            self._file[name][self._first : self._first + count] = values
        self._first += count

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ParquetWriter:
    """FuxiCTR 2.3: numbers as they are, sequences and vectors as lists."""

    def __init__(self, path: Path, specs: Sequence[ColumnSpec], num_rows: int):
        self._specs = {spec.name: spec for spec in specs}
        fields = [(spec.name, self._type(spec)) for spec in specs]
        self._writer = pq.ParquetWriter(path, pa.schema(fields))

    @staticmethod
    def _type(spec: ColumnSpec) -> pa.DataType:
        plain = pa.from_numpy_dtype(spec.dtype)
        return plain if spec.width is None else pa.list_(plain)

    def append(self, columns: Mapping[str, np.ndarray]) -> None:
        """Add rows, as one row group."""
        arrays = [self._array(spec, columns[name]) for name, spec in self._specs.items()]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._writer.schema))

    def _array(self, spec: ColumnSpec, values: np.ndarray) -> pa.Array:
        flat = pa.array(np.ascontiguousarray(values, dtype=spec.dtype).reshape(-1))
        if spec.width is None:
            return flat
        offsets = np.arange(0, len(values) * spec.width + 1, spec.width, dtype=np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), flat)

    def close(self) -> None:
        """Write the footer."""
        self._writer.close()


class NpzWriter:
    """FuxiCTR 2.1 to 2.3: an uncompressed npz of one array per column.

    An archive takes one member after the other, and rows come with all columns at once: each column waits in a
    nameless file of its own.
    """

    def __init__(self, path: Path, specs: Sequence[ColumnSpec], num_rows: int):
        self._path, self._num_rows = path, num_rows
        self._specs = {spec.name: spec for spec in specs}
        self._stack = ExitStack()
        self._waiting: dict[str, IO[bytes]] = {}
        for name in self._specs:
            nameless = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 - the stack closes it
            self._waiting[name] = self._stack.enter_context(nameless)

    def append(self, columns: Mapping[str, np.ndarray]) -> None:
        """Add rows."""
        for name, spec in self._specs.items():
            self._waiting[name].write(np.ascontiguousarray(columns[name], dtype=spec.dtype).data)

    def close(self) -> None:
        """Put the columns together."""
        with self._stack, zipfile.ZipFile(self._path, "w", allowZip64=True) as archive:
            for name, spec in self._specs.items():
                header = {"descr": spec.dtype.str, "fortran_order": False, "shape": _shape(spec, self._num_rows)}
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(member, header)
                    self._waiting[name].seek(0)
                    while chunk := self._waiting[name].read(_COPY_BYTES):
                        member.write(chunk)
                self._waiting[name].truncate(0)


def _shape(spec: ColumnSpec, num_rows: int) -> tuple[int, ...]:
    return (num_rows,) if spec.width is None else (num_rows, spec.width)


WRITERS: dict[str, Callable[[Path, Sequence[ColumnSpec], int], Any]] = {
    "h5": H5Writer,
    "parquet": ParquetWriter,
    "npz": NpzWriter,
}
