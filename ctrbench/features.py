# SPDX-License-Identifier: Apache-2.0
"""The feature map: FuxiCTR's `feature_map.json`, read with every check that it needs and written atomically."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fuxictr.features

from ctrbench.errors import ConfigError, DataError, did_you_mean
from ctrbench.feature_encoders import feature_encoder_problem
from ctrbench.files import sha256_of_value, write_json
from ctrbench.yamlfile import shown

if TYPE_CHECKING:
    from torch import Tensor

ITEM = "item"  # the `source` of features that an item table may hold
FEATURE_TYPES = ("numeric", "categorical", "sequence", "embedding", "meta")
# What a `feature_specs` entry may override. The other keys describe the stored data and cannot be changed afterwards.
OVERRIDABLE_KEYS = frozenset(
    {"source", "embedding_dim", "emb_output_dim", "feature_encoder", "share_embedding", "pretrain_dim"}
    | {"pretrain_usage", "freeze_emb"}
)
STORED_KEYS = frozenset({"type", "vocab_size", "max_len", "oov_idx", "padding_idx", "pretrained_emb"})
_DIMENSIONS = ("embedding_dim", "emb_output_dim", "pretrain_dim")
_CHOICES: dict[str, tuple[Any, ...]] = {"pretrain_usage": ("init", "sum", "concat"), "freeze_emb": (True, False)}


class FeatureMap(fuxictr.features.FeatureMap):
    """FuxiCTR's feature map; every FuxiCTR model accepts it.

    Args:
        dataset_id: name of the dataset.
        data_dir: folder of feature_map.json; pretrained embeddings and the vocabulary are read from there.
    """

    def __init__(self, dataset_id: str, data_dir: str):
        super().__init__(dataset_id, data_dir)
        # The column of the splits that is an index into the item table, and that table; see `ctrbench.items`.
        self.item_key: str | None = None
        self.item_table: dict[str, Tensor] | None = None
        self._stored: dict[str, Any] | None = None

    @property
    def item_features(self) -> list[str]:
        """Features that live in the item table and not in the splits."""
        if self.item_key is None:
            return []
        return [n for n, spec in self.features.items() if spec.get("source") == ITEM and n != self.item_key]

    @property
    def split_features(self) -> list[str]:
        """Features that the splits hold, in order."""
        elsewhere = set(self.item_features)
        return [name for name in self.features if name not in elsewhere]

    def load(self, json_file: str | Path, params: Mapping[str, Any]) -> None:
        """Read `json_file` as `load_feature_map` does, into this object."""
        loaded = load_feature_map(Path(json_file), self.dataset_id, params)
        self.__dict__.update(loaded.__dict__)

    def to_dict(self) -> dict[str, Any]:
        """The content of feature_map.json for the present state, in FuxiCTR's layout, and `item_key` if there is one."""
        content = {
            "dataset_id": self.dataset_id,
            "num_fields": self.num_fields,
            "total_features": self.total_features,
            "input_length": self.input_length,
            "labels": list(self.labels),
            "features": [{name: copy.deepcopy(dict(spec))} for name, spec in self.features.items()],
        }
        return content if self.item_key is None else {**content, "item_key": self.item_key}

    def save(self, json_file: str | Path) -> None:
        """Write `to_dict()` to `json_file` atomically."""
        self._stored = self.to_dict()
        write_json(Path(json_file), self._stored)

    def content_hash(self) -> str:
        """SHA-256 of the JSON this map was loaded from or last saved as.

        Run parameters (`use_features`, `feature_specs`, `embedding_dim`) leave it unchanged: it names the stored data.
        """
        return sha256_of_value(self._stored if self._stored is not None else self.to_dict())

    def refresh_counts(self) -> None:
        """Recompute num_fields, total_features and the column index from `features` and `labels`."""
        specs = self.features.values()
        self.num_fields = self.get_num_fields()
        self.total_features = sum(1 for spec in specs if spec["type"] == "numeric") + sum(
            spec["vocab_size"]
            for spec in specs
            if spec["type"] in ("categorical", "sequence") and spec.get("share_embedding") not in self.features
        )
        self.column_index: dict[str, int | list[int]] = {}
        self.set_column_index()


def load_feature_map(path: Path, dataset_id: str | None, params: Mapping[str, Any]) -> FeatureMap:
    """Load feature_map.json and apply the run's parameters.

    Args:
        path: the JSON file, written by ctrbench or FuxiCTR (2.0 or later).
        dataset_id: what the file must say; None accepts any.
        params: may hold `embedding_dim` (default width), `group_id`, `use_features` (ordered subset of the features;
            the `group_id` column is kept besides) and `feature_specs` (list of `{name: str | list, key: value, ...}`).

    Raises:
        DataError: the file is missing, damaged, incomplete, of another dataset, or names an encoder off the whitelist.
        ConfigError: `params` name features or keys that do not exist.
    """
    stored = read_feature_map(path)
    if dataset_id is not None and stored["dataset_id"] != dataset_id:
        raise DataError(
            f"{path}: it belongs to dataset_id '{stored['dataset_id']}', not '{dataset_id}': "
            f"correct dataset_id or delete {path.parent} and build again"
        )
    return make_feature_map(stored, path, params)


def make_feature_map(stored: dict[str, Any], path: Path, params: Mapping[str, Any]) -> FeatureMap:
    """The feature map of the JSON content `stored` of the file `path`, with the run's parameters applied.

    Raises:
        DataError, ConfigError: as `load_feature_map`.
    """
    feature_map = FeatureMap(stored["dataset_id"], str(path.parent))
    feature_map._stored = stored
    feature_map.item_key = stored.get("item_key")
    feature_map.labels = list(stored["labels"])
    feature_map.default_emb_dim = params.get("embedding_dim")
    features = OrderedDict((name, dict(spec)) for entry in stored["features"] for name, spec in entry.items())
    for spec in features.values():
        if spec["type"] == "embedding" and "pretrain_dim" not in spec and spec.get("embedding_dim"):
            spec["pretrain_dim"] = spec["embedding_dim"]
    group_id = _group_id(stored, params, features)
    feature_map.group_id = group_id
    _apply_feature_specs(features, params.get("feature_specs") or [])
    feature_map.features = _use_features(features, params.get("use_features"), group_id)
    if feature_map.item_features and feature_map.item_key not in feature_map.features:
        raise ConfigError(
            f"use_features: '{feature_map.item_features[0]}' is looked up by '{feature_map.item_key}': name that too"
        )
    for name, spec in feature_map.features.items():
        if spec["type"] == "embedding" and "pretrain_dim" not in spec:
            width = spec.get("embedding_dim") or feature_map.default_emb_dim
            if not width:
                raise DataError(
                    f"{path}: feature '{name}' of type embedding has no pretrain_dim (the stored width): "
                    "give it pretrain_dim in feature_cols or feature_specs"
                )
            spec["pretrain_dim"] = width
    feature_map.refresh_counts()
    return feature_map


def read_feature_map(path: Path) -> dict[str, Any]:
    """The content of a feature map file.

    Raises:
        DataError: the file is missing, damaged, incomplete, or names an encoder off the whitelist.
    """
    remedy = f"delete the folder {path.parent} and run again to build it anew"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such feature map: build the dataset first, or correct data_root") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}): {remedy}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: damaged or truncated JSON ({error}): {remedy}") from None
    if not isinstance(stored, dict):
        raise DataError(f"{path}: not a feature map: {remedy}")
    missing = [key for key in ("dataset_id", "labels", "features") if key not in stored]
    if missing:
        raise DataError(f"{path}: incomplete feature map, '{missing[0]}' is missing: {remedy}")
    if not isinstance(stored["features"], list) or not all(
        isinstance(entry, dict) and all(isinstance(spec, dict) for spec in entry.values())
        for entry in stored["features"]
    ):
        raise DataError(f"{path}: incomplete feature map, 'features' is not a list of {{name: spec}}: {remedy}")
    labels = stored["labels"]
    if not isinstance(labels, list) or not labels or not all(label and isinstance(label, str) for label in labels):
        raise DataError(f"{path}: 'labels' must name the label columns, got {shown(labels)}: {remedy}")
    if any(isinstance(stored.get(key), list | dict) for key in ("dataset_id", "item_key", "group_id")):
        raise DataError(f"{path}: dataset_id, item_key and group_id must be names: {remedy}")
    specs = [item for entry in stored["features"] for item in entry.items()]
    for position, (name, spec) in enumerate(specs):
        if problem := _spec_problem(spec, later=[n for n, _ in specs[position:]]):
            raise DataError(f"{path}: feature '{name}': {problem}: {remedy}")
    return stored


def _spec_problem(spec: Mapping[str, Any], later: Sequence[str]) -> str | None:
    kind = spec.get("type")
    if kind not in FEATURE_TYPES:
        return f"type {shown(kind)} is not one of {', '.join(FEATURE_TYPES)}"
    sizes = {"categorical": ("vocab_size",), "sequence": ("vocab_size", "max_len")}.get(kind, ())
    for key in (*sizes, *(key for key in (*_DIMENSIONS, "max_len") if key in spec)):
        if type(spec.get(key)) is not int or spec[key] < 1:
            return f"{key} must be a positive integer, got {shown(spec.get(key))}"
    shared = spec.get("share_embedding")
    if shared is not None and (not isinstance(shared, str) or shared in later):
        return f"share_embedding must name an earlier feature, got {shown(shared)}"
    encoder = spec.get("feature_encoder")
    return feature_encoder_problem(encoder) if encoder is not None else None


def _group_id(stored: Mapping[str, Any], params: Mapping[str, Any], features: Mapping[str, Any]) -> str | None:
    group_id = params.get("group_id")
    if group_id is None:  # FuxiCTR 2.0 kept it in the file
        group_id = stored.get("group_id")
        return group_id if group_id in features else None
    if group_id not in features:
        raise ConfigError(f"group_id: '{group_id}' is not a column of the dataset{did_you_mean(group_id, features)}")
    if features[group_id]["type"] not in ("meta", "categorical"):
        raise ConfigError(
            f"group_id: '{group_id}' is of type {features[group_id]['type']}, it must be meta or categorical"
        )
    return str(group_id)


def use_features_problems(wanted: Sequence[str], names: Collection[str]) -> list[str]:
    """What is wrong with the `use_features` of a dataset that has the features `names`."""
    problems = [f"no such column, got '{n}'{did_you_mean(n, names)}" for n in wanted if n not in names]
    return problems + [f"'{n}' is named twice" for n in dict.fromkeys(wanted) if wanted.count(n) > 1]


def _use_features(
    features: OrderedDict[str, dict[str, Any]], names: Sequence[str] | None, group_id: str | None
) -> OrderedDict[str, dict[str, Any]]:
    if not names:
        return features
    if problems := use_features_problems(names, features):
        raise ConfigError(f"use_features: {problem}" for problem in problems)
    kept = list(names) + ([group_id] if group_id is not None and group_id not in names else [])
    return _reassign_shared(OrderedDict((name, features[name]) for name in kept), features)


def _reassign_shared(
    kept: OrderedDict[str, dict[str, Any]], features: Mapping[str, dict[str, Any]]
) -> OrderedDict[str, dict[str, Any]]:
    """Let the first kept feature of each shared table own it.

    FuxiCTR silently gives a feature whose owner is left out or comes later a table of its own, not even initialised as
    the others are.
    """
    owners: dict[str, str] = {}
    for name, spec in kept.items():
        root = name
        while features[root].get("share_embedding") in features:
            root = features[root]["share_embedding"]
        owner = owners.setdefault(root, name)
        kept[name] = {key: value for key, value in spec.items() if key != "share_embedding"}
        if owner != name:
            kept[name]["share_embedding"] = owner
    return kept


def _apply_feature_specs(features: Mapping[str, dict[str, Any]], overrides: Sequence[Mapping[str, Any]]) -> None:
    if problems := feature_specs_problems(overrides, features):
        raise ConfigError(f"feature_specs: {problem}" for problem in problems)
    for entry in overrides:
        values = {key: value for key, value in entry.items() if key != "name"}
        if values.get("feature_encoder") in ("null", "None", "none"):
            values["feature_encoder"] = None
        for name in _names_of(entry):
            features[name].update(values)


def feature_specs_problems(
    overrides: Sequence[Mapping[str, Any]], features: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """What is wrong with the `feature_specs` of a dataset.

    Args:
        overrides: the `feature_specs`.
        features: for each feature in order its `type` and, where it is known, its `vocab_size`.
    """
    problems: list[str] = []
    for entry in overrides:
        if not isinstance(entry, Mapping) or not entry.get("name"):
            problems.append(f"each entry needs a 'name', got {shown(entry)}")
            continue
        found = [name for name in _names_of(entry) if isinstance(name, str) and name in features]
        for name in _names_of(entry):
            if name not in found:
                problems.append(f"no such column, got {shown(name)}{did_you_mean(name, features)}")
        for key, value in entry.items():
            if key != "name" and (problem := _override_problem(key, value, found, features)):
                problems.append(f"{', '.join(found)}: {problem}" if found else problem)
    return problems


def _names_of(entry: Mapping[str, Any]) -> list[Any]:
    return entry["name"] if isinstance(entry["name"], list) else [entry["name"]]


def _override_problem(
    key: str, value: Any, names: Sequence[str], features: Mapping[str, Mapping[str, Any]]
) -> str | None:
    if key in STORED_KEYS:
        return f"'{key}' is fixed by the stored data: change it in feature_cols"
    if key not in OVERRIDABLE_KEYS:
        return f"unknown key '{key}'{did_you_mean(key, OVERRIDABLE_KEYS)}"
    if key in _DIMENSIONS and (type(value) is not int or value < 1):
        return f"{key} must be a positive integer, got {shown(value)}"
    if key == "feature_encoder" and value is not None and value not in ("null", "None", "none"):
        return feature_encoder_problem(value)
    if key in _CHOICES and not (value in _CHOICES[key] and type(value) is type(_CHOICES[key][0])):
        return f"{key} must be one of {', '.join(map(str, _CHOICES[key]))}, got {shown(value)}"
    if key == "source" and not isinstance(value, str):
        return f"source must be a string, got {shown(value)}"
    if key == "share_embedding" and value is not None:
        return next(filter(None, (_shared_problem(value, name, features) for name in names)), None)
    return None


def _shared_problem(shared: Any, name: str, features: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Why the feature `name` cannot use the table of `shared`."""
    if not isinstance(shared, str) or shared not in features:
        return f"share_embedding names {shown(shared)}, which is not a feature{did_you_mean(shared, features)}"
    order = list(features)
    if order.index(shared) >= order.index(name):
        return f"share_embedding names '{shared}', which comes later (or is this feature): name an earlier one"
    if any(features[n]["type"] not in ("categorical", "sequence") for n in (name, shared)):
        return f"share_embedding names '{shared}': both must be categorical or sequence"
    sizes = [features[n].get("vocab_size") for n in (name, shared)]
    if None not in sizes and sizes[0] != sizes[1]:
        return (
            f"share_embedding names '{shared}', which has {sizes[1]} ids and not {sizes[0]}: share it in feature_cols"
        )
    return None
