# SPDX-License-Identifier: Apache-2.0
"""The configuration files of a sweep: every trial and the best one as `run_expid.py` reads them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import filelock

from ctrbench.config import Experiment
from ctrbench.files import write_text
from ctrbench.schema import DatasetConfig
from ctrbench.tuner.definition import Sweep
from ctrbench.tuner.space import Values
from ctrbench.yamlfile import dump_yaml, load_yaml
from ctrbench.zoo import run_command


class ConfigFolder:
    """A folder of model_config.yaml and dataset_config.yaml that grows as settings are claimed.

    Args:
        sweep: whose trials it describes.
        path: the folder.
    """

    def __init__(self, sweep: Sweep, path: Path):
        self.sweep, self.path = sweep, path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(path / ".lock")
        self._known: dict[str, set[str]] = {
            name: set(load_yaml(path / name)) if (path / name).exists() else set() for name in ("model_config.yaml",)
        }

    def add(self, values: Values, experiment: Experiment) -> None:
        """Add a trial, unless it is there."""
        model, dataset = trial_sections(self.sweep, values, experiment)
        self._add("dataset_config.yaml", experiment.training.dataset_id, dataset)
        self._add("model_config.yaml", experiment.expid, model)

    def _add(self, name: str, key: str, section: dict[str, Any]) -> None:
        known = self._known.setdefault(name, set())
        if key in known:
            return
        path = self.path / name
        with self._lock:
            text = path.read_text(encoding="utf-8") if path.exists() else f"# Written by the sweep {self.sweep.name}.\n"
            addition = dump_yaml({key: section})
            if not _has_section(text, addition):
                write_text(path, text + addition)
        known.add(key)


def write_best(sweep: Sweep, values: Values, experiment: Experiment) -> Path:
    """`best_config/`, with the best trial alone."""
    folder = sweep.folder / "best_config"
    model, dataset = trial_sections(sweep, values, experiment)
    write_text(folder / "dataset_config.yaml", dump_yaml({experiment.training.dataset_id: dataset}))
    write_text(folder / "model_config.yaml", dump_yaml({experiment.expid: model}))
    return folder


def trial_sections(sweep: Sweep, values: Values, experiment: Experiment) -> tuple[dict[str, Any], dict[str, Any]]:
    """A trial's section of model_config.yaml and that of its dataset."""
    values = sweep.space.restored(values)
    of_dataset = {key: value for key, value in values.items() if key in DatasetConfig.model_fields}
    of_model = {key: value for key, value in values.items() if key not in of_dataset}
    training = experiment.training
    model = {**sweep.sections.model, **of_model, "dataset_id": training.dataset_id, "seed": training.seed}
    return model, {**(sweep.sections.dataset or {}), **of_dataset}


def rerun_command(
    sweep: Sweep, experiment: Experiment, gpu: int, config_dir: Path | None = None, seeds: Sequence[int] = ()
) -> str:
    """The command that runs a trial by hand, from the root of the repository; with `seeds`, those that were run together."""
    config = _from_root(config_dir or sweep.folder / "config", sweep)
    arguments = ["--config", config, "--expid", experiment.expid, "--gpu", str(gpu)]
    if not seeds and sweep.config.seeds and experiment.training.seed != sweep.seeds[0]:
        arguments += ["--seed", str(experiment.training.seed)]
    return shlex.join([*run_command(experiment.zoo.resolve(), sweep.sections.root.resolve(), seeds), *arguments])


def _from_root(path: Path, sweep: Sweep) -> str:
    path, root = path.resolve(), sweep.sections.root.resolve()
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def _has_section(text: str, addition: str) -> bool:
    head = addition.split("\n", 1)[0]
    return f"\n{head}\n" in f"\n{text}"
