# SPDX-License-Identifier: Apache-2.0
"""Mutate configurations: keys, types, nesting, YAML syntax, encodings. Each validates, or is refused with a clear message."""

from __future__ import annotations

import copy
import random
import resource
import shutil
import signal
import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from soak_outcome import ROOT, Outcome, one_line, timed

from ctrbench.config import load_experiment
from ctrbench.errors import CtrbenchError
from ctrbench.yamlfile import dump_yaml, load_yaml

# Seconds after which a configuration counts as one that hangs.
PATIENCE = 30
# Address space that a model's constructor may take beyond what there is.
ROOM = 2 << 30
EXPERIMENTS = ("DCNv3_tiny", "SDCNv3_tiny", "QIN_tiny_mm", "DIN_tiny_mm")
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        3,
        2**31,
        2**63,
        10**30,
        0.0,
        -0.5,
        0.5,
        1.5,
        1e-300,
        1e308,
        float("inf"),
        float("nan"),
    ),
    *(
        "",
        " ",
        "x",
        "0",
        "-1",
        "1e-3",
        "true",
        "None",
        "null",
        "~",
        "[]",
        "a" * 5000,
        "\u202e\u0000\u0007",
        "ü€😀",
        "{{7*7}}",
    ),
    *(
        "../../x",
        "/dev/null",
        "/",
        "~",
        "*",
        "**",
        "[",
        "a**b",
        "%s%n",
        "${HOME}",
        "__import__('os')",
        "l1_l2(1,2)",
        "AUC",
    ),
    *([], [None], [[]], ["x"], [1, 2], [[1], [2]], {}, {"": 1}, {"x": {"y": 1}}, [{"name": "x"}], (1, 2), [True] * 50),
)


def soak(count: int, seed: int, folder: Path) -> Outcome:
    """Load so many mutated configurations, a third of those that validate with their model constructed.

    Args:
        count: how many.
        seed: of the mutations.
        folder: an empty one.
    """
    outcome = Outcome(
        "mutated configurations", "each validates or is refused by a clear message; no unknown key is accepted"
    )
    dice = random.Random(seed)
    with timed(outcome):
        for number in range(count):
            expid = dice.choice(EXPERIMENTS)
            config, unknown, what = _mutated(expid, folder / "config", dice)
            how, failure = _try(config, expid, unknown, is_built=number % 3 == 0)
            outcome.add(how, failure and f"config {number} ({what}): {failure}")
            shutil.rmtree(config)
    return outcome


def _try(config: Path, expid: str, unknown: str | None, is_built: bool) -> tuple[str, str | None]:
    zoo = ROOT / "model_zoo" / expid.split("_")[0]
    try:
        with _limited():
            experiment = load_experiment(config, expid, zoo, is_data_required=False)
            _ = experiment.config_hash, experiment.to_yaml()
            if is_built:
                from ctrbench.estimate import construct

                construct(experiment)
    except CtrbenchError as error:
        text = str(error)
        if not text.strip() or any(len(line) > 3000 or not line.strip() for line in text.splitlines()):
            return "failed", f"an unclear message: {text[:200]!r}"
        if unknown is not None and unknown not in text:
            return "failed", f"the unknown key '{unknown}' is not named: {text[:200]!r}"
        return "refused", None
    except TimeoutError:
        return "failed", f"hangs for {PATIENCE} s"
    except BaseException as error:  # a Rust panic is no Exception
        return "failed", one_line(error)
    return "valid", f"the unknown key '{unknown}' was accepted" if unknown is not None else None


@contextmanager
def _limited() -> Iterator[None]:
    """Neither more time nor much more memory than now; what wants more gets an error."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(PATIENCE)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def _mutated(expid: str, folder: Path, dice: random.Random) -> tuple[Path, str | None, str]:
    """A configuration folder, the unknown key in it if there is one, and what was done."""
    model_file = ROOT / "model_zoo" / expid.split("_")[0] / "config" / "model_config.yaml"
    dataset_id = load_yaml(model_file)[expid]["dataset_id"]
    dataset_file = ROOT / "config" / "dataset_config" / f"{dataset_id}.yaml"
    sections = load_yaml(model_file)
    trees = {
        "model_config.yaml": {name: sections[name] for name in ("Base", expid)},
        "dataset_config.yaml": {dataset_id: load_yaml(dataset_file)[dataset_id]},
    }
    name = dice.choice(list(trees))
    unknown, done = None, []
    kind = dice.choice(("tree", "tree", "unknown", "text", "both"))
    if kind == "unknown":
        unknown = _add_unknown(trees, name, dice)
        done.append(f"unknown {unknown}")
    elif kind != "text":
        for _ in range(dice.choice((1, 1, 1, 2, 4))):
            change = dice.choice(TREE_CHANGES)
            change(trees[name], dice)
            done.append(change.__name__)
    folder.mkdir()
    for file, tree in trees.items():
        content = dump_yaml(tree).encode("utf-8", "surrogatepass")
        if file == name and kind in ("text", "both"):
            change_text = dice.choice(TEXT_CHANGES)
            content = change_text(content, dice)
            done.append(change_text.__name__)
        (folder / file).write_bytes(content)
    return folder, unknown, f"{name}, {' '.join(done)}"


def _word(dice: random.Random) -> str:
    return "".join(dice.choices(string.ascii_lowercase, k=dice.randint(8, 12)))


def _add_unknown(trees: dict[str, Any], name: str, dice: random.Random) -> str:
    """Misspell a key that is there, or add one that nobody knows."""
    section = dice.choice(list(trees[name].values()))
    holders = [section, *(c for c in section.get("feature_cols", []) if isinstance(c, dict))]
    holder = dice.choice(holders)
    key = f"{dice.choice(list(holder))}_{_word(dice)}" if dice.random() < 0.5 else _word(dice)
    holder[key] = dice.choice([v for v in VALUES if not isinstance(v, str) or v.isprintable()])
    return key


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a tree."""
    found, queue = [], [tree]
    while queue:
        node = queue.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            found.append((node, key))
            queue.append(value)
    return found


def replace_value(tree: Any, dice: random.Random) -> None:
    node, key = dice.choice(_places(tree))
    node[key] = copy.deepcopy(dice.choice(VALUES))


def delete(tree: Any, dice: random.Random) -> None:
    node, key = dice.choice(_places(tree))
    del node[key]
    if not tree:
        tree["x"] = {}


def misspell(tree: Any, dice: random.Random) -> None:
    node, key = dice.choice([place for place in _places(tree) if isinstance(place[0], dict)])
    letters = list(key)
    letters[dice.randrange(len(letters))] = dice.choice(string.ascii_letters + " .:#-?*&!|>%@`\"'{}[]é\t")
    node["".join(letters)] = node.pop(key)


def wrap(tree: Any, dice: random.Random) -> None:
    node, key = dice.choice(_places(tree))
    node[key] = dice.choice(([node[key]], {"x": node[key]}, {str(key): node[key]}, [[node[key]]], (node[key],)))


def nest_deeply(tree: Any, dice: random.Random) -> None:
    node, key = dice.choice(_places(tree))
    for _ in range(dice.choice((5, 60))):
        node[key] = [node[key]] if dice.random() < 0.5 else {"a": node[key]}


def to_text(tree: Any, dice: random.Random) -> None:
    node, key = dice.choice(_places(tree))
    node[key] = str(node[key])


def swap(tree: Any, dice: random.Random) -> None:
    (a, i), (b, j) = dice.choice(_places(tree)), dice.choice(_places(tree))
    a[i], b[j] = copy.deepcopy(b[j]), copy.deepcopy(a[i])


def scale(tree: Any, dice: random.Random) -> None:
    numbers = [(n, k) for n, k in _places(tree) if isinstance(n[k], int | float) and not isinstance(n[k], bool)]
    if numbers:
        node, key = dice.choice(numbers)
        node[key] = node[key] * dice.choice((-1, 0, 0.5, 1.0, 10**20, float("inf")))


TREE_CHANGES: tuple[Callable[[Any, random.Random], None], ...] = (
    *(replace_value, replace_value, replace_value, delete, misspell, wrap, nest_deeply, to_text, swap, scale),
)


def cut(text: bytes, dice: random.Random) -> bytes:
    return text[: dice.randrange(len(text))]


def flip(text: bytes, dice: random.Random) -> bytes:
    changed = bytearray(text)
    for _ in range(dice.choice((1, 1, 3, 20))):
        changed[dice.randrange(len(changed))] = dice.randrange(256)
    return bytes(changed)


def put_in(text: bytes, dice: random.Random) -> bytes:
    """Something of YAML's, somewhere."""
    piece = dice.choice(_PIECES)
    at = dice.randrange(len(text))
    if dice.random() < 0.6:  # after a colon, where a value begins
        colons = [i for i in range(len(text)) if text[i : i + 2] == b": "]
        at = dice.choice(colons) + 2
    return text[:at] + piece + text[at:]


def other_encoding(text: bytes, dice: random.Random) -> bytes:
    decoded = text.decode("utf-8", "replace")
    encoding = dice.choice(("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-7"))
    return (decoded + "# ü\n").encode(encoding, "replace")


def repeat_line(text: bytes, dice: random.Random) -> bytes:
    lines = text.splitlines(keepends=True)
    at = dice.randrange(len(lines))
    return b"".join([*lines[:at], lines[at], *lines[at:]])


def indent(text: bytes, dice: random.Random) -> bytes:
    lines = text.splitlines(keepends=True)
    at = dice.randrange(len(lines))
    lines[at] = dice.choice((b"\t", b" ", b"   ", b"- ", b"? ")) + lines[at]
    return b"".join(lines)


def line_ends(text: bytes, dice: random.Random) -> bytes:
    return text.replace(b"\n", dice.choice((b"\r\n", b"\r", b"\n\n", b"\xe2\x80\xa8", b"\x85")))


def laughs(text: bytes, dice: random.Random) -> bytes:
    """A value that is small in the file and huge in full."""
    lines = [b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [b"a%d: &a%d [%s]" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 12)]
    places = [i for i in range(len(text)) if text[i : i + 2] == b": "]
    at = dice.choice(places) + 2
    return b"\n".join(lines) + b"\n" + text[:at] + b"*a11 #" + text[at:]


def documents(text: bytes, dice: random.Random) -> bytes:
    return dice.choice((text + b"---\n" + text, b"%YAML 9.9\n---\n" + text, text + b"...\n", b"--- !!map\n" + text))


_PIECES = (
    *(
        b"!!python/object/apply:os.getcwd []",
        b"!!python/name:os.system ",
        b"!!binary aGk= ",
        b"!!set {a, b} ",
        b"!!omap [a: 1] ",
    ),
    *(
        b"!!timestamp 2001-13-45 ",
        b"2001-01-01 ",
        b"!!int x ",
        b"!!float x ",
        b"!!bool maybe ",
        b"!!null x ",
        b"!local x ",
    ),
    *(
        b"&a ",
        b"*a ",
        b"&a [*a] ",
        b"<<: ",
        b"<<: *a\n",
        b"| ",
        b"> ",
        b"'",
        b'"',
        b"[",
        b"]",
        b"{",
        b"}",
        b", ",
        b": ",
        b"- ",
    ),
    *(
        b"# ",
        b"%",
        b"@",
        b"`",
        b"\x00",
        b"\x07",
        b"\xff",
        b"\xef\xbb\xbf",
        b"? ",
        b"!",
        b"0x1F ",
        b"0o17 ",
        b"1_000 ",
        b"1:30 ",
    ),
    *(
        b"[" * 2000,
        b"{a: " * 2000,
        b"a: " * 50,
        b"9" * 5000 + b" ",
        b"~ ",
        b"on ",
        b"yes ",
        b".inf ",
        b".nan ",
        b"1e400 ",
    ),
    *(
        b'"\\x41\\u0000\\ud800" ',
        b'"\\N\\_\\L" ',
        b"!!python/tuple [1, 2] ",
        b"!!python/tuple 3 ",
        b"!!str [a] ",
        b"!!seq {a: b} ",
    ),
)
TEXT_CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(
        put_in,
        put_in,
        put_in,
        put_in,
        cut,
        flip,
        flip,
        other_encoding,
        repeat_line,
        indent,
        line_ends,
        laughs,
        documents,
    ),
)
