# SPDX-License-Identifier: Apache-2.0
"""A hash table from tokens to consecutive codes that works on whole arrays, without Python per token."""

from __future__ import annotations

import secrets

import numpy as np
import polars as pl

_TAG = np.uint64(0xFFFFFFFF00000000)
_TAG_BIT = np.uint64(1 << 32)  # set in every tag, so that an empty slot matches none
_CHUNK = 1 << 20  # tokens moved at once when a table grows
_seeds = (secrets.randbits(63), secrets.randbits(63))  # drawn anew, so that no file can be made to collide


def hash_seeds() -> tuple[int, int]:
    """The seeds of this process's hashes."""
    return _seeds


def use_hash_seeds(seeds: tuple[int, int]) -> None:
    """Hash as another process does, so that the tables of the two can be joined; before any table is made."""
    global _seeds
    _seeds = seeds


def hashed(tokens: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """Two hashes (n,) of every token: 64 bits to find and compare it, 31 more that tell it from others.

    For numbers the first is a bijection, hence exact. Two texts agree in both with a probability of 2^-95, which for a
    billion distinct tokens makes a confusion less likely than 10^-10.
    """
    if tokens.dtype == pl.String:
        key, tag = (tokens.hash(seed).to_numpy() for seed in _seeds)
        return key, (tag & _TAG) | _TAG_BIT
    if tokens.dtype == pl.Float64:
        bits = (tokens.fill_null(0).to_numpy() + 0.0).view(np.uint64)  # + 0.0: -0.0 is the token 0.0
    else:
        bits = tokens.fill_null(0).cast(pl.Int64).to_numpy().view(np.uint64)
    # The finalizer of SplitMix64, which is invertible.
    key = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    key ^= key >> np.uint64(31)
    return key, (key & _TAG) | _TAG_BIT


class TokenTable:
    """Hash table from tokens to codes 1, 2, ... that works on whole arrays (linear probing).

    A slot holds a tag in its upper and a code in its lower half, 0 when it is empty; `keys` holds the hash of every code.
    About 30 bytes per token.
    """

    def __init__(self, capacity: int = 1 << 12):
        self.num_tokens = 0
        self._slots = np.zeros(capacity, np.uint64)
        self._keys = np.zeros(capacity // 2, np.uint64)

    @classmethod
    def of(cls, keys: np.ndarray, tags: np.ndarray) -> TokenTable:
        """The table in which the token at position i has code i + 1; the tokens are distinct."""
        capacity = 1 << max(12, int(np.ceil(np.log2(2 * len(keys) + 1))))
        table = cls(capacity)
        table._keys = np.concatenate([np.zeros(1, np.uint64), keys])
        table.num_tokens = len(keys)
        table._place(tags | np.arange(1, len(keys) + 1, dtype=np.uint64))
        return table

    @property
    def keys(self) -> np.ndarray:
        """First hashes in the order of codes."""
        return self._keys[1 : self.num_tokens + 1]

    def tags(self) -> np.ndarray:
        """Tags in the order of codes."""
        entries = self._slots[self._slots != 0]
        tags = np.zeros(self.num_tokens + 1, np.uint64)
        tags[entries & ~_TAG] = entries & _TAG
        return tags[1:]

    def find(self, keys: np.ndarray, tags: np.ndarray) -> np.ndarray:
        """Codes (n,), 0 for tokens that are not there."""
        codes, rows = self._at_first_slot(keys, tags)
        key, tag, position = keys[rows], tags[rows], self._position(keys[rows])
        while len(rows):
            entries = self._slots[position]
            code = self._matches(entries, key, tag)
            codes[rows] = code
            on = (code == 0) & (entries != 0)
            rows, key, tag = rows[on], key[on], tag[on]
            position = (position[on] + 1) & (len(self._slots) - 1)
        return codes

    def find_or_add(self, keys: np.ndarray, tags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes (n,), and the rows whose tokens were new, in the order of their new codes."""
        codes, missing = self._at_first_slot(keys, tags)
        added = []
        while len(missing):
            # Few at a time in a small table: most of a block's tokens repeat, and must not make it grow.
            room = len(self._slots) * 5 // 8 - self.num_tokens
            if room < min(len(missing), len(self._slots) // 8):
                self._grow()
                continue
            part, missing = missing[:room], missing[room:]
            added += self._add(part, keys, tags, codes)
            codes[missing], still = self._at_first_slot(keys[missing], tags[missing])
            missing = missing[still]
        return codes, np.concatenate(added) if added else np.zeros(0, np.int64)

    def _position(self, keys: np.ndarray) -> np.ndarray:
        return np.asarray(keys & np.uint64(len(self._slots) - 1)).view(np.int64)

    def _matches(self, entries: np.ndarray, keys: np.ndarray, tags: np.ndarray) -> np.ndarray:
        """The codes in `entries` where these stand for the tokens sought, 0 elsewhere."""
        codes = np.asarray(entries ^ tags)
        codes *= codes < _TAG_BIT
        codes *= self._keys[codes.view(np.int64)] == keys
        return codes

    def _at_first_slot(self, keys: np.ndarray, tags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        codes = self._matches(self._slots[self._position(keys)], keys, tags).astype(np.uint32)
        return codes, np.flatnonzero(codes == 0)

    def _add(self, rows: np.ndarray, keys: np.ndarray, tags: np.ndarray, codes: np.ndarray) -> list[np.ndarray]:
        """Find or add `rows`, for which there is room; sets their `codes` and returns the rows added, in order."""
        key, tag, added = keys[rows], tags[rows], []
        position = self._position(key)
        while len(rows):
            free = np.flatnonzero(self._slots[position] == 0)
            if len(free):
                # Every row marks its free slot with its number; of several in one slot the last one stays.
                marks = (free + 1).astype(np.uint64)
                self._slots[position[free]] = marks
                won = free[self._slots[position[free]] == marks]
                self._slots[position[won]] = tag[won] | self._new_codes(key[won])
                added.append(rows[won])
            code = self._matches(self._slots[position], key, tag)
            codes[rows] = code
            on = np.flatnonzero(code == 0)
            rows, key, tag = rows[on], key[on], tag[on]
            position = (position[on] + 1) & (len(self._slots) - 1)
        return added

    def _new_codes(self, keys: np.ndarray) -> np.ndarray:
        first, self.num_tokens = self.num_tokens + 1, self.num_tokens + len(keys)
        self._keys = with_room(self._keys, self.num_tokens + 1)
        self._keys[first : self.num_tokens + 1] = keys
        return np.arange(first, self.num_tokens + 1, dtype=np.uint64)

    def _grow(self) -> None:
        entries = self._slots[self._slots != 0]
        self._slots = np.zeros(len(self._slots) * (4 if len(self._slots) < 1 << 20 else 2), np.uint64)
        self._place(entries)

    def _place(self, entries: np.ndarray) -> None:
        """Put distinct entries into slots, a chunk at a time."""
        for start in range(0, len(entries), _CHUNK):
            part = entries[start : start + _CHUNK]
            position = self._position(self._keys[part & ~_TAG])
            while len(part):
                free = self._slots[position] == 0
                self._slots[position[free]] = part[free]
                left = self._slots[position] != part
                part, position = part[left], (position[left] + 1) & (len(self._slots) - 1)


def with_room(values: np.ndarray, size: int) -> np.ndarray:
    """`values` with at least `size` elements, zeros added in growing steps."""
    if size <= len(values):
        return values
    return np.concatenate([values, np.zeros(max(size - len(values), len(values) // 2), values.dtype)])
