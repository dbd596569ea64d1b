# SPDX-License-Identifier: Apache-2.0
"""From FuxiCTR's YAML files to one validated, frozen `Experiment`. Every problem is reported at once."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ctrbench import manifest as manifests
from ctrbench.columns import basic_problems, check_together, dataset_problems
from ctrbench.errors import ConfigError
from ctrbench.files import sha256_of_value
from ctrbench.ready_data import is_encoded
from ctrbench.schema import (
    INSTEAD_OF,
    LOADER_KEYS,
    REFUSED_DATASET_KEYS,
    UNREAD_COLUMN_KEYS,
    UNREAD_DATASET_KEYS,
    UNREAD_MODEL_KEYS,
    DatasetConfig,
    TrainingConfig,
)
from ctrbench.sections import (
    Sections,
    check_name,
    check_path,
    dataset_section,
    default_config_dir,
    find_root,
    read_sections,
)
from ctrbench.validation import (
    Where,
    check_model_params,
    check_values,
    missing_data,
    valid_part,
    validate,
)
from ctrbench.yamlfile import dump_yaml, load_yaml, parse_yaml, shown

# Keys that came later. At their defaults they are not hashed, so that earlier runs keep their hashes.
LATER_KEYS = ("device_cache", "shuffle_buffer", "speed", "precision", "compile", "cuda_graph", "deterministic")
# Settings that do not change a result: where it is written and how much is said on the way.
NO_EFFECT = frozenset({"model_root", "verbose", "checkpoint_every"})
# Settings of a dataset that are paths.
PATHS = ("data_root", "train_data", "valid_data", "test_data", "item_info")
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One experiment, complete: what `run_expid.py --expid X` needs to know.

    Attributes:
        expid: its name in model_config.yaml.
        training: the framework's own settings.
        model_params: keywords of the model's constructor.
        dataset: the dataset's section.
        zoo: the model folder.
        root: the folder that relative paths are meant from.
        source: file and section that the settings come from, for messages.
    """

    expid: str
    training: TrainingConfig
    model_params: dict[str, Any]
    dataset: DatasetConfig
    zoo: Path
    root: Path
    source: str

    @property
    def run_dir(self) -> Path:
        """`<model_root>/<dataset_id>/<expid>/seed_<seed>`."""
        settings = self.training
        return self.root / settings.model_root / settings.dataset_id / self.expid / f"seed_{settings.seed}"

    @property
    def config_hash(self) -> str:
        """SHA-256 over everything that shapes the result."""
        return self._hash(NO_EFFECT)

    @property
    def settings_hash(self) -> str:
        """As `config_hash` without the seed: the same for all seeds of an experiment."""
        return self._hash(NO_EFFECT | {"seed"})

    def _hash(self, left_out: frozenset[str]) -> str:
        training = {k: v for k, v in self.training.model_dump().items() if k not in left_out}
        for key in LATER_KEYS:
            if training[key] == TrainingConfig.model_fields[key].default:
                del training[key]
        dataset = self.dataset.model_dump(exclude={"data_root"})
        # A dump does not tell `feature_encoder: null` from no feature_encoder, which for a sequence means the average.
        dataset["encoders"] = [column.encoder for column in self.dataset.feature_cols]
        return sha256_of_value({"training": training, "model": _with_tuples(self.model_params), "dataset": dataset})

    def to_yaml(self) -> str:
        """All settings, defaults included, in the form that `load_run` reads."""
        return dump_yaml(
            {
                "expid": self.expid,
                "root": os.path.relpath(self.root.resolve(), self.run_dir.resolve()),
                "zoo": os.path.relpath(self.zoo.resolve(), self.root.resolve()),
                "training": self.training.model_dump(),
                "model": self.model_params,
                "dataset": self.dataset.model_dump(exclude_unset=True),
            }
        )

    def flat(self) -> dict[str, Any]:
        """Model and training settings side by side."""
        return {**self.training.model_dump(), **self.model_params}

    def constructor_params(self, gpu: int = -1) -> dict[str, Any]:
        """What FuxiCTR passes to a constructor: `flat()` and the dataset's settings, with absolute paths."""
        dataset = self.dataset.model_dump(exclude_unset=True)
        dataset |= {key: str(self.root / dataset[key]) for key in PATHS if dataset.get(key)}
        model_root = str(self.root / self.training.model_root)
        return {**dataset, **self.flat(), "gpu": gpu, "model_id": self.expid, "model_root": model_root}


def load_experiment(
    config_dir: Path,
    expid: str,
    zoo: Path | None = None,
    overrides: Iterable[str] = (),
    seed: int | None = None,
    is_data_required: bool = True,
) -> Experiment:
    """Read, merge and validate one experiment.

    Args:
        config_dir: the folder of model_config.yaml (or model_config/*.yaml) and, where it has one, dataset_config.yaml.
        expid: the section.
        zoo: the model folder; by default the one that `config_dir` lies in, else `model_zoo/<model>`.
        overrides: `key=value` texts that win over the files.
        seed: wins over everything.
        is_data_required: report raw files that are missing.

    Raises:
        ConfigError: with one line per problem.
    """
    overridden = dict(_parse_override(text) for text in overrides)
    if seed is not None:
        overridden["seed"] = seed
    sections = read_sections(config_dir, expid, zoo, overridden)
    return make_experiment(sections, overridden, is_data_required=is_data_required)


def make_experiment(
    sections: Sections,
    overrides: Mapping[str, Any],
    override_source: str | None = None,
    is_data_required: bool = True,
    is_quiet: bool = False,
) -> Experiment:
    """Validate the sections of one experiment with some values replaced.

    Args:
        sections: from `read_sections`.
        overrides: key of the model or the dataset -> value.
        override_source: where the overrides come from, for messages; by default the option `--set`.
        is_data_required: report raw files that are missing.
        is_quiet: do not warn of keys that nothing reads.

    Raises:
        ConfigError: with one line per problem.
    """
    expid, root, zoo = sections.expid, sections.root, sections.zoo
    of_dataset = DatasetConfig.model_fields.keys() | UNREAD_DATASET_KEYS
    dataset_keys = {k: v for k, v in overrides.items() if k in of_dataset and k != "dataset_id"}
    section = {**sections.model, **{k: v for k, v in overrides.items() if k not in dataset_keys}}
    origins = sections.origins | dict.fromkeys(overrides, override_source or f"--set: {expid}")
    where = Where(sections.source, origins)

    problems: list[str] = []
    unread: list[str] = []
    training_keys = {k: v for k, v in section.items() if k in TrainingConfig.model_fields}
    training = validate(TrainingConfig, training_keys, where, problems)
    if sections.zoo_problem:
        problems.append(f"{where('model')}: {sections.zoo_problem}")
    model_params = {k: v for k, v in section.items() if k not in training_keys}
    for key in sorted(model_params.keys() & DatasetConfig.model_fields.keys()):
        problems.append(f"{where(key)}: belongs in dataset_config, got {shown(model_params.pop(key))}")
    if zoo is not None and isinstance(section.get("model"), str):
        loaded = LOADER_KEYS if (sections.dataset or {}).get("item_info") else ()
        found, unread = check_model_params(
            zoo, section["model"], model_params, where, unread=UNREAD_MODEL_KEYS, loaded=loaded
        )
        problems += found
    settings = valid_part(training_keys)
    problems += check_values(settings, where)
    problems += _path_problems({"model_root": settings.model_root}, where)
    dataset, dataset_unread = _make_dataset(
        sections, section.get("dataset_id"), dataset_keys, override_source, where, problems, is_data_required
    )
    if dataset is not None:
        problems += check_together(dataset, settings, where)
    if problems:
        raise ConfigError(problems)
    assert training is not None and dataset is not None and zoo is not None
    if (unread or dataset_unread) and not is_quiet:
        logger.warning(
            "Keys that nothing reads, accepted for FuxiCTR's sake: %s", ", ".join(_hinted(unread) + dataset_unread)
        )
    return Experiment(expid, training, model_params, dataset, zoo.resolve(), root, where.default)


def load_dataset(dataset_id: str, config_dir: Path | None = None) -> tuple[DatasetConfig, Path]:
    """The section of a dataset, and the folder that its paths are meant from.

    Args:
        dataset_id: its name.
        config_dir: folder of dataset_config.yaml (or dataset_config/*.yaml); by default config/ of the repository that
            the working directory lies in.

    Raises:
        ConfigError: with one line per problem.
    """
    config_dir = config_dir or default_config_dir()
    root = find_root(config_dir)
    section, source = dataset_section(config_dir, root, dataset_id)
    if section is None:
        raise ConfigError(source)
    where = Where(source)
    sections = Sections("", {}, {}, source, section, source, root, None)
    problems: list[str] = []
    dataset, unread = _make_dataset(sections, dataset_id, {}, None, where, problems, is_data_required=False)
    if problems:
        raise ConfigError(problems)
    assert dataset is not None
    if unread:
        logger.warning("Keys that nothing reads, accepted for FuxiCTR's sake: %s", ", ".join(unread))
    return dataset, root


def load_run(run_dir: Path) -> Experiment:
    """The experiment of a run directory, from its config.yaml.

    Raises:
        ConfigError: the directory holds no run, or its config.yaml was damaged.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_dir}: not a run directory, it has no config.yaml")
    saved = load_yaml(path)
    try:
        training = TrainingConfig.model_validate(saved["training"])
        dataset = DatasetConfig.model_validate(saved["dataset"])
        for key, name in (("expid", str(saved["expid"])), ("dataset.dataset_id", dataset.dataset_id)):
            check_name(name, f"{path}: {key}: {name}")
        root = (run_dir / saved["root"]).resolve()
        if not (root / saved["zoo"]).is_dir():  # a copy elsewhere, in the repository or outside it
            around = [*run_dir.resolve().parents, Path.cwd(), *Path.cwd().parents]
            root = next((folder for folder in around if (folder / saved["zoo"] / "src").is_dir()), root)
        paths = (root / saved["zoo"]).resolve(), root
        return Experiment(str(saved["expid"]), training, dict(saved["model"]), dataset, *paths, source=str(path))
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ConfigError(f"{path}: damaged: {str(error).splitlines()[0]}: run the experiment again") from error


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text}: must be key=value")
    return key.strip(), parse_yaml(value, f"--set {key.strip()}")


def _with_tuples(value: Any) -> Any:
    """A value in which tuples differ from lists, as they do for FuxiCTR's models, where JSON would not tell."""
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_with_tuples(item) for item in value]
        return {"tuple": items} if isinstance(value, tuple) else items
    return value


def _hinted(keys: Iterable[str]) -> list[str]:
    """Keys that nothing reads, sorted, with the one that does the same here."""
    return [f"{key} (here: {INSTEAD_OF[key]})" if key in INSTEAD_OF else key for key in sorted(keys)]


def _make_dataset(
    sections: Sections,
    dataset_id: Any,
    overrides: dict[str, Any],
    override_source: str | None,
    where: Where,
    problems: list[str],
    is_data_required: bool,
) -> tuple[DatasetConfig | None, list[str]]:
    if sections.dataset is None:
        if sections.dataset_source:
            problems.append(f"{where('dataset_id')}: {sections.dataset_source}")
        return None, []
    root = sections.root
    section = {**sections.dataset, **overrides}
    unread = _drop_unread(section)
    here = Where(sections.dataset_source, dict.fromkeys(overrides, override_source or f"--set: {dataset_id}"))
    for key in sorted(set(section) & set(TrainingConfig.model_fields) - set(DatasetConfig.model_fields)):
        problems.append(f"{here(key)}: belongs in model_config, got {shown(section.pop(key))}")
    for key in sorted(section.keys() & REFUSED_DATASET_KEYS):
        problems.append(f"{here(key)}: {REFUSED_DATASET_KEYS[key]}, got {shown(section.pop(key))}")
    dataset = validate(DatasetConfig, {**section, "dataset_id": dataset_id}, here, problems)
    if dataset is not None:
        if bad := _path_problems({key: getattr(dataset, key) for key in PATHS}, here):
            problems += bad
            return None, unread
        # Data that must not be rebuilt may have come from settings that would not do to build it.
        is_kept = not dataset.rebuild_dataset and manifests.read(dataset.folder(root)) is not None
        if is_encoded(dataset, dataset.folder(root)):  # it brings its own columns
            problems += basic_problems(dataset, here, is_ready=True)
        else:
            problems += (basic_problems if is_kept else dataset_problems)(dataset, here)
        if is_data_required:
            problems += [
                f"{here(key)}: no such file, got '{path}' (looked in {root}); data/README.md says how to get it"
                for key, path in missing_data(dataset, root).items()
            ]
    return dataset, unread


def _path_problems(paths: Mapping[str, Any], where: Where) -> list[str]:
    problems: list[str] = []
    for key, path in paths.items():
        try:
            check_path(path or "", where(key))
        except ConfigError as error:
            problems += error.problems
    return problems


def _drop_unread(section: dict[str, Any]) -> list[str]:
    unread = sorted(set(section) & UNREAD_DATASET_KEYS)
    for key in unread:
        del section[key]
    columns = section.get("feature_cols")
    if isinstance(columns, list):
        section["feature_cols"] = [
            {k: v for k, v in c.items() if k not in UNREAD_COLUMN_KEYS} if isinstance(c, dict) else c for c in columns
        ]
        in_columns = {k for c in columns if isinstance(c, dict) for k in c} & UNREAD_COLUMN_KEYS
        unread += sorted(f"feature_cols.{k}" for k in in_columns)
    return unread
