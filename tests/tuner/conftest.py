# SPDX-License-Identifier: Apache-2.0
"""A private repository for sweeps: one model folder, one dataset, and nothing written outside it."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from ctrbench.cli import main
from ctrbench.tuner.definition import Sweep, load_sweep
from ctrbench.tuner.records import SeedResult, TrialRecord
from ctrbench.yamlfile import dump_yaml, load_yaml

# pytest imports every conftest.py by that one name, so this one also has what tests import from the folder above.
_spec = importlib.util.spec_from_file_location("conftest_above", Path(__file__).resolve().parents[1] / "conftest.py")
assert _spec is not None and _spec.loader is not None
_above = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_above)
ROOT, load_script = _above.ROOT, _above.load_script

SMALL = {"epochs": 1, "batch_size": 512, "embedding_dim": 8, "verbose": 0}


@functools.cache
def section(path: Path, name: str) -> dict[str, Any]:
    """A section of one of the repository's own files, read once."""
    return load_yaml(path)[name]  # type: ignore[no-any-return]


class Repository:
    """A folder with model_zoo/DCNv3, config/dataset_config/tiny_ctr.yaml, benchmarks/ and tuner files in tuners/."""

    def __init__(self, folder: Path, raw: Path, data_root: Path):
        self.folder, self.raw, self.data_root = folder, raw, data_root
        self.zoo = folder / "model_zoo" / "DCNv3"
        self.config_dir = self.zoo / "config"
        self.runs, self.tuners = folder / "runs", folder / "tuners"
        ignored = shutil.ignore_patterns("__pycache__", "tuner_config")
        shutil.copytree(ROOT / "model_zoo" / "DCNv3", self.zoo, ignore=ignored)
        for name in ("benchmarks", "tuners", "config/dataset_config"):
            (folder / name).mkdir(parents=True)
        self.dataset_file = folder / "config" / "dataset_config" / "tiny_ctr.yaml"
        few = {
            name: section(ROOT / "model_zoo/DCNv3/config/model_config.yaml", name) for name in ("Base", "DCNv3_tiny")
        }
        (self.config_dir / "model_config.yaml").write_text(dump_yaml(few))
        self.write_dataset()

    def write_dataset(self, **changes: Any) -> None:
        """Write tiny_ctr's section; None leaves a key out."""
        files = {f"{split}_data": str(self.raw / f"{split}.csv") for split in ("train", "valid", "test")}
        known = section(ROOT / "config/dataset_config/tiny_ctr.yaml", "tiny_ctr")
        known = {**known, **files, "data_root": str(self.data_root), **changes}
        self.dataset_file.write_text(dump_yaml({"tiny_ctr": {k: v for k, v in known.items() if v is not None}}))

    def write_base(self, expid: str, **changes: Any) -> None:
        """Add an experiment to the model folder: DCNv3_tiny with other values."""
        path = self.config_dir / "model_config.yaml"
        path.write_text(
            path.read_text()
            + dump_yaml(
                {expid: {**section(ROOT / "model_zoo/DCNv3/config/model_config.yaml", "DCNv3_tiny"), **changes}}
            )
        )

    def tuner(self, tuner_space: Any = None, file: str = "tuners/sweep.yaml", **keys: Any) -> Path:
        """Write a tuner file; a key that is None is left out."""
        content = {"base_config": "model_zoo/DCNv3/config", "base_expid": "DCNv3_tiny", "dataset_id": "tiny_ctr"}
        content |= {**keys, "tuner_space": {"net_dropout": [0.1, 0.2]} if tuner_space is None else tuner_space}
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dump_yaml({key: value for key, value in content.items() if value is not None}))
        return path

    def load(self, tuner_space: Any = None, tag: str | None = None, name: str | None = None, **keys: Any) -> Sweep:
        """The sweep of a tuner file."""
        return load_sweep(self.tuner(tuner_space, **keys), tag=tag, name=name)

    def is_untouched(self) -> bool:
        """Whether no sweep and no run left anything."""
        return not self.runs.exists() and not any((self.folder / "data").glob("*"))


@pytest.fixture
def repository(tmp_path: Path, tiny_raw: Path, tiny_data_root: Path) -> Repository:
    return Repository(tmp_path / "repository", tiny_raw, tiny_data_root)


@pytest.fixture(scope="module")
def shared_repository(tmp_path_factory: pytest.TempPathFactory, tiny_raw: Path, tiny_data_root: Path) -> Repository:
    """A repository that all tests of a module run sweeps in."""
    return Repository(tmp_path_factory.mktemp("shared") / "repository", tiny_raw, tiny_data_root)


@pytest.fixture
def refuses(repository: Repository, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `ctrbench tune` on a tuner file that must be refused with these lines and leave nothing; returns its stderr."""
    # What is refused is refused before any worker is needed.
    monkeypatch.setattr("ctrbench.tuner.slots.preload", lambda: None)

    def check(path: Path, *patterns: str, arguments: tuple[str, ...] = (), is_clean: bool = True) -> str:
        capsys.readouterr()
        status = main(["tune", "--config", str(path), *arguments])
        output = capsys.readouterr()
        assert status == 2, output.err
        lines = output.err.splitlines()
        assert all(line.startswith("error: ") for line in lines), output.err
        assert len(lines) == len(patterns), output.err
        for pattern in patterns:
            assert any(re.search(pattern, line) for line in lines), f"{pattern}\n{output.err}"
        assert not is_clean or repository.is_untouched(), [*repository.runs.rglob("*")]
        return output.err

    return check


def make_record(index: int, objective: float | None = None, state: str = "complete", **changes: Any) -> TrialRecord:
    """A trial with one run of seed 2024, if it is complete."""
    seeds = [] if objective is None else [make_result(2024, objective)]
    known = {"expid": f"X_{index + 1:03d}_0123abcd", "values": {"net_dropout": 0.1}, "objective": objective}
    known |= {"curve": [] if objective is None else [objective], "seeds": seeds}
    return TrialRecord(**{"index": index, "state": state, **known, **changes})


def make_result(seed: int, value: float, **changes: Any) -> SeedResult:
    """A run whose monitored value is `value`."""
    metrics = {"valid": {"AUC": value, "logloss": 0.5}, "test": {"AUC": value - 0.01, "logloss": 0.51}}
    known = {"seed": seed, "metrics": metrics, "best_value": value, "best_epoch": 1, "epochs": 2}
    times = {"train_seconds": 1.25, "evaluate_seconds": 0.5, "total_seconds": 2.0}
    return SeedResult(**{**known, **times, "run_dir": f"/runs/seed_{seed}", **changes})
