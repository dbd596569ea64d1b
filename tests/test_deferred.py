# SPDX-License-Identifier: Apache-2.0
"""Importing a model must not import ray and scikit-learn, and must leave fuxictr whole."""

from __future__ import annotations

import subprocess
import sys

from conftest import ROOT

SCRIPT = """
import sys
import ctrbench.cli, ctrbench.interpret, ctrbench.predict, ctrbench.run, ctrbench.zoo
loaded = [name for name in ("ray", "sklearn", "pandas", "scipy", "matplotlib", "rich", "torch._dynamo") if name in sys.modules]
assert not loaded, loaded
import fuxictr.preprocess
assert "sklearn" not in sys.modules
from fuxictr.preprocess import FeatureProcessor, build_dataset
assert FeatureProcessor.__module__ == "fuxictr.preprocess.feature_processor" and "sklearn" in sys.modules
from fuxictr.pytorch.models import rank_model
import numpy
values = rank_model.evaluate_metrics(numpy.array([0.0, 1.0]), numpy.array([0.1, 0.2]), ["AUC"])
assert values["AUC"] == 1.0
values = rank_model.evaluate_metrics(numpy.array([0.0, 1.0]), numpy.array([0.2, 0.1]), ["AUC"])
assert values["AUC"] == 0.0
import fuxictr.metrics, types
assert type(fuxictr.metrics) is types.ModuleType and fuxictr.metrics.evaluate_metrics.__module__ == "fuxictr.metrics"
"""


def test_heavy_modules_load_when_they_are_used_and_not_before() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_run_does_not_load_the_compiler(tiny_overrides: list[str]) -> None:
    """It takes as long as all else before the first step."""
    words = [
        "run",
        "--expid",
        "SDCNv3_tiny",
        *(word for value in [*tiny_overrides, "epochs=1"] for word in ("--set", value)),
    ]
    script = (
        "import sys\nfrom ctrbench.cli import main\n"
        f"assert main({words!r}) == 0\n"
        "assert not {'torch._dynamo', 'torch._inductor', 'sympy', 'scipy', 'sklearn', 'ray'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_prepare_after_a_full_import_changes_nothing() -> None:
    script = (
        "import fuxictr.preprocess as p, fuxictr.metrics as m, sys\n"
        "from ctrbench import deferred; deferred.prepare()\n"
        "assert sys.modules['fuxictr.preprocess'] is p and sys.modules['fuxictr.metrics'] is m and 'ray' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
