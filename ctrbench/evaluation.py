# SPDX-License-Identifier: Apache-2.0
"""Predictions and metrics of any FuxiCTR model, by its own code where it has any.

A model of one output gives `y_pred`; FuxiCTR's models of several tasks give `<label>_pred` for each label, and are
evaluated as `MultiTaskModel` does it: every metric for each task as `<label>_<metric>`, and its mean over the tasks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from fuxictr.pytorch.models import BaseModel, MultiTaskModel
from torch import Tensor

from ctrbench import hooks
from ctrbench.batches import Batches
from ctrbench.errors import ConfigError, DataError
from ctrbench.forms import Form, HistoryTuple, OnHost
from ctrbench.guards import check_predictions
from ctrbench.metrics import evaluate_metrics
from ctrbench.schema import TrainingConfig

# Rows of a large batch on a CPU and on a GPU.
ROWS = {"cpu": 1 << 13, "cuda": 1 << 17}
# Numbers of embedded histories in it, for models that look at every slot.
CELLS = 1 << 27
logger = logging.getLogger(__name__)
Watch = Callable[[Iterable[Any], int, str], Iterator[Any]]


class Evaluator:
    """Runs a model over splits without training it.

    Args:
        model: a `fuxictr` model.
        watch: wraps an iterable of batches to show progress.
    """

    def __init__(self, model: BaseModel, watch: Watch):
        self.model = model
        self.watch = watch
        # As it is now: a loop of the model's own may be given another one.
        self._own_evaluate = model.evaluate if hooks.overrides(model, "evaluate") else None

    @property
    def labels(self) -> list[str]:
        """The labels that an evaluation needs."""
        labels: list[str] = self.model.feature_map.labels
        return labels if isinstance(self.model, MultiTaskModel) else labels[:1]

    def rows(self, settings: TrainingConfig, form: Form) -> int:
        """Rows of a batch without gradients: as many as pay off on the device, unless the configuration says.

        A model that unpacks its batches by itself may do anything with them: it gets them as in training.
        """
        if settings.eval_batch_size is not None:
            return settings.eval_batch_size
        if isinstance(form, HistoryTuple | OnHost) or hooks.overrides(self.model, "get_inputs"):
            return settings.batch_size
        feature_map = self.model.feature_map
        bare = [s for s in feature_map.features.values() if s["type"] == "sequence" and not s.get("feature_encoder")]
        width = getattr(feature_map, "default_emb_dim", None) or 1
        cells = sum(spec["max_len"] * spec.get("embedding_dim", width) for spec in bare)
        large = ROWS[self.model.device.type]
        return max(settings.batch_size, min(large, CELLS // cells) if cells else large)

    def predict(self, batches: Batches) -> dict[str, Tensor]:
        """Predictions (N,) in row order: `y_pred`, or `<label>_pred` for each task.

        Raises:
            ConfigError: the model's own `predict` gives another number of rows.
        """
        if not hooks.overrides(self.model, "predict"):
            return self._run(batches, "Predict")[0]
        with hooks.own_code(self.model, "predict"):
            given = hooks.own_predictions(self.model, self._for_own_code(batches))
        for name, values in given.items():
            if len(values) != batches.num_rows:
                model = type(self.model).__name__
                raise ConfigError(f"{model}: its predict gives {len(values)} {name} for {batches.num_rows} rows")
        return given

    def evaluate(self, batches: Batches, names: Sequence[str]) -> dict[str, float]:
        """Metrics on a split, the mean over tasks under the metric's own name.

        Raises:
            DataError: the split lacks a label.
        """
        labels = self.model.feature_map.labels
        for label in self.labels:
            if label not in batches.names:
                raise DataError(f"the split has no label column '{label}' to evaluate against: use predict")
        if self._own_evaluate is not None:
            with hooks.own_code(self.model, "evaluate"):  # it logs for itself
                figures = self._own_evaluate(self._for_own_code(batches), metrics=list(names))
                return hooks.as_figures(self.model, figures)
        y_pred, y_true, group_id = self._run(batches, "Evaluate", with_labels=True)
        check_predictions(y_pred)
        if list(y_pred) == ["y_pred"]:
            values = self._figures(y_true[0], y_pred["y_pred"], names, group_id)
            logger.info("[Metrics] %s", _line(values))
            return values
        by_task = {}
        for label, truth, scores in zip(labels, y_true, y_pred.values(), strict=True):
            by_task[label] = self._figures(truth, scores, names, group_id)
            logger.info("[Task: %s][Metrics] %s", label, _line(by_task[label]))
        figures = {f"{label}_{name}": value for label, values in by_task.items() for name, value in values.items()}
        means = {name: sum(values[name] for values in by_task.values()) / len(labels) for name in by_task[labels[0]]}
        return figures | means

    def _for_own_code(self, batches: Batches) -> Batches:
        is_on_host = self.model.device.type == "cpu" or isinstance(batches.form, OnHost)
        return batches if is_on_host else batches.in_form(OnHost(batches.form))

    # Not inference mode: a tensor that a model keeps for later may meet a gradient there.
    @torch.no_grad()
    def _run(
        self, batches: Batches, title: str, with_labels: bool = False
    ) -> tuple[dict[str, Tensor], list[Tensor], Tensor | None]:
        """Predictions by name and, if asked for, labels and groups; the model's own `get_...` see each batch once."""
        model, feature_map = self.model, self.model.feature_map
        own_labels = with_labels and hooks.overrides(model, "get_labels")
        group = feature_map.group_id if with_labels else None
        own_group = bool(group) and hooks.overrides(model, "get_group_id")
        model.eval()
        names: list[str] = []
        predictions, labels, groups = [], [], []
        for batch in self.watch(batches, len(batches), title):
            given = model.forward(batch)
            names = names or hooks.output_names(model, given)
            predictions.append([given[name].reshape(-1) for name in names])
            if own_labels:
                labels.append(_listed(model.get_labels(batch)))
            if own_group:
                groups.append([model.get_group_id(batch).reshape(-1)])
        y_pred = dict(zip(names, _joined(predictions), strict=True))
        if not with_labels:
            return y_pred, [], None
        wanted = feature_map.labels if len(names) > 1 else feature_map.labels[:1]
        y_true = _joined(labels) if own_labels else [batches.column(label) for label in wanted]
        group_id = _joined(groups)[0] if own_group else batches.column(group) if group else None
        return y_pred, y_true, group_id

    def _figures(
        self, y_true: Tensor, y_pred: Tensor, names: Sequence[str], group_id: Tensor | None
    ) -> dict[str, float]:
        if hooks.overrides(self.model, "evaluate_metrics"):
            return hooks.own_metrics(self.model, y_true, y_pred, names, group_id)
        group_id = None if group_id is None else group_id.to(y_pred.device)
        return evaluate_metrics(y_true.to(y_pred.device), y_pred, names, group_id)


def _listed(labels: Any) -> list[Tensor]:
    return [x.reshape(-1) for x in (labels if isinstance(labels, list | tuple) else [labels])]


def _joined(parts: list[list[Tensor]]) -> list[Tensor]:
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _line(values: dict[str, float]) -> str:
    return " - ".join(f"{name}: {value:.6f}" for name, value in values.items())
