# SPDX-License-Identifier: Apache-2.0
"""Codes, counts and ids of tokens against plain dictionaries, in one generation and in several."""

from __future__ import annotations

import errno
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ctrbench.interning
from ctrbench.errors import CtrbenchError
from ctrbench.interning import Coded, Interner
from ctrbench.tokentable import TokenTable, hashed
from ctrbench.vocabulary import OOV, PAD, Vocabulary


def plain_codes(known: dict[Any, int], tokens: list[Any]) -> dict[Any, int]:
    """The numbering that a dictionary would give; only which tokens are the same is compared."""
    for token in tokens:
        known.setdefault(token, len(known))
    return known


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 2)), max_size=40), max_size=8))
def test_table_equals_a_dictionary_when_slots_collide(blocks: list[list[tuple[int, int, int]]]) -> None:
    table, known = TokenTable(8), {}
    for block in blocks:
        # Few distinct low bits crowd the slots; equal keys with different tags are different tokens, and so are equal
        # tags with different keys.
        keys = np.array([low + (high << 40) for low, high, _ in block], np.uint64)
        tags = np.array([(2 * tag + 1) << 32 for _, _, tag in block], np.uint64)
        absent = [token not in known for token in block]
        assert (table.find(keys, tags) == 0).tolist() == absent
        codes, new = table.find_or_add(keys, tags)
        expected_new = {token for token in block if token not in known}
        assert {block[row] for row in new} == expected_new and len(new) == len(expected_new)
        assert codes[new].tolist() == list(range(len(known) + 1, len(known) + 1 + len(new)))
        for row in new:
            known[block[row]] = int(codes[row])
        assert codes.tolist() == [known[token] for token in block]
        assert table.find(keys, tags).tolist() == codes.tolist()
    assert table.num_tokens == len(known)
    again = TokenTable.of(table.keys, table.tags())
    for (low, high, tag), code in known.items():
        key, mark = np.array([low + (high << 40)], np.uint64), np.array([(2 * tag + 1) << 32], np.uint64)
        assert again.find(key, mark)[0] == code


def test_table_grows_with_its_tokens_and_not_with_repeats() -> None:
    table = TokenTable()
    keys, tags = hashed(pl.Series(np.arange(300_000) % 7))
    table.find_or_add(keys, tags)
    assert table.num_tokens == 7 and len(table._slots) == 1 << 12
    keys, tags = hashed(pl.Series([f"t{i}" for i in range(200_000)]))
    codes, new = table.find_or_add(keys, tags)
    assert len(new) == 200_000 and sorted(codes) == list(range(8, 200_008))
    assert len(table._slots) <= 1 << 20


def blocks_of(dtype: str, generator: np.random.Generator) -> list[pl.Series]:
    blocks = []
    for size in (0, 1, 300, 2000, 2000, 700):
        numbers = (generator.random(size) ** 4 * 3000).astype(np.int64) - 20
        if dtype == "text":
            values = pl.Series(numbers).cast(pl.String) + pl.Series(
                ["é" * 20 if n % 3 else "" for n in numbers], dtype=pl.String
            )
        elif dtype == "near":
            values = pl.Series(numbers)
        elif dtype == "far":
            values = pl.Series(numbers * 10**15)
        else:
            values = pl.Series(numbers / 8 * np.where(numbers % 2, 1.0, -1.0))
        missing = pl.Series(generator.random(size) < 0.1)
        blocks.append(pl.select(pl.when(missing).then(None).otherwise(values)).to_series() if size > 500 else values)
    return blocks


@pytest.mark.parametrize("sealed", [(), (2,), (0, 2, 3, 3), (5,)], ids=str)
@pytest.mark.parametrize("dtype", ["text", "near", "far", "real"])
def test_interner_equals_a_dictionary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, sealed: tuple[int, ...]
) -> None:
    monkeypatch.setattr(ctrbench.interning, "_CHUNK", 250)  # several files of tokens
    generator, interner = np.random.default_rng(1), Interner(tmp_path, "column")
    blocks, coded, wanted = blocks_of(dtype, generator), [], Counter()
    for number, tokens in enumerate(blocks):
        counted: Any = [True, False, generator.random(len(tokens)) < 0.5][number % 3]
        coded.append(interner.add(tokens, counted))
        mask = np.full(len(tokens), counted) if isinstance(counted, bool) else counted
        wanted.update(token for token, counts in zip(tokens, mask, strict=True) if counts and token is not None)
        for _ in range(sealed.count(number)):
            interner.seal()
    counts, distinct = interner.counts(2)
    assert distinct == len(wanted)
    assert dict(counts.rows()) == {token: count for token, count in wanted.items() if count >= 2}
    # A vocabulary may lack tokens of the column and hold others (a shared one does).
    tokens = pl.concat(
        [counts["token"].sort()[::2], pl.Series(["other"] if dtype == "text" else [123456]).cast(counts["token"].dtype)]
    )
    vocabulary = Vocabulary(tokens, np.arange(1, len(tokens) + 1))
    missing = tokens[3]
    known = dict(zip(tokens.to_list(), vocabulary.ids.tolist(), strict=True)) | {missing: 0}
    ids = interner.ids(vocabulary, missing)
    for _ in range(2):  # generations may be asked for again
        for values, codes in zip(blocks, coded, strict=True):
            expected = [known.get(token, vocabulary.oov) for token in values]
            assert ids.of(codes).tolist() == expected
            assert ids.of(codes).dtype == vocabulary.id_dtype


def test_codes_have_the_smallest_type(tmp_path: Path) -> None:
    interner = Interner(tmp_path, "column")
    assert interner.add(pl.Series(range(255))).codes.dtype == np.uint8
    assert interner.add(pl.Series([255])).codes.dtype == np.uint16
    assert interner.add(pl.Series(range(70_000))).codes.dtype == np.uint32
    assert interner.add(pl.Series([1], dtype=pl.Int64)).codes.dtype == np.uint32


def test_zero_has_no_sign(tmp_path: Path) -> None:
    codes = Interner(tmp_path, "column").add(pl.Series([0.0, -0.0, 1.0])).codes
    assert codes[0] == codes[1] != codes[2]


def test_reserved_tokens_are_reported_however_rare(tmp_path: Path) -> None:
    for seal in (False, True):
        interner = Interner(tmp_path, f"column{seal}")
        interner.add(pl.Series(["a", "a", "b", PAD]))
        interner.add(pl.Series([OOV]), False)
        if seal:
            interner.seal()
        assert dict(interner.counts(2)[0].rows()) == {"a": 2, PAD: 1}


def test_no_token_at_all(tmp_path: Path) -> None:
    interner = Interner(tmp_path, "column")
    assert interner.counts(1)[0].rows() == []
    interner.add(pl.Series([None, None], dtype=pl.String))
    interner.add(pl.Series(["a"]), False)
    counts, distinct = interner.counts(1)
    assert counts.rows() == [] and distinct == 0 and counts.schema["token"] == pl.String


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    interner = Interner(tmp_path, "column")
    interner.add(pl.Series(["a"]))
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(CtrbenchError, match=r"column-0-keys.npy: the disk is full"):
        interner.seal()
    monkeypatch.setattr(pl.DataFrame, "write_ipc", full)
    monkeypatch.setattr(ctrbench.interning, "_CHUNK", 1)
    with pytest.raises(CtrbenchError, match=r"column-tokens-0-1.ipc: the disk is full"):
        interner.add(pl.Series(["b"]))


def test_text_of_a_block_is_not_kept_for_its_new_tokens(tmp_path: Path) -> None:
    interner = Interner(tmp_path, "column")
    tokens = pl.Series(["a long token of which the block holds many " + str(i % 10) for i in range(50_000)])
    interner.add(tokens)
    kept = interner._tokens[0][0]
    assert isinstance(kept, pl.Series) and kept.estimated_size() < 1000


@pytest.mark.parametrize("pieces", [1, 2, 3, 100])
def test_json_of_a_vocabulary(monkeypatch: pytest.MonkeyPatch, pieces: int) -> None:
    monkeypatch.setattr("ctrbench.vocabulary._JSON_TOKENS", pieces)
    texts = pl.Series(["a", 'quote"', "back\\", "line\n", "\x7f", "", "é", "😀", "~ !"])
    for tokens in (texts, pl.Series([3, -1, 5]), pl.Series([1.5, 0.0, 1e300]), pl.Series([], dtype=pl.Int64)):
        for ids in (np.arange(len(tokens)) + 1, np.arange(len(tokens)), np.arange(len(tokens))[::-1] * 2):
            vocabulary = Vocabulary(tokens, ids)
            assert "".join(vocabulary.json_pieces()) == json.dumps(vocabulary.to_dict())
    vocabulary = Vocabulary(pl.Series(["a", OOV]), np.array([1, 3]))
    assert "".join(vocabulary.json_pieces()) == json.dumps(vocabulary.to_dict())


def test_a_block_of_codes_has_no_lengths_unless_rows_are_lists() -> None:
    assert Coded(np.zeros(3, np.uint8), 0).lengths is None
