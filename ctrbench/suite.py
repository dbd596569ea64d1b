# SPDX-License-Identifier: Apache-2.0
"""A suite: models x datasets x seeds, and sweeps whose best setting is run with the same seeds; `config/suites/<name>.yaml`."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ctrbench.config import Experiment, load_experiment
from ctrbench.errors import ConfigError, CtrbenchError, did_you_mean
from ctrbench.sections import dataset_ids
from ctrbench.validation import Where, validate
from ctrbench.yamlfile import load_yaml, shown

Name = Annotated[str, Field(min_length=1)]


class SuiteConfig(BaseModel):
    """The keys of a suite.

    Attributes:
        description: one line for people.
        models: model folders, by name in model_zoo/ or by a path from the repository's root.
        datasets: dataset_ids.
        seeds: of every experiment.
        expids: model -> dataset -> its experiment, or a list of them. By default `<model>_<dataset_id>`, or else the model's
            only experiment on that dataset. A model needs one on some of the datasets, not on all.
        sweeps: tuner files; the best setting of each, chosen on validation, is run with all seeds as a row of its own.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    description: str = ""
    models: list[Name] = []
    datasets: list[Name] = []
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)]
    expids: dict[str, dict[str, Name | Annotated[list[Name], Field(min_length=1)]]] = {}
    sweeps: list[Name] = []


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a suite.

    Attributes:
        zoo: the model folder.
        config_dir: its configuration folder, or that of a sweep's best setting.
        expid: the experiment.
        dataset_id: its data.
        seed: its seed.
    """

    zoo: Path
    config_dir: Path
    expid: str
    dataset_id: str
    seed: int

    def experiment(self, is_data_required: bool = True) -> Experiment:
        """The experiment.

        Raises:
            ConfigError: it cannot be run.
        """
        return load_experiment(self.config_dir, self.expid, self.zoo, (), self.seed, is_data_required)

    def command(self, root: Path, gpu: int, seeds: Sequence[int] = ()) -> str:
        """The command that runs it by hand, from the repository's root; with `seeds`, those that it is run with together."""
        from ctrbench.zoo import run_command  # which loads torch

        arguments = ["--expid", self.expid, *(() if seeds else ("--seed", str(self.seed))), "--gpu", str(gpu)]
        if self.config_dir != self.zoo / "config":
            arguments = ["--config", _from(root, self.config_dir), *arguments]
        return shlex.join([*run_command(self.zoo.resolve(), root.resolve(), seeds), *arguments])


@dataclasses.dataclass(frozen=True)
class Suite:
    """A suite, complete.

    Attributes:
        name: its file's.
        path: its file.
        root: the repository.
        config: its content.
        experiments: model folder, expid and dataset of each row, in the file's order; sweeps are not among them.
    """

    name: str
    path: Path
    root: Path
    config: SuiteConfig
    experiments: tuple[tuple[Path, str, str], ...]

    @property
    def sweeps(self) -> list[Path]:
        """The tuner files."""
        return [self.root / sweep for sweep in self.config.sweeps]

    def cells(self) -> Iterator[Cell]:
        """Every run of the suite's experiments: all of them with the first seed, then with the second, ..."""
        for seed in self.config.seeds:
            for zoo, expid, dataset_id in self.experiments:
                yield Cell(zoo, zoo / "config", expid, dataset_id, seed)


def load_suite(name: str, here: Path | None = None) -> Suite:
    """The suite `name`: a file, or a name in config/suites/ of the repository around `here`.

    Raises:
        ConfigError: with one line per problem.
    """
    path, root = _find(name, here or Path.cwd())
    content = load_yaml(path)
    problems: list[str] = []
    config: SuiteConfig | None = validate(SuiteConfig, content, Where(f"{path}"), problems)
    if config is None:
        raise ConfigError(line.replace(f"{path}.", f"{path}: ", 1) for line in problems)
    problems += _repeated(path, config)
    if not config.sweeps and not (config.models and config.datasets):
        problems.append(f"{path}: it needs models and datasets, or sweeps")
    problems += [f"{path}: sweeps: no such file, got '{s}'" for s in config.sweeps if not (root / s).is_file()]
    unknown = _unknown_datasets(config, root)
    problems += [f"{path}: datasets: unknown dataset, got '{name}'{near}" for name, near in unknown.items()]
    known = [dataset for dataset in config.datasets if dataset not in unknown]
    experiments: list[tuple[Path, str, str]] = []
    folders = sorted(p.name for p in (root / "model_zoo").glob("*") if (p / "src").is_dir())
    for model in dict.fromkeys(config.models):
        zoo = root / model if "/" in model else root / "model_zoo" / model
        if not (zoo / "config").is_dir():
            problems.append(f"{path}: models: no model folder, got '{model}'{did_you_mean(model, folders)}")
            continue
        problems += _experiments(path, config, model, zoo, known, experiments)
    problems += _unused_names(path, config)
    names = [(expid, dataset) for _, expid, dataset in experiments]
    twice = dict.fromkeys(name for name in names if names.count(name) > 1)
    problems += [f"{path}: {expid} on {dataset} is in it twice: keep one" for expid, dataset in twice]
    used = {dataset for _, _, dataset in experiments}
    if config.models and not problems:
        what = "none of the models has an experiment on it: leave it out"
        problems += [f"{path}: datasets: {what}, got '{name}'" for name in config.datasets if name not in used]
    if problems:
        raise ConfigError(problems)
    return Suite(path.stem, path, root, config, tuple(experiments))


def list_suites(root: Path) -> list[str]:
    """Names of the shipped suites."""
    return sorted(path.stem for path in (root / "config" / "suites").glob("*.yaml"))


def _find(name: str, here: Path) -> tuple[Path, Path]:
    around = [here.resolve(), *here.resolve().parents, Path(__file__).resolve().parents[1]]
    root = next((folder for folder in around if (folder / "model_zoo").is_dir()), here.resolve())
    for path in (root / "config" / "suites" / f"{name}.yaml", Path(name)):
        if path.is_file():
            return path, root
    known = list_suites(root)
    raise ConfigError(f"{name}: no such suite{did_you_mean(name, known)}; known: {', '.join(known) or 'none'}")


def _repeated(path: Path, config: SuiteConfig) -> Iterator[str]:
    for key in ("models", "datasets", "seeds", "sweeps"):
        values: Sequence[Any] = getattr(config, key)
        for value in dict.fromkeys(v for v in values if values.count(v) > 1):
            yield f"{path}: {key}: {shown(value)} is in it twice: keep one"


def _unused_names(path: Path, config: SuiteConfig) -> Iterator[str]:
    """Models and datasets under `expids` that the suite does not have."""
    for model, by_dataset in config.expids.items():
        if model not in config.models:
            yield f"{path}: expids.{model}: not one of the models{did_you_mean(model, config.models)}"
        for dataset in by_dataset:
            if dataset not in config.datasets:
                near = did_you_mean(dataset, config.datasets)
                yield f"{path}: expids.{model}.{dataset}: not one of the datasets{near}"


def _unknown_datasets(config: SuiteConfig, root: Path) -> dict[str, str]:
    """Datasets that are configured nowhere, and what they may be meant for."""
    known = [name for file in sorted((root / "config" / "dataset_config").glob("*.yaml")) for name in load_yaml(file)]
    for model in config.models:  # a model folder may bring its own
        for file in (root / model / "config" if "/" in model else root / "model_zoo" / model / "config").glob(
            "data*.yaml"
        ):
            known += load_yaml(file)
    return {dataset: did_you_mean(dataset, known) for dataset in config.datasets if dataset not in known}


def _experiments(
    path: Path,
    config: SuiteConfig,
    model: str,
    zoo: Path,
    datasets: Sequence[str],
    experiments: list[tuple[Path, str, str]],
) -> Iterator[str]:
    """Add the rows of one model; yields what is wrong with them."""
    try:
        known = dataset_ids(zoo / "config")
    except CtrbenchError as error:
        yield from str(error).splitlines()
        return
    has_any = any(dataset in known.values() for dataset in datasets)
    for dataset in dict.fromkeys(datasets):
        named = config.expids.get(model, {}).get(dataset)
        on_it = [expid for expid, its_dataset in known.items() if its_dataset == dataset]
        if not on_it and not named and has_any:
            continue  # a model of another kind of data
        default = on_it if len(on_it) == 1 else [f"{zoo.name}_{dataset}"]
        for expid in [named] if isinstance(named, str) else named or default:
            if known.get(expid) == dataset:
                experiments.append((zoo, expid, dataset))
            else:
                yield (
                    f"{path}: {model} has no experiment '{expid}' for {dataset}{did_you_mean(expid, on_it)}: add it to "
                    f"{zoo.name}/config, or name another one under expids"
                )


def _from(root: Path, path: Path) -> str:
    path, root = path.resolve(), root.resolve()
    return str(path.relative_to(root) if path.is_relative_to(root) else path)
