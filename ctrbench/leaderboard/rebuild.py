# SPDX-License-Identifier: Apache-2.0
"""Whether built data are what their raw files give: they are built once more beside them and compared."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ctrbench.config import Experiment
from ctrbench.files import sha256_of_file, shown_path
from ctrbench.foreign import COPY, open_encoded
from ctrbench.manifest import read as read_manifest
from ctrbench.preprocess import build_dataset, expected_hash
from ctrbench.ready_data import is_encoded, is_read_in_place

# What was found, by folder and data_hash: the runs of a leaderboard share their data.
_found: dict[tuple[Path, str], list[str]] = {}


def altered_files(experiment: Experiment) -> list[str]:
    """One line for each built file that is not what the raw files give; none where there is nothing to compare.

    Ready H5 data are their own source, and raw files may be gone.

    Raises:
        CtrbenchError: the data cannot be built.
    """
    dataset, root, task = experiment.dataset, experiment.root, experiment.training.task
    folder = dataset.folder(root)
    if is_encoded(dataset, folder) and not is_read_in_place(dataset, root):
        return _altered_copies(experiment, folder)
    manifest = read_manifest(folder)
    if manifest is None or expected_hash(dataset, root=root, task=task) != manifest["data_hash"]:
        return []
    key = folder.resolve(), str(manifest["data_hash"])
    if key not in _found:
        place = folder.parent if os.access(folder.parent, os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix=".verify_", dir=place) as data_root:
            again = build_dataset(dataset.model_copy(update={"data_root": data_root}), root=root, task=task).path
            names = read_manifest(again)["outputs"]  # type: ignore[index]
            remedy = f"delete {shown_path(folder)}, it is built again"
            _found[key] = [
                f"{shown_path(folder / name)} is not what the raw files give: {remedy}"
                for name in names
                if not _is_equal(folder / name, again / name)
            ]
    return _found[key]


def _altered_copies(experiment: Experiment, folder: Path) -> list[str]:
    """As `altered_files`, of the typed copies of FuxiCTR's files."""
    dataset, root, task = experiment.dataset, experiment.root, experiment.training.task
    data = open_encoded(dataset, root, task)
    key = folder.resolve(), data.data_hash
    if key not in _found:
        with tempfile.TemporaryDirectory(prefix="ctrbench-") as scratch:
            again = open_encoded(dataset, root, task, Path(scratch)).splits
            altered = [path for split, path in data.splits.items() if not _is_equal(path, again[split])]
        remedy = f"delete {shown_path(folder / COPY)}, it is made again"
        _found[key] = [f"{shown_path(path)} is not what {shown_path(folder)} holds: {remedy}" for path in altered]
    return _found[key]


def _is_equal(first: Path, second: Path) -> bool:
    if not first.is_file():
        return False
    if sha256_of_file(first) == sha256_of_file(second):
        return True
    if first.suffix != ".h5":
        return False
    try:  # another version of HDF5 may lay out the same values in other bytes
        with h5py.File(first, "r") as a, h5py.File(second, "r") as b:
            return a.keys() == b.keys() and all(_content(a[name]) == _content(b[name]) for name in a)
    except OSError:
        return False


def _content(column: h5py.Dataset) -> tuple[np.dtype[Any], tuple[int, ...], bytes]:
    return column.dtype, column.shape, column[()].tobytes()
