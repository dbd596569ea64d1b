# SPDX-License-Identifier: Apache-2.0
"""Encoded data of FuxiCTR as a dataset: H5, Parquet or npz splits with the feature_map.json that they belong to.

The dataset's folder is where FuxiCTR has it, `data_root/dataset_id`, and nothing in it is changed. One H5 file per split
(FuxiCTR 2.0) is read as it is. Everything else is checked value by value and copied once, ids and their order unchanged,
to typed H5 files in the folder's subfolder `ctrbench`, which are made anew when the originals change.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from ctrbench import items
from ctrbench import manifest as manifests
from ctrbench.errors import ConfigError, DataError, did_you_mean
from ctrbench.features import FeatureMap, load_feature_map
from ctrbench.files import sha256_of_value, storage_error
from ctrbench.foreign_files import EncodedBlock, EncodedSplit, encoded_files
from ctrbench.preprocess import FEATURE_MAP, FEATURE_VOCAB, LOCK, DataFolder
from ctrbench.ready_data import find_split
from ctrbench.schema import DatasetConfig
from ctrbench.splits import SPLITS, no_rows
from ctrbench.storage import ColumnSpec, SplitWriter, column_specs
from ctrbench.validation import tasks_of

COPY = "ctrbench"  # subfolder of the typed copies
_LARGEST = float(np.finfo(np.float32).max)


def open_encoded(
    dataset: DatasetConfig, root: Path, task: str | Sequence[str] = "binary_classification", copy: Path | None = None
) -> DataFolder:
    """Open encoded data, copying it if that was not done or its files have changed since.

    Args:
        dataset: the dataset section.
        root: folder of relative paths.
        task: binary_classification demands labels 0 and 1; a list has one task for each label.
        copy: folder of the typed copies; by default within the dataset's.

    Raises:
        ConfigError: no train_data.
        DataError: files that are missing, damaged or do not belong to the feature map; names file, row and column.
        CtrbenchError: the disk is full or the folder cannot be written.
    """
    folder = dataset.folder(root)
    copy = copy or folder / COPY
    feature_map = load_feature_map(folder / FEATURE_MAP, dataset.dataset_id, {"embedding_dim": 1})
    splits = _splits(dataset, root)
    files = {**splits, **_companions(folder, feature_map)}
    settings = sha256_of_value(["encoded", manifests.FORMAT_VERSION, dataset.data_format, task])
    try:
        copy.mkdir(parents=True, exist_ok=True)
        lock = FileLock(copy / LOCK)
        lock.acquire()  # one process copies, others wait and use it
    except OSError as error:
        raise storage_error(error, copy / LOCK) from error
    try:
        manifest = manifests.read(copy)
        reason = "not copied yet" if manifest is None else manifests.why_stale(copy, manifest, settings, files)
        if reason is not None:
            logging.info("Copy %s to %s: %s", folder, copy, reason)
            manifest = _copy(feature_map, splits, files, copy, settings, task)
    finally:
        lock.release()
    assert manifest is not None
    num_rows = {split: manifest["num_rows"][split] for split in splits}
    items_file = None if feature_map.item_key is None else folder / items.FILE
    paths = {split: copy / f"{split}.h5" for split in splits}
    return DataFolder(folder, folder / FEATURE_MAP, paths, manifest["data_hash"], num_rows, items_file)


def _splits(dataset: DatasetConfig, root: Path) -> dict[str, list[Path]]:
    prefix, files = f"dataset_config: {dataset.dataset_id}.", {}
    for split in SPLITS:
        text = getattr(dataset, f"{split}_data")
        if not text:
            continue
        path = find_split(dataset, root, text)
        if not path.exists():
            near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
            raise DataError(f"{prefix}{split}_data: {path} does not exist{near}: correct the path")
        files[split] = encoded_files(path, dataset.data_format)
    if "train" not in files:
        raise ConfigError(f"{prefix}train_data: missing: name the {dataset.data_format} files")
    return files


def _companions(folder: Path, feature_map: FeatureMap) -> dict[str, list[Path]]:
    """The other files that a run depends on, by a key for the manifest."""
    found = {"feature_map": [folder / FEATURE_MAP]}
    for name, spec in feature_map.features.items():
        if spec.get("pretrained_emb") and (folder / str(spec["pretrained_emb"])).is_file():
            found[f"pretrained_{name}"] = [folder / str(spec["pretrained_emb"])]
    if len(found) > 1 and (folder / FEATURE_VOCAB).is_file():  # tells the rows of pretrained vectors
        found["feature_vocab"] = [folder / FEATURE_VOCAB]
    return found


def _copy(
    feature_map: FeatureMap,
    splits: Mapping[str, list[Path]],
    files: dict[str, list[Path]],
    copy: Path,
    settings: str,
    task: str | Sequence[str],
) -> dict[str, Any]:
    """Write the typed copies; returns their manifest."""
    manifests.remove(copy, [f"{split}.h5" for split in SPLITS])
    for leftover in copy.glob(".*.partial"):
        leftover.unlink(missing_ok=True)
    sources, num_rows, outputs = manifests.describe(files), {}, []
    for split, paths in splits.items():
        started = time.perf_counter()
        path = copy / f"{split}.h5"
        num_rows[split] = copy_split(EncodedSplit(paths), feature_map, path, task, labels_required=split != "test")
        outputs.append(path)
        logging.info("Copy %s: %d rows in %.1f s", split, num_rows[split], time.perf_counter() - started)
    if not manifests.unchanged(sources):
        raise DataError(f"{copy.parent}: its files changed while they were read: run again when they are complete")
    return manifests.write(copy, sources, settings, num_rows, outputs, dataset_id=str(feature_map.dataset_id))


def copy_split(
    split: EncodedSplit, feature_map: FeatureMap, path: Path, task: str | Sequence[str], labels_required: bool = True
) -> int:
    """Write one split as a typed H5 file, checking every value; returns its rows.

    Raises:
        DataError: a column is missing or a value does not belong to the feature map.
    """
    writer: SplitWriter | None = None
    try:
        for specs, columns in checked_blocks(split, feature_map, task, labels_required):
            writer = writer or SplitWriter(path, specs, feature_map_hash=feature_map.content_hash())
            writer.append(columns)
        if writer is None:
            raise no_rows(split.files)
        writer.close()
    except BaseException:
        if writer is not None:
            writer.abort()
        raise
    return writer.num_rows


def checked_blocks(
    split: EncodedSplit, feature_map: FeatureMap, task: str | Sequence[str], labels_required: bool = True
) -> Iterator[tuple[list[ColumnSpec], dict[str, np.ndarray]]]:
    """All rows, block by block: how the columns are stored, and the columns, every value checked.

    Raises:
        DataError: a column is missing or a value does not belong to the feature map.
    """
    split.check_has(feature_map.split_features, "these files and feature_map.json are not of one dataset")
    has_labels = all(label in split.columns for label in feature_map.labels)
    if labels_required and not has_labels:
        split.check_has(feature_map.labels, "this split needs labels")
    specs = column_specs(feature_map, has_labels=has_labels)
    names = [spec.name for spec in specs]
    for number, block in enumerate(split.blocks(names)):
        if not number:
            specs = [_as_found(spec, block, feature_map) for spec in specs]
        yield specs, {spec.name: _checked(spec, block, feature_map, task) for spec in specs}


def _as_found(spec: ColumnSpec, block: EncodedBlock, feature_map: FeatureMap) -> ColumnSpec:
    """A vector's width is known only from the data where the feature map of an earlier FuxiCTR does not tell it."""
    feature = feature_map.features.get(spec.name, {})
    values = block.columns[spec.name]
    is_open = feature.get("type") == "embedding" and feature["pretrain_dim"] == 1 and values.ndim == 2
    return ColumnSpec(spec.name, spec.dtype, values.shape[1]) if is_open else spec


def _checked(spec: ColumnSpec, block: EncodedBlock, feature_map: FeatureMap, task: str | Sequence[str]) -> np.ndarray:
    """A column of the block as it is stored."""
    values, name = block.columns[spec.name], spec.name
    if values.shape[1:] != (() if spec.width is None else (spec.width,)):
        wanted, found = ("a single value" if w is None else f"{w} values" for w in (spec.width, _width(values)))
        raise DataError(f"{block.file}: column '{name}' has {found} in a row, the feature map says {wanted}")
    if spec.dtype.kind == "f":
        _check_numbers(values, name, block, feature_map, task)
        return values
    whole = values
    if values.dtype.kind == "f":  # ids as numbers: FuxiCTR stacks all columns in one array of reals
        fraction = ~np.isfinite(values) | (values != np.floor(values))
        _refuse(fraction, name, block, values, "is not a whole number, but the column holds ids")
        whole = values.astype(np.int64)
    size = feature_map.features[name].get("vocab_size")
    if size is not None:
        outside = (whole < 0) | (whole >= size)
        _refuse(outside, name, block, whole, f"is not an id from 0 to {size - 1} (vocab_size {size})")
    return whole


def _width(values: np.ndarray) -> int | None:
    return values.shape[1] if values.ndim == 2 else None


def _check_numbers(
    values: np.ndarray, name: str, block: EncodedBlock, feature_map: FeatureMap, task: str | Sequence[str]
) -> None:
    if values.dtype.kind == "f":
        _refuse(~(np.abs(values) <= _LARGEST), name, block, values, "is not a finite 32-bit number")
    if name in feature_map.labels:
        tasks = tasks_of(task)
        position = feature_map.labels.index(name)
        if tasks[position if position < len(tasks) else 0] == "binary_classification":
            why = "is not a binary label (0 or 1): correct the data, or set task: regression"
            _refuse((values != 0) & (values != 1), name, block, values, why)


def _refuse(wrong: np.ndarray, name: str, block: EncodedBlock, values: np.ndarray, why: str) -> None:
    rows = np.flatnonzero(wrong.reshape(len(wrong), -1).any(axis=1))
    if len(rows):
        row = int(rows[0])
        value = values[row][wrong[row]][0] if values.ndim == 2 else values[row]
        raise DataError(f"{block.place(row, name)}: {value} {why}")
