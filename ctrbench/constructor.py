# SPDX-License-Identifier: Apache-2.0
"""The keys that a constructor takes from `**kwargs` without naming them, read off its source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any


def keys_in_kwargs(function: Any) -> set[str]:
    """Keys that a function looks up in its `**kwargs`, itself or by handing them on to a class of its module.

    `kwargs["x"]`, `kwargs.get("x")`, `kwargs.pop("x")` and `"x" in kwargs` count, and what the constructors of classes
    called with `**kwargs` name.
    """
    return set(_keys(function, set()))


def _keys(function: Any, seen: set[Any]) -> Iterator[str]:
    if function in seen or not inspect.isfunction(function):
        return
    seen.add(function)
    variable = next((p.name for p in inspect.signature(function).parameters.values() if p.kind is p.VAR_KEYWORD), None)
    if variable is None:
        return
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):
        return  # defined where there is no source to read
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=str(key))) if name == variable:
                yield key
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id=name), attr="get" | "pop"), args=[ast.Constant(value=str(key)), *_]
            ) if name == variable:
                yield key
            case ast.Compare(left=ast.Constant(value=str(key)), comparators=[ast.Name(id=name)]) if name == variable:
                yield key
            case ast.Call(func=ast.Name(id=called), keywords=keywords) if _hands_on(keywords, variable):
                target = function.__globals__.get(called)
                if inspect.isclass(target) and inspect.isfunction(target.__init__):
                    parameters = inspect.signature(target.__init__).parameters.values()
                    yield from (p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
                    yield from _keys(target.__init__, seen)


def _hands_on(keywords: list[ast.keyword], variable: str) -> bool:
    return any(k.arg is None and isinstance(k.value, ast.Name) and k.value.id == variable for k in keywords)
