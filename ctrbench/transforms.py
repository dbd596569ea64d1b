# SPDX-License-Identifier: Apache-2.0
"""The named functions that `preprocess` may call, as polars expressions (those of FuxiCTR's dataset processors)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

from ctrbench.errors import did_you_mean

_CALL = re.compile(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*")


def _copy_from(source: pl.Expr) -> pl.Expr:
    return source


def _convert_to_bucket(source: pl.Expr) -> pl.Expr:
    """Criteo counts: floor(ln(v)^2) above 2, else v without its fraction."""
    value = source.cast(pl.Float64, strict=False)
    return pl.when(value > 2).then(value.log().pow(2).floor()).otherwise(value).cast(pl.Int32, strict=False)


def _date(source: pl.Expr) -> pl.Expr:
    return source.cast(pl.String).str.slice(0, 6).str.to_date("%y%m%d", strict=False)


def _convert_hour(source: pl.Expr) -> pl.Expr:
    return source.cast(pl.String).str.slice(6, 2).cast(pl.Int32, strict=False)


def _convert_weekday(source: pl.Expr) -> pl.Expr:
    """0 (Sunday) to 6 (Saturday)."""
    return (_date(source).dt.weekday() % 7).cast(pl.Int32)


def _convert_weekend(source: pl.Expr) -> pl.Expr:
    return (_date(source).dt.weekday() >= 6).cast(pl.Int32)


def _extract_country_code(source: pl.Expr) -> pl.Expr:
    """The first two letters of an ISRC."""
    return source.cast(pl.String).str.slice(0, 2).fill_null("")


def _bucketize_age(source: pl.Expr) -> pl.Expr:
    """KKBox: decades "1" (1..10) to "6" (51..60), "7" above, nothing outside 1..95."""
    age = source.cast(pl.Float64, strict=False)
    text = source.cast(pl.String)
    unreadable = age.is_null() & text.is_not_null() & (text.str.strip_chars() != "")
    decade = (age / 10).ceil().clip(1, 7).cast(pl.Int32, strict=False)
    known = pl.when(age.is_between(1, 95)).then(decade.cast(pl.String)).otherwise(pl.lit(""))
    return pl.when(unreadable).then(pl.lit(None, pl.String)).when(age.is_null()).then(pl.lit("")).otherwise(known)


# Name -> (function, the column it reads when none is given (None: the column itself), what its values must be).
_FUNCTIONS: dict[str, tuple[Callable[[pl.Expr], pl.Expr], str | None, str]] = {
    "copy_from": (_copy_from, None, "a value of the column's dtype"),
    "convert_to_bucket": (_convert_to_bucket, None, "a number"),
    "convert_hour": (_convert_hour, "hour", "a time as YYMMDDHH"),
    "convert_weekday": (_convert_weekday, "hour", "a time as YYMMDDHH"),
    "convert_weekend": (_convert_weekend, "hour", "a time as YYMMDDHH"),
    "extract_country_code": (_extract_country_code, None, "an ISRC"),
    "bucketize_age": (_bucketize_age, None, "a number"),
}


@dataclass(frozen=True)
class Transform:
    """One parsed `preprocess` value: a function by name and the column that it reads."""

    function: str
    source: str

    @property
    def expects(self) -> str:
        """What a source value must be, for error messages."""
        return _FUNCTIONS[self.function][2]

    @property
    def gives_integer(self) -> bool:
        """Whether the result is an integer whatever the source holds."""
        return self.function.startswith("convert_")

    def expression(self, source: pl.Expr) -> pl.Expr:
        """The function applied to `source`; null where a value cannot be understood."""
        return _FUNCTIONS[self.function][0](source)


def parse_preprocess(text: str, column: str) -> Transform | str:
    """Parse `name` or `name(column)` against the whitelist; a string is what is wrong with it."""
    match = _CALL.fullmatch(text)
    if match is None:
        return f"'{text}' is not a function name or name(column)"
    name, argument = match.groups()
    if name not in _FUNCTIONS:
        return f"unknown function '{name}'{did_you_mean(name, _FUNCTIONS)}; known are {', '.join(_FUNCTIONS)}"
    argument = (argument or "").strip()
    if name == "copy_from" and not argument:
        return "copy_from needs the column to copy, as copy_from(column)"
    return Transform(name, argument or _FUNCTIONS[name][1] or column)
