# SPDX-License-Identifier: Apache-2.0
"""Item tables: what is known of an item is stored once, loaded once to the device and looked up by item id.

A dataset with `item_info: <file>` and features of `source: item` has one. Its key is the first categorical column of
that source: the splits hold it, and `items.h5` holds row i of all the other item features for the item of id i. A meta
column of lists is then a history: item ids under the same numbering, padded with 0 on the left, the newest item last.

Ids are given (`rebuild_dataset: false`) or fitted. Fitted ones number the items of `item_info`, also those that the
training split never shows; their features are fitted over the table.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from pathlib import Path

import numpy as np
import polars as pl

from ctrbench.errors import DataError
from ctrbench.features import ITEM, FeatureMap
from ctrbench.rawdata import RawReader
from ctrbench.schema import DatasetConfig, FeatureColumn
from ctrbench.storage import SplitWriter, column_specs

FILE = "items.h5"
SOURCE = "item_info"  # how manifest.json and the build's plan name the raw file


def key_column(dataset: DatasetConfig) -> FeatureColumn | None:
    """The column that is an index into the item table; None without a table."""
    if dataset.item_info is None:
        return None
    items = (c for c in dataset.feature_cols if c.active and c.source == ITEM and c.type == "categorical")
    return next(items, None)


def split_dataset(dataset: DatasetConfig) -> DatasetConfig:
    """The configuration of what the splits hold: without the features of the item table, but with its key."""
    key = key_column(dataset)
    if key is None:
        return dataset
    columns = [c for c in dataset.feature_cols if c.source != ITEM or c.name == key.name]
    return dataset.model_copy(update={"feature_cols": columns})


def item_dataset(dataset: DatasetConfig) -> DatasetConfig:
    """The configuration of the table itself, as if it were a split of its own."""
    key = key_column(dataset)
    assert key is not None and dataset.item_info is not None
    # Every item counts once here, so a minimum would leave none.
    columns = [key.model_copy(update={"min_categr_count": 1})]
    columns += [c for c in dataset.feature_cols if c.active and c.source == ITEM and c.name != key.name]
    data_format = "csv" if dataset.item_info.endswith(".csv") else "parquet"
    changes = {"feature_cols": columns, "label_col": [], "data_format": data_format, "n_rows": None}
    return dataset.model_copy(update=changes)


def history_columns(dataset: DatasetConfig, reader: RawReader, files: list[Path]) -> list[str]:
    """The meta columns of lists: histories of item ids."""
    if key_column(dataset) is None:
        return []
    schema = reader.schema(files[0])
    names = [column.name for column in dataset.feature_cols if column.active and column.type == "meta"]
    return [name for name in names if isinstance(schema.get(name), pl.List | pl.Array)]


def item_map(feature_map: FeatureMap) -> FeatureMap:
    """The part of the feature map that `items.h5` holds."""
    part = copy.copy(feature_map)
    assert feature_map.item_key is not None
    names = [feature_map.item_key, *feature_map.item_features]
    part.features = OrderedDict((name, feature_map.features[name]) for name in names)
    part.labels, part.item_key, part.group_id = [], None, None
    return part


def write_items(folder: Path, feature_map: FeatureMap, columns: dict[str, np.ndarray], where: str) -> None:
    """Check the encoded rows of `item_info`, put them in the order of their ids and write items.h5.

    Args:
        folder: of the dataset.
        feature_map: complete.
        columns: arrays by name, the key among them, in file order.
        where: the raw file, for messages.

    Raises:
        DataError: an id occurs twice, or one is missing.
    """
    key = feature_map.item_key
    assert key is not None
    ids, size = columns[key].astype(np.int64), int(feature_map.features[key]["vocab_size"])
    seen = np.bincount(ids, minlength=size)
    if len(twice := np.flatnonzero(seen > 1)):
        first, second = np.flatnonzero(ids == twice[0])[:2] + 1
        raise DataError(
            f"{where}: column '{key}': rows {first} and {second} have one id ({twice[0]}): keep one of them"
        )
    # The last id may be the one of unknown items, which has no row.
    missing = np.flatnonzero(seen[1 : size - 1] == 0) + 1
    if len(missing):
        raise DataError(
            f"{where}: column '{key}': {len(missing)} of the items 1 to {size - 2} are missing, the first is "
            f"{missing[0]}: add their rows, or correct vocab_size ({size})"
        )
    if seen[0] and any(values[ids == 0].any() for name, values in columns.items() if name != key):
        logging.warning("%s: item 0 stands for padding: its values are replaced by zeros", where)
    table = {name: np.zeros((size, *values.shape[1:]), values.dtype) for name, values in columns.items()}
    for name, values in columns.items():
        table[name][ids] = values
        table[name][0] = 0
    table[key] = np.arange(size).astype(columns[key].dtype)
    specs = column_specs(item_map(feature_map), has_labels=False)
    with SplitWriter(folder / FILE, specs, feature_map_hash=feature_map.content_hash()) as writer:
        writer.append(table)
