# SPDX-License-Identifier: Apache-2.0
"""Import FuxiCTR's models and layers without what they do not use.

`fuxictr.pytorch.layers` needs one small function of `fuxictr.preprocess` and `fuxictr.pytorch.models` one of
`fuxictr.metrics`, but importing these two brings in ray and scikit-learn, which cost more time than torch. `prepare()`
registers both in a form that runs its own source only when something is asked of it that needs it. Nothing of fuxictr
is changed or copied; whoever uses `fuxictr.preprocess.FeatureProcessor` afterwards gets the real one, a little later.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import threading
from types import ModuleType
from typing import Any

_lock = threading.RLock()


class _DeferredModule(ModuleType):
    """A module whose source runs when an attribute is missing. Submodules can be imported before that."""

    # Functions that may be imported by name without running the module: they run it when they are called.
    _callables: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        if name in self._callables:

            def call_later(*args: Any, **kwargs: Any) -> Any:
                return getattr(_load(self), name)(*args, **kwargs)

            return call_later
        return getattr(_load(self), name)


def _load(module: ModuleType) -> ModuleType:
    """Run the module's source unless that has happened."""
    with _lock:
        if type(module) is _DeferredModule:
            module.__class__ = ModuleType  # type: ignore[assignment]
            spec = module.__spec__
            assert spec is not None and spec.loader is not None
            spec.loader.exec_module(module)
    return module


def _defer(name: str, callables: tuple[str, ...] = ()) -> None:
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None:
        return  # the import that follows says so
    module = _DeferredModule(name)
    module.__dict__["_callables"] = callables
    module.__spec__, module.__loader__, module.__file__ = spec, spec.loader, spec.origin
    module.__package__ = spec.parent
    if spec.submodule_search_locations is not None:
        module.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    setattr(sys.modules[parent], child, module)


def prepare() -> None:
    """Defer the heavy parts of fuxictr, if they are not imported yet. `import ctrbench` calls it."""
    with _lock:
        importlib.import_module("fuxictr")
        _defer("fuxictr.preprocess")
        _defer("fuxictr.metrics", callables=("evaluate_metrics",))
