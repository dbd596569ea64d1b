# SPDX-License-Identifier: Apache-2.0
"""Vocabularies with FuxiCTR's ids, built and applied without Python per row.

Id 0 is padding, tokens count from 1 and the last id is out-of-vocabulary (OOV). Strings are numbered by falling count,
then by code point; numbers by value. A null is an unknown token and encodes as OOV.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl

from ctrbench.errors import DataError
from ctrbench.storage import smallest_int

PAD, OOV = "__PAD__", "__OOV__"
COUNT, TOKEN = "count", "token"
_JSON_TOKENS = 1 << 18  # tokens of feature_vocab.json that are made text at once
_NEEDS_NO_ESCAPE = r"^[ !#-\[\]-~]*$"


class Vocabulary:
    """Token -> id.

    Args:
        tokens: distinct tokens: String, Int64 or Float64.
        ids: their ids, aligned (0 is padding).
        remap: False when the ids are the tokens themselves.
    """

    def __init__(self, tokens: pl.Series, ids: np.ndarray, remap: bool = True):
        self.tokens = tokens
        self.ids = ids.astype(np.int64)
        self.remap = remap
        self.oov = int(self.ids.max(initial=0)) + 1

    @property
    def size(self) -> int:
        """Largest id + 1: the rows of the embedding table."""
        return max(int(self.ids.max(initial=0)), self.oov) + 1

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """The smallest type that holds every id."""
        return smallest_int(self.size)

    @classmethod
    def fit(
        cls, counts: pl.DataFrame, *, min_count: int, na_value: Any, remap: bool, where: str, num_distinct: int
    ) -> Vocabulary:
        """Number the tokens of `counts` (columns token, count).

        Args:
            counts: from `Interner.counts`, of the training split.
            min_count: rarer tokens are left out.
            na_value: the token of missing values, left out too.
            remap: False keeps int(token) as the id.
            where: file and column, for error messages.
            num_distinct: tokens before rare ones were left out, for error messages.

        Raises:
            DataError: no token is left, or one collides with a reserved name or (remap False) is no positive integer.
        """
        is_text = counts.schema[TOKEN] == pl.String
        if is_text:
            reserved = counts.filter(pl.col(TOKEN).is_in([PAD, OOV]))
            if reserved.height:
                raise DataError(f"{where} holds the reserved token '{reserved[TOKEN][0]}': rename it in the data")
        kept = counts.filter(pl.col(COUNT) >= min_count)
        if is_text == isinstance(na_value, str):
            kept = kept.filter(pl.col(TOKEN) != na_value)
        if not kept.height:
            raise DataError(
                f"{where}: none of its {num_distinct} distinct tokens occurs min_categr_count={min_count} times "
                "(missing values do not count): lower min_categr_count or set the column active: false"
            )
        order = kept.sort([COUNT, TOKEN], descending=[True, False]) if is_text else kept.sort(TOKEN)
        tokens = order[TOKEN]
        if remap:
            return cls(tokens, np.arange(1, len(tokens) + 1))
        ids = tokens.cast(pl.Int64, strict=False)
        bad = ids.is_null() | (ids < 0) | (ids >= 2**31 - 1)
        if bad.any():
            raise DataError(
                f"{where} has remap: false, but token {tokens.filter(bad)[0]!r} is no integer from 0 to 2^31-2: "
                "use remap: true"
            )
        return cls(tokens, ids.to_numpy(), remap=False)

    def merge(self, other: Vocabulary) -> None:
        """Add the tokens of `other` that are new, numbered from the OOV id on; OOV moves to the end."""
        new = ~other.tokens.is_in(self.tokens.implode())
        count = int(new.sum())
        if count:
            self.tokens = pl.concat([self.tokens, other.tokens.filter(new)])
            ids = np.arange(self.oov, self.oov + count) if other.remap else other.ids[new.to_numpy()]
            self.ids = np.concatenate([self.ids, ids])
            self.oov = int(self.ids.max()) + 1

    def expand(self, keys: pl.Series) -> None:
        """Append unknown `keys` after OOV, in their order; OOV stays, as it marks where pretrained rows begin."""
        keys = keys.unique(maintain_order=True)
        keys = keys.filter(~keys.is_in(self.tokens.implode()))
        first = self.size
        self.tokens = pl.concat([self.tokens, keys])
        self.ids = np.concatenate([self.ids, np.arange(first, first + len(keys))])

    def to_dict(self) -> dict[Any, int]:
        """`{token: id}` in the order of ids, reserved tokens included: an entry of feature_vocab.json."""
        pairs = dict(zip(self.tokens.to_list(), self.ids.tolist(), strict=True)) | {PAD: 0, OOV: self.oov}
        return dict(sorted(pairs.items(), key=lambda pair: pair[1]))

    def json_pieces(self) -> Iterator[str]:
        """The text of `json.dumps(self.to_dict())` in pieces, without Python per token."""
        if not len(self.tokens) or (self.tokens.dtype == pl.String and self.tokens.is_in([PAD, OOV]).any()):
            yield json.dumps(self.to_dict())  # pretrained keys may be called so
            return
        ids = np.concatenate([self.ids, [0, self.oov]])
        order = np.argsort(ids, kind="stable")
        for start in range(0, len(order), _JSON_TOKENS):
            chosen = order[start : start + _JSON_TOKENS]
            reserved = chosen >= len(self.tokens)
            keys = _json_keys(self.tokens.gather(np.where(reserved, 0, chosen)))
            names = [f'"{(PAD, OOV)[i - len(self.tokens)]}"' for i in chosen[reserved].tolist()]
            keys = keys.scatter(np.flatnonzero(reserved), names)
            pairs = pl.select(keys + ": " + pl.Series(ids[chosen]).cast(pl.String)).to_series()
            yield ("{" if start == 0 else ", ") + pairs.str.join(", ").item()
        yield "}"


def _json_keys(tokens: pl.Series) -> pl.Series:
    """Tokens as JSON object keys, quotation marks included."""
    if tokens.dtype == pl.Float64:
        return pl.Series([json.dumps({value: 0})[1:-4] for value in tokens.to_list()], dtype=pl.String)
    if tokens.dtype != pl.String:
        return '"' + tokens.cast(pl.String) + '"'
    odd = (~tokens.str.contains(_NEEDS_NO_ESCAPE)).arg_true()
    keys = '"' + tokens + '"'
    return keys.scatter(odd, [json.dumps(token) for token in tokens.gather(odd).to_list()]) if len(odd) else keys


def pad_sequences(ids: np.ndarray, lengths: np.ndarray, max_len: int, padding: str) -> np.ndarray:
    """Lay concatenated sequences out as rows padded with 0.

    Args:
        ids: all sequences one after the other, (sum of lengths,).
        lengths: (n,).
        max_len: width of the result; longer sequences lose what lies on the padding side.
        padding: "pre" keeps the last `max_len` ids, right-aligned; "post" the first, left-aligned.

    Returns:
        (n, max_len), of the type of `ids`.
    """
    rows = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum(lengths) - lengths
    position = np.arange(len(ids)) - np.repeat(starts, lengths)
    if padding == "pre":
        position += max_len - np.repeat(lengths, lengths)
        kept = position >= 0
    else:
        kept = position < max_len
    padded = np.zeros((len(lengths), max_len), ids.dtype)
    padded[rows[kept], position[kept]] = ids[kept]
    return padded


def load_pretrained_keys(path: Path, dtype: pl.DataType, pretrain_dim: int | None, where: str) -> pl.Series:
    """The `key` array of a pretrained embedding file (.h5, .npz or .parquet with arrays key and value) as tokens.

    Raises:
        DataError: the file is missing, of another format, or its arrays do not fit each other or `pretrain_dim`.
    """
    try:
        keys, shape = _read_pretrained(path)
    except FileNotFoundError:
        raise DataError(f"{where}: pretrained_emb: {path} does not exist") from None
    except (OSError, KeyError, ValueError, pl.exceptions.PolarsError) as error:
        raise DataError(
            f"{where}: pretrained_emb: {path} is not a readable .h5, .npz or .parquet file "
            f"with 'key' and 'value' ({error})"
        ) from None
    if len(shape) != 2 or shape[0] != len(keys):
        raise DataError(f"{where}: pretrained_emb: {path}: {len(keys)} keys do not fit values of shape {shape}")
    if pretrain_dim is not None and shape[1] != pretrain_dim:
        raise DataError(f"{where}: pretrained_emb: {path}: values are {shape[1]} wide, pretrain_dim is {pretrain_dim}")
    tokens = keys.cast(dtype, strict=False)
    if tokens.null_count():
        raise DataError(f"{where}: pretrained_emb: {path}: key {keys.filter(tokens.is_null())[0]!r} is not {dtype}")
    return tokens


def _read_pretrained(path: Path) -> tuple[pl.Series, tuple[int, ...]]:
    if path.suffix == ".h5":
        with h5py.File(path, "r") as file:
            keys, shape = file["key"][:], file["value"].shape
    elif path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            keys, shape = arrays["key"], arrays["value"].shape
    elif path.suffix == ".parquet":
        frame = pl.read_parquet(path, columns=["key", "value"])
        width = frame["value"].cast(pl.List(pl.Float64)).list.len()
        if width.n_unique() > 1:
            raise ValueError("values differ in width")
        return frame["key"], (frame.height, int(width[0]) if frame.height else 0)
    else:
        raise ValueError(f"unknown ending '{path.suffix}'")
    if keys.dtype.kind in "OS":
        keys = np.array([key.decode() if isinstance(key, bytes) else str(key) for key in keys.tolist()])
    return pl.Series(keys.tolist()), tuple(shape)
