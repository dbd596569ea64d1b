# SPDX-License-Identifier: Apache-2.0
"""What FuxiCTR's YAML files say of an experiment, merged and not yet checked: model_config and dataset_config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctrbench.errors import ConfigError, did_you_mean
from ctrbench.yamlfile import load_yaml, shown, shown_text

# File systems allow 255; what is added to a name (a number, a hash, `.partial`) needs some of them.
MAX_NAME_BYTES = 200


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
        dataset, dataset_source = dataset_section(config_dir, root, dataset_id)
    return Sections(expid, section, origins, source, dataset, dataset_source, root, zoo, problem)


def list_expids(config_dir: Path) -> list[str]:
    """The experiments of a configuration folder, in file order."""
    names = [name for path in _model_files(config_dir) for name in load_yaml(path)]
    return [name for name in dict.fromkeys(names) if name != "Base"]


def dataset_ids(config_dir: Path) -> dict[str, Any]:
    """expid -> the dataset_id that it or its Base names; each file is read once."""
    contents = [{k: v for k, v in load_yaml(path).items() if isinstance(v, dict)} for path in _model_files(config_dir)]
    base = next((content["Base"] for content in contents if "Base" in content), {})
    return {
        expid: {**content.get("Base", base), **section}.get("dataset_id")
        for content in contents
        for expid, section in content.items()
        if expid != "Base"
    }


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


def default_config_dir() -> Path:
    """config/ of the repository that the working directory lies in, else of the one that this program lies in."""
    here = Path.cwd()
    folders = (here, *here.parents, Path(__file__).resolve().parents[1])
    return next((folder for folder in folders if _is_repository(folder)), here) / "config"


def _is_repository(folder: Path) -> bool:
    return (folder / "model_zoo").is_dir() and (folder / "config" / "dataset_config").is_dir()


def check_name(name: str, where: str) -> None:
    """Experiments and datasets name folders, which must not lie elsewhere."""
    if not name or name in (".", "..") or set(name) & set("/\\\0"):
        raise ConfigError(f"{shown_text(where)}: names a folder, so it must not contain '/' or be '.' or '..'")
    if not name.isprintable():
        raise ConfigError(f"{shown_text(where)}: names a folder, so it must not contain control characters")
    if len(name.encode(errors="replace")) > MAX_NAME_BYTES:
        raise ConfigError(
            f"{shown_text(where)}: names a folder, so it must not be longer than {MAX_NAME_BYTES} bytes, got "
            f"{len(name.encode(errors='replace'))}"
        )


def _is_name(name: str) -> bool:
    try:
        check_name(name, "")
    except ConfigError:
        return False
    return True


def check_path(path: str | Path, where: str) -> None:
    """A folder that a configuration names must be one that a file system can have.

    Raises:
        ConfigError: it contains NUL, or a part of it is too long.
    """
    if "\0" in str(path):
        raise ConfigError(f"{where}: names a path, so it must not contain NUL, got {shown(str(path))}")
    if any(len(part.encode(errors="replace")) > MAX_NAME_BYTES for part in Path(path).parts):
        raise ConfigError(
            f"{where}: names a path, so no part of it may be longer than {MAX_NAME_BYTES} bytes, got {shown(str(path))}"
        )


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


def _find_zoo(config_dir: Path, root: Path, model: Any) -> tuple[Path | None, str]:
    """The model folder, or None and what to say of it."""
    around = config_dir.resolve().parent
    # A name, not a path: what lies there is run.
    named = [root / "model_zoo" / model] if isinstance(model, str) and _is_name(model) else []
    for folder in (around, *named):
        if (folder / "src" / "__init__.py").is_file():
            return folder, ""
    folders = sorted(p.name for p in (root / "model_zoo").glob("*") if (p / "src").is_dir())
    known = f"known: {', '.join(folders)}" if folders else f"{root / 'model_zoo'} has none: name it with --zoo FOLDER"
    if model is None:
        return None, ""  # reported with the other training keys
    return None, f"no model folder, got {shown(model)}{did_you_mean(model, folders)}; {known}"


def dataset_section(config_dir: Path, root: Path, dataset_id: Any) -> tuple[dict[str, Any] | None, str]:
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
