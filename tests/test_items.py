# SPDX-License-Identifier: Apache-2.0
"""Item tables: built from item_info, stored once, checked, loaded and looked up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
import pytest
import torch

from ctrbench.batches import Batches, load_items
from ctrbench.errors import ConfigError, CtrbenchError, DataError
from ctrbench.features import load_feature_map
from ctrbench.forms import Columns
from ctrbench.preprocess import DataFolder, build_dataset
from ctrbench.schema import DatasetConfig

COLUMNS: list[dict[str, Any]] = [
    {"name": "user_id", "active": True, "dtype": "int", "type": "meta"},
    {"name": "item_seq", "active": True, "dtype": "int", "type": "meta"},
    {"name": "likes_level", "active": True, "dtype": "int", "type": "categorical", "vocab_size": 11},
    {"name": "item_id", "active": True, "dtype": "int", "type": "categorical", "source": "item", "vocab_size": 5},
    {
        "name": "item_tags",
        "active": True,
        "dtype": "int",
        "type": "sequence",
        "source": "item",
        "max_len": 2,
        "vocab_size": 7,
    },
    {"name": "item_emb", "active": True, "dtype": "float", "type": "embedding", "source": "item", "embedding_dim": 3},
]


def section(**changes: Any) -> DatasetConfig:
    values = {
        "dataset_id": "mm",
        "data_root": "data",
        "data_format": "parquet",
        "rebuild_dataset": False,
        "feature_cols": COLUMNS,
        "label_col": {"name": "label", "dtype": "float"},
        "item_info": "item_info.parquet",
        **{f"{split}_data": f"{split}.parquet" for split in ("train", "valid", "test")},
    }
    return DatasetConfig.model_validate({**values, **changes})


def rows(**changes: Any) -> pl.DataFrame:
    values: dict[str, Any] = {
        "user_id": [7, 8, 9],
        "item_id": [1, 4, 2],
        "item_seq": [[0, 0, 3, 1], [0, 0, 0, 0], [4, 3, 2, 1]],
        "likes_level": [0, 10, 3],
        "label": [1, 0, 1],
    }
    return pl.DataFrame({**values, **changes})


def items(**changes: Any) -> pl.DataFrame:
    values: dict[str, Any] = {
        "item_id": [2, 0, 1, 4, 3],  # in any order
        "item_tags": [[0, 2], [0, 0], [5, 6], [0, 4], [1, 3]],
        "item_emb": [[2.0, 2.1, 2.2], [0.0, 0.0, 0.0], [1.0, 1.1, 1.2], [4.0, 4.1, 4.2], [3.0, 3.1, 3.2]],
    }
    return pl.DataFrame({**values, **changes})


def write(root: Path, train: pl.DataFrame | None = None, table: pl.DataFrame | None = None, **others: Any) -> None:
    frames = {"train": train, "valid": None, "test": None, **others}
    for split, frame in frames.items():
        (rows() if frame is None else frame).write_parquet(root / f"{split}.parquet")
    (items() if table is None else table).write_parquet(root / "item_info.parquet")


def build(root: Path, **changes: Any) -> DataFolder:
    return build_dataset(section(**changes), root=root)


def test_the_table_is_stored_once_and_the_splits_hold_ids_only(tmp_path: Path) -> None:
    write(tmp_path, test=rows().drop("label"))
    folder = build(tmp_path)
    feature_map = load_feature_map(folder.feature_map_file, "mm", {"embedding_dim": 4, "group_id": "user_id"})
    assert feature_map.item_key == "item_id" and feature_map.item_features == ["item_tags", "item_emb"]
    assert feature_map.features["item_emb"]["pretrain_dim"] == 3  # the stored width, as the file names none
    assert feature_map.features["item_seq"] == {"type": "meta", "max_len": 4}
    with h5py.File(folder.splits["train"]) as file:
        assert set(file) == {"user_id", "item_seq", "likes_level", "item_id", "label"}
        assert file["item_seq"].dtype == np.uint8 and file["item_seq"][:].tolist() == rows()["item_seq"].to_list()
    assert folder.items_file is not None
    table = load_items(folder.items_file, feature_map, "cpu")
    assert list(table) == ["item_id", "item_tags", "item_emb"]
    assert table["item_id"].tolist() == [0, 1, 2, 3, 4]
    assert table["item_tags"].tolist() == [[0, 0], [5, 6], [0, 2], [1, 3], [0, 4]]
    torch.testing.assert_close(table["item_emb"], torch.tensor(items().sort("item_id")["item_emb"].to_list()))


def test_batches_carry_ids_or_the_target_items_features(tmp_path: Path) -> None:
    write(tmp_path)
    folder = build(tmp_path)
    feature_map = load_feature_map(folder.feature_map_file, "mm", {"embedding_dim": 4})
    assert folder.items_file is not None
    table = load_items(folder.items_file, feature_map, "cpu")
    (batch,) = Batches.from_file(folder.splits["train"], feature_map, 8)
    assert set(batch) == {"user_id", "item_seq", "likes_level", "item_id", "label"}
    (batch,) = Batches.from_file(folder.splits["train"], feature_map, 8, form=Columns(table))
    assert batch["item_tags"].tolist() == [[5, 6], [0, 4], [0, 2]]
    torch.testing.assert_close(batch["item_emb"], table["item_emb"][[1, 4, 2]])
    picked = Batches.from_file(folder.splits["train"], feature_map, 8, shuffle=True, form=Columns(table)).rows([2, 0])
    assert picked["item_id"].tolist() == [2, 1] and picked["item_tags"].tolist() == [[0, 2], [5, 6]]
    assert picked.keys() == batch.keys()


def test_a_second_build_reuses_it_and_a_changed_table_is_noticed(tmp_path: Path) -> None:
    write(tmp_path)
    first = build(tmp_path)
    assert build(tmp_path) == first
    items(item_tags=[[0, 1]] * 5).write_parquet(tmp_path / "item_info.parquet")
    with pytest.raises(DataError, match="the content of item_info has changed, and rebuild_dataset is false"):
        build(tmp_path)


def test_fitted_ids_number_the_items_of_the_table(tmp_path: Path) -> None:
    """Every item has a row, also one that training never shows; histories use the same numbers, padded on the left."""
    names = {"item_id": ["b", "a", "d", "c"], "item_tags": [["x"], ["x", "y"], [], ["z"]]}
    table = items().tail(4).with_columns(**{name: pl.Series(values) for name, values in names.items()})
    train = rows(item_id=["a", "b", "a"], item_seq=[["a"], [], ["c", "nowhere", "a"]], likes_level=[3, 3, 3])
    write(tmp_path, train, table, valid=rows(item_id=["d", "nowhere", "a"], item_seq=[["a"], [], []]), test=train)
    columns = [{**c, "dtype": "str"} if c["name"] in ("item_id", "item_tags", "item_seq") else c for c in COLUMNS]
    folder = build(tmp_path, rebuild_dataset=True, feature_cols=columns, min_categr_count=2)
    feature_map = load_feature_map(folder.feature_map_file, "mm", {"embedding_dim": 4})
    vocabulary = json.loads((folder.path / "feature_vocab.json").read_text())
    assert vocabulary["item_id"] == {"__PAD__": 0, "a": 1, "b": 2, "c": 3, "d": 4, "__OOV__": 5}
    assert vocabulary["item_tags"] == {"__PAD__": 0, "x": 1, "__OOV__": 2} and "item_seq" not in vocabulary
    with h5py.File(folder.splits["train"]) as file:
        assert file["item_id"][:].tolist() == [1, 2, 1]
        assert file["item_seq"][:].tolist() == [[0, 0, 1], [0, 0, 0], [3, 5, 1]]
    with h5py.File(folder.splits["valid"]) as file:
        assert file["item_id"][:].tolist() == [4, 5, 1]
    assert folder.items_file is not None
    stored = load_items(folder.items_file, feature_map, "cpu")
    assert stored["item_tags"].tolist() == [[0, 0], [1, 2], [1, 0], [2, 0], [0, 0], [0, 0]]
    assert stored["item_emb"][5].tolist() == [0.0, 0.0, 0.0]


def test_the_newest_slots_are_kept(tmp_path: Path) -> None:
    write(tmp_path)
    columns = [{**c, "max_len": 2} if c["name"] == "item_seq" else c for c in COLUMNS]
    folder = build(tmp_path, feature_cols=columns)
    with h5py.File(folder.splits["train"]) as file:
        assert file["item_seq"][:].tolist() == [[3, 1], [0, 0], [2, 1]]


def test_row_0_stands_for_padding(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, table=items(item_tags=[[1, 2]] * 5))
    folder = build(tmp_path)
    assert "item 0 stands for padding: its values are replaced by zeros" in caplog.text
    feature_map = load_feature_map(folder.feature_map_file, "mm", {"embedding_dim": 4})
    assert folder.items_file is not None
    assert load_items(folder.items_file, feature_map, "cpu")["item_tags"].tolist() == [[0, 0]] + [[1, 2]] * 4


@pytest.mark.parametrize(
    ("train", "table", "message"),
    [
        (rows(item_id=[1, 5, 2]), items(), r"train.parquet: row 2, column 'item_id': 5 is not an id from 0 to 4"),
        (
            rows(item_seq=[[0, 0, 3, 1], [0, 0, 0, 9], [4, 3, 2, 1]]),
            items(),
            r"train.parquet: row 2, column 'item_seq': 9 is not an id from 0 to 4",
        ),
        (
            rows(item_seq=[[0, 0, 3, 1], [2, 1], [4, 3, 2, 1]]),
            items(),
            r"row 2, column 'item_seq': the history has 2 slots, the longest has 4: pad it with 0 on the left",
        ),
        (
            rows(),
            items(item_id=[2, 0, 1, 2, 3]),
            r"item_info.parquet: column 'item_id': rows 1 and 4 have one id \(2\)",
        ),
        (
            rows(),
            items().filter(pl.col("item_id") != 2),
            r"column 'item_id': 1 of the items 1 to 3 are missing, the first is 2: add their rows, or correct vocab_size",
        ),
        (
            rows(),
            items(item_id=[2, 0, 1, 6, 3]),
            r"item_info.parquet: row 4, column 'item_id': 6 is not an id from 0 to",
        ),
        (
            rows(),
            items(item_emb=[[1.0, 2.0, 3.0]] * 4 + [[1.0, 2.0]]),
            r"item_info.parquet: row 5, column 'item_emb': the vector has 2 numbers, pretrain_dim is 3",
        ),
        (
            rows(),
            items(item_tags=[[0, 9]] * 5),
            r"item_info.parquet: row 1, column 'item_tags': '9' is not an id from 0",
        ),
        (rows(), items().drop("item_tags"), r"item_info.parquet: column 'item_tags' is missing"),
        (rows(), items().head(0), r"item_info.parquet"),
        (rows(label=[1, None, 0]), items(), r"train.parquet: row 2, column 'label': the label is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(tmp_path: Path, train: pl.DataFrame, table: pl.DataFrame, message: str) -> None:
    write(tmp_path, train, table)
    with pytest.raises(DataError, match=message):
        build(tmp_path)
    assert not list((tmp_path / "data/mm").glob("*.h5")) or not (tmp_path / "data/mm/manifest.json").exists()


def test_labels_that_are_missing_in_part_of_the_test_split(tmp_path: Path) -> None:
    write(tmp_path, test=rows(label=[1, 0, None]))
    with pytest.raises(DataError, match=r"test.parquet: row 3, column 'label': the label is missing"):
        build(tmp_path)


def test_a_history_longer_than_the_configured_slots_or_shorter(tmp_path: Path) -> None:
    write(tmp_path)
    columns = [{**c, "max_len": 6} if c["name"] == "item_seq" else c for c in COLUMNS]
    with pytest.raises(DataError, match=r"the history has 4 slots, max_len is 6: .*, or correct max_len"):
        build(tmp_path, feature_cols=columns)


def test_settings_that_cannot_work(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ConfigError, match="item_info: needs an active categorical column of source: item"):
        build(tmp_path, feature_cols=[{**c, "source": ""} if "source" in c else c for c in COLUMNS])
    with pytest.raises(DataError, match=r"item_info: .*nowhere.parquet does not exist"):
        build(tmp_path, item_info="nowhere.parquet")
    columns = [{**c, "dtype": "str"} if c["name"] == "item_seq" else c for c in COLUMNS]
    with pytest.raises(CtrbenchError, match=r"item_seq.dtype: it holds ids of 'item_id', so it must be int, got str"):
        build(tmp_path, feature_cols=columns)


def test_features_of_the_table_need_its_key(tmp_path: Path) -> None:
    write(tmp_path)
    folder = build(tmp_path)
    with pytest.raises(ConfigError, match="use_features: 'item_tags' is looked up by 'item_id': name that too"):
        load_feature_map(folder.feature_map_file, "mm", {"use_features": ["likes_level", "item_tags"]})


@pytest.mark.parametrize("damage", ["missing", "truncated", "short"])
def test_a_damaged_table_is_named(tmp_path: Path, damage: str) -> None:
    write(tmp_path)
    folder = build(tmp_path)
    feature_map = load_feature_map(folder.feature_map_file, "mm", {"embedding_dim": 4})
    path = folder.items_file
    assert path is not None
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    else:
        feature_map.features["item_id"]["vocab_size"] = 9
    with pytest.raises(DataError, match=r"items\.h5: .*"):
        load_items(path, feature_map, "cpu")


def test_lists_without_an_item_table_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    columns = [{k: v for k, v in c.items() if k != "source"} for c in COLUMNS[:4]]
    with pytest.raises(DataError, match="column 'item_seq' holds lists, but its type is meta"):
        build(tmp_path, item_info=None, feature_cols=columns)
