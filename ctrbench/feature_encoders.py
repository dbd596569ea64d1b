# SPDX-License-Identifier: Apache-2.0
"""The feature encoders that a configuration or a feature map may name.

FuxiCTR evaluates the `feature_encoder` strings of a feature map as Python. Here each one is parsed against a whitelist
when a column is configured and when a map is loaded, so that no other string ever reaches that evaluation.
"""

from __future__ import annotations

import ast
from typing import Any

from ctrbench.errors import did_you_mean
from ctrbench.yamlfile import shown

# Callable -> the types of its positional arguments and of its keyword arguments.
_ENCODERS: dict[str, tuple[tuple[type, ...], dict[str, type]]] = {
    "layers.MaskedAveragePooling": ((), {}),
    "layers.MaskedSumPooling": ((), {}),
    "layers.KMaxPooling": ((int, int), {}),
    "nn.Linear": ((int, int), {"bias": bool}),
    "nn.ReLU": ((), {}),
    "nn.Sigmoid": ((), {}),
    "nn.Tanh": ((), {}),
    "nn.Identity": ((), {}),
    "nn.Dropout": ((float,), {}),
}


def feature_encoder_problem(encoder: object) -> str | None:
    """Why `encoder` (a string or a list of strings) is not on the whitelist, or None when all of it is."""
    for text in encoder if isinstance(encoder, list) else [encoder]:
        if not isinstance(text, str) or not _is_allowed_encoder(text):
            name = text.partition("(")[0].strip() if isinstance(text, str) else ""
            hint = did_you_mean(name, _ENCODERS) if name not in _ENCODERS else " (check its arguments)"
            return f"feature_encoder {shown(text)} is not allowed{hint}; allowed are {_allowed_encoders()}"
    return None


def _allowed_encoders() -> str:
    return ", ".join(
        f"{name}({', '.join([t.__name__ for t in args] + [f'{k}={t.__name__}' for k, t in kwargs.items()])})"
        for name, (args, kwargs) in _ENCODERS.items()
    )


def _is_allowed_encoder(text: str) -> bool:
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
        return False
    if not isinstance(call.func.value, ast.Name):
        return False
    name = f"{call.func.value.id}.{call.func.attr}"
    if name not in _ENCODERS:
        return False
    positional, keywords = _ENCODERS[name]
    optional = name == "nn.Dropout"
    if len(call.args) != len(positional) and not (optional and not call.args):
        return False
    values = list(zip(call.args, positional, strict=False))
    values += [(k.value, keywords[k.arg]) for k in call.keywords if k.arg in keywords]
    return len(values) == len(call.args) + len(call.keywords) and all(_is_literal(node, t) for node, t in values)


def _is_literal(node: ast.expr, wanted: type) -> bool:
    if not isinstance(node, ast.Constant):
        return False
    value: Any = node.value
    if wanted is float:
        return type(value) in (int, float) and 0 <= value < 1
    return isinstance(value, int) and (wanted is bool or value > 0) and type(value) is wanted
