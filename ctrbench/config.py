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
from ctrbench.errors import ConfigError, did_you_mean
from ctrbench.files import sha256_of_value
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
from ctrbench.validation import (
    Where,
    check_model_params,
    check_values,
    missing_data,
    valid_part,
    validate,
)
from ctrbench.yamlfile import dump_yaml, load_yaml, parse_yaml, shown

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


@dataclasses.dataclass(frozen=True)
class Sections:
    """What the files say of one experiment: merged, not yet checked.

    Attributes:
        expid: its name.
        model: `Base` updated with the experiment's section.
        origins: for each key of `model`, the file and section that it comes from.
        source: file and section of the experiment.
        dataset: section of the dataset; None where there is none.
        dataset_source: file and section of the dataset, or what to say where there is none.
        root: the folder that relative paths are meant from.
        zoo: the model folder; None where it is not known.
        zoo_problem: what to say where it is not.
    """

    expid: str
    model: dict[str, Any]
    origins: dict[str, str]
    source: str
    dataset: dict[str, Any] | None
    dataset_source: str
    root: Path
    zoo: Path | None
    zoo_problem: str = ""


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


def read_sections(
    config_dir: Path,
    expid: str,
    zoo: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    inline: Mapping[str, Any] | None = None,
    inline_source: str = "",
) -> Sections:
    """What the files of a configuration folder say of one experiment.

    Args:
        config_dir: as for `load_experiment`.
        expid: the section.
        zoo: the model folder, where it is known.
        overrides: `dataset_id` and `model` in it win over the files.
        inline: `model_config` and `dataset_config` as mappings of sections, which win over the folder's files.
        inline_source: the file that these are from, for messages.

    Raises:
        ConfigError: a file is missing or not YAML, or there is no such section.
    """
    root, inline = find_root(config_dir, zoo), inline or {}
    check_name(expid, f"--expid {expid}")
    if "model_config" in inline:
        source = f"{inline_source}: model_config.{expid}"
        section, origins = _inline_section(inline["model_config"], expid, inline_source)
    else:
        source = f"{_model_files(config_dir)[0]}: {expid}"
        section, origins = _model_section(config_dir, expid)
    named = {**section, **(overrides or {})}
    problem = ""
    if zoo is None:
        zoo, problem = _find_zoo(config_dir, root, named.get("model"))
    dataset_id = named.get("dataset_id")
    if isinstance(dataset_id, str) and dataset_id in inline.get("dataset_config", {}):
        check_name(dataset_id, f"{inline_source}: dataset_config.{dataset_id}")
        dataset, dataset_source = inline["dataset_config"][dataset_id], f"{inline_source}: dataset_config.{dataset_id}"
    else:
        dataset, dataset_source = _dataset_section(config_dir, root, dataset_id)
    return Sections(expid, section, origins, source, dataset, dataset_source, root, zoo, problem)


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
        root = (run_dir / saved["root"]).resolve()
        if not (root / saved["zoo"]).is_dir():  # a copy elsewhere in the repository
            around = run_dir.resolve().parents
            root = next((folder for folder in around if (folder / saved["zoo"] / "src").is_dir()), root)
        paths = (root / saved["zoo"]).resolve(), root
        return Experiment(str(saved["expid"]), training, dict(saved["model"]), dataset, *paths, source=str(path))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: damaged: {str(error).splitlines()[0]}: run the experiment again") from error


def list_expids(config_dir: Path) -> list[str]:
    """The experiments of a configuration folder, in file order."""
    names = [name for path in _model_files(config_dir) for name in load_yaml(path)]
    return [name for name in dict.fromkeys(names) if name != "Base"]


def find_root(config_dir: Path, zoo: Path | None = None) -> Path:
    """The folder that relative paths are meant from: the repository's, else the model folder around `config_dir`.

    A model folder that lies in a repository but not in its model_zoo is foreign to it and its own root. A configuration
    folder that lies elsewhere has the root of the model folder `zoo`.
    """
    config_dir = config_dir.resolve()
    folders = [config_dir, *config_dir.parents, *((zoo / "config").resolve().parents if zoo else ())]
    repository = next((f for f in folders if _is_repository(f)), None)
    for folder in folders:
        if folder == repository:
            return folder
        if (folder / "src" / "__init__.py").is_file() and (repository is None or folder.parent.name != "model_zoo"):
            return folder
    return next((folder for folder in folders if (folder / "src").is_dir()), config_dir.parent)


def _is_repository(folder: Path) -> bool:
    return (folder / "model_zoo").is_dir() and (folder / "config" / "dataset_config").is_dir()


def check_name(name: str, where: str) -> None:
    """Experiments and datasets name folders, which must not lie elsewhere."""
    if not name or name in (".", "..") or set(name) & set("/\\\0"):
        raise ConfigError(f"{where}: names a folder, so it must not contain '/' or be '.' or '..'")


def _model_files(config_dir: Path) -> list[Path]:
    return _config_files(config_dir, "model_config") or _raise(
        f"{config_dir}: not a configuration folder, it has neither model_config.yaml nor model_config/*.yaml"
    )


def _config_files(config_dir: Path, stem: str) -> list[Path]:
    single = config_dir / f"{stem}.yaml"
    return [single] if single.is_file() else sorted((config_dir / stem).glob("*.yaml"))


def _raise(problem: str) -> Any:
    raise ConfigError(problem)


def _model_section(config_dir: Path, expid: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Base updated with the expid's section, and for each key the file and section that it comes from.

    As in FuxiCTR, Base is that of the expid's own file; a file without one takes it from another file of the folder.
    """
    bases: dict[Path, dict[str, Any]] = {}
    found: dict[Path, dict[str, Any]] = {}
    known: list[str] = []
    for path in _model_files(config_dir):
        content = load_yaml(path)
        known += [name for name in content if name != "Base"]
        for name, sections in (("Base", bases), (expid, found)):
            if name in content and not isinstance(content[name], dict):
                raise ConfigError(f"{path}: {name}: must be a section of keys, got {shown(content[name])}")
            if name in content:
                sections[path] = content[name]
    if not found or expid == "Base":
        raise ConfigError(
            f"{config_dir}: unknown expid '{expid}'{did_you_mean(expid, known)}; known: {', '.join(known) or 'none'}"
        )
    if len(found) > 1:
        raise ConfigError(
            f"{config_dir}: expid '{expid}' is in {' and '.join(p.name for p in found)}: keep one of them"
        )
    [(path, section)] = found.items()
    base_path = path if path in bases else next(iter(bases), path)
    base = bases.get(base_path, {})
    origins = dict.fromkeys(base, f"{base_path}: Base") | dict.fromkeys(section, f"{path}: {expid}")
    return {**base, **section}, origins


def _inline_section(
    model_config: Mapping[str, dict[str, Any]], expid: str, source: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """As `_model_section`, of a mapping of sections."""
    if expid not in model_config:
        known = [name for name in model_config if name != "Base"]
        raise ConfigError(
            f"{source}: model_config: no section '{expid}'{did_you_mean(expid, known)}; it has {', '.join(known) or 'none'}"
        )
    names = [name for name in ("Base", expid) if name in model_config]
    merged = {key: value for name in names for key, value in model_config[name].items()}
    return merged, {key: f"{source}: model_config.{name}" for name in names for key in model_config[name]}


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


def _find_zoo(config_dir: Path, root: Path, model: Any) -> tuple[Path | None, str]:
    """The model folder, or None and what to say of it."""
    around = config_dir.resolve().parent
    for folder in (around, root / "model_zoo" / str(model)):
        if (folder / "src" / "__init__.py").is_file():
            return folder, ""
    folders = sorted(p.name for p in (root / "model_zoo").glob("*") if (p / "src").is_dir())
    known = f"known: {', '.join(folders)}" if folders else f"{root / 'model_zoo'} has none: name it with --zoo FOLDER"
    if model is None:
        return None, ""  # reported with the other training keys
    return None, f"no model folder, got {shown(model)}{did_you_mean(model, folders)}; {known}"


def _dataset_section(config_dir: Path, root: Path, dataset_id: Any) -> tuple[dict[str, Any] | None, str]:
    """A dataset's section and its file, or None and what to say of it."""
    if not isinstance(dataset_id, str):
        return None, ""  # reported with the other training keys
    known: list[str] = []
    for path in _config_files(config_dir, "dataset_config") + _config_files(root / "config", "dataset_config"):
        content = load_yaml(path)
        known += content
        if dataset_id in content:
            section = content[dataset_id]
            if not isinstance(section, dict):
                raise ConfigError(f"{path}: {dataset_id}: must be a section of keys, got {shown(section)}")
            check_name(dataset_id, f"{path}: {dataset_id}")
            return section, f"{path}: {dataset_id}"
    places = [config_dir / "dataset_config.yaml", root / "config" / "dataset_config" / "*.yaml"]
    return None, f"unknown dataset, got {shown(dataset_id)}{did_you_mean(dataset_id, known)}; " + (
        f"known: {', '.join(dict.fromkeys(known))}" if known else f"there is no {' or '.join(map(str, places))}"
    )


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
        # Data that must not be rebuilt may have come from settings that would not do to build it.
        is_kept = not dataset.rebuild_dataset and manifests.read(dataset.folder(root)) is not None
        problems += (basic_problems if is_kept else dataset_problems)(dataset, here)
        if is_data_required:
            problems += [
                f"{here(key)}: no such file, got '{path}' (looked in {root}); data/README.md says how to get it"
                for key, path in missing_data(dataset, root).items()
            ]
    return dataset, unread


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
