# SPDX-License-Identifier: Apache-2.0
"""H5 files: one typed, uncompressed dataset per column, chunked by rows, checksummed and written atomically.

File attributes: `format_version`, `num_rows` and `feature_map` (the feature map's hash); each column carries the CRC-32
of its bytes. Files of FuxiCTR 2.0 (the same layout, 64-bit columns, no attributes) open as they are.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from ctrbench.errors import CtrbenchError, DataError, did_you_mean
from ctrbench.features import FeatureMap
from ctrbench.files import atomic_path, storage_error

FORMAT_VERSION = 1
_CHUNK_ROWS = 1 << 16
_VERIFY_BYTES = 1 << 24  # bytes read at once when a checksum is verified
# What h5py raises when a file's own structures do not add up.
_H5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError)


@dataclass(frozen=True)
class ColumnSpec:
    """How one column is stored: (N,) or, with a `width`, (N, width)."""

    name: str
    dtype: np.dtype[Any]
    width: int | None = None


def smallest_int(size: int) -> np.dtype[Any]:
    """The smallest of uint8, uint16, int32 and int64 that holds 0 .. size-1."""
    for dtype in (np.uint8, np.uint16, np.int32):
        if size - 1 <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    return np.dtype(np.int64)


def column_specs(
    feature_map: FeatureMap, *, has_labels: bool = True, meta_sizes: Mapping[str, int] | None = None
) -> list[ColumnSpec]:
    """The columns of a split file: features in the map's order, without those of the item table, then labels.

    Args:
        feature_map: what the columns are.
        has_labels: whether label columns are stored.
        meta_sizes: number of distinct ids of meta columns; one that is not named is stored as int64.
    """
    specs = []
    for name in feature_map.split_features:
        feature = feature_map.features[name]
        kind, width = feature["type"], stored_width(feature)
        if kind in ("categorical", "sequence"):
            dtype = smallest_int(feature["vocab_size"])
        elif kind == "meta":
            size = (meta_sizes or {}).get(name)
            dtype = smallest_int(size) if size is not None else np.dtype(np.int64)
        else:
            dtype = np.dtype(np.float32)
        specs.append(ColumnSpec(name, dtype, width))
    labels = feature_map.labels if has_labels else []
    return specs + [ColumnSpec(name, np.dtype(np.float32)) for name in labels]


class SplitWriter:
    """Writes one split file block by block; the file appears under its name when `close` returns.

    One thread at a time may call it, which need not be the one that created it. As a context manager it closes on
    success and discards the file on an exception.

    Args:
        path: the final file.
        specs: its columns.
        feature_map_hash: `FeatureMap.content_hash()` of the map that the ids belong to.

    Raises:
        CtrbenchError: the disk is full or the folder cannot be written; nothing is left behind.
    """

    def __init__(self, path: Path, specs: Sequence[ColumnSpec], *, feature_map_hash: str | None = None):
        self.path = path
        self.num_rows = 0
        self._specs = {spec.name: spec for spec in specs}
        self._hash = feature_map_hash
        self._checksums = dict.fromkeys(self._specs, 0)
        self._datasets: dict[str, h5py.Dataset] = {}
        self._stack = ExitStack()
        partial = self._stack.enter_context(atomic_path(path))
        try:
            self._file = h5py.File(partial, "w", libver="latest")
        except (OSError, RuntimeError) as error:
            raise self._discard(error) from error
        except BaseException as error:
            self._discard(error)
            raise

    def append(self, columns: Mapping[str, np.ndarray]) -> None:
        """Add rows: `{name: (n,) or (n, width)}` with every column of the file and the same n."""
        rows = {len(values) for values in columns.values()}
        if columns.keys() != self._specs.keys() or len(rows) != 1:
            raise ValueError(f"{self.path}: a block must hold the columns {list(self._specs)} with equally many rows")
        count = rows.pop()
        if not count:
            return
        try:
            for name, values in columns.items():
                stored = _as_stored(values, self._specs[name], self.path)
                self._checksums[name] = zlib.crc32(stored.data, self._checksums[name])
                dataset = self._dataset(name, count)
                dataset.resize(self.num_rows + count, axis=0)
                dataset[self.num_rows :] = stored
        except (OSError, RuntimeError) as error:
            raise self._discard(error) from error
        self.num_rows += count

    def close(self) -> None:
        """Write the attributes, put the file on disk and rename it into place."""
        try:
            for name, spec in self._specs.items():
                self._dataset(name, 1).attrs["crc32"] = np.uint32(self._checksums[spec.name])
            self._file.attrs["num_rows"] = self.num_rows
            if self._hash is not None:
                self._file.attrs["feature_map"] = self._hash
            self._file.attrs["format_version"] = FORMAT_VERSION
            self._file.close()
        except (OSError, RuntimeError) as error:
            raise self._discard(error) from error
        self._stack.close()

    def abort(self) -> None:
        """Give up: no file appears."""
        self._discard(InterruptedError("given up"))

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self._discard(error)

    def _dataset(self, name: str, first_rows: int) -> h5py.Dataset:
        if name not in self._datasets:
            spec = self._specs[name]
            tail = () if spec.width is None else (spec.width,)
            rows = min(first_rows, max(1, _CHUNK_ROWS // (spec.width or 1)))
            self._datasets[name] = self._file.create_dataset(
                name, shape=(0, *tail), maxshape=(None, *tail), chunks=(rows, *tail), dtype=spec.dtype
            )
        return self._datasets[name]

    def _discard(self, error: BaseException) -> CtrbenchError:
        """Close and remove the unfinished file; returns the error to show for an operating system `error`."""
        with suppress(OSError, RuntimeError, ValueError, AttributeError):
            self._file.close()
        shown = storage_error(error if isinstance(error, OSError) else OSError(str(error)), self.path)
        with suppress(CtrbenchError, InterruptedError):
            self._stack.__exit__(InterruptedError, InterruptedError("given up"), None)
        return shown


def _as_stored(values: np.ndarray, spec: ColumnSpec, path: Path) -> np.ndarray:
    tail = () if spec.width is None else (spec.width,)
    if values.shape[1:] != tail:
        raise ValueError(f"{path}: column '{spec.name}' takes blocks of shape {('n', *tail)}, got {values.shape}")
    if values.dtype != spec.dtype and np.issubdtype(spec.dtype, np.integer):
        limits = np.iinfo(spec.dtype)
        if values.size and not (limits.min <= values.min() and values.max() <= limits.max):
            raise ValueError(f"{path}: column '{spec.name}' holds ids that do not fit {spec.dtype}")
    return np.ascontiguousarray(values, dtype=spec.dtype)


class SplitFile:
    """One opened split; see `open_split`.

    Attributes:
        path: the file.
        num_rows: its rows.
        has_labels: whether the label columns are there.
        columns: names of the feature map's columns, then of the labels.
    """

    def __init__(self, path: Path, file: h5py.File, columns: list[str], num_rows: int, has_labels: bool):
        self.path = path
        self.columns = columns
        self.num_rows = num_rows
        self.has_labels = has_labels
        self._file = file

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of a column, (n,) or (n, L), in the stored type.

        Raises:
            DataError: the file holds no such column or cannot be read.
        """
        if name not in self.columns:
            raise DataError(f"{self.path}: no column '{name}'{did_you_mean(name, self.columns)}")
        try:
            return np.asarray(self._file[name][start:stop])
        except _H5_ERRORS as error:
            raise _damaged(self.path, f"column '{name}' cannot be read ({error})") from error

    def dtype(self, name: str) -> np.dtype[Any]:
        """The stored type of a column."""
        stored: np.dtype[Any] = self._file[name].dtype
        return stored

    def checksums(self) -> dict[str, int] | None:
        """CRC-32 by column as stored, or None for a file that carries none (FuxiCTR 2.0).

        Raises:
            DataError: a file that was written here has lost one.
        """
        missing = [name for name in self.columns if "crc32" not in self._file[name].attrs]
        if missing and "format_version" in self._file.attrs:
            raise _damaged(self.path, f"column '{missing[0]}' has lost its checksum")
        if missing:
            return None
        return {name: int(self._file[name].attrs["crc32"]) for name in self.columns}

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> SplitFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_split(path: Path, feature_map: FeatureMap, *, labels_required: bool = True, verify: bool = True) -> SplitFile:
    """Open one split and check it against the feature map.

    Args:
        path: an H5 file of ctrbench or FuxiCTR 2.0.
        feature_map: names, types and widths of the columns that must be there.
        labels_required: refuse a file without labels.
        verify: read every column once and compare its checksum; where there is none, check the range of the ids.

    Raises:
        DataError: anything that does not fit; names the file, the column and the remedy.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file: build the dataset first, or correct the path in dataset_config")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise _damaged(path, f"truncated or not an H5 file ({error})") from None
    try:
        columns, num_rows, has_labels = _check_columns(path, file, feature_map, labels_required)
        _check_attributes(path, file, feature_map, num_rows)
        split = SplitFile(path, file, columns, num_rows, has_labels)
        if verify:
            _verify(split, feature_map)
    except CtrbenchError:
        file.close()
        raise
    except _H5_ERRORS as error:
        file.close()
        raise _damaged(path, f"its structure is damaged ({error})") from None
    except BaseException:
        file.close()
        raise
    return split


def _check_columns(
    path: Path, file: h5py.File, feature_map: FeatureMap, labels_required: bool
) -> tuple[list[str], int, bool]:
    present = [label for label in feature_map.labels if label in file]
    if present != feature_map.labels and (labels_required or present):
        absent = next(label for label in feature_map.labels if label not in file)
        raise DataError(
            f"{path}: label column '{absent}' is missing{did_you_mean(absent, file)}: "
            "this split needs labels; add them to the source and build again"
        )
    num_rows: int | None = None
    for name in [*feature_map.split_features, *present]:
        if name not in file:
            raise DataError(
                f"{path}: column '{name}' of the feature map is missing{did_you_mean(name, file)}: "
                f"{_other_settings(path)}"
            )
        column = file[name]
        spec = feature_map.features.get(name, {"type": "label"})
        if not isinstance(column, h5py.Dataset):
            raise _damaged(path, f"column '{name}' is a group, not a dataset")
        allowed = "iu" if spec["type"] in ("categorical", "sequence") else "iufb"
        if column.dtype.kind not in allowed:
            raise DataError(f"{path}: column '{name}' holds {column.dtype}, not numbers: {_other_settings(path)}")
        width = stored_width(spec)
        tail = () if width is None else (width,)
        if column.shape[1:] != tail:
            wanted = "(N,)" if width is None else f"(N, {width})"
            raise DataError(f"{path}: column '{name}' has shape {column.shape}, not {wanted}: {_other_settings(path)}")
        num_rows = len(column) if num_rows is None else num_rows
        if len(column) != num_rows:
            raise _damaged(path, f"column '{name}' has {len(column)} rows, the others {num_rows}")
    if not num_rows:
        raise DataError(f"{path}: the split is empty (no rows): check the source file and build again")
    return [*feature_map.split_features, *present], num_rows, bool(present)


def _check_attributes(path: Path, file: h5py.File, feature_map: FeatureMap, num_rows: int) -> None:
    version = file.attrs.get("format_version")
    if version is not None and version != FORMAT_VERSION:
        raise DataError(f"{path}: format version {version}, not {FORMAT_VERSION}: {_other_settings(path)}")
    if file.attrs.get("num_rows", num_rows) != num_rows:
        raise _damaged(path, f"{num_rows} rows, its header says {file.attrs['num_rows']}")
    if file.attrs.get("feature_map", feature_map.content_hash()) != feature_map.content_hash():
        raise DataError(f"{path}: its ids belong to another feature_map.json: {_other_settings(path)}")


def _verify(split: SplitFile, feature_map: FeatureMap) -> None:
    stored = split.checksums()
    for name in split.columns:
        spec = feature_map.features.get(name, {"type": "label"})
        checksum, vocab_size = 0, spec.get("vocab_size")
        for block in _blocks(split, name):
            if stored is not None:
                checksum = zlib.crc32(np.ascontiguousarray(block).data, checksum)
            elif vocab_size is not None and block.size and not (block.min() >= 0 and block.max() < vocab_size):
                outside = f"column '{name}' holds ids outside 0..{vocab_size - 1}"
                raise DataError(f"{split.path}: {outside}: {_other_settings(split.path)}")
        if stored is not None and checksum != stored[name]:
            raise _damaged(split.path, f"checksum of column '{name}' does not match")


def _blocks(split: SplitFile, name: str) -> Iterator[np.ndarray]:
    column = split._file[name]
    rows = max(1, _VERIFY_BYTES // max(1, column.dtype.itemsize * int(np.prod(column.shape[1:]))))
    for start in range(0, split.num_rows, rows):
        yield split.read(name, start, start + rows)


def stored_width(spec: Mapping[str, Any]) -> int | None:
    """Second dimension of the stored column of a feature, None for a plain one."""
    width = spec.get({"sequence": "max_len", "meta": "max_len", "embedding": "pretrain_dim"}.get(spec["type"], ""))
    return None if width is None else int(width)


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path}: damaged file: {what}: delete {path.parent} and run again to build it anew")


def _other_settings(path: Path) -> str:
    return f"the file was built from other settings; delete {path.parent} and run again to build it anew"
