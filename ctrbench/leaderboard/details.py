# SPDX-License-Identifier: Apache-2.0
"""A chosen run, looked at closely: calibration, what each field is worth, and which fields work together.

Field importance and interactions need nothing of the model but predictions: a field's values are shuffled among the rows,
which keeps their distribution and cuts what they say of a row (Breiman, Machine Learning 2001, for single fields).
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from torch import Tensor

from ctrbench.batches import Batch
from ctrbench.errors import ConfigError
from ctrbench.leaderboard.collect import read_run
from ctrbench.leaderboard.records import Details
from ctrbench.leaderboard.verify import calibration
from ctrbench.metrics import auc
from ctrbench.run import load_trained, open_batches
from ctrbench.trainer import Trainer

# Rows to look at: every pair of fields is one pass over them.
MAX_ROWS = 20_000
MAX_ROWS_OF_MANY_FIELDS = 5_000
MANY_FIELDS = 20


def look_closely(run_dir: Path, gpu: int = -1) -> Details:
    """The details of a finished run.

    Args:
        run_dir: the run; its weights and data must be here.
        gpu: where the model runs.

    Raises:
        ConfigError: the run has no test labels, or is no binary classification.
        CtrbenchError: it cannot be loaded.
    """
    run = read_run(run_dir)
    if run.metric("test", "AUC") is None:
        raise ConfigError(f"{run_dir}: has no test AUC, so there is nothing to look at closely: choose another run")
    experiment, data, feature_map, trainer = load_trained(run_dir, gpu)
    batches = open_batches(experiment, data, feature_map, "test", trainer)
    label = batches.column(feature_map.labels[0])
    score = trainer.predict(batches)
    fields = [name for name, spec in feature_map.features.items() if spec["type"] != "meta" and name in batches.names]
    most = MAX_ROWS_OF_MANY_FIELDS if len(fields) > MANY_FIELDS else MAX_ROWS
    rows = torch.randperm(batches.num_rows, generator=torch.Generator().manual_seed(0))[:most].sort().values
    batch = batches.rows(rows.tolist())
    value, importance, interactions = _shuffle_fields(trainer, batch, label[rows.to(label.device)], fields)
    layers = {}
    if hasattr(trainer.model, "field_interactions"):
        layers = {name: matrix.cpu().tolist() for name, matrix in trainer.model.field_interactions().items()}
    bins = calibration(label.double().cpu().numpy(), score.double().cpu().numpy())
    return Details(run, "AUC", value, len(rows), tuple(fields), bins, importance, interactions, layers)


@torch.inference_mode()
def _shuffle_fields(
    trainer: Trainer, batch: Batch, label: Tensor, fields: list[str]
) -> tuple[float, list[float], list[list[float]]]:
    generator = torch.Generator().manual_seed(1)
    orders = {name: torch.randperm(len(label), generator=generator).to(label.device) for name in fields}
    trainer.model.eval()

    def lost(*shuffled: str) -> float:
        changed = {**batch, **{name: batch[name][orders[name]] for name in shuffled}}
        return value - float(auc(label, trainer.model.forward(changed)["y_pred"].reshape(-1)))

    value = float(auc(label, trainer.model.forward(batch)["y_pred"].reshape(-1)))
    alone = [lost(name) for name in fields]
    together = [[0.0] * len(fields) for _ in fields]
    for i, j in itertools.combinations(range(len(fields)), 2):
        together[i][j] = together[j][i] = lost(fields[i], fields[j]) - alone[i] - alone[j]
    return value, alone, together
