# SPDX-License-Identifier: Apache-2.0
"""What must hold in a configuration, each problem as one line with file, section and key."""

from __future__ import annotations

import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from ctrbench import manifest as manifests
from ctrbench.errors import ConfigError, did_you_mean
from ctrbench.ready_data import is_encoded
from ctrbench.schema import DatasetConfig, FeatureColumn, LabelColumn, TrainingConfig, expand_columns
from ctrbench.yamlfile import shown


class Where:
    """Names the file and the section that a key comes from."""

    def __init__(self, default: str, origins: Mapping[str, str] | None = None):
        self.default = default
        self.origins = origins or {}

    def __call__(self, key: str) -> str:
        head = key.split(".")[0].split("[")[0]
        return f"{self.origins.get(head, self.default)}.{key}"

    def is_base(self, key: str) -> bool:
        """Whether the key comes from `Base`, which the experiments of all models of a folder share."""
        return self.origins.get(key, "").endswith(": Base")


def validate(
    model: type[pydantic.BaseModel], values: dict[str, Any], where: Callable[[str], str], problems: list[str]
) -> Any:
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        by_key: dict[str, list[Any]] = {}
        for item in error.errors():
            by_key.setdefault(_key_of(item["loc"], values), []).append(item)
        problems.extend(f"{where(key)}: {_explain(_fitting(items), model)}" for key, items in by_key.items())
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
    if parts[0] == "exclude" and len(location) > 1:
        return ".".join([f"exclude[{location[1]}]", *map(str, location[2:3])])
    if len(location) > 1 and isinstance(location[1], int) and parts[0] in ("feature_cols", "label_col"):
        columns = values.get(parts[0])
        column = expand_columns(columns)[location[1]] if isinstance(columns, list) else None
        name = column.get("name", location[1]) if isinstance(column, dict) else location[1]
        parts[0] += f"[{shown(name)}]"
        if len(location) > 2:
            parts.append(str(location[2]))
    return ".".join(parts)


def _fitting(items: Sequence[Any]) -> list[Any]:
    """Of what the members of a union say: what those say that fit the kind of the value, in as far as they do."""
    kinds = [item for item in items if not item["type"].endswith("_type")] or items
    deepest = [item for item in kinds if len(item["loc"]) == max(len(i["loc"]) for i in kinds)]
    return [item for item in deepest if item.get("input") is deepest[0].get("input")]


def _explain(items: Sequence[Any], model: type[pydantic.BaseModel]) -> str:
    """What is wrong with one value; several items are alternatives."""
    item = items[0]
    kind, got, context = item["type"], item.get("input"), item.get("ctx", {})
    key = str(item["loc"][-1])
    if kind == "extra_forbidden":
        columns: dict[str, type[pydantic.BaseModel]] = {"feature_cols": FeatureColumn, "label_col": LabelColumn}
        fields = columns.get(str(item["loc"][0]), model)
        known = [field.alias or name for name, field in fields.model_fields.items()]
        return f"unknown key, got {shown(got)}{did_you_mean(key, known)}"
    if kind == "missing":
        return "missing, this key is required"
    if kind == "literal_error":
        choices = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return f"must be {context['expected']}, got {shown(got)}{did_you_mean(got, choices)}"
    if kind == "model_type":
        return f"must be a mapping of keys, got {shown(got)}"
    if kind in ("too_short", "string_too_short"):
        return f"must not be empty, got {shown(got)}"
    messages = [i["msg"].removeprefix("Input should be ").replace("a valid ", "a ") for i in items]
    wanted = [m.replace("a integer", "an integer") for m in dict.fromkeys(messages)]
    if "a number" in wanted:
        wanted = [m for m in wanted if m != "an integer"]
    return f"must be {' or '.join(wanted)}, got {shown(got)}"


def check_model_params(
    zoo: Path,
    name: str,
    params: dict[str, Any],
    where: Where,
    unread: Collection[str] = (),
    loaded: Collection[str] = (),
) -> tuple[list[str], list[str]]:
    """Model keys against the constructor: names, types and, by our naming conventions, ranges.

    Args:
        zoo: the model folder.
        name: the model.
        params: the keys that are not the framework's. Those that nothing reads are taken out.
        where: names the origin of a key.
        unread: keys that are accepted although no constructor names them.
        loaded: keys that shape the batches where the constructor does not name them.

    Returns:
        The problems, and the keys that nothing reads.
    """
    from ctrbench.hooks import class_overrides
    from ctrbench.zoo import load_model_class, model_keys, other_keys

    try:
        model_class = load_model_class(zoo, name)
    except ConfigError as error:
        return error.problems, []
    keys = model_keys(model_class)
    # Only a model that unpacks its batches itself may be meant for a loader of its own.
    loaded = loaded if class_overrides(model_class, "get_inputs") else ()
    problems, ignored = [], []
    for key, value in list(params.items()):
        if key in keys:
            # What FuxiCTR's own models take, 0 layers or a `num_` that is a list, is theirs to say.
            is_ours = keys[key].annotation is not inspect.Parameter.empty
            problem = _check_type(keys[key], model_class, value) or (_check_range(key, value) if is_ours else None)
            if problem:
                problems.append(f"{where(key)}: {problem}, got {shown(value)}")
        elif key in unread or (where.is_base(key) and key in other_keys(zoo)):
            ignored.append(key)
            del params[key]
        elif key not in loaded:
            known = sorted({*keys, *loaded, *TrainingConfig.model_fields, *DatasetConfig.model_fields})
            problems.append(f"{where(key)}: unknown key, got {shown(value)}{did_you_mean(key, known)}")
    return problems, ignored


def _check_type(parameter: inspect.Parameter, model_class: type, value: Any) -> str | None:
    annotation = parameter.annotation
    if isinstance(annotation, str):
        annotation = _ANNOTATIONS.get(annotation.replace(" ", ""), parameter.empty)
    if annotation is parameter.empty:
        default = parameter.default
        if default is parameter.empty or default is None or isinstance(default, list | tuple | dict):
            return None
        # FuxiCTR writes `net_dropout=0` where it takes any number, and lists wherever layers may differ.
        is_number = isinstance(default, int | float) and not isinstance(default, bool)
        annotation = float | str | list | None if is_number else type(default) | list | None
    try:
        pydantic.TypeAdapter(annotation).validate_python(list(value) if type(value) is tuple else value, strict=True)
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
    """What is wrong with the framework's own settings beyond their types."""
    problems = _metric_problems(training, where)
    for key in ("embedding_regularizer", "net_regularizer"):
        try:
            parse_regularizer(getattr(training, key))
        except ConfigError as error:
            problems += [f"{where(key)}: {problem}" for problem in error.problems]
    if problem := _optimizer_problem(training.optimizer):
        problems.append(f"{where('optimizer')}: {problem}, got {shown(training.optimizer)}")
    problems += [f"{where('loss')}: {problem}, got {shown(training.loss)}" for problem in _loss_problems(training)]
    if training.min_learning_rate > training.learning_rate:
        above = f"must not be above learning_rate ({training.learning_rate:g}), got {training.min_learning_rate:g}"
        problems.append(f"{where('min_learning_rate')}: {above}")
    return problems


# Metrics that fall as predictions get better, and metrics of any label; all others rise and rank labels 0 and 1.
_FALLING = ("logloss", "binary_crossentropy", "MSE", "MAE")
_OF_ANY_LABEL = ("MSE", "MAE")


def _metric_problems(training: TrainingConfig, where: Where) -> list[str]:
    from ctrbench.metrics import parse_metrics

    problems = []
    monitored = [training.monitor] if isinstance(training.monitor, str) else list(training.monitor)
    remedies = {"metrics": "use MSE or MAE", "monitor": "set monitor: MSE and monitor_mode: min"}
    for key, names in (("metrics", training.metrics), ("monitor", monitored)):
        try:
            parse_metrics(names, training.group_id)
        except ConfigError as error:
            problems += [f"{where(key)}: {problem.removeprefix('metrics: ')}" for problem in error.problems]
            continue
        binary = [name for name in names if name not in _OF_ANY_LABEL]
        if "regression" in tasks_of(training.task) and binary:
            is_list = isinstance(training.task, list)
            what = "one task of the list is regression" if is_list else "task is regression"
            need = f"{binary[0]} needs labels 0 and 1, but {what}: {remedies[key]}"
            problems.append(f"{where(key)}: {need}, got {shown(getattr(training, key))}")
        elif key == "monitor" and (problem := _direction_problem(training.monitor, training.monitor_mode)):
            problems.append(f"{where('monitor')}: {problem}, got {shown(training.monitor)}")
    return problems


def _direction_problem(monitor: str | dict[str, float | int], mode: str) -> str | None:
    """Why the monitored figure does not get better in the direction that `monitor_mode` says."""
    weights: Mapping[str, float] = {monitor: 1} if isinstance(monitor, str) else monitor
    if not any(weights.values()):
        return "must weight at least one metric"
    sign, other = (1, "min") if mode == "max" else (-1, "max")
    wrong = [name for name, weight in weights.items() if sign * weight * (-1 if name in _FALLING else 1) < 0]
    if not wrong:
        return None
    what = f"a {'lower' if wrong[0] in _FALLING else 'higher'} {wrong[0]} is better"
    if len(wrong) == sum(weight != 0 for weight in weights.values()):
        return f"{what}, but monitor_mode is {mode}: set monitor_mode: {other}"
    return f"{what}, but its weight is {weights[wrong[0]]:g} and monitor_mode is {mode}: change the sign of the weight"


def tasks_of(task: str | Sequence[str]) -> list[str]:
    """The tasks of a model: one, or one for each label."""
    return [task] if isinstance(task, str) else list(task)


def _loss_problems(training: TrainingConfig) -> list[str]:
    """What is wrong with a loss for its task; a list of one goes with a single other as with a list of equal ones."""
    losses, tasks = tasks_of(training.loss), tasks_of(training.task)
    if isinstance(training.loss, list) and isinstance(training.task, list) and len(losses) != len(tasks):
        return [f"names {len(losses)} losses, but task names {len(tasks)}"]
    pairs = zip(losses, tasks, strict=True) if len(losses) == len(tasks) else itertools.product(losses, tasks)
    found = [_loss_problem(loss, task) for loss, task in pairs]
    return list(dict.fromkeys(problem for problem in found if problem))


def _loss_problem(name: str, task: str) -> str | None:
    import torch

    if name in LOSSES:
        return None if task == "binary_classification" else f"needs labels and outputs in [0, 1], but task is {task}"
    functions = {n: f for n, f in vars(torch.nn.functional).items() if inspect.isroutine(f) and not n.startswith("_")}
    losses = {n: f for n, f in functions.items() if n.endswith(("loss", "entropy", "entropy_with_logits", "kl_div"))}
    if name not in losses:
        return f"no such loss in torch.nn.functional{did_you_mean(name, [*LOSSES, *losses])}"
    unfit = "cannot train one output per row towards"
    if task == "regression":
        return None if _can_regress(losses[name]) else f"{unfit} its label: use mse_loss or l1_loss"
    if name.endswith("_with_logits"):
        return "takes logits, but the output of a binary task is a probability: use binary_crossentropy"
    if not _can_classify(losses[name]):
        return f"{unfit} a label of 0 or 1: use binary_crossentropy or mse_loss"
    return None


def _can_classify(loss: Callable[..., Any]) -> bool:
    """Whether a loss of outputs in (0, 1) is nothing where they equal the labels and grows with the distance."""
    for label in (0.0, 1.0):
        right, between, wrong = _losses(loss, [abs(label - distance) for distance in (1e-6, 0.5, 1 - 1e-6)], label)
        if not (abs(right) < 1e-3 < between < wrong < math.inf):
            return False
    return True


def _can_regress(loss: Callable[..., Any]) -> bool:
    """Whether the output of the lowest loss is not the same for every label."""
    outputs = [x / 4 for x in range(-20, 21)]
    values = [_losses(loss, outputs, label) for label in (1.0, 3.0)]
    if not all(map(math.isfinite, values[0] + values[1])):
        return False
    return values[0].index(min(values[0])) < values[1].index(min(values[1]))


def _losses(loss: Callable[..., Any], outputs: list[float], label: float) -> list[float]:
    """The loss of each output in a batch of its own (2, 1), as `BaseModel.add_loss` calls it; nan where it fails."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            values = [loss(torch.full((2, 1), x), torch.full((2, 1), label), reduction="mean") for x in outputs]
            return [float(value) for value in values]
        except Exception:  # whatever a function says of arguments that it was not made for
            return [math.nan] * len(outputs)


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
        raise ConfigError(f"must be a number, l1(x), l2(x) or l1_l2(x,y), got {shown(value)}")
    return list(zip(powers, weights, strict=True))


def missing_data(dataset: DatasetConfig, root: Path) -> dict[str, str]:
    """The raw files that are neither there nor needed no more because the dataset is built: key -> configured path."""
    if manifests.read(dataset.folder(root)) is not None:
        return {}
    paths = {key: getattr(dataset, key) for key in ("train_data", "valid_data", "test_data", "item_info")}
    bases, suffixes = [root], [""]
    if is_encoded(dataset, dataset.folder(root)):  # its files may be named as they lie there, without their suffix
        bases, suffixes = [root, dataset.folder(root)], ["", f".{dataset.data_format}"]
    return {
        key: path
        for key, path in paths.items()
        if path is not None and not any(_exists(base, path + suffix) for base in bases for suffix in suffixes)
    }


def _exists(root: Path, pattern: str) -> bool:
    path = root / pattern
    try:
        return path.exists() or any(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    except (ValueError, OSError, NotImplementedError, IndexError, RecursionError):  # a pattern or a name that cannot be
        return False
