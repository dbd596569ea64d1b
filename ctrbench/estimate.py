# SPDX-License-Identifier: Apache-2.0
"""What an experiment will take, told before it is run: parameters, memory and time of an epoch."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from fuxictr.pytorch.torch_utils import get_device, seed_everything
from torch import Tensor, nn

from ctrbench import manifest as manifests
from ctrbench.acceleration import tensors_of
from ctrbench.batches import Batch, Batches, load_items
from ctrbench.columns import draft_feature_map
from ctrbench.config import Experiment
from ctrbench.embedding import embedding_parameters
from ctrbench.errors import ConfigError
from ctrbench.features import ITEM, FeatureMap, load_feature_map
from ctrbench.items import FILE as ITEMS_FILE
from ctrbench.memory import BYTES_PER_PARAMETER, GIB, bytes_per_parameter, check_tables, free_memory
from ctrbench.preprocess import FEATURE_MAP
from ctrbench.schema import TrainingConfig
from ctrbench.storage import stored_width
from ctrbench.trainer import Trainer
from ctrbench.zoo import build_model, load_model_class

BYTES_PER_CELL = 4
# Rows of the batch on which activations are counted.
ACTIVATION_ROWS = 256
# Steps that are timed, after one that is not.
TIMED_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What an experiment will take.

    Attributes:
        parameters: of the model; None while vocabularies are not known, because the dataset is not built.
        num_rows: of the training split; None while the dataset is not built.
        model_bytes: weights, gradients and optimizer state.
        data_bytes: all splits on the device.
        epoch_seconds: time of an epoch's training steps; None where it was not measured.
    """

    parameters: int | None
    num_rows: int | None
    model_bytes: int | None
    data_bytes: int | None
    epoch_seconds: float | None = None


def construct(experiment: Experiment) -> tuple[nn.Module, FeatureMap, bool] | None:
    """The experiment's model on the CPU, for what its constructor objects to.

    Returns:
        The model, its feature map, and whether that is the one of the built dataset rather than a draft. None for ready
        H5 data that is not there, and for a model that reads files of a dataset that is not built.

    Raises:
        ConfigError: the settings and the model do not fit.
    """
    flat, folder = experiment.flat(), experiment.dataset.folder(experiment.root)
    try:
        feature_map, is_built = _feature_map(experiment, folder, flat)
    except ConfigError as error:
        raise ConfigError(f"{experiment.source}.{problem}" for problem in error.problems) from error
    if feature_map is None:
        return None
    check_tables(feature_map, "cpu", experiment.source, BYTES_PER_CELL)
    model_class = load_model_class(experiment.zoo, experiment.training.model)
    params = experiment.constructor_params()
    try:
        return build_model(model_class, feature_map, params, experiment.source), feature_map, is_built
    except ConfigError as error:
        missing = error.__cause__.filename if isinstance(error.__cause__, OSError) else None
        if not is_built and missing and Path(missing).resolve().is_relative_to(folder.resolve()):
            return None  # it reads a file of the dataset
        raise


def estimate(experiment: Experiment, gpu: int | None = None) -> Estimate:
    """What an experiment will take.

    Args:
        experiment: what is to be run.
        gpu: where to time a few steps on random rows; None times nothing.

    Raises:
        ConfigError: the settings and the model do not fit.
    """
    made = construct(experiment)
    if made is None or not made[2]:
        return Estimate(None, None, None, None)
    model, feature_map, _ = made
    manifest = manifests.read(experiment.dataset.folder(experiment.root))
    rows = manifest["num_rows"] if manifest else {}
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    cells = sum(rows.values()) * len(feature_map.labels)
    for spec in feature_map.features.values():
        # What is known of an item lies in its table once.
        is_looked_up = feature_map.item_key is not None and spec.get("source") == ITEM
        holders = feature_map.features[feature_map.item_key]["vocab_size"] if is_looked_up else sum(rows.values())
        cells += holders * (stored_width(spec) or 1)
    seconds = None
    if gpu is not None and "train" in rows:
        batch_size = experiment.training.batch_size
        seconds = _step_seconds(experiment, feature_map, gpu) * math.ceil(rows["train"] / batch_size)
    return Estimate(parameters, rows.get("train"), BYTES_PER_PARAMETER * parameters, BYTES_PER_CELL * cells, seconds)


def _feature_map(experiment: Experiment, folder: Path, flat: dict[str, Any]) -> tuple[FeatureMap | None, bool]:
    manifest = manifests.read(folder)
    settings = manifests.settings_hash(experiment.dataset, experiment.training.task)
    if manifest is None or manifest["settings_hash"] != settings:
        return draft_feature_map(experiment.dataset, folder, flat), False
    feature_map = load_feature_map(folder / FEATURE_MAP, experiment.training.dataset_id, flat)
    if (folder / ITEMS_FILE).exists() and feature_map.item_key is not None:
        feature_map.item_table = load_items(folder / ITEMS_FILE, feature_map, "cpu")
    return feature_map, True


def describe(experiment: Experiment, gpu: int = -1) -> list[str]:
    """The lines that `ctrbench estimate` prints.

    The time is that of a few steps on generated rows. Activations are what the backward pass keeps of a batch of
    `ACTIVATION_ROWS` generated rows, scaled to `batch_size`: kernels need some memory beyond that.

    Raises:
        ConfigError: the settings and the model do not fit, or the embedding tables do not fit the device.
    """
    settings, folder, device = experiment.training, experiment.dataset.folder(experiment.root), get_device(gpu)
    feature_map, is_built = _feature_map(experiment, folder, experiment.flat())
    lines = [
        f"{experiment.expid}: {settings.model} on {settings.dataset_id}, batches of {settings.batch_size:,}, {device}"
    ]
    if feature_map is None:
        return [*lines, f"nothing is known before its data is there: {folder}"]
    check_tables(feature_map, device, experiment.source, bytes_per_parameter(settings.optimizer))
    found = estimate(experiment)
    model, trainer, batch = _generated(experiment, feature_map, gpu)
    parameters = [sum(p.numel() for p in part if p.requires_grad)
                  for part in (model.parameters(), embedding_parameters(model))]  # fmt: skip
    is_known = is_built or all(
        column.vocab_size for column in experiment.dataset.feature_cols if column.type in _TOKENS
    )
    at_least = "" if is_known else f"at least (vocabularies are known when {settings.dataset_id} is built) "
    lines.append(f"parameters: {at_least}{parameters[0]:,}, of them {parameters[1]:,} in embedding tables")
    memory = {
        "weights, gradients and optimizer": bytes_per_parameter(settings.optimizer) * parameters[0],
        "data": found.data_bytes,
        f"activations of a batch (scaled from {ACTIVATION_ROWS} rows)": _activation_bytes(experiment, feature_map, gpu),
    }
    lines += [f"memory: {name}: {_size(count) if count is not None else 'not known'}" for name, count in memory.items()]
    total, free = sum(count or 0 for count in memory.values()), free_memory(device)
    lines.append(f"memory: {_size(total)} in all" + ("" if free is None else f", {_size(free)} are free on {device}"))
    if free is not None and total > free:
        large = settings.device_cache != "stream" and (found.data_bytes or 0) > total / 2
        remedy = "set device_cache: stream" if large else "lower batch_size or embedding_dim"
        lines.append(f"warning: that does not fit: {remedy}")
    seconds = _median_seconds(trainer, batch)
    if found.num_rows is None:
        million = seconds * 1e6 / settings.batch_size
        return [*lines, f"time: {_duration(million)} for a million rows, evaluation apart; {folder} is not built"]
    epoch = seconds * math.ceil(found.num_rows / settings.batch_size)
    most = f"{settings.epochs} epochs at most {_duration(epoch * settings.epochs)}"
    return [*lines, f"time: {_duration(epoch)} for an epoch of {found.num_rows:,} rows, evaluation apart; {most}"]


_TOKENS = ("categorical", "sequence")


def _size(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.2f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _activation_bytes(experiment: Experiment, feature_map: FeatureMap, gpu: int) -> int | None:
    """Bytes that the backward pass of a batch keeps, scaled up from a small one; None where a model's step hides them."""
    rows = min(ACTIVATION_ROWS, experiment.training.batch_size)
    changes = {"batch_size": rows, "compile": False, "cuda_graph": False}
    small = dataclasses.replace(experiment, training=experiment.training.model_copy(update=changes))
    model, trainer, batch = _generated(small, feature_map, gpu)
    owned = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers(), *tensors_of(batch))}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.step(batch)
    return sum(kept.values()) * experiment.training.batch_size // rows if kept else None


def _step_seconds(experiment: Experiment, feature_map: FeatureMap, gpu: int) -> float:
    """Median seconds of a training step on random rows."""
    return _median_seconds(*_generated(experiment, feature_map, gpu)[1:])


def _generated(experiment: Experiment, feature_map: FeatureMap, gpu: int) -> tuple[nn.Module, Trainer, Any]:
    """The model, its trainer and a batch of random rows in the form that it takes."""
    device = get_device(gpu)
    table = getattr(feature_map, "item_table", None)
    if table is not None:
        feature_map.item_table = {name: values.to(device) for name, values in table.items()}
    seed_everything(experiment.training.seed)
    with tempfile.TemporaryDirectory() as unused:
        params = {**experiment.constructor_params(gpu), "model_root": unused}
        model_class = load_model_class(experiment.zoo, experiment.training.model)
        model = build_model(model_class, feature_map, params, experiment.source)
    trainer = Trainer(model, experiment.training, params=params)
    columns = random_batch(feature_map, experiment.training, device)
    stored = {name: columns[name] for name in (*feature_map.split_features, *feature_map.labels)}
    (batch,) = trainer.adapt(Batches(stored, experiment.training.batch_size, device=device))
    model.train()
    return model, trainer, batch


def _median_seconds(trainer: Trainer, batch: Any) -> float:
    """Of a few steps, after one that is not counted."""
    seconds = []
    for _ in range(1 + TIMED_STEPS):
        started = time.perf_counter()
        float(trainer.step(batch))  # waits for the device
        seconds.append(time.perf_counter() - started)
    return sorted(seconds[1:])[TIMED_STEPS // 2]


def random_batch(feature_map: FeatureMap, settings: TrainingConfig, device: torch.device) -> Batch:
    """Random rows of a feature map, (B,) or (B, width) by column, labels of both classes."""
    generator = torch.Generator().manual_seed(settings.seed)
    rows = settings.batch_size
    key = feature_map.item_key
    num_items = feature_map.features[key]["vocab_size"] if key is not None else 2

    def column(spec: dict[str, Any]) -> Tensor:
        width = stored_width(spec)
        shape = (rows,) if width is None else (rows, width)
        if spec["type"] in ("numeric", "embedding"):
            return torch.randn(shape, generator=generator)
        size = spec.get("vocab_size", num_items)
        return torch.randint(1 if size > 2 else 0, size, shape, generator=generator, dtype=torch.int32)

    batch = {name: column(spec) for name, spec in feature_map.features.items()}
    batch.update({label: (torch.arange(rows) % 2).float() for label in feature_map.labels})
    table: dict[str, Tensor] | None = getattr(feature_map, "item_table", None)
    if table is not None and key is not None:
        chosen = batch[key].long()
        batch.update({name: values.cpu()[chosen] for name, values in table.items() if name not in batch})
    return {name: values.to(device) for name, values in batch.items()}
