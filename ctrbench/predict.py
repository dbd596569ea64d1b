# SPDX-License-Identifier: Apache-2.0
"""Predictions of a finished run, written as CSV or Parquet in row order."""

from __future__ import annotations

import tempfile
from pathlib import Path

import polars as pl
import torch

from ctrbench.batches import Batches
from ctrbench.config import Experiment
from ctrbench.errors import ConfigError, DataError
from ctrbench.features import FeatureMap, load_feature_map
from ctrbench.files import atomic_path
from ctrbench.preprocess import build_dataset
from ctrbench.run import load_trained, open_batches

FORMATS = (".csv", ".parquet")


def write_predictions(run_dir: Path, output: Path, split: str = "test", data: Path | None = None, gpu: int = -1) -> int:
    """Score a split of the run's dataset, or other raw rows with the same columns.

    Args:
        run_dir: a finished run.
        output: file to write; columns y_pred and, where the rows have them, the label and the group_id.
        split: train, valid or test.
        data: raw rows in the dataset's own format instead of a split. They are encoded with the vocabularies of the
            training split, which is read again for that.
        gpu: where the model runs; -1 is the CPU.

    Returns:
        The number of rows written.

    Raises:
        ConfigError: the output is neither .csv nor .parquet.
        DataError: data or weights that cannot be used.
    """
    if output.suffix not in FORMATS:
        raise ConfigError(f"--output {output}: must end in .csv or .parquet")
    experiment, folder, feature_map, trainer = load_trained(run_dir, gpu)
    if data is None:
        batches = open_batches(experiment, folder, feature_map, split, trainer.device)
    else:
        batches = _encode(experiment, data, feature_map, trainer.device)
    columns = {"y_pred": trainer.predict(batches).cpu().numpy()}
    for name in (*feature_map.labels, *([feature_map.group_id] if feature_map.group_id else [])):
        if name in batches.names:
            columns[name] = batches.column(name).cpu().numpy()
    frame = pl.DataFrame(columns)
    with atomic_path(output) as partial:
        frame.write_csv(partial) if output.suffix == ".csv" else frame.write_parquet(partial)
    return int(frame.height)


def _encode(experiment: Experiment, data: Path, feature_map: FeatureMap, device: torch.device) -> Batches:
    with tempfile.TemporaryDirectory(prefix="ctrbench-") as scratch:
        dataset = experiment.dataset.model_copy(
            update={"data_root": scratch, "valid_data": None, "test_data": str(data.resolve())}
        )
        folder = build_dataset(dataset, root=experiment.root, task=experiment.training.task)
        flat = experiment.flat()
        encoded_map = load_feature_map(folder.feature_map_file, experiment.training.dataset_id, flat)
        if encoded_map.features != feature_map.features:
            raise DataError(
                f"{data}: the training split gives other vocabularies than the run's: run the experiment again"
            )
        size = experiment.training.eval_batch_size or max(experiment.training.batch_size, 1 << 13)
        return Batches.from_file(folder.splits["test"], encoded_map, size, device=device, labels_required=False)
