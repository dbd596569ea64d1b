# SPDX-License-Identifier: Apache-2.0
"""YAML as configurations need it: numbers, names, duplicates, tags, and a dump that reads back the same."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Any

import pytest

from ctrbench.errors import ConfigError
from ctrbench.yamlfile import dump_yaml, load_yaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1.e-3", 0.001),
        ("1E5", 100_000.0),
        ("-2e3", -2000.0),
        (".5", 0.5),
        ("5e-1", 0.5),
        ("1_000", 1000),
        ("3", 3),
        ("-.inf", -math.inf),
        ("'1e-3'", "1e-3"),
        ("e3", "e3"),
        ("1e", "1e"),
        ("1e-3x", "1e-3x"),
        ("^", "^"),
        ("None", "None"),
        ("null", None),
        ("", None),
        ("true", True),
        ("!!python/tuple [8, [9]]", (8, [9])),
        ("[!!python/tuple [a, b], c]", [("a", "b"), "c"]),
        ("!!python/tuple []", ()),
    ],
)
def test_scalars_and_tuples(text: str, value: Any) -> None:
    parsed = parse_yaml(text, "x")
    assert parsed == value and type(parsed) is type(value)


def test_nan() -> None:
    assert math.isnan(parse_yaml(".nan", "x"))


def test_keys_are_the_texts_that_stand_there() -> None:
    text = "001: 1\non: 2\n1e-3: 3\n1.50: 4\n2020-01-01: 5\n'quoted': 6\n!!str 07: 7\n"
    assert list(parse_yaml(text, "x")) == ["001", "on", "1e-3", "1.50", "2020-01-01", "quoted", "07"]


def test_merge_keys() -> None:
    text = """
a: &a {x: 1, y: 1}
b: &b {<<: *a, x: 2, z: {w: 1}}
c: {v: 0, <<: *b, y: 3}
d: {<<: [*a, *b]}
e: {<<: {x: 5}, y: 6}
"""
    parsed = parse_yaml(text, "x")
    assert parsed["b"] == {"x": 2, "y": 1, "z": {"w": 1}}
    assert parsed["c"] == {"v": 0, "x": 2, "y": 3, "z": {"w": 1}}
    assert parsed["d"] == {"x": 1, "y": 1, "z": {"w": 1}}  # the first of a list wins
    assert parsed["e"] == {"x": 5, "y": 6}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "x: line 3: duplicate key 'a'"),
        ("a:\n  b: 1\n  b: 1", "x: line 3: duplicate key 'b'"),
        ("a: {b: 1, 'b': 2}", "x: line 1: duplicate key 'b'"),
        ("a:\n- {b: 1}\n- {1: 1, 1: 2}", "x: line 3: duplicate key '1'"),
        ("a: {<<: {b: 1, b: 2}}", "x: line 1: duplicate key 'b'"),
        ("? [a]\n: 1", "x: line 1: a key must be a plain name"),
        ("? {a: 1}\n: 1", "x: line 1: a key must be a plain name"),
        ("a: 1\nnull: 2", "x: line 2: a key must be a plain name"),
        ("a: {<<: {[b]: 1}}", "x: line 1: a key must be a plain name"),
        ("<<: 3", "x: line 1: expected a mapping or list of mappings for merging, but found scalar"),
        ("<<: [3]", "x: line 1: expected a mapping for merging, but found scalar"),
        ("!!map [1]", "x: line 1: expected a mapping"),
        ("a: !!python/tuple 3", "x: line 1: expected a sequence node, but found scalar"),
        ("a: !!python/object/apply:os.system [ls]", "x: line 1: could not determine a constructor for the tag "),
        ("a: !!python/name:os.system", "x: line 1: could not determine a constructor for the tag "),
        ("\na: !mine 3", "x: line 2: could not determine a constructor for the tag '!mine'"),
        ("a: 1\n---\nb: 1", "x: line 2: expected a single document in the stream, but found another document"),
        ("a: [1", "x: line 1: expected ',' or ']', but got '<stream end>'"),
        ("a: *b", "x: line 1: found undefined alias 'b'"),
        ("a: &b [*b]", "x: line 1: found unconstructable recursive node"),
        ("a: 1\n\tb: 2", "x: line 2: found character '\\t' that cannot start any token"),
        ("a: \x00", "x: not valid YAML: unacceptable character #x0000: special characters are not allowed"),
        ("a: 2020-13-01", "x: not valid YAML: month must be in 1..12"),
        ("a: !!bool maybe", "x: not valid YAML: a value does not fit its tag"),
        ("a: !!timestamp now", "x: not valid YAML: a value does not fit its tag"),
        ("a: !!int three", "x: not valid YAML: invalid literal for int() with base 10: 'three'"),
        ("[" * 700, "x: not valid YAML: maximum recursion depth exceeded"),
    ],
)
def test_what_is_wrong_is_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "x")
    assert str(caught.value).startswith(message) and len(str(caught.value).splitlines()) == 1


def test_load_yaml(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("Größe: 1e-3\n", encoding="utf-8")
    assert load_yaml(path) == {"Größe": 0.001}
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")  # as Windows editors write it
    assert load_yaml(path) == {"a": 1, "b": 2}
    path.write_text("# nothing but a comment\n")
    assert load_yaml(path) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\nb: \xe9\n", r"a\.yaml: not UTF-8 text \(byte 8\)$"),
        (b"- a\n- b\n", r"a\.yaml: must hold a mapping of sections, got list$"),
        (b"text\n", r"a\.yaml: must hold a mapping of sections, got str$"),
        (b"a: 1\na: 2\n", r"a\.yaml: line 2: duplicate key 'a'$"),
    ],
)
def test_load_yaml_refuses(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_yaml(tmp_path / "a.yaml")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file or directory$"):
        load_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory$"):
        load_yaml(tmp_path)


LIKE_NUMBERS = ["1e-3", "1.e-3", "-1E5", ".5", "1.", "3", "0x1F", "1_000", "12:30:45", "2020-01-01", ".inf", ".nan"]
LIKE_OTHERS = ["on", "No", "null", "~", "", "a: b", "- a", "#", "!!x", "*", "&a", "%", "'", '"', "<<", "=", "|"]


@pytest.mark.parametrize("value", [*LIKE_NUMBERS, *LIKE_OTHERS, "^", " a ", "a\nb", "\t", "é"])
def test_dump_reads_back_as_the_same_text(value: str) -> None:
    assert parse_yaml(dump_yaml({"k": value, "l": [value], value or "empty": 1}), "x")["k"] == value
    assert parse_yaml(dump_yaml([value]), "x") == [value]


@pytest.mark.parametrize(
    "value",
    [1e-3, 1e-05, 1e16, 1e22, 0.1 + 0.2, -0.0, math.inf, -math.inf, 5e-324, 1.0, 7, -7, 2**63, True, None],
)
def test_dump_reads_back_as_the_same_number(value: Any) -> None:
    parsed = parse_yaml(dump_yaml({"k": value}), "x")["k"]
    assert repr(parsed) == repr(value)


def test_dump_keeps_order_and_nesting() -> None:
    value = {"z": [1, [2.5, "a"], {"y": {}, "x": []}], "a": {"1": None}, "d": datetime.date(2024, 1, 2)}
    text = dump_yaml(value)
    parsed = parse_yaml(text, "x")
    assert parsed == value and list(parsed) == ["z", "a", "d"]


def test_aliases_that_unfold_to_more_than_fits() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(
        ConfigError, match=r"^x: its aliases \(\*name\) unfold to more than 1,000,000 values: write out"
    ):
        parse_yaml("\n".join(lines), "x")
    for text in ("a: &a [1, *a]", "a: &a {b: *a}"):
        with pytest.raises(ConfigError, match="recursive node"):
            parse_yaml(text, "x")
    assert parse_yaml("a: &a [1, 2]\nb: [*a, *a]", "x") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}
