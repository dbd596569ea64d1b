# SPDX-License-Identifier: Apache-2.0
"""What must hold in a dataset section, and between it and the settings that name its columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ctrbench import manifest as manifests
from ctrbench.errors import did_you_mean
from ctrbench.feature_encoders import feature_encoder_problem
from ctrbench.features import (
    ITEM,
    FeatureMap,
    feature_specs_problems,
    make_feature_map,
    read_feature_map,
    use_features_problems,
)
from ctrbench.items import key_column
from ctrbench.ready_data import is_encoded
from ctrbench.schema import DatasetConfig, FeatureColumn, LabelColumn, TrainingConfig
from ctrbench.transforms import parse_preprocess
from ctrbench.validation import Where
from ctrbench.yamlfile import shown

_TOKENS = ("categorical", "sequence")
_DRAFT_SIZE = 8  # ids of a vocabulary and numbers of a vector whose size nobody knows yet
_DRAFT_LENGTH = 3  # tokens of a sequence of unknown length


def dataset_problems(dataset: DatasetConfig, where: Where) -> list[str]:
    """Everything in a dataset section that cannot work, one line each; ready H5 files bring their own columns."""
    problems = basic_problems(dataset, where)
    if dataset.data_format in ("h5", "npz"):
        return problems
    for split in ("valid", "test"):
        size, data = getattr(dataset, f"{split}_size"), getattr(dataset, f"{split}_data")
        if size and data:
            problems.append(f"{where(f'{split}_size')}: {split}_data is given too: keep one of them")
        if isinstance(size, float) and size >= 1 and not size.is_integer():
            problems.append(f"{where(f'{split}_size')}: must be a fraction below 1 or a number of rows, got {size}")
    if max(dataset.valid_size, dataset.test_size) < 1 <= dataset.valid_size + dataset.test_size:
        total = dataset.valid_size + dataset.test_size
        problems.append(f"{where('valid_size')}: valid_size + test_size must be below 1, got {total}")
    if dataset.item_info is not None and key_column(dataset) is None:
        problems.append(f"{where('item_info')}: needs an active categorical column of source: item, the table's key")
    active = [column for column in dataset.feature_cols if column.active]
    if dataset.feature_cols and not active:
        problems.append(f"{where('feature_cols')}: no active column")
    for label in dataset.label_col:
        for key, problem in _label_problems(label):
            problems.append(f"{where(f'label_col[{shown(label.name)}].{key}')}: {problem}")
    for position, column in enumerate(active):
        earlier = {c.name: c for c in active[:position]}
        for key, problem in _column_problems(column, earlier, [c.name for c in active], not dataset.rebuild_dataset):
            problems.append(f"{where(f'feature_cols[{shown(column.name)}].{key}')}: {problem}")
    return problems


def basic_problems(dataset: DatasetConfig, where: Where, is_ready: bool = False) -> list[str]:
    """What is missing or given twice in a dataset section, also in one whose data is there to stay or is ready."""
    problems = []
    names = [c.name for c in dataset.feature_cols] + [c.name for c in dataset.label_col]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"{where('feature_cols')}: column {shown(name)} is listed more than once")
    if not dataset.train_data:
        problems.append(f"{where('train_data')}: missing, this key is required")
    if not is_ready and dataset.data_format not in ("h5", "npz"):
        for key in ("feature_cols", "label_col"):
            if not getattr(dataset, key):
                problems.append(f"{where(key)}: missing, this key is required for data_format {dataset.data_format}")
    return problems


def _label_problems(label: LabelColumn) -> Iterator[tuple[str, str]]:
    parsed = parse_preprocess(label.preprocess, label.name) if label.preprocess else None
    if isinstance(parsed, str):
        yield "preprocess", parsed
    if isinstance(label.fill_na, str):
        yield "fill_na", f"must be a number, got {shown(label.fill_na)}"


def _column_problems(
    column: FeatureColumn, earlier: dict[str, FeatureColumn], known: list[str], ids_given: bool
) -> Iterator[tuple[str, str]]:
    if column.type != "meta" and (problem := _name_problem(column.name)):
        yield "name", problem
    parsed = parse_preprocess(column.preprocess, column.name) if column.preprocess else None
    if isinstance(parsed, str):
        yield "preprocess", parsed
    if column.encoder is not None and (problem := feature_encoder_problem(column.encoder)):
        yield "feature_encoder", problem.removeprefix("feature_encoder ")
    if isinstance(column.fill_na, str) and column.dtype != "str" and column.type not in ("sequence", "embedding"):
        yield "fill_na", f"must be a number, as dtype is {column.dtype}, got {shown(column.fill_na)}"
    if column.type == "numeric" and isinstance(column.fill_na, str) and column.dtype == "str":
        yield "fill_na", f"must be a number, as type is numeric, got {shown(column.fill_na)}"
    if column.normalizer and column.type != "numeric":
        yield "normalizer", f"only a numeric column has one, this is {column.type}"
    if column.splitter == "":
        yield "splitter", "must not be empty; null splits at white space"
    if column.pretrained_emb is not None and column.type not in _TOKENS:
        yield "pretrained_emb", f"only categorical and sequence columns have one, this is {column.type}"
    if column.share_embedding is not None and (problem := _share_problem(column, earlier, known)):
        yield "share_embedding", problem
    if ids_given:
        if column.type in _TOKENS and column.vocab_size is None:
            yield "vocab_size", "needed when rebuild_dataset is false (the files hold ids)"
        if column.type == "sequence" and not column.max_len:
            yield "max_len", "needed when rebuild_dataset is false (the files hold ids)"
        if column.normalizer:
            yield "normalizer", "needs rebuild_dataset: true"


def _name_problem(name: str) -> str | None:
    """Models keep a feature's layer under the feature's name, which a `torch.nn.Module` must not use otherwise."""
    from torch import nn

    if hasattr(nn.ModuleDict, name) or name in vars(nn.ModuleDict()) or "." in name:
        reason = "contains a dot" if "." in name else "is an attribute of every torch module"
        return (
            f"'{name}' {reason}, so that no layer can have this name: rename the column, "
            f"as {{name: {name.replace('.', '_')}_, preprocess: copy_from({name})}}"
        )
    return None


def _share_problem(column: FeatureColumn, earlier: dict[str, FeatureColumn], known: list[str]) -> str | None:
    shared = column.share_embedding
    if shared not in earlier:
        if shared in known:
            return f"'{shared}' comes later in feature_cols (or is this column): move it before this one"
        return f"'{shared}' is not an active column{did_you_mean(shared, known)}"
    other = earlier[shared]
    if other.type not in _TOKENS or column.type not in _TOKENS:
        return f"'{shared}' is {other.type} and this is {column.type}; both must be categorical or sequence"
    kinds = [("text" if c.type == "sequence" or c.dtype == "str" else "numbers") for c in (column, other)]
    if kinds[0] != kinds[1]:
        return f"tokens here are {kinds[0]}, those of '{shared}' are {kinds[1]}, so none would match: use dtype: str"
    return None


def check_together(dataset: DatasetConfig, training: TrainingConfig, where: Where) -> list[str]:
    """What is wrong with the settings of a run that name columns of its dataset."""
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
    used, key = training.use_features or [], key_column(dataset)
    problems += [f"{where('use_features')}: {problem}" for problem in use_features_problems(used, types)]
    looked_up = [c.name for c in dataset.feature_cols if c.source == ITEM and c.name in used]
    if key is not None and looked_up and key.name not in used:
        problems.append(f"{where('use_features')}: '{looked_up[0]}' is looked up by '{key.name}': name that too")
    for problem in feature_specs_problems(training.feature_specs or [], {n: {"type": t} for n, t in types.items()}):
        problems.append(f"{where('feature_specs')}: {problem}")
    return problems


def draft_feature_map(dataset: DatasetConfig, folder: Path, params: Mapping[str, Any]) -> FeatureMap | None:
    """The feature map of a dataset as far as its section tells, to construct a model before the data is there.

    Vocabularies are small throughout, and pretrained embeddings are left out. Lengths that the section leaves to the
    data are those of the data that is built from it, if there is any.

    Args:
        dataset: its section. Encoded data has a feature map of its own, which must be there.
        folder: of the dataset.
        params: as `load_feature_map`, and the `task`.

    Returns:
        The draft, None for encoded data that is not there.

    Raises:
        DataError, ConfigError: as `load_feature_map`.
    """
    path = folder / "feature_map.json"
    if is_encoded(dataset, folder):
        if not path.is_file():
            return None
        stored = read_feature_map(path)
        for spec in (spec for entry in stored["features"] for spec in entry.values()):
            spec.pop("pretrained_emb", None)
            if spec["type"] in _TOKENS:
                spec |= {"padding_idx": 0, "vocab_size": _DRAFT_SIZE}
        return make_feature_map(stored, path, params)
    active = [column for column in dataset.feature_cols if column.active]
    built = _built_lengths(dataset, folder, params.get("task", ""))
    stored = {
        "dataset_id": dataset.dataset_id,
        "labels": [label.name for label in dataset.label_col],
        "features": [{c.name: _draft_spec(c, dataset, params) | built.get(c.name, {})} for c in active],
    }
    if (key := key_column(dataset)) is not None:
        stored["item_key"] = key.name
    return make_feature_map(stored, path, params)


def _built_lengths(dataset: DatasetConfig, folder: Path, task: str | Sequence[str]) -> dict[str, dict[str, int]]:
    """By feature, the lengths of the data that was built from these settings."""
    manifest = manifests.read(folder)
    if manifest is None or manifest["settings_hash"] != manifests.settings_hash(dataset, task):
        return {}
    specs = [item for entry in read_feature_map(folder / "feature_map.json")["features"] for item in entry.items()]
    return {name: {key: spec[key] for key in ("max_len", "pretrain_dim") if key in spec} for name, spec in specs}


def _draft_spec(column: FeatureColumn, dataset: DatasetConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    if column.type == "meta":
        is_history = dataset.item_info is not None and column.max_len
        return {"type": "meta", "max_len": column.max_len} if is_history else {"type": "meta"}
    spec: dict[str, Any] = {"source": column.source, "type": column.type}
    keys = ("embedding_dim", "emb_output_dim", "share_embedding")
    spec |= {key: getattr(column, key) for key in keys if getattr(column, key) is not None}
    if column.encoder is not None:
        spec["feature_encoder"] = column.encoder
    if column.type in _TOKENS:
        spec |= {"padding_idx": 0, "vocab_size": _DRAFT_SIZE}
    if column.type == "sequence":
        spec["max_len"] = column.max_len or _DRAFT_LENGTH
    if column.type == "embedding":
        width = column.pretrain_dim or column.embedding_dim or params.get("embedding_dim")
        spec["pretrain_dim"] = width or _DRAFT_SIZE
    return spec
