# SPDX-License-Identifier: Apache-2.0
"""What must hold in a configuration, each problem as one line with file, section and key."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

from ctrbench.errors import ConfigError, did_you_mean
from ctrbench.schema import DatasetConfig, FeatureColumn, TrainingConfig, expand_columns


class Where:
    """Names the file and the section that a key comes from."""

    def __init__(self, default: str, origins: Mapping[str, str] | None = None):
        self.default = default
        self.origins = origins or {}

    def __call__(self, key: str) -> str:
        head = key.split(".")[0].split("[")[0]
        return f"{self.origins.get(head, self.default)}.{key}"


def validate(model: type[pydantic.BaseModel], values: dict[str, Any], where: Where, problems: list[str]) -> Any:
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        # A union reports once per member; one line per key is enough.
        lines: dict[str, str] = {}
        for item in error.errors():
            key = _key_of(item["loc"], values)
            lines.setdefault(key, f"{where(key)}: {_explain(item, model)}")
        problems.extend(lines.values())
        return None


def _key_of(location: tuple[Any, ...], values: dict[str, Any]) -> str:
    """`feature_cols['I1'].type` from pydantic's location, which numbers columns and ends in names of union members."""
    parts = [str(location[0])]
    if len(location) > 1 and isinstance(location[1], int) and parts[0] in ("feature_cols", "label_col"):
        columns = values.get(parts[0])
        column = expand_columns(columns)[location[1]] if isinstance(columns, list) else None
        name = column.get("name", location[1]) if isinstance(column, dict) else location[1]
        parts[0] += f"[{name!r}]"
        if len(location) > 2:
            parts.append(str(location[2]))
    return ".".join(parts)


def _explain(item: Any, model: type[pydantic.BaseModel]) -> str:
    kind, got, context = item["type"], item.get("input"), item.get("ctx", {})
    key = str(item["loc"][-1])
    if kind == "extra_forbidden":
        fields = FeatureColumn if str(item["loc"][0]) == "feature_cols" else model
        return f"unknown key, got {got!r}{did_you_mean(key, fields.model_fields)}"
    if kind == "missing":
        return "missing, this key is required"
    if kind == "literal_error":
        choices = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return f"must be {context['expected']}, got {got!r}{did_you_mean(got, choices)}"
    message = item["msg"].removeprefix("Input should be a valid ").removeprefix("Input should be ")
    return f"must be {message}, got {got!r}"


def check_model_params(zoo: Path, name: str, params: dict[str, Any], where: Where) -> list[str]:
    """Model keys against the constructor: names, types and, by FuxiCTR's naming conventions, ranges."""
    from ctrbench.zoo import load_model_class, model_keys

    model_class = load_model_class(zoo, name)
    keys = model_keys(model_class)
    problems = []
    for key, value in params.items():
        if key not in keys:
            known = sorted({*keys, *TrainingConfig.model_fields})
            problems.append(f"{where(key)}: unknown key, got {value!r}{did_you_mean(key, known)}")
            continue
        problem = _check_type(keys[key], model_class, value) or _check_range(key, value)
        if problem:
            problems.append(f"{where(key)}: {problem}, got {value!r}")
    return problems


def _check_type(parameter: inspect.Parameter, model_class: type, value: Any) -> str | None:
    annotation = parameter.annotation
    if isinstance(annotation, str):
        annotation = _ANNOTATIONS.get(annotation.replace(" ", ""), parameter.empty)
    if annotation is parameter.empty:
        default = parameter.default
        if default is parameter.empty or default is None or isinstance(default, list | tuple | dict):
            return None
        annotation = float | str | list | None if isinstance(default, float) else type(default) | list | None
    try:
        pydantic.TypeAdapter(annotation).validate_python(value, strict=True)
    except pydantic.ValidationError:
        wanted = annotation.__name__ if isinstance(annotation, type) else str(annotation)
        return f"must be {wanted}"
    except pydantic.PydanticSchemaGenerationError:
        return None
    return None


# FuxiCTR's names of the binary cross entropy.
LOSSES = ("binary_crossentropy", "binary_cross_entropy", "bce")

# Annotations as written under `from __future__ import annotations`; never evaluated, only looked up.
_ANNOTATIONS: dict[str, Any] = {
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "str|None": str | None,
    "int|None": int | None,
    "float|None": float | None,
    "float|str|None": float | str | None,
    "list[int]": list[int],
    "list[str]": list[str],
}


def _check_range(key: str, value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if key.endswith("dropout") and not 0 <= value < 1:
        return "must lie in [0, 1)"
    if (key.startswith("num_") or key.endswith("_dim")) and value < 1:
        return "must be at least 1"
    return None


def check_values(training: TrainingConfig, where: Where) -> list[str]:
    import torch

    from ctrbench.metrics import parse_metrics

    problems = []
    monitored = [training.monitor] if isinstance(training.monitor, str) else list(training.monitor)
    for key, names in (("metrics", training.metrics), ("monitor", monitored)):
        try:
            parse_metrics(names, training.group_id)
        except ConfigError as error:
            problems += [f"{where(key)}: {problem.removeprefix('metrics: ')}" for problem in error.problems]
    for key in ("embedding_regularizer", "net_regularizer"):
        try:
            parse_regularizer(getattr(training, key))
        except ConfigError as error:
            problems += [f"{where(key)}: {problem}" for problem in error.problems]
    if problem := _optimizer_problem(training.optimizer):
        problems.append(f"{where('optimizer')}: {problem}, got {training.optimizer!r}")
    if training.loss not in LOSSES and not hasattr(torch.nn.functional, training.loss):
        problems.append(
            f"{where('loss')}: no such function in torch.nn.functional, got {training.loss!r}"
            f"{did_you_mean(training.loss, LOSSES)}"
        )
    return problems


def _optimizer_problem(name: str) -> str | None:
    import torch

    if name.lower() == "adam":
        return None
    known = [n for n, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)]
    return None if name in known else f"no such optimizer in torch.optim{did_you_mean(name, known)}"


def parse_regularizer(value: float | str | None) -> list[tuple[int, float]]:
    """FuxiCTR's regularizers as (p, lambda) pairs: a number means L2, else `l1(x)`, `l2(x)` or `l1_l2(x,y)`."""
    if value is None or value == 0:
        return []
    if isinstance(value, int | float):
        if value < 0:
            raise ConfigError(f"must not be negative, got {value!r}")
        return [(2, float(value))]
    name, _, arguments = value.replace(" ", "").rstrip(")").partition("(")
    powers = {"l1": [1], "l2": [2], "l1_l2": [1, 2]}.get(name)
    try:
        weights = [float(x) for x in arguments.split(",")]
    except ValueError:
        weights = []
    if powers is None or len(powers) != len(weights):
        raise ConfigError(f"must be a number, l1(x), l2(x) or l1_l2(x,y), got {value!r}")
    return list(zip(powers, weights, strict=True))


def check_dataset(dataset: DatasetConfig, where: Where) -> list[str]:
    problems = []
    names = [c.name for c in dataset.feature_cols] + [c.name for c in dataset.label_col]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"{where('feature_cols')}: column '{name}' is listed more than once")
    if dataset.train_data is None:
        problems.append(f"{where('train_data')}: missing, this key is required")
    if dataset.data_format != "h5":
        for key in ("feature_cols", "label_col"):
            if not getattr(dataset, key):
                problems.append(f"{where(key)}: missing, this key is required for data_format {dataset.data_format}")
    return problems


def missing_data(dataset: DatasetConfig, root: Path) -> dict[str, str]:
    """The raw files that are neither there nor needed no more because the dataset is built: key -> configured path."""
    if (root / dataset.data_root / dataset.dataset_id / "manifest.json").is_file():
        return {}
    paths = {key: getattr(dataset, key) for key in ("train_data", "valid_data", "test_data")}
    return {key: path for key, path in paths.items() if path is not None and not _exists(root, path)}


def _exists(root: Path, pattern: str) -> bool:
    path = root / pattern
    return path.exists() or any(Path(path.anchor).glob(str(path.relative_to(path.anchor))))


def check_together(dataset: DatasetConfig, training: TrainingConfig, where: Where) -> list[str]:
    if not dataset.feature_cols:
        return []  # ready data: the feature map decides when it is read
    problems = []
    types = {column.name: column.type for column in dataset.feature_cols if column.active}
    group = training.group_id
    if group is not None and group not in types:
        problems.append(f"{where('group_id')}: no such column, got '{group}'{did_you_mean(group, types)}")
    for name in training.use_features or []:
        if name not in types:
            problems.append(f"{where('use_features')}: no such column, got '{name}'{did_you_mean(name, types)}")
    return problems
