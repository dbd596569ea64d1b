# SPDX-License-Identifier: Apache-2.0
"""A build as a map over raw files and an associative merge: one shard for each file, worked on by an engine.

Counting leaves the rows of a shard as codes in a folder of its own, and the tokens with their counts in files; the merge
puts these one behind the other, so that the vocabularies are those of a build in one process. Encoding turns the codes
of a shard into the arrays that the one writer of H5 files stores. Every byte of the dataset is the same as without shards.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ctrbench.counting import TOKENS_IN_MEMORY, Statistics, StatisticsPart
from ctrbench.encoding import Arrays, SplitEncoder
from ctrbench.engines import Engine, check_is_shared
from ctrbench.files import storing
from ctrbench.fitting import Fitted, count, new_statistics, num_cores
from ctrbench.items import split_dataset
from ctrbench.rawdata import RawReader
from ctrbench.schema import DatasetConfig
from ctrbench.sources import RawRows
from ctrbench.spill import CodedBlock, Spill, StoredBlock
from ctrbench.splits import SplitPlan, no_rows
from ctrbench.tokentable import hash_seeds, use_hash_seeds


@dataclass(frozen=True)
class Shard:
    """One raw file.

    Attributes:
        source: train, valid or test.
        file: the raw file.
        folder: for what is made of it.
        assignment: index into SPLITS of each of its rows, where splits are cut out of the train files.
        stored: its rows as codes, once they have been counted.
    """

    source: str
    file: Path
    folder: Path
    assignment: np.ndarray | None
    stored: tuple[StoredBlock, ...] = ()


@dataclass(frozen=True)
class Job:
    """What all shards of a build have in common; `fitted` is there once encoding begins."""

    dataset: DatasetConfig
    task: str | Sequence[str]
    labels: Mapping[str, list[str]]
    histories: list[str]
    hash_seeds: tuple[int, int]
    tokens_in_memory: int
    num_threads: int
    fitted: Fitted | None = None

    def rows(self, shard: Shard) -> RawRows:
        """The raw rows of one shard."""
        reader = RawReader(self.dataset, ids_given=not self.dataset.rebuild_dataset)
        plan = SplitPlan({shard.source: [shard.file]}, shard.assignment)
        return RawRows(self.dataset, reader, plan, self.task, self.labels)


class Shards:
    """The raw files of a build, each a task of an engine.

    Args:
        dataset: its configuration.
        rows: of all files; nothing is read from them here.
        task: binary_classification demands labels 0 and 1; a list has one task for each label.
        histories: meta features that are lists of item ids.
        scratch: folder for what is made of the shards; the workers must see it.
        engine: does the work.
    """

    def __init__(
        self,
        dataset: DatasetConfig,
        rows: RawRows,
        task: str | Sequence[str],
        histories: list[str],
        scratch: Path,
        engine: Engine,
    ):
        self._engine = engine
        self._shards = _cut(rows, scratch)
        workers = min(engine.workers, len(self._shards)) or 1
        threads = max(1, num_cores() // workers)
        memory = max(1, TOKENS_IN_MEMORY // workers)
        self._job = Job(dataset, task, rows.labels, histories, hash_seeds(), memory, threads)
        logging.info("Scale out: %d files over %d workers", len(self._shards), workers)

    def count(self, statistics: Statistics) -> None:
        """Count every shard and join what was found, in the order of the files.

        Raises:
            DataError: the raw data cannot be read.
            CtrbenchError: a worker died, the disk is full, or a worker does not see the folder.
        """
        if not statistics.is_needed:
            return
        for position, (part, stored) in enumerate(self._engine.map(_count, self._job, tuple(self._shards))):
            generations = statistics.join(part)
            blocks = tuple(block.moved(generations) for block in stored)
            self._shards[position] = replace(self._shards[position], stored=blocks)

    def encoded_blocks(self, fitted: Fitted) -> Callable[[str], Iterator[Arrays]]:
        """What gives the encoded blocks of a source; the sources must be asked for in their order.

        Raises:
            DataError: a value cannot be encoded, or a source has no row.
            CtrbenchError: a worker died or the disk is full.
        """
        files = self._engine.map(_encode, replace(self._job, fitted=fitted), self._shards)

        def of(source: str) -> Iterator[Arrays]:
            is_empty, shards = True, [shard for shard in self._shards if shard.source == source]
            for shard in shards:
                encoded = next(files)
                for block in shard.stored:
                    block.path.unlink()
                for path in encoded:
                    with np.load(path, allow_pickle=False) as arrays:
                        yield dict(arrays)
                    path.unlink()
                    is_empty = False
            if is_empty:
                raise no_rows([shard.file for shard in shards])

        return of


def _cut(rows: RawRows, scratch: Path) -> list[Shard]:
    shards = []
    for source, files in rows.plan.sources.items():
        is_cut, first_row = source == "train" and rows.plan.assignment is not None, 0
        for number, (file, length) in enumerate(
            zip(files, rows.reader.count_rows(files) if is_cut else files, strict=True)
        ):
            part = None
            if is_cut:
                assert rows.plan.assignment is not None and isinstance(length, int)
                part, first_row = rows.plan.assignment[first_row : first_row + length], first_row + length
            shards.append(Shard(source, file, scratch / f"{source}-{number}", part))
    return shards


def _count(job: Job, shard: Shard) -> tuple[StatisticsPart, list[StoredBlock]]:
    check_is_shared(shard.folder.parent)
    use_hash_seeds(job.hash_seeds)
    shard.folder.mkdir(exist_ok=True)  # a worker that died may have begun it
    statistics = new_statistics(job.dataset, shard.folder, job.histories, job.tokens_in_memory)
    with Spill(shard.folder) as spill:
        count(job.rows(shard), statistics, spill, job.num_threads)
        return statistics.part(), spill.stored(shard.source)


def _encode(job: Job, shard: Shard) -> list[Path]:
    check_is_shared(shard.folder.parent)
    use_hash_seeds(job.hash_seeds)
    assert job.fitted is not None
    shard.folder.mkdir(exist_ok=True)
    encoder = SplitEncoder(split_dataset(job.dataset), job.fitted, job.fitted.encoders)
    # The codes stay until the shard is done: a worker that dies begins anew.
    stored = (block.read() for block in shard.stored)
    blocks = stored if shard.stored else map(CodedBlock, job.rows(shard).blocks(shard.source))
    paths: list[Path] = []
    for arrays in map(encoder.arrays, blocks):
        paths.append(shard.folder / f"encoded-{len(paths)}.npz")
        with storing(paths[-1]):
            np.savez(paths[-1], allow_pickle=False, **arrays)
    return paths
