# SPDX-License-Identifier: Apache-2.0
"""YAML as configurations need it: no objects from tags, no duplicate keys, and `1e-3` is a number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ctrbench.errors import ConfigError

# Keys that are names although YAML 1.1 reads them as something else, such as an expid 001 or a section called on.
_NAMES = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "timestamp"))
_MERGE = "tag:yaml.org,2002:merge"
# Values of a file with its aliases unfolded: a few lines can stand for more than fits memory.
MAX_VALUES = 1_000_000
_SHOWN = 100  # characters of a value in a message


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 floats, FuxiCTR's `!!python/tuple` (no other tag of Python's), and keys that are texts,
    each once.
    """

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put the entries that `<<` names in its place: a key may override a merged one, but not repeat its own."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in _NAMES:
                raise _problem("a key must be a plain name", key_node)
            if key_node.value in seen:
                raise _problem(f"duplicate key '{key_node.value}'", key_node)
            seen.add(key_node.value)
        super().flatten_mapping(node)
        node.value = list({key_node.value: (key_node, value) for key_node, value in node.value}.values())


_FLOAT = re.compile(
    r"""^(?:[-+]?(?:\d[\d_]*)(?:\.[\d_]*)?(?:[eE][-+]?\d+)
       |[-+]?(?:\d[\d_]*)\.[\d_]*
       |[-+]?\.\d[\d_]*(?:[eE][-+]?\d+)?
       |[-+]?\.(?:inf|Inf|INF)
       |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


def _problem(what: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)


def _mapping(loader: _Loader, node: yaml.Node) -> dict[str, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise _problem("expected a mapping", node)
    loader.flatten_mapping(node)
    return {key_node.value: loader.construct_object(value_node, deep=True) for key_node, value_node in node.value}


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes a text which `_Loader` would read as a number, and keeps tuples apart from lists."""


def _tuple(loader: _Loader, node: Any) -> tuple[Any, ...]:
    # FuxiCTR's models tell a tuple of fields, which they concatenate, from a list of them.
    return tuple(loader.construct_sequence(node, deep=True))


def _tuple_node(dumper: _Dumper, value: tuple[Any, ...]) -> yaml.Node:
    return dumper.represent_sequence(_TUPLE, value, flow_style=True)


_TUPLE = "tag:yaml.org,2002:python/tuple"
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Dumper.add_representer(tuple, _tuple_node)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor(_TUPLE, _tuple)


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text.

    Raises:
        ConfigError: one line with the source, the line number and what is wrong.
    """
    try:
        value = yaml.load(text, Loader=_Loader)  # derives from SafeLoader
        if _size(value, {}) > MAX_VALUES:
            raise ConfigError(
                f"{source}: its aliases (*name) unfold to more than {MAX_VALUES:,} values: write out what is meant"
            )
        return value
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        problem = error.problem or str(error)
        if problem.startswith("but "):  # the second half of a sentence
            problem = f"{error.context}, {problem}"
        raise ConfigError(f"{source}: {line}{problem}") from error
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid YAML: {str(error).splitlines()[0]}") from error
    except (AttributeError, KeyError) as error:  # PyYAML's own for `!!bool maybe`
        raise ConfigError(f"{source}: not valid YAML: a value does not fit its tag") from error


def _size(value: Any, known: dict[int, int]) -> int:
    """Values in a tree, those that aliases repeat counted each time."""
    if not isinstance(value, dict | list | tuple):
        return 1
    if id(value) not in known:
        known[id(value)] = 1 + sum(_size(v, known) for v in (value.values() if isinstance(value, dict) else value))
    return known[id(value)]


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; an empty file is an empty mapping.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8, or does not hold a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from error
    value = parse_yaml(text, str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold a mapping of sections, got {type(value).__name__}")
    return value


def shown(value: object) -> str:
    """A value as messages echo it after "got": its repr, cut where it is too long to help."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]} ..."


def shown_text(text: str) -> str:
    """A text as messages begin with it: control characters escaped, cut where it is too long to help."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 2 * _SHOWN else f"{text[: 2 * _SHOWN - 4]} ..."


def dump_yaml(value: Any) -> str:
    """YAML text with keys in the given order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)
