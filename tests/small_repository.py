# SPDX-License-Identifier: Apache-2.0
"""A private repository for suites and leaderboards: a few model folders, tiny_ctr with 600 rows, nothing outside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctrbench.cli import main
from ctrbench.evidence import FILES
from ctrbench.files import sha256_of_file, write_json
from ctrbench.yamlfile import dump_yaml, load_yaml

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (1, 2, 3)


class SmallRepository:
    """A folder with model_zoo/, config/, data/raw/tiny_ctr and whatever its runs leave.

    Args:
        folder: where it is, or is to be made.
    """

    def __init__(self, folder: Path):
        self.folder, self.runs, self.raw = folder, folder / "runs", folder / "data" / "raw" / "tiny_ctr"

    @classmethod
    def make(cls, folder: Path, raw: Path, models: Sequence[str] = ("LR", "FM")) -> SmallRepository:
        """Make one with these model folders and a copy of the raw data."""
        made = cls(folder)
        for model in models:
            ignored = shutil.ignore_patterns("__pycache__", "tuner_config")
            shutil.copytree(ROOT / "model_zoo" / model, folder / "model_zoo" / model, ignore=ignored)
        (folder / "config" / "suites").mkdir(parents=True)
        (folder / "config" / "dataset_config").mkdir()
        shutil.copy(ROOT / "config" / "dataset_config" / "tiny_ctr.yaml", folder / "config" / "dataset_config")
        shutil.copytree(raw, made.raw)
        return made

    def copy(self, folder: Path) -> SmallRepository:
        """Another one with all that this one has."""
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns("__pycache__", "*.lock"))
        return SmallRepository(folder)

    def suite(self, name: str = "small", **keys: Any) -> str:
        """Write a suite; a key that is None is left out."""
        content = {"models": ["LR", "FM"], "datasets": ["tiny_ctr"], "seeds": list(SEEDS), **keys}
        path = self.folder / "config" / "suites" / f"{name}.yaml"
        path.write_text(dump_yaml({key: value for key, value in content.items() if value is not None}))
        return name

    def write_section(self, model: str, expid: str, **values: Any) -> None:
        """Add or change keys of an experiment; `<model>_tiny` is what a new one begins from."""
        path = self.folder / "model_zoo" / model / "config" / "model_config.yaml"
        content = load_yaml(path)
        content[expid] = {**content.get(expid, content.get(f"{model}_tiny", {})), **values}
        path.write_text(dump_yaml(content))

    def train(self, expid: str, seed: int, *overrides: str) -> Path:
        """Train a run in this process; its run directory."""
        zoo = self.folder / "model_zoo" / expid.split("_")[0]
        command = ["run", "--zoo", str(zoo), "--expid", expid, "--seed", str(seed), "--set", "verbose=0"]
        assert main([*command, *(word for value in overrides for word in ("--set", value))]) == 0
        return self.run_dir(expid, seed)

    def run_dir(self, expid: str, seed: int) -> Path:
        """The directory of a run."""
        return self.runs / "tiny_ctr" / expid / f"seed_{seed}"

    def marks(self) -> dict[str, int]:
        """When each run was finished, by `expid/seed_<seed>`."""
        done = sorted(self.runs.glob("tiny_ctr/*/*/DONE"))
        return {f"{p.parents[1].name}/{p.parent.name}": p.stat().st_mtime_ns for p in done}

    def ledger(self) -> list[dict[str, Any]]:
        """The lines of the ledger."""
        return [json.loads(line) for line in (self.runs / "ledger.jsonl").read_text().splitlines()]

    def write_ledger(self, entries: Sequence[dict[str, Any]]) -> None:
        """Put these lines in its place."""
        (self.runs / "ledger.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def report_of(run_dir: Path) -> dict[str, Any]:
    """Content of report.json."""
    report: dict[str, Any] = json.loads((run_dir / "report.json").read_text())
    return report


def edit_report(run_dir: Path, **values: Any) -> None:
    """Change report.json and leave its seal as it is."""
    write_json(run_dir / "report.json", {**report_of(run_dir), **values})


def reseal(run_dir: Path, repository: SmallRepository | None = None) -> None:
    """What a forger does: renew all hashes of a run, and its line of the ledger too if the repository is given."""
    before = sha256_of_file(run_dir / "report.json")
    known = [e["report"] for e in repository.ledger()] if repository else []
    old = (run_dir / "DONE").read_text().strip() if (run_dir / "DONE").exists() else before
    edit_report(run_dir, evidence={name: sha256_of_file(run_dir / name) for name in FILES if (run_dir / name).exists()})
    digest = sha256_of_file(run_dir / "report.json")
    (run_dir / "DONE").write_text(digest + "\n")
    if repository:
        assert old in known
        metrics = report_of(run_dir)["metrics"]
        forged = [{**e, "report": digest, "metrics": metrics} if e["report"] == old else e for e in repository.ledger()]
        repository.write_ledger(forged)
