# SPDX-License-Identifier: Apache-2.0
"""The keys of a configuration: names, types, ranges and defaults, as pydantic models.

FuxiCTR's names throughout. `config.py` reads the YAML and turns what pydantic finds into one line per problem.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Scalar = str | int | float
Task = Literal["binary_classification", "regression"]
Name = Annotated[str, Field(min_length=1)]
Weight = Annotated[float, Field(allow_inf_nan=False)] | int
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]


def _none_if_spelled(value: Any) -> Any:
    return None if value in ("None", "none", "null") else value


# FuxiCTR accepts a quoted "null" where it means no encoder.
OptionalEncoder = Annotated[str | list[str] | None, BeforeValidator(_none_if_spelled)]


def _check_separator(value: str) -> str:
    if len(value) != 1 or not value.isascii():
        raise PydanticCustomError("separator", 'Input should be one ASCII character (a tab is "\\t" in double quotes)')
    return value


_MINUTES = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*min(?:ute|utes)?")


def _minutes(text: str) -> float | None:
    """The number in `10 min`, `10min`, `0.5 minutes`; None for anything else, and for no time at all."""
    match = _MINUTES.fullmatch(text)
    minutes = float(match[1]) if match else 0.0
    return minutes if 0 < minutes < math.inf else None


def _check_checkpoint_every(value: Any) -> Any:
    if value is None or (type(value) is int and value >= 1) or (isinstance(value, str) and _minutes(value)):
        return value
    raise PydanticCustomError("checkpoint_every", "Input should be a number of steps (500) or of minutes (10 min)")


CheckpointEvery = Annotated[int | str | None, BeforeValidator(_check_checkpoint_every)]


class _Section(BaseModel):
    """Strict: `"5"` is not 5 and 1 is not true; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FeatureColumn(_Section):
    """One entry of `feature_cols` (after a list of names has been expanded to one entry each)."""

    name: Name
    active: bool = True
    dtype: Literal["str", "int", "float"] = "str"
    type: Literal["numeric", "categorical", "sequence", "embedding", "meta"]
    source: str = ""
    fill_na: Scalar | None = None
    preprocess: str | None = None
    normalizer: Literal["StandardScaler", "MinMaxScaler"] | None = None
    embedding_dim: PositiveInt | None = None
    emb_output_dim: PositiveInt | None = None
    feature_encoder: OptionalEncoder = None
    share_embedding: str | None = None
    pretrained_emb: str | None = None
    pretrain_dim: PositiveInt | None = None
    pretrain_usage: Literal["init", "sum", "concat"] = "init"
    freeze_emb: bool = True
    min_categr_count: PositiveInt | None = None
    remap: bool = True
    vocab_size: Annotated[int, Field(ge=2)] | None = None
    splitter: str | None = "^"
    max_len: NonNegativeInt = 0
    padding: Literal["pre", "post"] = "post"

    @property
    def na_value(self) -> Scalar:
        """What a missing value is filled with before anything else; this token never enters the vocabulary."""
        if self.fill_na is not None:
            return self.fill_na
        default: Scalar = "" if self.dtype == "str" else 0 if self.dtype == "int" else 0.0
        return default

    @property
    def encoder(self) -> str | list[str] | None:
        """The feature encoder that the feature map names; sequences are averaged unless `feature_encoder` says otherwise."""
        if self.type == "sequence" and "feature_encoder" not in self.model_fields_set:
            return "layers.MaskedAveragePooling()"
        return self.feature_encoder


def expand_columns(columns: list[Any]) -> list[Any]:
    """`feature_cols` with one entry for each name."""
    expanded: list[Any] = []
    for column in columns:
        names = column.get("name") if isinstance(column, dict) else None
        expanded += [{**column, "name": name} for name in names] if isinstance(names, list) else [column]
    return expanded


class LabelColumn(_Section):
    """One entry of `label_col`."""

    name: Name
    dtype: Literal["str", "int", "float"] = "float"
    fill_na: Scalar | None = None
    preprocess: str | None = None


class DatasetConfig(_Section):
    """One section of `dataset_config.yaml`."""

    dataset_id: str
    data_root: str = "./data/"
    data_format: Literal["csv", "parquet", "h5", "npz"] = "csv"
    train_data: str | None = None
    valid_data: str | None = None
    test_data: str | None = None
    item_info: str | None = None
    feature_cols: list[FeatureColumn] = []
    label_col: list[LabelColumn] = []
    min_categr_count: PositiveInt = 1
    sep: Annotated[str, AfterValidator(_check_separator)] = ","
    n_rows: PositiveInt | None = None
    rebuild_dataset: bool = True
    valid_size: Annotated[float, Field(ge=0)] | NonNegativeInt = 0
    test_size: Annotated[float, Field(ge=0)] | NonNegativeInt = 0
    split_type: Literal["sequential", "random"] = "sequential"
    split_seed: NonNegativeInt = 2018

    def folder(self, root: Path) -> Path:
        """Where the built dataset lies."""
        return root / self.data_root / self.dataset_id

    @model_validator(mode="before")
    @classmethod
    def _expand_lists(cls, section: Any) -> Any:
        """`label_col` may be one mapping; a feature entry may name several columns at once."""
        if not isinstance(section, dict):
            return section
        section = dict(section)
        if isinstance(section.get("label_col"), dict):
            section["label_col"] = [section["label_col"]]
        if isinstance(section.get("feature_cols"), list):
            section["feature_cols"] = expand_columns(section["feature_cols"])
        return section


class TrainingConfig(_Section):
    """The keys of a model_config section that the framework itself reads; all others belong to the model."""

    model: str
    dataset_id: str
    # A model of several tasks (FuxiCTR's MultiTaskModel) may have a list of each, in the order of the labels.
    task: Task | Annotated[list[Task], Field(min_length=1)] = "binary_classification"
    loss: str | Annotated[list[str], Field(min_length=1)] = "binary_crossentropy"
    metrics: Annotated[list[str], Field(min_length=1)] = ["AUC", "logloss"]
    monitor: str | dict[str, Weight] = "AUC"
    monitor_mode: Literal["max", "min"] = "max"
    optimizer: str = "adam"
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    embedding_regularizer: float | str | None = None
    net_regularizer: float | str | None = None
    max_gradient_norm: Annotated[float, Field(gt=0)] = 10.0
    batch_size: PositiveInt = 10000
    eval_batch_size: PositiveInt | None = None
    epochs: PositiveInt = 100
    shuffle: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 2024
    early_stop_patience: PositiveInt = 2
    reduce_lr_on_plateau: bool = True
    lr_decay_factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    min_learning_rate: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-6
    eval_steps: PositiveInt | None = None
    save_best_only: bool = True
    checkpoint_every: CheckpointEvery = None
    device_cache: Literal["auto", "resident", "stream"] = "auto"
    shuffle_buffer: PositiveInt = 1 << 20
    speed: Literal["auto", "plain"] = "auto"
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    compile: bool = False
    cuda_graph: bool = False
    deterministic: bool = False
    group_id: str | None = None
    use_features: list[str] | None = None
    feature_specs: list[dict[str, Any]] | None = None
    model_root: str = "./runs/"
    verbose: NonNegativeInt = 1

    @property
    def checkpoint_steps(self) -> int | None:
        """Steps from one checkpoint to the next, where `checkpoint_every` is given in steps."""
        return self.checkpoint_every if isinstance(self.checkpoint_every, int) else None

    @property
    def checkpoint_seconds(self) -> float | None:
        """Seconds from one checkpoint to the next, where `checkpoint_every` is given in minutes."""
        minutes = _minutes(self.checkpoint_every) if isinstance(self.checkpoint_every, str) else None
        return None if minutes is None else 60 * minutes


# Keys of stock FuxiCTR files that nothing here reads: accepted, with one warning that names them. A model whose
# constructor names one of them gets it.
UNREAD_MODEL_KEYS = frozenset(
    {"pickle_feature_encoder", "feature_config", "debug_mode", "data_loader", "version", "gpu", "model_id"}
    | {"num_workers", "accumulation_steps", "streaming", "buffer_size", "ordered_features"}
    | {"factor", "patience", "every_x_epochs", "debug", "use_hdf5", "partition_block_size"}  # of FuxiCTR 1
)
# What does the same here as some of them.
INSTEAD_OF = {
    "factor": "lr_decay_factor",
    "patience": "early_stop_patience",
    "every_x_epochs": "eval_steps",
    "ordered_features": "use_features",
}
# Keys that shape the batches of a dataset with an item table, where the model's constructor does not name them.
LOADER_KEYS = frozenset({"max_len"})
UNREAD_DATASET_KEYS = frozenset({"data_block_size", "num_buckets"})
# What FuxiCTR's own loaders read and nothing here does, though it shapes the data: refused with what to do.
REFUSED_DATASET_KEYS = {
    "user_info": "a file of histories by user is not read: give every row its history, a list of item ids in a column of "
    "type meta",
}
UNREAD_COLUMN_KEYS = frozenset({"encoder", "na_value"})
