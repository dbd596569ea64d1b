# SPDX-License-Identifier: Apache-2.0
"""Predictions in the form that the MMCTR challenge takes: `prediction.csv` with the columns ID and Task2, and its zip."""

from __future__ import annotations

import zipfile
from pathlib import Path

import polars as pl
from torch import Tensor

from ctrbench.errors import ConfigError
from ctrbench.files import atomic_path

TASKS = ("Task2", "Task1&2")
FILE = "prediction.csv"


def write_submission(predictions: Tensor, folder: Path, name: str, task: str = "Task2") -> list[Path]:
    """Write `prediction.csv` and `<name>.zip`, which holds it, into `folder`.

    Args:
        predictions: probabilities (N,) in the row order of the test split; row i has ID i.
        folder: created when it is missing.
        name: of the archive.
        task: the column's name: Task2, or Task1&2 for both tasks of the challenge.

    Returns:
        The two files.

    Raises:
        ConfigError: a column that the challenge does not know.
    """
    if task not in TASKS:
        raise ConfigError(f"--task {task}: must be {' or '.join(TASKS)}")
    table = folder / FILE
    frame = pl.DataFrame({"ID": range(len(predictions)), task: predictions.cpu().numpy()})
    with atomic_path(table) as partial:
        frame.write_csv(partial)
    archive = folder / f"{name}.zip"
    with atomic_path(archive) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.write(table, FILE)
    return [table, archive]
