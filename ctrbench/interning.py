# SPDX-License-Identifier: Apache-2.0
"""Numbers the distinct tokens of a column in the order in which they appear, so that text is looked at only once.

The numbers ("codes") are what a build keeps of a column until its vocabulary is known; a table from code to id, one
entry per distinct token, then turns them into ids. Tokens themselves lie on disk beyond a small buffer. When the tables
of a build hold more tokens than memory should, the largest is written out and a new generation of codes begins: the
counts of several generations are added up by hash partitions, in bounded memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from ctrbench.files import storing
from ctrbench.tokentable import TokenTable, hashed, with_room
from ctrbench.vocabulary import COUNT, OOV, PAD, TOKEN, Vocabulary

_CHUNK = 1 << 20  # tokens handled at once where all of a column are gone through
_NEAR = 1 << 15  # integers nearer to 0 than this have a plain array of codes
_PARTITIONS = 32  # parts into which the counts of several generations are cut


@dataclass(frozen=True)
class Coded:
    """A column of one block as codes.

    Attributes:
        codes: of all tokens, one after the other; 0 stands for null.
        generation: which table the codes belong to.
        lengths: tokens of each row (n,), None where every row is one token.
    """

    codes: np.ndarray
    generation: int
    lengths: np.ndarray | None = None


@dataclass(frozen=True)
class _Sealed:
    """A generation on disk: hashes, tags and counts in the order of codes."""

    keys: Path
    tags: Path
    counts: Path

    def open(self, name: str) -> np.ndarray:
        return np.asarray(np.load(getattr(self, name), mmap_mode="r", allow_pickle=False))


@dataclass(frozen=True)
class InternedPart:
    """All that an interner knows, in files: sealed generations and the tokens of each."""

    sealed: tuple[_Sealed, ...]
    tokens: tuple[tuple[Path, ...], ...]

    @property
    def num_generations(self) -> int:
        """Tables that codes may belong to."""
        return len(self.sealed)


class Interner:
    """Codes and counts of one column.

    Args:
        folder: for what does not stay in memory; it must exist, and outlive this object.
        stem: begins the names of its files.
    """

    def __init__(self, folder: Path, stem: str):
        self._folder, self._stem = folder, stem
        self._table = TokenTable()
        self._counts = np.zeros(1 << 10, np.int64)
        self._sealed: list[_Sealed] = []
        # By generation: chunks of tokens in the order of codes, in memory or in files.
        self._tokens: list[list[pl.Series | Path]] = [[]]
        self._buffered = 0
        self._near = np.zeros(0, np.uint32)  # codes of small integers

    @property
    def num_tokens(self) -> int:
        """Distinct tokens whose hashes are in memory."""
        return self._table.num_tokens

    def add(self, tokens: pl.Series, counted: np.ndarray | bool = True) -> Coded:
        """The codes of a block's tokens, in the smallest type.

        Args:
            tokens: (n,) of type String, Int64 or Float64.
            counted: which of them count, a mask (n,) or all or none.
        """
        codes = self._codes(tokens)
        if counted is not False:
            self._count(codes if counted is True else codes[counted])
        size = self.num_tokens + 1
        codes = codes.astype(np.uint8 if size <= 1 << 8 else np.uint16 if size <= 1 << 16 else np.uint32)
        return Coded(codes, len(self._sealed))

    def _codes(self, tokens: pl.Series) -> np.ndarray:
        if tokens.null_count():
            codes = np.zeros(len(tokens), np.uint32)
            codes[tokens.is_not_null().to_numpy()] = self._codes(tokens.drop_nulls())
            return codes
        if tokens.dtype == pl.Int64 and len(tokens) and tokens.min() >= -_NEAR and tokens.max() < _NEAR:
            return self._near_codes(tokens)
        codes, new = self._table.find_or_add(*hashed(tokens))
        if len(new):
            self._keep(tokens.gather(new))
        return codes

    def _near_codes(self, tokens: pl.Series) -> np.ndarray:
        """Codes of small integers, most of which a plain array knows."""
        if not len(self._near):
            self._near = np.zeros(2 * _NEAR, np.uint32)
        values = tokens.to_numpy()
        codes = np.asarray(self._near[values])  # negative ones count from the end
        rows = np.flatnonzero(codes == 0)
        if len(rows):
            found = tokens.gather(rows)
            codes[rows], new = self._table.find_or_add(*hashed(found))
            self._near[values[rows]] = codes[rows]
            if len(new):
                self._keep(found.gather(new))
        return codes

    def _count(self, codes: np.ndarray) -> None:
        self._counts = with_room(self._counts, self.num_tokens + 1)
        if self.num_tokens < len(codes):
            self._counts[: self.num_tokens + 1] += np.bincount(codes, minlength=self.num_tokens + 1)
        else:
            np.add.at(self._counts, codes, 1)

    def _keep(self, tokens: pl.Series) -> None:
        # Text that was picked out of a block would keep the whole block's text in memory; appending copies it.
        self._tokens[-1].append(tokens + "" if tokens.dtype == pl.String else tokens)
        self._buffered += len(tokens)
        if self._buffered >= _CHUNK:
            self._write_tokens()

    def _write_tokens(self) -> None:
        written = [chunk for chunk in self._tokens[-1] if isinstance(chunk, Path)]
        buffered = [chunk for chunk in self._tokens[-1] if not isinstance(chunk, Path)]
        if buffered:
            path = self._folder / f"{self._stem}-tokens-{len(self._sealed)}-{len(written)}.ipc"
            with storing(path):
                pl.concat(buffered).alias(TOKEN).to_frame().write_ipc(path, compression="uncompressed")
            self._tokens[-1] = [*written, path]
        self._buffered = 0

    def seal(self) -> None:
        """Write the present generation out and begin a new one."""
        if not self.num_tokens:
            return
        self._write_tokens()
        stem = self._folder / f"{self._stem}-{len(self._sealed)}"
        arrays = {"keys": self._table.keys, "tags": self._table.tags(), "counts": self._live_counts()}
        paths = {name: stem.with_name(f"{stem.name}-{name}.npy") for name in arrays}
        for name, path in paths.items():
            with storing(path):
                np.save(path, arrays[name], allow_pickle=False)
        self._sealed.append(_Sealed(**paths))
        self._tokens.append([])
        self._table, self._counts = TokenTable(), np.zeros(1 << 10, np.int64)
        self._near = np.zeros(0, np.uint32)

    def part(self) -> InternedPart:
        """Write everything out, for a process that joins the parts of several."""
        self.seal()
        chunks = self._tokens[: len(self._sealed)]
        tokens = [tuple(chunk for chunk in of_one if isinstance(chunk, Path)) for of_one in chunks]
        return InternedPart(tuple(self._sealed), tuple(tokens))

    def join(self, part: InternedPart) -> int:
        """Add the generations of a part that was made with the same hash seeds; the number of its first one here.

        Joining is associative: the result depends on the order of the parts, not on how they were grouped.
        """
        self.seal()
        first = len(self._sealed)
        self._sealed += part.sealed
        self._tokens[-1:] = [*map(list, part.tokens), []]
        return first

    def _live_counts(self) -> np.ndarray:
        self._counts = with_room(self._counts, self.num_tokens + 1)
        return self._counts[1 : self.num_tokens + 1]

    def counts(self, min_count: int) -> tuple[pl.DataFrame, int]:
        """Columns `token` and `count` of the tokens that count at least `min_count` times, in no particular order.

        Reserved tokens are included however rare they are. Second is the number of all distinct tokens that counted.
        """
        if self._sealed:
            self.seal()  # now all generations are on disk
            parts = [self._merged(part, min_count) for part in range(_PARTITIONS)]
            kept, distinct = pl.concat([frame for frame, _ in parts]), sum(count for _, count in parts)
        else:
            counts = self._live_counts()
            is_kept = (counts >= max(1, min_count)) | ((counts > 0) & _is_reserved(self._table.keys))
            codes = np.flatnonzero(is_kept)
            kept = pl.DataFrame({"generation": np.zeros(len(codes), np.int64), "code": codes, COUNT: counts[codes]})
            distinct = int(np.count_nonzero(counts))
        frames = []
        for generation in range(len(self._tokens)):
            chosen = kept.filter(pl.col("generation") == generation).sort("code")
            tokens = self._tokens_at(generation, chosen["code"].to_numpy())
            if tokens is not None:
                frames.append(pl.DataFrame({TOKEN: tokens, COUNT: chosen[COUNT]}))
        return pl.concat(frames) if frames else self._no_counts(), distinct

    def _no_counts(self) -> pl.DataFrame:
        first = next((chunk for chunk in self._chunks(0)), pl.Series([], dtype=pl.String))
        return pl.DataFrame({TOKEN: first.clear(), COUNT: pl.Series([], dtype=pl.Int64)})

    def _merged(self, part: int, min_count: int) -> tuple[pl.DataFrame, int]:
        """Of one hash partition over all generations: where each kept token lies first, and the number of tokens."""
        frames = []
        for generation, sealed in enumerate(self._sealed):
            keys = sealed.open("keys")
            codes = _where(keys, lambda values: values >> np.uint64(59) == np.uint64(part))
            columns = {"key": keys[codes], "tag": sealed.open("tags")[codes], COUNT: sealed.open("counts")[codes]}
            frames.append(
                pl.DataFrame({**columns, "code": codes}).with_columns(generation=pl.lit(generation, pl.Int64))
            )
        together = pl.concat(frames).group_by("key", "tag")
        merged = together.agg(pl.col(COUNT).sum(), pl.col("generation", "code").first()).filter(pl.col(COUNT) > 0)
        is_kept = (pl.col(COUNT) >= min_count) | pl.Series(_is_reserved(merged["key"].to_numpy()))
        return merged.filter(is_kept).select("generation", "code", COUNT), merged.height

    def _chunks(self, generation: int) -> Iterator[pl.Series]:
        for chunk in self._tokens[generation]:
            yield pl.read_ipc(chunk)[TOKEN] if isinstance(chunk, Path) else chunk.alias(TOKEN)

    def _tokens_at(self, generation: int, positions: np.ndarray) -> pl.Series | None:
        """The tokens at ascending `positions` (codes less 1) of a generation."""
        found, start = [], 0
        for chunk in self._chunks(generation):
            first, last = np.searchsorted(positions, [start, start + len(chunk)])
            if last > first:
                picked = chunk.gather(positions[first:last] - start)
                found.append(picked + "" if picked.dtype == pl.String else picked)
            start += len(chunk)
        return pl.concat(found) if found else None

    def ids(self, vocabulary: Vocabulary, missing: str | int | float | None = None) -> TokenIds:
        """The ids of all codes under `vocabulary`. Codes must all have been given out by now; the table is let go.

        Args:
            vocabulary: complete.
            missing: a token that gets id 0, as padding has.
        """
        live = self._table
        self._table, self._counts = TokenTable(), np.zeros(0, np.int64)
        ids = TokenIds([*self._sealed, None], vocabulary, missing)
        ids.use(len(self._sealed), live)
        return ids


class TokenIds:
    """Turns codes into ids of one vocabulary."""

    def __init__(self, generations: list[_Sealed | None], vocabulary: Vocabulary, missing: str | int | float | None):
        self.dtype = vocabulary.id_dtype
        self._generations = generations
        self._vocabulary: Vocabulary | None = vocabulary
        self._missing = missing
        self._generation = -1
        self._table = np.zeros(0, self.dtype)
        self._last: np.ndarray | None = None

    def of(self, coded: Coded) -> np.ndarray:
        """Ids (n,) of a block's codes, in the smallest type that holds the vocabulary."""
        if coded.generation != self._generation:
            if coded.generation == len(self._generations) - 1 and self._last is not None:
                self._table, self._generation = self._last, coded.generation
            else:
                sealed = self._generations[coded.generation]
                assert sealed is not None
                self.use(coded.generation, TokenTable.of(sealed.open("keys"), sealed.open("tags")))
        return np.asarray(self._table[coded.codes])

    def use(self, generation: int, table: TokenTable) -> None:
        """Make the ids of one generation; those of the last one are kept."""
        assert self._vocabulary is not None
        vocabulary = self._vocabulary
        ids = np.full(table.num_tokens + 1, vocabulary.oov, self.dtype)
        for start in range(0, len(vocabulary.tokens), _CHUNK):
            codes = table.find(*hashed(vocabulary.tokens[start : start + _CHUNK]))
            ids[codes] = vocabulary.ids[start : start + _CHUNK]
        ids[0] = vocabulary.oov
        if self._missing is not None:
            code = table.find(*hashed(pl.Series([self._missing], dtype=vocabulary.tokens.dtype)))[0]
            if code:
                ids[code] = 0
        self._table, self._generation = ids, generation
        if generation == len(self._generations) - 1:
            self._last = ids
            if generation == 0:
                self._vocabulary = None  # nothing more to make from it


def _where(values: np.ndarray, condition: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Positions at which `condition` holds, a chunk at a time."""
    starts = range(0, len(values), _CHUNK)
    found = [np.flatnonzero(condition(values[start : start + _CHUNK])) + start for start in starts]
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _is_reserved(keys: np.ndarray) -> np.ndarray:
    """Whether each hash is that of a reserved token; for numbers, which no text equals, a few may be kept in vain."""
    return np.isin(keys, hashed(pl.Series([PAD, OOV]))[0])
