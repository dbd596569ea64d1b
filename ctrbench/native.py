# SPDX-License-Identifier: Apache-2.0
"""The C functions of `csrc`, called through ctypes on the memory of tensors.

They are compiled when the package is installed. Without a C compiler it installs all the same, and whoever asks here finds
that they are missing and does the same with torch. They share torch's threads, as many as `torch.get_num_threads()` says.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from typing import Any

from torch import Tensor

# Of csrc/interface.c.
INTERFACE = 3
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Layer(ctypes.Structure):
    """`Layer` of crosslayer.c."""

    _fields_ = (
        *((name, _INT) for name in ("rows", "half", "heads", "threads", "is_training")),
        *((name, _FLOAT) for name in ("eps", "factor", "batch_eps", "momentum")),
        *((name, _POINTER) for name in ("mean", "rstd", "gain", "shift", "running_mean", "running_var")),
        *((name, _POINTER) for name in ("weight", "bias", "b", "x", "anchor", "product", "kept")),
    )


class Gradients(ctypes.Structure):
    """`Gradients` of crosslayer.c."""

    _fields_ = tuple((name, _POINTER) for name in ("dx", "danchor", "dproduct", "parameters"))


_LAYER = ctypes.POINTER(Layer)
_ARGUMENTS: dict[str, list[Any]] = {
    "cross_forward": [_LAYER, _POINTER],
    "cross_backward": [_LAYER, _POINTER, ctypes.POINTER(Gradients)],
    "draw_mask": [_POINTER, _INT, ctypes.c_uint64, ctypes.c_uint8, ctypes.c_uint64, _INT],
    "squared_norms": [*[_POINTER] * 2, *[_INT] * 2, _POINTER],
    "scatter_rows": [*[_POINTER] * 4, *[_INT] * 4],
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where there are none, they do not run here or are of another version."""
    found = importlib.util.find_spec("ctrbench._native")
    if found is None or found.origin is None:
        return None
    try:
        loaded = ctypes.CDLL(found.origin)
        if loaded.native_interface() != INTERFACE:
            return None
        for name, arguments in _ARGUMENTS.items():
            getattr(loaded, name).argtypes = arguments
    except (OSError, AttributeError):
        return None
    return loaded


def call(name: str, *arguments: Any) -> None:
    """Call a function; tensors must be contiguous, of the type that it expects, and stay alive meanwhile.

    Raises:
        MemoryError: it could not get memory for its sums.
    """
    functions = library()
    assert functions is not None
    if getattr(functions, name)(*(address(x) if isinstance(x, Tensor) else x for x in arguments)):
        raise MemoryError(f"not enough memory for {name}")


def address(tensor: Tensor | None) -> int | None:
    """Where the elements of a tensor lie."""
    return None if tensor is None else tensor.data_ptr()
