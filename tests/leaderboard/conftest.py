# SPDX-License-Identifier: Apache-2.0
"""A small repository with six finished runs, trained once, and private copies of it to tamper with."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from small_repository import SEEDS, SmallRepository

from ctrbench.cli import main

# pytest imports every conftest.py by that one name, so this one also has what tests import from the folder above.
_spec = importlib.util.spec_from_file_location("conftest_above", Path(__file__).resolve().parents[1] / "conftest.py")
assert _spec is not None and _spec.loader is not None
_above = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_above)
ROOT, load_script = _above.ROOT, _above.load_script

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="session")
def few_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw files of tiny_ctr with 600 rows."""
    folder = tmp_path_factory.mktemp("few") / "tiny_ctr"
    load_script(ROOT / "data" / "make_tiny.py").make_tiny_ctr(folder, rows=600)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, few_rows: Path) -> SmallRepository:
    """A repository with LR_tiny and FM_tiny, trained with three seeds each, which no test changes."""
    made = SmallRepository.make(tmp_path_factory.mktemp("finished") / "repository", few_rows)
    made.suite()
    for expid in ("LR_tiny", "FM_tiny"):
        for seed in SEEDS:
            made.train(expid, seed)
    return made


@pytest.fixture
def repository(finished: SmallRepository, tmp_path: Path) -> SmallRepository:
    """A private copy of it."""
    return finished.copy(tmp_path / "repository")


@pytest.fixture
def shown(capsys: Capture) -> Callable[..., str]:
    """Runs a command that must end with this status; returns its standard output."""

    def run(status: int, *command: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in command]) == status
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys: Capture) -> Callable[..., list[str]]:
    """Runs a command that must end with status 2 and lines of standard error alone, which it returns."""

    def run(*command: object) -> list[str]:
        capsys.readouterr()
        assert main([str(word) for word in command]) == 2
        output = capsys.readouterr()
        lines = output.err.splitlines()
        assert output.out == "" and lines and all(line.startswith("error: ") for line in lines), output.err
        return [line.removeprefix("error: ") for line in lines]

    return run
