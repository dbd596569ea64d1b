# SPDX-License-Identifier: Apache-2.0
"""Generated data of the published shapes, and the models that the published runs trained on them.

Ids are drawn with long tails. The vocabularies of Criteo_x4, ML_1M and MicroLens_1M are the published feature maps'; of
Avazu_x4 their sum is published, and the parts are made up.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
from measure import ROOT

CRITEO_NUMBERS = (44, 99, 122, 41, 220, 112, 80, 69, 92, 6, 27, 37, 72)
CRITEO_CATEGORIES = (1446, 554, 157_339, 117_822, 306, 18, 11_882, 630, 5, 39_530, 5131, 156_656, 3176, 28, 11_043)
CRITEO_CATEGORIES += (148_913, 12, 4560, 2003, 5, 154_564, 18, 17, 53_031, 82, 40_955)
AVAZU_FIELDS = {
    **{"hour": 26, "C1": 9, "banner_pos": 9, "site_id": 4050, "site_domain": 5900, "site_category": 27, "app_id": 6500},
    **{"app_domain": 420, "app_category": 34, "device_id": 810_000, "device_ip": 2_909_366, "device_model": 7800},
    **{"device_type": 7, "device_conn_type": 6, "C14": 2640, "C15": 10, "C16": 11, "C17": 440, "C18": 6, "C19": 70},
    **{"C20": 175, "C21": 62, "weekday": 9, "weekend": 4},
}
AVAZU_FIELDS["device_ip"] += 3_750_999 - sum(AVAZU_FIELDS.values())
ML_1M_FIELDS = {"UserID": 6042, "Gender": 4, "Age": 9, "Occupation": 23, "MovieID": 3643, "Release": 10, "Genres": 20}
GENRES_LENGTH = 5
NUM_ITEMS, NUM_TAGS, TAGS_LENGTH, HISTORY, MAX_LEN, LEVELS, WIDTH = 91_718, 11_740, 5, 100, 64, 11, 128
SDCNV3 = {"num_heads": 1, "layer_norm": True, "embedding_dim": 16}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A dataset's shape, and the published model and settings on it.

    Attributes:
        name: dataset_id.
        model: folder of the model zoo.
        batch_size: B.
        epoch_rows: rows of the published training split.
        fields: vocabulary by field; empty for MicroLens_1M, which has an item table.
        params: of the model's constructor.
        training: settings that differ from the defaults.
        is_small: tiny vocabularies, for a trial of the harness.
    """

    name: str
    model: str
    batch_size: int
    epoch_rows: int
    fields: dict[str, int]
    params: dict[str, Any]
    training: dict[str, Any]
    is_small: bool = False

    @property
    def has_items(self) -> bool:
        """Whether items are looked up in a table beside the rows."""
        return not self.fields

    @property
    def num_columns(self) -> int:
        """Stored columns of a row, the label included."""
        return len(make_columns(self, 1))

    def small(self) -> Shape:
        """The same with few ids and small batches."""
        fields = {name: min(size, 30) for name, size in self.fields.items()}
        return dataclasses.replace(self, fields=fields, batch_size=64, is_small=True)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "Criteo_x4",
            "SDCNv3",
            4096,
            36_672_493,
            {
                **{f"I{i}": size for i, size in enumerate(CRITEO_NUMBERS, 1)},
                **{f"C{i}": size for i, size in enumerate(CRITEO_CATEGORIES, 1)},
            },
            {
                **SDCNV3,
                **{"num_deep_cross_layers": 3, "num_shallow_cross_layers": 4, "batch_norm": False},
                **{"deep_net_dropout": 0.1, "shallow_net_dropout": 0.2},
            },
            {"embedding_regularizer": 1e-5},
        ),
        Shape(
            "Avazu_x4",
            "SDCNv3",
            10_000,
            32_343_172,
            AVAZU_FIELDS,
            {
                **SDCNV3,
                **{"num_heads": 4, "num_deep_cross_layers": 4, "num_shallow_cross_layers": 5, "batch_norm": True},
                **{"deep_net_dropout": 0.0, "shallow_net_dropout": 0.0},
            },
            {"embedding_regularizer": 0},
        ),
        Shape(
            "ML_1M",
            "SDCNv3",
            4096,
            591_209,
            ML_1M_FIELDS,
            {
                **SDCNV3,
                **{"num_deep_cross_layers": 3, "num_shallow_cross_layers": 4, "batch_norm": True},
                **{"deep_net_dropout": 0.1, "shallow_net_dropout": 0.1},
            },
            {"embedding_regularizer": 1e-2},
        ),
        Shape(
            "MicroLens_1M",
            "QIN",
            8192,
            3_600_000,
            {},
            {"embedding_dim": WIDTH, "max_len": MAX_LEN, "num_layers": 4, "num_row": 4, "net_dropout": 0.1},
            {"embedding_regularizer": 2e-4, "learning_rate": 2e-3},
        ),
    )
}


def shape_of(name: str, is_small: bool) -> Shape:
    """A shape by its name, small if asked."""
    return SHAPES[name].small() if is_small else SHAPES[name]


def make_columns(shape: Shape, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random rows: ids (rows,) or (rows, width), and labels (rows,) that some of the ids decide in part."""
    random = np.random.default_rng([seed, rows])
    if shape.has_items:
        columns = _microlens(random, rows, _num_items(shape))
        decisive = columns["item_id"] + columns["likes_level"]
    else:
        columns = {name: _long_tailed(random, rows, size) for name, size in shape.fields.items()}
        first, *_, last = (name for name in columns if name != "Genres")
        decisive = columns[first] + columns[last]
        if "Genres" in columns:
            genres = random.integers(1, max(2, shape.fields["Genres"] - 1), (rows, GENRES_LENGTH))
            genres[np.arange(GENRES_LENGTH) >= random.integers(1, GENRES_LENGTH + 1, rows)[:, None]] = 0
            columns["Genres"] = genres.astype(np.int32)
    is_noise = random.random(rows) < 0.2
    label = ((decisive % 3 > 0) ^ is_noise).astype(np.float64)
    label[: min(2, rows)] = (0, 1)[: min(2, rows)]
    return {**columns, "label": label}


def _long_tailed(random: np.random.Generator, rows: int, size: int) -> np.ndarray:
    """Ids from 1 to size - 1, low ones often."""
    return (1 + (size - 1) * random.random(rows) ** 4).astype(np.int32).clip(max=size - 1)


def _num_items(shape: Shape) -> int:
    return 300 if shape.is_small else NUM_ITEMS


def _microlens(random: np.random.Generator, rows: int, num_items: int) -> dict[str, np.ndarray]:
    """Long-tailed items, left-padded histories of lognormal length: median 6, mean 8, as in the data."""
    shares = np.cumsum(1 / np.arange(1, num_items) ** 0.7)
    lengths = np.clip(random.lognormal(math.log(6), 0.7, rows).round(), 0, HISTORY).astype(np.int64)
    drawn = np.searchsorted(shares, random.random((rows, HISTORY + 1)) * shares[-1]).astype(np.int32) + 1
    history = drawn[:, 1:].copy()
    history[np.arange(HISTORY) < HISTORY - lengths[:, None]] = 0
    levels = {name: random.integers(0, LEVELS, rows).astype(np.int32) for name in ("likes_level", "views_level")}
    return {"item_seq": history, **levels, "item_id": drawn[:, 0].copy()}


def make_items(shape: Shape) -> dict[str, np.ndarray]:
    """The item table: up to five tags and 128 numbers an item."""
    random, items = np.random.default_rng(1), _num_items(shape)
    tags = random.integers(1, NUM_TAGS, (items, TAGS_LENGTH)).astype(np.int32)
    tags[np.arange(TAGS_LENGTH) < random.integers(0, TAGS_LENGTH, (items, 1))] = 0
    vectors = random.standard_normal((items, WIDTH), np.float32)
    tags[0], vectors[0] = 0, 0
    return {"item_id": np.arange(items, dtype=np.int32), "item_tags": tags, "item_emb_d128": vectors}


def make_feature_map(shape: Shape, device: str = "cpu") -> Any:
    """FuxiCTR's own feature map of a shape, with the item table on `device` where there is one."""
    from fuxictr.features import FeatureMap

    feature_map = FeatureMap(shape.name, "unused")
    categorical = {"type": "categorical", "padding_idx": 0, "source": ""}
    averaged = {"type": "sequence", "feature_encoder": "layers.MaskedAveragePooling()"}
    for name, size in shape.fields.items():
        spec = {**categorical, "vocab_size": size}
        feature_map.features[name] = spec | ({**averaged, "max_len": GENRES_LENGTH} if name == "Genres" else {})
    if shape.has_items:
        import torch

        of_item = {**categorical, "source": "item"}
        feature_map.features.update(
            item_seq={"type": "meta", "max_len": HISTORY},
            likes_level={**categorical, "vocab_size": LEVELS},
            views_level={**categorical, "vocab_size": LEVELS},
            item_id={**of_item, "vocab_size": _num_items(shape)},
            item_tags={**of_item, **averaged, "max_len": TAGS_LENGTH, "vocab_size": NUM_TAGS},
            item_emb_d128={"source": "item", "type": "embedding", "embedding_dim": WIDTH, "pretrain_dim": WIDTH},
        )
        feature_map.item_table = {name: torch.from_numpy(x).to(device) for name, x in make_items(shape).items()}
    feature_map.labels = ["label"]
    feature_map.num_fields = feature_map.get_num_fields()
    if not shape.has_items:
        feature_map.set_column_index()
    return feature_map


def make_model(shape: Shape, device: str = "cpu", overrides: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """The model, untrained, and its settings.

    Args:
        shape: whose data it takes.
        device: cpu or cuda.
        overrides: further settings of the configuration's training section.
    """
    import torch

    from ctrbench.schema import TrainingConfig
    from ctrbench.zoo import build_model, load_model_class

    torch.manual_seed(0)
    settings = TrainingConfig(
        model=shape.model,
        dataset_id=shape.name,
        batch_size=shape.batch_size,
        epochs=2,
        verbose=0,
        **{**shape.training, **(overrides or {})},
    )
    model_class = load_model_class(ROOT / "model_zoo" / shape.model, shape.model)
    params = {**settings.model_dump(), **shape.params, "gpu": 0 if device == "cuda" else -1, "model_id": shape.model}
    return build_model(model_class, make_feature_map(shape, device), params, ""), settings


def write_columns(shape: Shape, rows: int, path: Path) -> None:
    """Write random rows as an .npz file with an array for each column, which both sides read."""
    np.savez(path, **make_columns(shape, rows))


def read_columns(path: Path) -> dict[str, Any]:
    """The columns of such a file as tensors: ids of 32 bits, labels in single precision."""
    import torch

    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    return {n: torch.from_numpy(x.astype(np.float32 if n == "label" else np.int32)) for n, x in arrays.items()}
