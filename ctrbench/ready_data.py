# SPDX-License-Identifier: Apache-2.0
"""Which datasets are ready: their files hold ids that belong to a feature_map.json. `ctrbench.foreign` opens them."""

from __future__ import annotations

import os
from pathlib import Path

from ctrbench import manifest as manifests
from ctrbench.schema import DatasetConfig

_FEATURE_MAP, _LOCK = "feature_map.json", ".build.lock"
SPLIT_KEYS = ("train_data", "valid_data", "test_data")


def is_encoded(dataset: DatasetConfig, folder: Path) -> bool:
    """Whether a dataset's files hold ids, and are not raw rows to be encoded.

    H5 and npz always do. Parquet may be either: it is encoded where the dataset's folder has a feature_map.json that was
    not built here, and the section asks for no build (no feature_cols, or rebuild_dataset: false) or names files of that
    very folder.

    Args:
        dataset: its section.
        folder: of the dataset.
    """
    if dataset.data_format in ("h5", "npz"):
        return True
    if dataset.data_format != "parquet" or not (folder / _FEATURE_MAP).is_file():
        return False
    if (folder / _LOCK).exists() or manifests.read(folder) is not None:  # built here, or begun to be
        return False
    return not dataset.feature_cols or not dataset.rebuild_dataset or _lies_inside(dataset, folder)


def _lies_inside(dataset: DatasetConfig, folder: Path) -> bool:
    text = dataset.train_data or ""
    own = folder.absolute() if os.path.isabs(text) else Path(dataset.data_root, dataset.dataset_id)
    return bool(text) and Path(os.path.normpath(text)).is_relative_to(os.path.normpath(own))


def is_read_in_place(dataset: DatasetConfig, root: Path) -> bool:
    """Whether every split is one H5 file, which needs no copy."""
    named = [text for key in SPLIT_KEYS if (text := getattr(dataset, key))]
    return dataset.data_format == "h5" and not any(find_split(dataset, root, text).is_dir() for text in named)


def find_split(dataset: DatasetConfig, root: Path, text: str) -> Path:
    """The file or folder that `text` names, from `root` or from the dataset's folder, with or without its suffix."""
    suffix = f".{dataset.data_format}"
    names = [text] if text.endswith(suffix) else [text, text + suffix]
    candidates = [base / name for base in (root, dataset.folder(root)) for name in names]
    return next((path for path in candidates if path.exists()), root / text)


def shown_format(dataset: DatasetConfig) -> str:
    """The format as messages write it."""
    return {"h5": "H5", "parquet": "Parquet"}.get(dataset.data_format, dataset.data_format)
