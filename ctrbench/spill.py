# SPDX-License-Identifier: Apache-2.0
"""What a build keeps of the raw rows between fitting and encoding: blocks of codes in a scratch folder.

So the raw text is read, parsed and looked up once. A block's file goes as soon as it has been read again.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import polars as pl

from ctrbench.files import storage_error, storing
from ctrbench.interning import Coded
from ctrbench.rawdata import Block

_BLOCKS_IN_FLIGHT = 2  # blocks that may wait for the writing thread


@dataclass(frozen=True)
class CodedBlock:
    """A block whose token columns are codes; its frame holds the others."""

    block: Block
    coded: Mapping[str, Coded] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Rows of the block."""
        if self.coded:
            first = next(iter(self.coded.values()))
            return len(first.codes) if first.lengths is None else len(first.lengths)
        return int(self.block.frame.height)


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """A folder inside `folder` for the files of one build, removed afterwards; those of killed builds go first.

    Raises:
        CtrbenchError: it cannot be made.
    """
    for leftover in folder.glob(".*.partial"):
        remove_tree(leftover)
    path = folder / f".build.{os.getpid()}.partial"
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise storage_error(error, path) from error
    try:
        yield path
    finally:
        remove_tree(path)


def remove_tree(path: Path) -> None:
    """Remove a file or a folder with all that it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Array:
    dtype: np.dtype
    size: int
    generation: int = 0


@dataclass(frozen=True)
class StoredBlock:
    """Where a block lies and how its bytes are read."""

    path: Path
    file: Path
    first_row: int
    frame_bytes: int
    arrays: dict[str, tuple[_Array, _Array | None]]

    def moved(self, generations: Mapping[str, int]) -> StoredBlock:
        """With the generations of its codes moved up, as those of a part that others come before."""
        arrays = {
            name: (replace(codes, generation=codes.generation + generations[name]), lengths)
            for name, (codes, lengths) in self.arrays.items()
        }
        return replace(self, arrays=arrays)

    def read(self) -> CodedBlock:
        """The block."""
        with self.path.open("rb") as stream:
            frame = pl.read_ipc(stream.read(self.frame_bytes)) if self.frame_bytes else pl.DataFrame()
            coded = {}
            for name, (codes, lengths) in self.arrays.items():
                values = np.fromfile(stream, codes.dtype, codes.size)
                of_rows = None if lengths is None else np.fromfile(stream, lengths.dtype, lengths.size)
                coded[name] = Coded(values, codes.generation, of_rows)
        return CodedBlock(Block(frame, self.file, self.first_row), coded)


class Spill:
    """Blocks on disk, by source; a thread of its own writes them. As a context manager it ends this thread.

    Attributes:
        folder: for its files; it must exist.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._blocks: dict[str, list[Future[StoredBlock]]] = {}
        self._waiting: deque[Future[StoredBlock]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="spill-writer")

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def append(self, source: str, coded: CodedBlock) -> None:
        """Keep a block.

        Raises:
            CtrbenchError: an earlier block could not be written: the disk is full.
        """
        blocks = self._blocks.setdefault(source, [])
        path = self.folder / f"{source}-{len(blocks)}.block"
        blocks.append(self._thread.submit(_write, path, coded))
        self._waiting.append(blocks[-1])
        while len(self._waiting) > _BLOCKS_IN_FLIGHT:
            self._waiting.popleft().result()

    def __contains__(self, source: str) -> bool:
        return source in self._blocks

    def blocks(self, source: str) -> Iterator[CodedBlock]:
        """The blocks of a source in the order in which they came, each once."""
        for future in self._blocks.pop(source, []):
            stored = future.result()
            block = stored.read()
            stored.path.unlink(missing_ok=True)
            yield block

    def stored(self, source: str) -> list[StoredBlock]:
        """Where the blocks of a source are, for another process that reads them."""
        return [future.result() for future in self._blocks.get(source, [])]


def _write(path: Path, coded: CodedBlock) -> StoredBlock:
    frame, arrays = coded.block.frame, {}
    with storing(path), path.open("wb") as stream:
        if frame.width:
            frame.write_ipc(stream, compression="uncompressed")
        frame_bytes = stream.tell()
        for name, column in coded.coded.items():
            stream.write(column.codes.data)
            codes, lengths = _Array(column.codes.dtype, len(column.codes), column.generation), None
            if column.lengths is not None:
                stream.write(column.lengths.data)
                lengths = _Array(column.lengths.dtype, len(column.lengths))
            arrays[name] = codes, lengths
    return StoredBlock(path, coded.block.file, coded.block.first_row, frame_bytes, arrays)
