# SPDX-License-Identifier: Apache-2.0
"""A tuner file -> a sweep: the base experiment, the search space, and the experiments that a setting stands for."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from optuna.samplers import RandomSampler

from ctrbench.config import NO_EFFECT, Experiment, make_experiment
from ctrbench.errors import ConfigError, did_you_mean
from ctrbench.files import sha256_of_value
from ctrbench.schema import UNREAD_DATASET_KEYS, UNREAD_MODEL_KEYS, DatasetConfig
from ctrbench.sections import Sections, check_name, find_root, list_expids, read_sections
from ctrbench.tuner.sampling import setting_name
from ctrbench.tuner.schema import TunerConfig
from ctrbench.tuner.space import MAX_GRID, Dimension, Space, Values, parse_space
from ctrbench.validation import validate
from ctrbench.yamlfile import load_yaml, shown

# Draws in a row that give nothing new before a random search counts as exhausted.
MAX_REPEATED_DRAWS = 10_000


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep, complete.

    Attributes:
        name: of the sweep, and of its folder.
        path: the tuner file.
        config: its content.
        sections: what the files say of the base experiment.
        base: the experiment of each key's first value.
        base_name: what the expids of the trials begin with.
        space: the search space.
        seeds: seeds that each setting is run with.
        tag: only expids that contain it.
    """

    name: str
    path: Path
    config: TunerConfig
    sections: Sections
    base: Experiment
    base_name: str
    space: Space
    seeds: tuple[int, ...]
    tag: str | None = None

    @property
    def folder(self) -> Path:
        """`<model_root>/sweeps/<name>`: configurations, results and the embedded store."""
        return self.base.root / self.base.training.model_root / "sweeps" / self.name

    @property
    def monitor(self) -> str:
        """What is optimised, for people."""
        found = self.base.training.monitor
        name = found if isinstance(found, str) else " + ".join(f"{w:g} {n}" for n, w in found.items() if w)
        return f"validation {name.removeprefix('1 ')}"

    @property
    def direction(self) -> str:
        """max or min."""
        return self.base.training.monitor_mode

    @functools.cached_property
    def plan(self) -> Plan:
        """The settings in order, those that carry the tag only."""
        return Plan(self)

    def experiment(self, index: int, values: Values) -> Experiment:
        """The experiment of a setting, with its first seed.

        Raises:
            ConfigError: the values contradict each other.
        """
        values = self.space.restored(values)
        overrides = {"seed": self.seeds[0], **values}
        overrides["dataset_id"] = own_dataset_id(self.sections, self.base_dataset_id, values)
        source = f"{self.path}: tuner_space"
        found = make_experiment(self.sections, overrides, source, is_data_required=False, is_quiet=True)
        return dataclasses.replace(found, expid=f"{self.base_name}_{index + 1:03d}_{found.config_hash[:8]}")

    def experiments(self, index: int, values: Values) -> list[Experiment]:
        """The experiments of a setting, one for each seed.

        Raises:
            ConfigError: the values contradict each other.
        """
        first = self.experiment(index, values)
        return [self.with_seed(first, seed) for seed in self.config.seeds] if self.config.seeds else [first]

    def with_seed(self, experiment: Experiment, seed: int) -> Experiment:
        """The same setting with another seed."""
        return dataclasses.replace(experiment, training=experiment.training.model_copy(update={"seed": seed}))

    @property
    def base_dataset_id(self) -> str:
        """The dataset that is tuned on."""
        return str(self.config.dataset_id or self.sections.model["dataset_id"])

    def spec(self) -> dict[str, Any]:
        """What the sweep is, as JSON: two commands share one only if theirs are equal."""
        tuned = set(self.config.tuner_space)
        flat = {k: v for k, v in self.base.flat().items() if k not in tuned | NO_EFFECT | {"seed"}}
        dataset = self.base.dataset.model_dump(exclude={"data_root", "dataset_id", *tuned} - {"rebuild_dataset"})
        config = self.config.model_dump(by_alias=True)
        own = ("tuner_space", "sampler", "sampler_seed", "pruner", "exclude")
        spec = {
            "base": flat,
            "dataset": dataset,
            **{key: config[key] for key in own},
            "order": [dimension.key for dimension in self.space.dimensions],
            "seeds": list(self.seeds),
            "tag": self.tag,
        }
        plain: dict[str, Any] = json.loads(json.dumps(spec, sort_keys=True, default=str))
        return plain


class Plan:
    """The settings of a grid or a random search by index, made as they are asked for.

    TPE has no plan: what it draws depends on what came out before.
    """

    def __init__(self, sweep: Sweep):
        self._source = self._tagged(sweep) if sweep.tag is not None else enumerate(self._all(sweep))
        self._made: list[tuple[int, Values]] = []

    def get(self, number: int) -> tuple[int, Values] | None:
        """Index and values of the setting with this number, from 0; None behind the last."""
        while len(self._made) <= number:
            following = next(self._source, None)
            if following is None:
                return None
            self._made.append(following)
        return self._made[number]

    def __len__(self) -> int:
        """Number of settings; endless for a random search with a timeout alone."""
        self._made += list(self._source)
        return len(self._made)

    @staticmethod
    def _all(sweep: Sweep) -> Iterator[Values]:
        settings = sweep.space.grid() if sweep.config.sampler == "grid" else _random_settings(sweep)
        return itertools.islice(settings, sweep.config.num_trials)

    @classmethod
    def _tagged(cls, sweep: Sweep) -> Iterator[tuple[int, Values]]:
        for index, values in enumerate(cls._all(sweep)):
            try:
                expid = sweep.experiment(index, values).expid
            except ConfigError:  # it has no hash, and could not be run
                continue
            if str(sweep.tag) in expid:
                yield index, values


def _random_settings(sweep: Sweep) -> Iterator[Values]:
    """Distinct allowed settings, the same for the same seed."""
    sampler = RandomSampler(seed=sweep.config.sampler_seed)
    distributions = sweep.space.distributions()
    seen: set[str] = set()
    repeated = 0
    while repeated < MAX_REPEATED_DRAWS:
        sampled = {
            key: sampler.sample_independent(None, None, key, distribution)  # type: ignore[arg-type]
            for key, distribution in distributions.items()
        }
        values = sweep.space.from_sampled(sampled)
        name = setting_name(values)
        if name in seen or not sweep.space.allows(values):
            repeated += 1
            continue
        seen.add(name)
        repeated = 0
        yield values


def load_sweep(
    path: Path,
    zoo: Path | None = None,
    tag: str | None = None,
    name: str | None = None,
    is_data_required: bool = True,
) -> Sweep:
    """Read and check a tuner file.

    Args:
        path: the tuner file.
        zoo: the model folder, where it cannot be found by the base configuration.
        tag: only trials whose expid contains it.
        name: of the sweep; by default the file's, with the tag.
        is_data_required: report raw files that are missing.

    Raises:
        ConfigError: all that is wrong, one line each.
    """
    content = load_yaml(path)
    problems: list[str] = []
    where = lambda key: f"{path}: {key}"  # noqa: E731
    config: TunerConfig | None = validate(TunerConfig, content, where, problems)
    if config is None:
        raise ConfigError(problems)
    space = parse_space(config.tuner_space, config.exclude, config.sampler == "grid", where, problems)
    problems += _tuner_problems(path, config, space, tag)
    if problems:
        raise ConfigError(problems)
    sections = _base_sections(path, config, zoo)
    if sections.dataset is None and sections.dataset_source:
        raise ConfigError(f"{path}: dataset_id: {sections.dataset_source}")
    base_dataset_id = config.dataset_id or sections.model.get("dataset_id")
    space = dataclasses.replace(space, dimensions=_in_fuxictr_order(space, sections))
    first = space.first()
    if first is None:
        raise ConfigError(f"{path}: exclude: leaves no combination")
    base = _check_values(sections, str(base_dataset_id), first, space, f"{path}: tuner_space", is_data_required)
    is_open = sections.model.get("dataset_id") == "TBD"
    base_name = f"{base.training.model}_{base_dataset_id}" if is_open else config.base_expid
    if name is not None:
        check_name(name, f"--name {name}")
    name = name or (path.stem if tag is None else f"{path.stem}@{tag}")
    check_name(name, f"the sweep's name {name}")
    seeds = tuple(config.seeds or [base.training.seed])
    sweep = Sweep(name, path, config, sections, base, base_name, space, seeds, tag)
    if config.sampler != "tpe" and sweep.plan.get(0) is None:
        raise ConfigError(f"--tag {tag}: matches no expid of the sweep")
    return sweep


def _tuner_problems(path: Path, config: TunerConfig, space: Space, tag: str | None) -> list[str]:
    problems = []
    keys = {dimension.key: dimension for dimension in space.dimensions}
    for key, dimension in keys.items():
        if dimension.is_single:
            continue
        if key in UNREAD_MODEL_KEYS | UNREAD_DATASET_KEYS:
            problems.append(
                f"{path}: tuner_space.{key}: nothing reads it, so its values would give equal trials: delete it"
            )
        elif key in NO_EFFECT | {"data_root"}:
            problems.append(f"{path}: tuner_space.{key}: does not change a result: give it one value")
        elif key in ("monitor", "monitor_mode", "task"):
            problems.append(
                f"{path}: tuner_space.{key}: trials of different objectives cannot be compared: give it one value"
            )
    if "dataset_id" in keys:
        problems.append(
            f"{path}: tuner_space.dataset_id: a sweep is about one dataset: set dataset_id beside tuner_space"
        )
    if "seed" in keys and config.seeds:
        problems.append(
            f"{path}: seeds: tuner_space has seed as well: keep one of them (seeds averages, seed compares)"
        )
    if config.sampler == "grid" and space.size() > MAX_GRID:
        problems.append(
            f"{path}: tuner_space: a grid of {space.size():,.0f} trials: set sampler: random and num_trials"
        )
    if config.sampler != "grid" and config.num_trials is None and config.timeout is None:
        problems.append(f"{path}: num_trials: missing: sampler {config.sampler} needs num_trials, timeout or both")
    if config.sampler == "random" and config.num_trials is None and tag is not None:
        problems.append(f"--tag {tag}: picks among the trials of a random search, which needs num_trials for that")
    if config.sampler == "tpe" and tag is not None:
        problems.append(f"--tag {tag}: picks trials of a grid or a random search, but sampler is tpe")
    if config.seeds and len(set(config.seeds)) < len(config.seeds):
        problems.append(f"{path}: seeds: lists a seed twice, got {shown(config.seeds)}")
    return problems


def _base_sections(path: Path, config: TunerConfig, zoo: Path | None) -> Sections:
    inline = {"model_config": config.model_config_, "dataset_config": config.dataset_config}
    inline = {key: value for key, value in inline.items() if value is not None}
    if config.model_config_ is not None and config.base_config is None:
        config_dir = path.parent
    else:
        config_dir = _config_dir(path, config.base_config)
        expids = [] if config.model_config_ is not None else list_expids(config_dir)
        if config.model_config_ is None and config.base_expid not in expids:
            raise ConfigError(
                f"{path}: base_expid: {config_dir} has no '{config.base_expid}'{did_you_mean(config.base_expid, expids)}; "
                f"known: {', '.join(expids) or 'none'}"
            )
    overrides = {"dataset_id": config.dataset_id} if config.dataset_id else {}
    model = config.tuner_space.get("model")
    if isinstance(model, str):
        overrides["model"] = model
    return read_sections(config_dir, config.base_expid, zoo, overrides, inline, str(path))


def _config_dir(path: Path, base_config: str | None) -> Path:
    """Where `base_config` lies: from the root, the tuner file, here, or a folder beside the zoo (FuxiCTR's scripts)."""
    root = find_root(path.resolve().parent)
    if base_config is None:
        places = [path.parent, path.parent.parent]
    else:
        places = [base / base_config for base in (root, path.parent, Path.cwd(), root / "benchmarks")]
    for place in places:
        if (place / "model_config.yaml").is_file() or any((place / "model_config").glob("*.yaml")):
            return place.resolve()
    raise ConfigError(
        f"{path}: base_config: no folder with model_config.yaml, got {shown(base_config)} "
        f"(looked at {', '.join(dict.fromkeys(str(place) for place in places))})"
    )


def _in_fuxictr_order(space: Space, sections: Sections) -> tuple[Dimension, ...]:
    """The keys as FuxiCTR counts: the model's as the base has them, then the dataset's, so that numbers mean the same."""
    of_dataset = [d for d in space.dimensions if d.key in DatasetConfig.model_fields]
    of_model = [d for d in space.dimensions if d not in of_dataset]

    def by_position(dimensions: list[Dimension], section: Mapping[str, Any]) -> list[Dimension]:
        order = {key: position for position, key in enumerate(section)}
        return sorted(dimensions, key=lambda dimension: order.get(dimension.key, len(order)))

    return (*by_position(of_model, sections.model), *by_position(of_dataset, sections.dataset or {}))


def _check_values(
    sections: Sections, base_dataset_id: str, first: Values, space: Space, source: str, is_data_required: bool
) -> Experiment:
    """Check each value of each key, the others as in the first setting, so that all that is wrong is said before any run.

    Returns:
        The experiment of the first setting, with the base's dataset_id.

    Raises:
        ConfigError: with one line per problem.
    """
    problems: dict[str, None] = {}

    def check(values: Values) -> None:
        overrides = {**values, "dataset_id": own_dataset_id(sections, base_dataset_id, values)}
        try:
            found = make_experiment(sections, overrides, source, is_data_required, is_quiet=True)
        except ConfigError as error:
            problems.update(dict.fromkeys(error.problems))
            return
        if found.dataset.valid_data is None and not found.dataset.valid_size:
            problems[
                f"{sections.dataset_source}.valid_data: missing, and a sweep compares its trials on the validation split: "
                "name a file, or set valid_size"
            ] = None

    check(first)
    unknown = [
        dimension.key for dimension in space.dimensions if any(f".{dimension.key}: unknown" in p for p in problems)
    ]
    for dimension in space.dimensions:
        ends = dimension.choices if dimension.range is None else (dimension.range.low, dimension.range.high)
        for value in ends if dimension.key not in unknown else ():
            candidate = {**first, dimension.key: value}
            if space.allows(candidate):
                check(candidate)
    if problems:
        raise ConfigError(problems)
    return make_experiment(sections, {**first, "dataset_id": base_dataset_id}, source, is_data_required=False)


def own_dataset_id(sections: Sections, base_dataset_id: str, values: Values) -> str:
    """The dataset of a setting: the base's, or one of its own where the setting changes what the data holds."""
    base, fields = sections.dataset or {}, DatasetConfig.model_fields
    of_data = [key for key in values if key in fields and key not in ("data_root", "rebuild_dataset")]
    changed = {key: values[key] for key in of_data if base.get(key, fields[key].default) != values[key]}
    return f"{base_dataset_id}_{sha256_of_value(changed)[:8]}" if changed else base_dataset_id
