# SPDX-License-Identifier: Apache-2.0
"""What one pass over the raw rows finds out: codes and counts of tokens, lengths of sequences, moments of numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from ctrbench.interning import Coded, InternedPart, Interner
from ctrbench.rawdata import Block
from ctrbench.schema import FeatureColumn
from ctrbench.spill import CodedBlock

TOKENS_IN_MEMORY = 1 << 25  # distinct tokens of all columns whose hashes stay in memory: about 1.5 GB


@dataclass
class Moments:
    """Count, mean, spread and range of a numeric column that comes block by block."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean
    low: float = math.inf
    high: float = -math.inf

    @classmethod
    def of(cls, values: np.ndarray) -> Moments:
        """Those of values (n,), n > 0."""
        mean = float(values.mean())
        return cls(len(values), mean, float(((values - mean) ** 2).sum()), float(values.min()), float(values.max()))

    def merge(self, other: Moments) -> None:
        """Add those of further values, by the parallel form of Welford's update (Chan et al. 1979)."""
        count, distance = self.count + other.count, other.mean - self.mean
        self.squares += other.squares + distance**2 * self.count * other.count / count
        self.mean += distance * other.count / count
        self.count = count
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def shift_and_scale(self, normalizer: str) -> tuple[float, float]:
        """(shift, scale) of (x - shift) / scale; a constant column has scale 1."""
        if normalizer == "StandardScaler":
            return self.mean, math.sqrt(self.squares / self.count) or 1.0
        return self.low, (self.high - self.low) or 1.0


def tokens_of(column: FeatureColumn, dtype: pl.DataType) -> pl.Expr:
    """A sequence or history as lists of tokens: text is split, lists are taken as they are."""
    if isinstance(dtype, pl.List):
        return pl.col(column.name)
    if column.splitter is None:  # as str.split(None) does
        return pl.col(column.name).str.extract_all(r"\S+")
    return pl.col(column.name).str.split(column.splitter)


def flat_tokens(lists: pl.Series) -> tuple[pl.Series, np.ndarray]:
    """The tokens of all lists, one after the other, and the length of each list."""
    lengths = lists.list.len()
    return lists.filter(lengths > 0).explode(), lengths.to_numpy().astype(np.int32)


@dataclass(frozen=True)
class StatisticsPart:
    """What `Statistics` found in some of the rows; the tokens are in files.

    Attributes:
        interned: by column.
        lengths: longest sequence by column.
        moments: of each block by column, since rounding depends on the order in which they are added up.
    """

    interned: Mapping[str, InternedPart]
    lengths: Mapping[str, int]
    moments: Mapping[str, Sequence[Moments]]


class Statistics:
    """One pass over the raw rows: codes and counts of tokens, longest sequences and numeric moments.

    Args:
        columns: of one table.
        scratch: folder for what does not stay in memory.
        ids_given: no vocabulary or scaler is fitted.
        histories: meta features that are lists of item ids.
        tokens_in_memory: distinct tokens of all columns whose hashes may stay in memory.
    """

    def __init__(
        self,
        columns: list[FeatureColumn],
        scratch: Path,
        *,
        ids_given: bool,
        histories: Collection[str] = (),
        tokens_in_memory: int | None = None,
    ):
        self._tokens_in_memory = tokens_in_memory or TOKENS_IN_MEMORY
        fitted = [column for column in columns if not ids_given]
        tokens = [c for c in fitted if c.type in ("categorical", "sequence")]
        meta = [c for c in fitted if c.type == "meta" and (c.remap or c.name in histories)]
        self._coded = tokens + meta
        # Vocabularies are fitted on train alone, ids of meta columns on all splits; histories have those of the items.
        self._always = {column.name for column in meta} - set(histories)
        self._never = set(histories)
        lengths = [c for c in columns if (c.type == "embedding" and c.pretrain_dim is None)]
        lengths += [c for c in columns if c.name in histories and c.max_len == 0]
        self._sequences = [c.name for c in fitted if c.type == "sequence" and c.max_len == 0]
        self._lengths = [column.name for column in lengths]
        self._numeric = [c.name for c in fitted if c.type == "numeric" and c.normalizer]
        self.interners = {c.name: Interner(scratch, f"{i}") for i, c in enumerate(self._coded)}
        self.lengths = dict.fromkeys(self._lengths + self._sequences, 0)
        self._block_moments: dict[str, list[Moments]] = {name: [] for name in self._numeric}

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to fit."""
        return bool(self._coded or self._lengths or self._numeric)

    def moments(self, name: str) -> Moments:
        """Of the training rows of a numeric column."""
        total = Moments()
        for moments in self._block_moments[name]:
            total.merge(moments)
        return total

    def part(self) -> StatisticsPart:
        """Everything as files and plain values, for `join` in another process; nothing may be added after it."""
        interned = {name: interner.part() for name, interner in self.interners.items()}
        return StatisticsPart(interned, self.lengths, self._block_moments)

    def join(self, part: StatisticsPart) -> dict[str, int]:
        """Add what was found in the rows that follow; by column, by how much the generations of its codes move up.

        Associative, so that the parts may have been grouped in any way.
        """
        for name, length in part.lengths.items():
            self.lengths[name] = max(self.lengths[name], length)
        for name, moments in part.moments.items():
            self._block_moments[name] += moments
        return {name: self.interners[name].join(interned) for name, interned in part.interned.items()}

    def add(self, block: Block, train: np.ndarray | bool, threads: ThreadPoolExecutor) -> CodedBlock:
        """Count a block and give its columns codes where they have a vocabulary.

        Args:
            block: prepared.
            train: which of its rows are training rows, a mask (n,) or all or none.
            threads: over which columns are spread.
        """
        frame = block.frame
        found = list(threads.map(lambda column: self._code(column, frame, train), self._coded))
        coded = {column.name: codes for column, codes in zip(self._coded, found, strict=True)}
        if train is not False:
            self._measure(frame if train is True else frame.filter(pl.Series(train)))
            for name in self._sequences:
                lengths = coded[name].lengths
                assert lengths is not None
                longest = (lengths if train is True else lengths[train]).max(initial=0)
                self.lengths[name] = max(self.lengths[name], int(longest))
        self._bound_memory()
        return CodedBlock(Block(frame.drop(list(coded)), block.file, block.first_row), coded)

    def _code(self, column: FeatureColumn, frame: pl.DataFrame, train: np.ndarray | bool) -> Coded:
        interner, name = self.interners[column.name], column.name
        counted: np.ndarray | bool = name in self._always or (train if name not in self._never else False)
        if column.type == "categorical" or name in self._always:
            return interner.add(frame[name], counted)
        tokens, lengths = flat_tokens(frame.select(tokens_of(column, frame.schema[name])).to_series())
        if isinstance(counted, np.ndarray):
            counted = np.repeat(counted, lengths)
        return replace(interner.add(tokens, counted), lengths=lengths)

    def _measure(self, train: pl.DataFrame) -> None:
        for name in self._lengths:  # of an embedding or a history
            self.lengths[name] = max(self.lengths[name], int(train[name].list.len().max() or 0))
        for name in self._numeric:
            if train.height:
                self._block_moments[name].append(Moments.of(train[name].cast(pl.Float64).to_numpy()))

    def _bound_memory(self) -> None:
        while sum(interner.num_tokens for interner in self.interners.values()) > self._tokens_in_memory:
            max(self.interners.values(), key=lambda interner: interner.num_tokens).seal()
