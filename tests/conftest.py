# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures: a tiny raw dataset, and experiments on it that write nothing into the repository."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# Tests run in parallel on few cores; more threads each would only get in each other's way.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def load_script(path: Path) -> ModuleType:
    """Import a script of the repository by its path."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def raw_data() -> Path:
    """The folder of real raw data; a test that asks for it is skipped where there is none."""
    folder = Path(os.environ.get("CTRBENCH_RAW", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real raw data: set CTRBENCH_RAW to the folder that holds ml-1m/ml-1m.zip")
    return folder


@pytest.fixture(scope="session")
def tiny_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.csv, valid.csv and test.csv of tiny_ctr."""
    folder = tmp_path_factory.mktemp("raw") / "tiny_ctr"
    load_script(ROOT / "data" / "make_tiny.py").make_tiny_ctr(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tiny_ctr is built, once for all tests of a session."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def tiny_overrides(tiny_raw: Path, tiny_data_root: Path, tmp_path: Path) -> list[str]:
    """`--set` values that keep an experiment on tiny_ctr out of the repository."""
    return [
        *(f"{split}_data={tiny_raw / split}.csv" for split in ("train", "valid", "test")),
        f"data_root={tiny_data_root}",
        f"model_root={tmp_path / 'runs'}",
        "verbose=0",
    ]
