# SPDX-License-Identifier: Apache-2.0
"""Model folders: `<folder>/src/` holds a model class, `<folder>/config/` its experiments.

Folders are found by path, never by an import name: the fuxictr wheel installs a top-level package `model_zoo` too.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import inspect
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from fuxictr.pytorch.models import BaseModel
from fuxictr.pytorch.torch_utils import get_loss, get_optimizer
from torch import nn

from ctrbench.constructor import keys_in_kwargs
from ctrbench.errors import ConfigError, CtrbenchError, did_you_mean
from ctrbench.files import sha256_of_file, sha256_of_value

# An import changes what all threads share, sys.path and sys.modules.
_importing = threading.RLock()


def load_model_class(folder: Path, name: str) -> type[nn.Module]:
    """The class `name` of the package `<folder>/src`.

    Raises:
        ConfigError: there is no such folder or class, or its code does not import (with the error and its place).
    """
    init = folder / "src" / "__init__.py"
    if not init.is_file():
        raise ConfigError(f"{folder}: not a model folder, it has no src/__init__.py")
    with _importing:
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
    init = init.resolve()
    # The name carries the path, so that two folders of one name do not meet in sys.modules.
    name = f"ctrbench_zoo_{init.parent.parent.name}_{hashlib.sha1(str(init).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(init.parent)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _importable(init.parents[1], module):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        for imported in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
            del sys.modules[imported]
        what = error.msg if isinstance(error, SyntaxError) else str(error).replace(f"{name}.", "src.")
        remedy = ""
        if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith((name, "src.")):
            remedy = ": install the package that has it"
        raise ConfigError(
            f"{place(error, init.parent) or init}: the model does not import: {type(error).__name__}: {what}{remedy}"
        ) from error
    return module


@contextlib.contextmanager
def _importable(folder: Path, package: ModuleType) -> Iterator[None]:
    """Let code import as if run by the folder's own run_expid.py: `src` is the package, the folder is on the path.

    Afterwards nothing of that is left for another folder to meet.
    """
    before, hidden = set(sys.modules), {m: sys.modules.pop(m) for m in list(sys.modules) if _is_in(m, "src")}
    sys.modules["src"] = package
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [m for m in sys.modules if _is_in(m, "src") or m not in before]:
            file = getattr(sys.modules[name], "__file__", None)
            is_own = file is not None and Path(file).resolve().is_relative_to(folder)
            if _is_in(name, "src") or (is_own and not _is_in(name, package.__name__)):
                del sys.modules[name]
        sys.modules.update(hidden)


def _is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def place(error: BaseException, folder: Path) -> str | None:
    """`file:line` in the model folder's code that an error comes from, not the one in a library; None if it is not."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).resolve().is_relative_to(folder.resolve())]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else None


def own_data_loader(folder: Path) -> str | None:
    """The data loader class of its own that the folder's run_expid.py sets, as FuxiCTR's long-history models have."""
    script = folder / "run_expid.py"
    try:
        tree = ast.parse(script.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return None
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("fuxictr.")]
    stock = {alias.asname or alias.name for node in imports for alias in node.names}
    for node in ast.walk(tree):
        match node:
            case ast.Assign(value=ast.Name(id=name)) | ast.keyword(value=ast.Name(id=name)) if name in stock:
                continue
            case ast.Assign(targets=[ast.Subscript(slice=ast.Constant(value="data_loader"))], value=ast.Name(id=name)):
                return name
            case ast.keyword(arg="data_loader", value=ast.Name(id=name)):
                return name
    return None


def run_command(folder: Path, root: Path, seeds: Sequence[int] = ()) -> list[str]:
    """What starts an experiment of a model folder from `root`: its run_expid.py, unless that is FuxiCTR's own.

    Args:
        folder: of the model.
        root: of the repository.
        seeds: that are trained together, if they are.
    """
    shown = [str(p.relative_to(root) if p.is_relative_to(root) else p) for p in (folder, folder / "run_expid.py")]
    script = folder / "run_expid.py"
    if seeds:
        return ["ctrbench", "run", "--zoo", shown[0], "--seeds", *map(str, seeds), "--together", "stack"]
    if script.is_file() and "ctrbench" in script.read_text(encoding="utf-8", errors="replace"):
        return ["python", shown[1]]
    return ["ctrbench", "run", "--zoo", shown[0]]


def source_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of a model folder's code."""
    files = sorted((folder / "src").rglob("*.py"))
    return sha256_of_value([[file.relative_to(folder).as_posix(), sha256_of_file(file)] for file in files])


def model_keys(model_class: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """The configuration keys that the constructors of a model class and its bases name or look up in `**kwargs`."""
    keys: dict[str, inspect.Parameter] = {}
    for base in reversed(model_class.__mro__):
        if "__init__" in vars(base) and issubclass(base, nn.Module) and base is not nn.Module:
            for name in keys_in_kwargs(base.__init__):
                keys.setdefault(name, inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY))
            for parameter in inspect.signature(base.__init__, eval_str=False).parameters.values():
                if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                    keys[parameter.name] = parameter
    for internal in ("self", "feature_map", "model_id", "gpu"):
        keys.pop(internal, None)
    return keys


def other_keys(folder: Path) -> set[str]:
    """The keys of all models of an imported folder, which a `Base` section may hold for any of them."""
    package = _import_package(folder / "src" / "__init__.py")
    classes: list[Any] = [c for c in vars(package).values() if inspect.isclass(c) and issubclass(c, BaseModel)]
    return {key for model_class in classes for key in model_keys(model_class)}


def build_model(model_class: type[nn.Module], feature_map: Any, params: Mapping[str, Any], where: str) -> nn.Module:
    """Construct a model on its device.

    The trainer makes the optimizer, so `BaseModel.compile` only records what the model asked for; one that looks at its
    optimizer before, to hang a schedule on it, gets FuxiCTR's. A class that overrides `compile` keeps its own.

    Args:
        model_class: from `load_model_class`.
        feature_map: the fields.
        params: constructor keywords, FuxiCTR's (`optimizer`, `loss`, `metrics`, `gpu`, ...) included.
        where: file and section of the configuration, for the error message.

    Raises:
        ConfigError: the constructor refuses a value.
    """
    if model_class.compile is BaseModel.compile:
        parts: dict[str, Any] = {"compile": _record_compile, "optimizer": property(_optimizer, _set_optimizer)}
        parts |= {"_written": model_class, "__module__": model_class.__module__}
        model_class = type(model_class.__name__, (model_class,), parts)
    try:
        return model_class(feature_map, **params)
    except CtrbenchError:
        raise
    except Exception as error:  # whatever a constructor says of values that it was not made for
        file = inspect.getfile(written_class(model_class))
        spot = place(error, Path(file).parent) if isinstance(error, _BUGS) else None
        at = f" ({spot})" if spot else ""
        raise ConfigError(f"{where}: {model_class.__name__}: {_reason(error)}{at}") from error


# Errors that say more with the line that they come from.
_BUGS = (AttributeError, NameError, ImportError, TypeError)


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


def asked_optimizer(model: nn.Module) -> tuple[Any, float] | None:
    """Optimizer and learning rate that the model passed to `compile`; None if it has made an optimizer of its own."""
    asked: tuple[Any, float] | None = vars(model).get("_asked_optimizer")
    return asked


def written_class(model_class: type[nn.Module]) -> type[nn.Module]:
    """A model's class as its folder has it, without what `build_model` adds."""
    written: type[nn.Module] = vars(model_class).get("_written", model_class)
    return written


def _record_compile(self: Any, optimizer: Any, loss: Any, lr: float) -> None:
    self.loss_fn = get_loss(loss)
    self._asked_optimizer, self._made_optimizer = (optimizer, lr), None


def _optimizer(self: Any) -> Any:
    if vars(self).get("_made_optimizer") is None and asked_optimizer(self) is not None:
        self.optimizer = get_optimizer(self._asked_optimizer[0], self.parameters(), self._asked_optimizer[1])
    return vars(self).get("_made_optimizer")


def _set_optimizer(self: Any, optimizer: Any) -> None:
    self._made_optimizer, self._asked_optimizer = optimizer, None
