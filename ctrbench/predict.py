# SPDX-License-Identifier: Apache-2.0
"""Predictions of a finished run, written as CSV or Parquet in row order."""

from __future__ import annotations

import tempfile
from pathlib import Path

import polars as pl

from ctrbench.batches import Batches
from ctrbench.config import Experiment
from ctrbench.errors import ConfigError, DataError
from ctrbench.features import FeatureMap, load_feature_map
from ctrbench.files import atomic_path
from ctrbench.preprocess import DataFolder, build_dataset
from ctrbench.rawdata import resolve_files
from ctrbench.ready_data import is_encoded, shown_format
from ctrbench.run import load_trained, open_batches
from ctrbench.submission import write_submission
from ctrbench.trainer import Trainer

FORMATS = (".csv", ".parquet")


def write_predictions(run_dir: Path, output: Path, split: str = "test", data: Path | None = None, gpu: int = -1) -> int:
    """Score a split of the run's dataset, or other raw rows with the same columns.

    Args:
        run_dir: a finished run.
        output: file to write; columns y_pred (`<label>_pred` for each task of a model of several) and, where the rows
            have them, the labels and the group_id (only ids that are the data's own: numbers that were given to its
            tokens would say nothing).
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
        batches = open_batches(experiment, folder, feature_map, split, trainer)
    else:
        batches = _encode(experiment, data, folder, feature_map, trainer)
    columns = {name: values.cpu().numpy() for name, values in trainer.evaluator.predict(batches).items()}
    for name in (*feature_map.labels, *_own_ids(experiment, feature_map)):
        if name in batches.names:
            columns[name] = batches.column(name).cpu().numpy()
    frame = pl.DataFrame(columns)
    with atomic_path(output) as partial:
        frame.write_csv(partial) if output.suffix == ".csv" else frame.write_parquet(partial)
    return int(frame.height)


def write_challenge_files(
    run_dir: Path, folder: Path, split: str = "test", task: str = "Task2", gpu: int = -1
) -> list[Path]:
    """Score a split of the run's dataset and write `prediction.csv` and its zip, named after the experiment.

    Raises:
        DataError: data or weights that cannot be used.
    """
    experiment, data, feature_map, trainer = load_trained(run_dir, gpu)
    predictions = trainer.predict(open_batches(experiment, data, feature_map, split, trainer))
    return write_submission(predictions, folder, experiment.expid, task)


def _own_ids(experiment: Experiment, feature_map: FeatureMap) -> list[str]:
    """The group_id if it is stored as it stands in the raw data."""
    columns = {column.name: column for column in experiment.dataset.feature_cols}
    column = columns.get(feature_map.group_id or "")
    is_own = column is not None and not (experiment.dataset.rebuild_dataset and column.remap)
    return [column.name] if column is not None and is_own else []


def _encode(
    experiment: Experiment, data: Path, folder: DataFolder, feature_map: FeatureMap, trainer: Trainer
) -> Batches:
    """`data` as the test split of a scratch dataset with the training rows of the run's own."""
    dataset = experiment.dataset
    if is_encoded(dataset, dataset.folder(experiment.root)):
        raise ConfigError(
            f"--data {data}: {dataset.dataset_id} is ready {shown_format(dataset)} data, with no raw rows to fit the encoding on"
        )
    if data.suffix in FORMATS and data.suffix != f".{dataset.data_format}":
        raise ConfigError(f"--data {data}: must be {dataset.data_format}, as the files that the run was trained on")
    if dataset.n_rows is not None:
        raise ConfigError(f"--data {data}: the run has n_rows: {dataset.n_rows}, which would cut these rows too")
    resolve_files(Path.cwd(), str(data), dataset.data_format, "--data")
    # Rows that valid_size and test_size cut out of the training rows must stay out of them.
    cut = sum(folder.num_rows[split] for split in ("valid", "test") if getattr(dataset, f"{split}_size"))
    with tempfile.TemporaryDirectory(prefix="ctrbench-") as scratch:
        files = {"data_root": scratch, "valid_data": None, "test_data": str(data.resolve())}
        dataset = dataset.model_copy(update={**files, "valid_size": cut, "test_size": 0})
        built = build_dataset(dataset, root=experiment.root, task=experiment.training.task)
        flat = experiment.flat()
        encoded_map = load_feature_map(built.feature_map_file, experiment.training.dataset_id, flat)
        if encoded_map.features != feature_map.features:
            raise DataError(
                f"{data}: the training split gives other vocabularies than the run's: run the experiment again"
            )
        batches = Batches.from_file(
            built.splits["test"], encoded_map, trainer.evaluation_rows, device=trainer.device, labels_required=False
        )
        return trainer.adapt(batches)
