# SPDX-License-Identifier: Apache-2.0
"""A dataset in the files of stock FuxiCTR: the same ids, rows and order, and the feature_map.json that goes with them.

`<output>/<dataset_id>/` holds feature_map.json, feature_vocab.json, the splits and dataset_config.yaml, a section to train
on them. The folder appears under its name when it is complete.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ctrbench.dataset_lookup import EncodedDataset
from ctrbench.errors import ConfigError, CtrbenchError, DataError
from ctrbench.export_files import WRITERS, Writer
from ctrbench.features import FeatureMap
from ctrbench.files import storage_error, write_failure, write_json
from ctrbench.foreign import checked_blocks
from ctrbench.foreign_files import FORMATS
from ctrbench.preprocess import FEATURE_MAP, FEATURE_VOCAB
from ctrbench.storage import ColumnSpec
from ctrbench.yamlfile import dump_yaml

SECTION = "dataset_config.yaml"
logger = logging.getLogger(__name__)


def export_dataset(dataset: EncodedDataset, data_format: str, output: Path, block_size: int = 0) -> Path:
    """Write a dataset in one of FuxiCTR's forms; returns its new folder, `output/dataset_id`.

    Args:
        dataset: built or foreign.
        data_format: h5 (FuxiCTR 2.0), parquet (2.3) or npz (2.1 to 2.3).
        output: the data_root that FuxiCTR is to be given.
        block_size: rows of a block; each split becomes a folder of them. 0 makes one file of each split.

    Raises:
        ConfigError: unknown format, or a folder that is there already.
        DataError: data that is damaged or that FuxiCTR has no form for.
        CtrbenchError: the disk is full or the folder cannot be written. Nothing is left of an unfinished export.
    """
    if data_format not in FORMATS:
        raise ConfigError(f"--format {data_format}: must be one of {', '.join(FORMATS)}")
    if block_size < 0:
        raise ConfigError(f"--block-size {block_size}: must be at least 1, or left out for one file")
    feature_map = dataset.feature_map()
    _check_exportable(dataset, feature_map)
    dataset.verify(feature_map)
    target = output / str(feature_map.dataset_id)
    if target.exists():
        raise ConfigError(f"--output {output}: {target} exists already: remove it or name another folder")
    partial = output / f".{target.name}.{os.getpid()}.partial"
    try:
        _remove_leftovers(output, target.name)
        partial.mkdir(parents=True)
        for split in dataset.splits:
            _write_split(dataset, split, feature_map, data_format, partial, block_size)
        _write_companions(dataset, feature_map, partial)
        section = _section(feature_map, dataset, data_format, output.absolute(), block_size)
        (partial / SECTION).write_text(dump_yaml({str(feature_map.dataset_id): section}), encoding="utf-8")
        for path in (*partial.rglob("*"), partial):
            _put_on_disk(path)
        os.rename(partial, target)
    except Exception as error:
        if isinstance(error, CtrbenchError) or (failure := write_failure(error)) is None:
            raise
        raise storage_error(failure, target) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _remove_leftovers(output: Path, name: str) -> None:
    """What exports left whose process was killed."""
    for leftover in output.glob(f".{name}.*.partial"):
        number = leftover.name.split(".")[-2]
        if number.isdigit() and not _is_alive(int(number)):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # asks only
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _put_on_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_exportable(dataset: EncodedDataset, feature_map: FeatureMap) -> None:
    if feature_map.item_key is not None:
        raise DataError(
            f"{dataset.folder}: FuxiCTR's loaders have no item tables (item_info): a model that reads one brings its own "
            "loader, for the raw files"
        )
    wide = next((n for n, s in feature_map.features.items() if s["type"] == "meta" and "max_len" in s), None)
    if wide is not None:
        raise DataError(f"{dataset.folder}: column '{wide}': FuxiCTR's loaders have no meta columns of lists")


def _write_split(
    dataset: EncodedDataset, split: str, feature_map: FeatureMap, data_format: str, folder: Path, block_size: int
) -> None:
    source, started = dataset.open(split), time.perf_counter()
    suffix = f".{data_format}"
    if block_size:
        (folder / split).mkdir()
    writer: Writer | None = None
    written = room = part = 0
    for specs, columns in checked_blocks(source, feature_map, "regression", labels_required=split != "test"):
        specs = [_fuxictr_spec(spec, feature_map) for spec in specs]
        count, start = len(columns[specs[0].name]), 0
        while start < count:
            if writer is None:
                room = min(block_size or source.num_rows, source.num_rows - written)
                name = f"{split}/part_{part:06d}" if block_size else split
                writer = WRITERS[data_format](folder / (name + suffix), specs, room)
                part += 1
            stop = min(count, start + room)
            writer.append({name: values[start:stop] for name, values in columns.items()})
            written, room, start = written + stop - start, room - (stop - start), stop
            if not room:
                writer.close()
                writer = None
    seconds = time.perf_counter() - started
    logger.info("Exported %s: %d rows in %.1f s (%.0f rows/s)", split, written, seconds, written / seconds)


def _fuxictr_spec(spec: ColumnSpec, feature_map: FeatureMap) -> ColumnSpec:
    """The types that FuxiCTR itself writes."""
    kind = feature_map.features.get(spec.name, {"type": "label"})["type"]
    types: dict[str, Any] = {"sequence": np.int32, "numeric": np.float64, "label": np.float64, "embedding": np.float32}
    dtype = np.dtype(types.get(kind, np.int64))
    if kind == "sequence" and feature_map.features[spec.name]["vocab_size"] > np.iinfo(np.int32).max:
        dtype = np.dtype(np.int64)
    return ColumnSpec(spec.name, dtype, spec.width)


def _write_companions(dataset: EncodedDataset, feature_map: FeatureMap, folder: Path) -> None:
    """feature_map.json as it is, but for the width of vectors, which later FuxiCTR must be told; and what it names."""
    stored = json.loads((dataset.folder / FEATURE_MAP).read_text(encoding="utf-8"))
    for spec in (spec for entry in stored["features"] for spec in entry.values()):
        if spec["type"] == "embedding" and "pretrain_dim" not in spec:
            spec["pretrain_dim"] = spec.get("embedding_dim", 1)
    write_json(folder / FEATURE_MAP, stored)
    names = {str(s["pretrained_emb"]) for s in feature_map.features.values() if s.get("pretrained_emb")}
    for name in sorted({FEATURE_VOCAB, *names}):
        if (dataset.folder / name).is_file():
            shutil.copyfile(dataset.folder / name, folder / name)


def _section(
    feature_map: FeatureMap, dataset: EncodedDataset, data_format: str, output: Path, block_size: int
) -> dict[str, Any]:
    """The dataset section that FuxiCTR, or this program, trains with."""
    folder = output / str(feature_map.dataset_id)
    ending = "/" if block_size else f".{data_format}"
    section: dict[str, Any] = {"data_root": f"{output}/", "data_format": data_format}
    section |= {f"{split}_data": f"{folder / split}{ending}" for split in dataset.splits}
    if block_size:
        section["data_block_size"] = block_size
    if data_format == "npz":
        section["rebuild_dataset"] = False
    section["feature_cols"] = [_column(name, spec) for name, spec in feature_map.features.items()]
    section["label_col"] = [{"name": label, "dtype": "float"} for label in feature_map.labels]
    return section


def _column(name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    dtypes = {"sequence": "str", "numeric": "float", "embedding": "float"}
    column = {"name": name, "active": True, "dtype": dtypes.get(spec["type"], "int"), "type": spec["type"]}
    keys = ("vocab_size", "max_len", "embedding_dim", "emb_output_dim", "pretrain_dim", "share_embedding", "source")
    column |= {key: spec[key] for key in keys if spec.get(key)}
    if spec["type"] == "sequence" or spec.get("feature_encoder"):
        column["feature_encoder"] = spec.get("feature_encoder")
    return column
