# SPDX-License-Identifier: Apache-2.0
"""From raw CSV or Parquet files to a dataset folder: feature_map.json, feature_vocab.json, <split>.h5, manifest.json.

The same JSON and the same ids as FuxiCTR's FeatureProcessor, in bounded memory and without Python per row.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ctrbench import items
from ctrbench import manifest as manifests
from ctrbench.columns import dataset_problems
from ctrbench.encoding import encode_items, encoded_blocks, write_splits
from ctrbench.engines import Engine
from ctrbench.errors import ConfigError, DataError
from ctrbench.features import FeatureMap, load_feature_map
from ctrbench.files import atomic_path, sha256_of_file, sha256_of_value, storage_error
from ctrbench.fitting import Fitted, count, fit, new_statistics
from ctrbench.rawdata import RawReader, resolve_files
from ctrbench.ready_data import is_encoded, is_read_in_place
from ctrbench.schema import DatasetConfig
from ctrbench.shards import Shards
from ctrbench.sources import RawRows
from ctrbench.spill import Spill, scratch_folder
from ctrbench.splits import SPLITS, plan_splits
from ctrbench.storage import open_split
from ctrbench.validation import Where

FEATURE_MAP, FEATURE_VOCAB = "feature_map.json", "feature_vocab.json"
LOCK = ".build.lock"


@dataclass(frozen=True)
class DataFolder:
    """A complete dataset.

    Attributes:
        path: its folder.
        feature_map_file: feature_map.json.
        splits: H5 file by split (train, valid, test), those that exist.
        data_hash: identifies sources and settings; the same for two builds from the same.
        num_rows: by split.
        items_file: the item table's H5 file, None for a dataset without one.
    """

    path: Path
    feature_map_file: Path
    splits: dict[str, Path]
    data_hash: str
    num_rows: dict[str, int]
    items_file: Path | None = None


def build_dataset(
    dataset: DatasetConfig,
    *,
    root: Path,
    task: str | Sequence[str] = "binary_classification",
    fresh: bool = False,
    engine: Engine | None = None,
) -> DataFolder:
    """Build a dataset unless a complete one from the same sources and settings is there.

    Args:
        dataset: the dataset section. Relative paths in it are meant from `root`. With `rebuild_dataset: false` existing
            data is used but never replaced; where there is none, the raw files must hold ids (each categorical and
            sequence column with its vocab_size).
        root: folder of relative paths.
        task: binary_classification demands labels 0 and 1; a list has one task for each label.
        fresh: build in any case.
        engine: works on the raw files side by side; by default this process reads one after the other. The result is the
            same to the last byte.

    Raises:
        ConfigError: settings that contradict each other, all of them at once.
        DataError: raw or stored data that cannot be used; names the file, the row, the column and the remedy.
        CtrbenchError: the disk is full or the folder cannot be written. Nothing is left that counts as complete.
    """
    folder = dataset.folder(root)
    if is_encoded(dataset, folder):
        if is_read_in_place(dataset, root):
            return _ready_h5(dataset, root, folder)
        from ctrbench.foreign import open_encoded  # it needs this module

        return open_encoded(dataset, root, task)
    problems = dataset_problems(dataset, Where(f"dataset_config: {dataset.dataset_id}"))
    # With rebuild_dataset: false a folder built from other settings is the first thing to say.
    if problems and (dataset.rebuild_dataset or manifests.read(folder) is None):
        raise ConfigError(problems)
    files = _source_files(dataset, root, folder)
    settings = manifests.settings_hash(dataset, task)
    if not fresh and (found := _reusable(dataset, folder, settings, files)) is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        _acquire(lock, folder)
    except OSError as error:
        raise storage_error(error, folder / LOCK) from error
    try:
        # Another process may have built it while this one waited.
        if not fresh and (found := _reusable(dataset, folder, settings, files)) is not None:
            return found
        _build(dataset, root, folder, settings, files, task, engine)
    finally:
        lock.release()
    built = manifests.read(folder)
    assert built is not None
    return _data_folder(folder, built)


def expected_hash(
    dataset: DatasetConfig, *, root: Path, task: str | Sequence[str] = "binary_classification"
) -> str | None:
    """The `data_hash` that building from the present sources and settings gives; None for encoded data or lost sources."""
    folder = dataset.folder(root)
    if is_encoded(dataset, folder) or not (files := _source_files(dataset, root, folder)):
        return None
    known = (manifests.read(folder) or {}).get("sources")
    return manifests.data_hash(manifests.describe(files, known), manifests.settings_hash(dataset, task))


def _acquire(lock: FileLock, folder: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logging.info("Waiting for the process that builds %s", folder)
        lock.acquire()


def _data_folder(folder: Path, manifest: dict[str, Any]) -> DataFolder:
    rows = manifest["num_rows"]
    splits = {split: folder / f"{split}.h5" for split in SPLITS if split in rows}
    num_rows = {split: rows[split] for split in splits}
    items_file = folder / items.FILE if items.FILE in manifest["outputs"] else None
    return DataFolder(folder, folder / FEATURE_MAP, splits, manifest["data_hash"], num_rows, items_file)


def _reusable(dataset: DatasetConfig, folder: Path, settings: str, files: dict[str, list[Path]]) -> DataFolder | None:
    """The dataset in `folder` if it may be used as it is.

    Raises:
        DataError: it is stale and `rebuild_dataset: false` forbids to replace it.
    """
    manifest = manifests.read(folder)
    if manifest is None:
        return None
    reason = manifests.why_stale(folder, manifest, settings, files)
    if reason is None:
        return _data_folder(folder, manifest)
    if not dataset.rebuild_dataset:
        raise DataError(
            f"{folder}: {reason}, and rebuild_dataset is false: set rebuild_dataset: true, restore the settings, "
            "or use another dataset_id"
        )
    logging.info("Rebuild %s: %s", folder, reason)
    return None


def _source_files(dataset: DatasetConfig, root: Path, folder: Path) -> dict[str, list[Path]]:
    """Raw files by split and pretrained files by feature; empty when all are gone and a built dataset remains."""
    named = {split: getattr(dataset, f"{split}_data") for split in SPLITS}
    prefix = f"dataset_config: {dataset.dataset_id}."
    files: dict[str, list[Path]] = {}
    try:
        for split, text in named.items():
            if text:
                files[split] = resolve_files(root, text, dataset.data_format, f"{prefix}{split}_data")
    except DataError:
        if files or manifests.read(folder) is None:
            raise
        return {}
    if dataset.item_info is not None:
        files[items.SOURCE] = resolve_files(root, dataset.item_info, "parquet", f"{prefix}{items.SOURCE}")
    for column in dataset.feature_cols:
        if column.active and column.pretrained_emb is not None:
            where = f"{prefix}feature_cols.{column.name}.pretrained_emb"
            files[f"pretrained_{column.name}"] = resolve_files(root, column.pretrained_emb, "*", where)
    return files


def _build(
    dataset: DatasetConfig,
    root: Path,
    folder: Path,
    settings: str,
    files: dict[str, list[Path]],
    task: str | Sequence[str],
    engine: Engine | None,
) -> None:
    if not files:
        raise DataError(f"{folder}: its source files are gone, so it cannot be built: restore train_data")
    if not dataset.rebuild_dataset:
        _check_given_ids(dataset, folder)
    start = time.perf_counter()
    manifests.remove(folder, [FEATURE_MAP, FEATURE_VOCAB, items.FILE, *(f"{split}.h5" for split in SPLITS)])
    # Hashing reads the same files beside the build, in a thread that holds no lock of the interpreter meanwhile.
    with ThreadPoolExecutor(1, thread_name_prefix="source-hash") as hashing, scratch_folder(folder) as scratch:
        sources = hashing.submit(manifests.describe, files)
        reader = RawReader(dataset, ids_given=not dataset.rebuild_dataset)
        plan = plan_splits(dataset, reader, {split: files[split] for split in SPLITS if split in files})
        for split, paths in plan.sources.items():
            logging.info("Reading files: %s: %s", split, ", ".join(str(path) for path in paths))
        rows, item_files = RawRows(dataset, reader, plan, task), files.get(items.SOURCE, [])
        histories = items.history_columns(dataset, reader, files["train"])
        statistics = new_statistics(dataset, scratch, histories)
        with Spill(scratch) as spill:
            shards = None if engine is None else Shards(dataset, rows, task, histories, scratch, engine)
            if shards is None:
                count(rows, statistics, spill)
            else:
                shards.count(statistics)
            fitted = fit(dataset, statistics, histories, spill, folder, root, files)
            logging.info(
                "Fit feature map: %d features in %.1f s",
                sum(column.active for column in dataset.feature_cols),
                time.perf_counter() - start,
            )
            if item_files:
                encode_items(dataset, item_files, spill, fitted, folder)
            blocks = encoded_blocks(dataset, rows, spill, fitted) if shards is None else shards.encoded_blocks(fitted)
            num_rows = write_splits(rows, blocks, fitted, folder)
        described = sources.result()
    if not manifests.unchanged(described):
        raise DataError(f"{folder}: the source files changed while they were read: run again when they are complete")
    _write_vocabulary(folder / FEATURE_VOCAB, fitted)
    fitted.feature_map.save(folder / FEATURE_MAP)
    outputs = [folder / FEATURE_MAP, folder / FEATURE_VOCAB, *(folder / f"{split}.h5" for split in num_rows)]
    outputs += sorted(folder.glob("pretrained_*")) + ([folder / items.FILE] if item_files else [])
    manifests.write(folder, described, settings, num_rows, outputs)
    total, seconds = sum(num_rows.values()), time.perf_counter() - start
    logging.info("Built %s: %d rows in %.1f s (%.0f rows/s)", folder, total, seconds, total / seconds)


def _write_vocabulary(path: Path, fitted: Fitted) -> None:
    """feature_vocab.json, one line per feature: indenting millions of tokens would take longer than fitting them."""
    features = fitted.feature_map.features
    named = [n for n, spec in features.items() if spec["type"] != "meta" and n in fitted.vocabularies]
    with atomic_path(path) as partial, partial.open("w", encoding="utf-8") as stream:
        for position, name in enumerate(named):
            stream.write(f"{',' if position else '{'}\n{json.dumps(name)}: ")
            stream.writelines(fitted.vocabularies[name].json_pieces())
        stream.write("\n}\n" if named else "{\n\n}\n")


def _check_given_ids(dataset: DatasetConfig, folder: Path) -> None:
    """Files of another program must not be overwritten when rebuilding is switched off."""
    if (folder / FEATURE_MAP).exists() and manifests.read(folder) is None:
        raise DataError(
            f"{folder}: it holds a feature_map.json without manifest.json, and rebuild_dataset is false: "
            "set data_format: h5 to use H5 files of FuxiCTR, or delete the folder"
        )


def _ready_h5(dataset: DatasetConfig, root: Path, folder: Path) -> DataFolder:
    """Check H5 files that are used as they are."""
    feature_map = load_feature_map(folder / FEATURE_MAP, dataset.dataset_id, {"embedding_dim": 1})
    splits, num_rows = {}, {}
    for split in SPLITS:
        text = getattr(dataset, f"{split}_data")
        if not text:
            continue
        path = next((p for p in _h5_candidates(root, folder, text) if p.is_file()), root / text)
        with open_split(path, feature_map, labels_required=split != "test", verify=False) as opened:
            splits[split], num_rows[split] = path, opened.num_rows
    if not splits:
        raise ConfigError(f"dataset_config: {dataset.dataset_id}.train_data: missing: name the H5 files")
    items_file = None if feature_map.item_key is None else folder / items.FILE
    return DataFolder(folder, folder / FEATURE_MAP, splits, _h5_hash(folder, feature_map, splits), num_rows, items_file)


def _h5_candidates(root: Path, folder: Path, text: str) -> list[Path]:
    names = [text] if text.endswith(".h5") else [text, f"{text}.h5"]
    return [base / name for base in (root, folder) for name in names]


def _h5_hash(folder: Path, feature_map: FeatureMap, splits: dict[str, Path]) -> str:
    """The manifest's data_hash for the files that it lists, otherwise a hash of the files."""
    manifest = manifests.read(folder)
    if manifest is not None and {split: folder / f"{split}.h5" for split in manifest["num_rows"]} == splits:
        return str(manifest["data_hash"])
    parts: dict[str, object] = {"feature_map": feature_map.content_hash()}
    for split, path in splits.items():
        with open_split(path, feature_map, labels_required=False, verify=False) as opened:
            checksums = opened.checksums()
            parts[split] = [opened.num_rows, checksums] if checksums is not None else sha256_of_file(path)
    return sha256_of_value(parts)
