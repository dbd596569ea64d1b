# SPDX-License-Identifier: Apache-2.0
"""What must hold in a configuration, each problem as one line with file, section and key."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

from ctrbench.errors import ConfigError, did_you_mean
from ctrbench.schema import DatasetConfig, FeatureColumn, LabelColumn, TrainingConfig, expand_columns


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


def valid_part(values: dict[str, Any]) -> TrainingConfig:
    """Training settings with defaults for the keys that are wrong, so that what the others say can be checked too."""
    try:
        return TrainingConfig.model_validate(values)
    except pydantic.ValidationError as error:
        wrong = {item["loc"][0] for item in error.errors()}
        return TrainingConfig.model_construct(**{key: value for key, value in values.items() if key not in wrong})


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
        columns: dict[str, type[pydantic.BaseModel]] = {"feature_cols": FeatureColumn, "label_col": LabelColumn}
        fields = columns.get(str(item["loc"][0]), model)
        return f"unknown key, got {got!r}{did_you_mean(key, fields.model_fields)}"
    if kind == "missing":
        return "missing, this key is required"
    if kind == "literal_error":
        choices = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return f"must be {context['expected']}, got {got!r}{did_you_mean(got, choices)}"
    if kind == "model_type":
        return f"must be a mapping of keys, got {got!r}"
    if kind == "too_short":
        return f"must not be empty, got {got!r}"
    message = item["msg"].removeprefix("Input should be a valid ").removeprefix("Input should be ")
    return f"must be {message}, got {got!r}"


def check_model_params(zoo: Path, name: str, params: dict[str, Any], where: Where) -> list[str]:
    """Model keys against the constructor: names, types and, by FuxiCTR's naming conventions, ranges."""
    from ctrbench.zoo import load_model_class, model_keys

    try:
        model_class = load_model_class(zoo, name)
    except ConfigError as error:
        return error.problems
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
    if isinstance(training.monitor, dict) and not any(training.monitor.values()):
        problems.append(f"{where('monitor')}: must weight at least one metric, got {training.monitor!r}")
    if problem := _loss_problem(training.loss, training.task):
        problems.append(f"{where('loss')}: {problem}, got {training.loss!r}")
    return problems


def _loss_problem(name: str, task: str) -> str | None:
    import torch

    if name in LOSSES:
        return None if task == "binary_classification" else f"needs labels and outputs in [0, 1], but task is {task}"
    functions = {n: f for n, f in vars(torch.nn.functional).items() if inspect.isroutine(f) and not n.startswith("_")}
    known = [n for n, f in functions.items() if n.endswith(("loss", "entropy", "entropy_with_logits", "kl_div"))]
    return None if name in known else f"no such loss in torch.nn.functional{did_you_mean(name, [*LOSSES, *known])}"


# These need a closure, sparse gradients or matrices only, or are the base class.
_OTHER_OPTIMIZERS = ("Optimizer", "LBFGS", "SparseAdam", "Muon")


def _optimizer_problem(name: str) -> str | None:
    import torch

    if name.lower() == "adam":
        return None
    classes = {n: c for n, c in vars(torch.optim).items() if inspect.isclass(c)}
    known = [n for n, c in classes.items() if issubclass(c, torch.optim.Optimizer) and n not in _OTHER_OPTIMIZERS]
    return None if name in known else f"no such optimizer in torch.optim{did_you_mean(name, known)}"


def parse_regularizer(value: float | str | None) -> list[tuple[int, float]]:
    """FuxiCTR's regularizers as (p, lambda) pairs: a number means L2, else `l1(x)`, `l2(x)` or `l1_l2(x,y)`."""
    if value is None or value == 0:
        return []
    if isinstance(value, int | float):
        if not 0 <= value < math.inf:
            raise ConfigError(f"must not be negative or infinite, got {value!r}")
        return [(2, float(value))]
    name, _, arguments = value.replace(" ", "").rstrip(")").partition("(")
    powers = {"l1": [1], "l2": [2], "l1_l2": [1, 2]}.get(name)
    try:
        weights = [float(x) for x in arguments.split(",")]
    except ValueError:
        weights = []
    if powers is None or len(powers) != len(weights) or not all(0 <= weight < math.inf for weight in weights):
        raise ConfigError(f"must be a number, l1(x), l2(x) or l1_l2(x,y), got {value!r}")
    return list(zip(powers, weights, strict=True))


def check_dataset(dataset: DatasetConfig, where: Where) -> list[str]:
    problems = []
    names = [c.name for c in dataset.feature_cols] + [c.name for c in dataset.label_col]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"{where('feature_cols')}: column '{name}' is listed more than once")
    if not dataset.train_data:
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
    paths = {key: getattr(dataset, key) for key in ("train_data", "valid_data", "test_data", "item_info")}
    bases, suffixes = [root], [""]
    if dataset.data_format == "h5":  # H5 files may be named as they lie in the dataset's folder, without their suffix
        bases, suffixes = [root, root / dataset.data_root / dataset.dataset_id], ["", ".h5"]
    return {
        key: path
        for key, path in paths.items()
        if path is not None and not any(_exists(base, path + suffix) for base in bases for suffix in suffixes)
    }


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
    elif group is not None and types[group] not in ("meta", "categorical"):
        problems.append(
            f"{where('group_id')}: must be a column of type meta or categorical, '{group}' is {types[group]}"
        )
    for key, names in (
        ("use_features", training.use_features or []),
        ("feature_specs", _named(training.feature_specs)),
    ):
        for name in names:
            if not isinstance(name, str) or name not in types:
                problems.append(f"{where(key)}: no such column, got '{name}'{did_you_mean(name, types)}")
    return problems


def _named(feature_specs: list[dict[str, Any]] | None) -> list[Any]:
    names = [entry.get("name") for entry in feature_specs or []]
    return [name for entry in names if entry is not None for name in (entry if isinstance(entry, list) else [entry])]
