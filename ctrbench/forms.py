# SPDX-License-Identifier: Apache-2.0
"""The form of batch that a model takes.

Most models take columns by name. FuxiCTR's models of long histories take what their own data loaders give instead, a
tuple (batch_dict, item_dict, mask); it is made here of the item table, on the device and without a loop over rows.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from fuxictr.pytorch.models import BaseModel
from torch import Tensor

from ctrbench import hooks
from ctrbench.errors import ConfigError, CtrbenchError

if TYPE_CHECKING:
    from ctrbench.batches import Batches

Form = Callable[[dict[str, Tensor]], Any]
logger = logging.getLogger(__name__)
FEW = 8
HISTORY = "item_seq"  # the history's name in FuxiCTR's loader, for datasets that have several
SUPPORTED = (
    "supported batches are {column: tensor} and, for a dataset with item_info and a history of item ids, "
    "(batch_dict, item_dict, mask)"
)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Columns by name, those of the target item included.

    Attributes:
        items: the item table, its key first; empty for a dataset without one.
        is_wide: ids are int64, as FuxiCTR's loaders give them, for models that index with them.
    """

    items: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    is_wide: bool = False

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.items:
            key, *features = self.items
            rows = batch[key].long()
            batch = batch | {name: self.items[name].index_select(0, rows) for name in features}
        return _wide(batch) if self.is_wide else batch


@dataclasses.dataclass(frozen=True)
class HistoryTuple:
    """(batch_dict, item_dict, mask), as FuxiCTR's loaders of long histories give.

    batch_dict holds the columns but for the history and the target's id, (B, ...). item_dict holds the features of
    [history, target] of every row one below the other, (B*(L+1), ...). mask tells the history's items from padding,
    (B, L).

    Attributes:
        items: the item table, its key first.
        history: the column of item ids, padded with 0 on the left.
        max_len: L, the newest slots that count; None for all.
    """

    items: Mapping[str, Tensor]
    history: str
    max_len: int | None = None

    def __call__(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        key = next(iter(self.items))
        context = {name: values for name, values in batch.items() if name not in (key, self.history)}
        history = batch[self.history][:, -(self.max_len or 0) :]  # (B, L)
        rows = torch.cat([history, batch[key].unsqueeze(1)], dim=1).long().flatten()  # (B*(L+1),)
        item_dict = {name: values.index_select(0, rows) for name, values in self.items.items()}
        return _wide(context), _wide(item_dict), (history > 0).float()


@dataclasses.dataclass(frozen=True)
class OnHost:
    """Another form's batches in the host's memory, where FuxiCTR's are, for code that makes arrays of them."""

    form: Form

    def __call__(self, batch: dict[str, Tensor]) -> Any:
        made = self.form(batch)
        return _on_host(made) if isinstance(made, dict) else tuple(map(_on_host, made))


def _on_host(part: Any) -> Any:
    return {name: x.cpu() for name, x in part.items()} if isinstance(part, dict) else part.cpu()


def _wide(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x if x.is_floating_point() else x.long() for name, x in batch.items()}


class FormFinder:
    """Finds the form of batch that a model takes: the first that its `forward` runs on.

    Args:
        model: any FuxiCTR model.
        max_len: the history's slots in the tuple form; None for all.
        data_loader: the data loader class of the model's folder, which is not run, for messages.
    """

    def __init__(self, model: BaseModel, max_len: int | None = None, data_loader: str | None = None):
        self._model = model
        self._max_len = max_len
        self._data_loader = data_loader
        self._found: Form | None = None

    @property
    def found(self) -> Form:
        """The model's form; plain columns while it is not known."""
        return self._found or self._candidates()[0]

    def find(self, split: Batches) -> Form:
        """The form, tried on the first rows of a split the first time: on a few and, failing that, on a whole batch.

        Raises:
            ConfigError: the model runs on none, with what it says of the one that fits best.
        """
        for count in (FEW, split.batch_size):  # a model may need more rows than a few
            if self._found is None:
                rows = split.plain_rows(range(min(count, split.num_rows)))
                failures = self._try(rows)
        if self._found is None:
            raise self._refusal(failures, rows)
        return self._found

    def _try(self, rows: dict[str, Tensor]) -> list[tuple[Form, Exception]]:
        """Take the first form that works; returns why those before it do not."""
        was_training = self._model.training
        self._model.eval()
        failures: list[tuple[Form, Exception]] = []
        for form in self._candidates():
            try:
                with torch.random.fork_rng(devices=[]), torch.no_grad():
                    given = self._model.forward(form(dict(rows)))
            except CtrbenchError:
                raise
            except Exception as error:
                failures.append((form, error))
                continue
            if not hooks.overrides(self._model, "evaluate"):
                hooks.output_names(self._model, given)  # complains if there is nothing to evaluate
            self._found = form
            self._model.train(was_training)
            self._tell()
            break
        return failures

    def _candidates(self) -> list[Form]:
        forms = self._forms()
        is_on_host = self._model.device.type == "cpu"
        return forms if is_on_host else forms + [OnHost(form) for form in forms]

    def _forms(self) -> list[Form]:
        feature_map = self._model.feature_map
        table: dict[str, Tensor] | None = getattr(feature_map, "item_table", None)
        # A model with the class attribute `reads_item_table = True` looks items up in that table itself.
        if not table or getattr(self._model, "reads_item_table", False):
            return [Columns(), Columns(is_wide=True)]
        columns: list[Form] = [Columns(table), Columns(table, is_wide=True)]
        histories = [n for n, spec in feature_map.features.items() if spec["type"] == "meta" and "max_len" in spec]
        if HISTORY in histories:
            histories = [HISTORY]
        return columns + [HistoryTuple(table, name, self._max_len) for name in histories if len(histories) == 1]

    def _tell(self) -> None:
        if self._data_loader:
            form = "(batch_dict, item_dict, mask)" if isinstance(self._found, HistoryTuple) else "{column: tensor}"
            logger.warning(
                "The folder's own data loader %s is not run: batches %s are made here of the same data",
                self._data_loader,
                form,
            )

    def _refusal(self, failures: Sequence[tuple[Form, Exception]], rows: dict[str, Tensor]) -> ConfigError:
        error = next((e for form, e in failures if self._unpacks(form, rows)), failures[0][1])
        what = (str(error).strip().splitlines() or [""])[0]
        model, dataset_id = type(self._model).__name__, self._model.feature_map.dataset_id
        remedy = "check embedding_dim, feature_encoder and the model's keys against the columns"
        if self._data_loader:
            remedy = f"its folder's own data loader {self._data_loader} is not run: {SUPPORTED}"
        return ConfigError(f"{model} fails on the first rows of {dataset_id}: {type(error).__name__}: {what}: {remedy}")

    def _unpacks(self, form: Form, rows: dict[str, Tensor]) -> bool:
        try:
            with torch.no_grad():
                self._model.get_inputs(form(dict(rows)))
        except Exception:
            return False
        return True
