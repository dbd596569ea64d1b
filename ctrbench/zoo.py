# SPDX-License-Identifier: Apache-2.0
"""Model folders: `<folder>/src/` holds a model class, `<folder>/config/` its experiments.

Folders are found by path, never by an import name: the fuxictr wheel installs a top-level package `model_zoo` too.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fuxictr.pytorch.models import BaseModel
from fuxictr.pytorch.torch_utils import get_loss
from torch import nn

from ctrbench.errors import ConfigError, did_you_mean
from ctrbench.files import sha256_of_file, sha256_of_value


def load_model_class(folder: Path, name: str) -> type[nn.Module]:
    """The class `name` of the package `<folder>/src`.

    Raises:
        ConfigError: there is no such folder or class, or its code does not import (with the error and its place).
    """
    init = folder / "src" / "__init__.py"
    if not init.is_file():
        raise ConfigError(f"{folder}: not a model folder, it has no src/__init__.py")
    package = _import_package(init)
    found = getattr(package, name, None)
    if inspect.ismodule(found):  # `from .src import X` in FuxiCTR's folders may name the module
        found = getattr(found, name, None)
    if not inspect.isclass(found):
        classes = [n for n, c in vars(package).items() if inspect.isclass(c)]
        raise ConfigError(
            f"{init}: has no model '{name}'{did_you_mean(name, classes)}; it has {', '.join(sorted(classes)) or 'none'}"
        )
    if not issubclass(found, nn.Module):
        raise ConfigError(f"{init}: '{name}' is not a model: it must derive from fuxictr.pytorch.models.BaseModel")
    return found


def _import_package(init: Path) -> Any:
    # The name carries the path, so that two folders of one name do not meet in sys.modules.
    name = f"ctrbench_zoo_{init.parent.parent.name}_{hashlib.sha1(str(init.resolve()).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(init.parent)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        for imported in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
            del sys.modules[imported]
        what = error.msg if isinstance(error, SyntaxError) else error
        raise ConfigError(
            f"{_place(error, init)}: the model does not import: {type(error).__name__}: {what}"
        ) from error
    return module


def _place(error: Exception, init: Path) -> str:
    """`file:line` in the model folder that an import failed at, not the one in the import machinery or a library."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(init.parent)]
    frame = (own or frames)[-1]
    return f"{frame.filename}:{frame.lineno}"


def source_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of a model folder's code."""
    files = sorted((folder / "src").rglob("*.py"))
    return sha256_of_value([[file.relative_to(folder).as_posix(), sha256_of_file(file)] for file in files])


def model_keys(model_class: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """The configuration keys that the constructors of a model class and its bases name."""
    keys: dict[str, inspect.Parameter] = {}
    for base in reversed(model_class.__mro__):
        if "__init__" in vars(base) and issubclass(base, nn.Module) and base is not nn.Module:
            for parameter in inspect.signature(base.__init__, eval_str=False).parameters.values():
                if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                    keys[parameter.name] = parameter
    for internal in ("self", "feature_map", "model_id", "gpu"):
        keys.pop(internal, None)
    return keys


def build_model(model_class: type[nn.Module], feature_map: Any, params: Mapping[str, Any], where: str) -> nn.Module:
    """Construct a model on its device.

    The trainer makes the optimizer, so `BaseModel.compile` only records what the model asked for. A class that overrides
    `compile` keeps its own.

    Args:
        model_class: from `load_model_class`.
        feature_map: the fields.
        params: constructor keywords, FuxiCTR's (`optimizer`, `loss`, `metrics`, `gpu`, ...) included.
        where: file and section of the configuration, for the error message.

    Raises:
        ConfigError: the constructor refuses a value.
    """
    if model_class.compile is BaseModel.compile:
        model_class = type(
            model_class.__name__, (model_class,), {"compile": _record_loss, "__module__": model_class.__module__}
        )
    try:
        return model_class(feature_map, **params)
    except (ValueError, LookupError, TypeError, RuntimeError, AssertionError, ArithmeticError, OSError) as error:
        raise ConfigError(f"{where}: {model_class.__name__}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What a constructor objects to, in one line; ValueErrors and assertions are written for the user."""
    if isinstance(error, KeyError):
        text = str(error.args[0]) if error.args else ""
        return text if " " in text else f"missing key {text!r}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = (str(error).strip().splitlines() or [""])[0]
    is_written = text and isinstance(error, ValueError | AssertionError | NotImplementedError)
    return text if is_written else f"{type(error).__name__}: {text}".removesuffix(": ")


def _record_loss(self: Any, optimizer: str, loss: Any, lr: float) -> None:
    self.loss_fn = get_loss(loss)
    self.optimizer = None
