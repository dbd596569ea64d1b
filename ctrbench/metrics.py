# SPDX-License-Identifier: Apache-2.0
"""Exact metrics, computed where the predictions are: sorts and segment sums, no loop over groups.

Nothing is copied from a GPU before the last line of `evaluate_metrics`, which fetches all figures at once. A figure
that is not defined (AUC of one class, a group metric without a usable group, a prediction that is nan) is nan.

On a CPU, AUC and its averages over groups come from one sort of 64-bit keys, which numpy does with vector instructions,
several times as fast as an argsort: group, score and label side by side.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ctrbench.errors import ConfigError, DataError, did_you_mean
from ctrbench.yamlfile import shown

_NDCG = re.compile(r"NDCG(?:@([1-9]\d*)|\(\s*(?:k\s*=\s*)?([1-9]\d*)\s*\))")


def parse_metrics(names: Sequence[str], group_id: str | None = None) -> list[str]:
    """Check metric names before a run spends any time.

    Args:
        names: the `metrics` (or monitored) names of a configuration.
        group_id: the column that identifies a group; the group metrics need one.

    Returns:
        The names, unchanged and in order, each once.

    Raises:
        ConfigError: unknown names, or group metrics without a `group_id`; one line for each.
    """
    problems = []
    for name in dict.fromkeys(names):
        if not _is_known(name):
            problems.append(f"metrics: unknown metric {shown(name)}{_suggestion(name)}; known: {', '.join(_KNOWN)}")
        elif _is_group_metric(name) and group_id is None:
            problems.append(f"metrics: {name} is computed within groups: set group_id to the column that names them")
    if problems:
        raise ConfigError(problems)
    return list(dict.fromkeys(names))


@torch.no_grad()
def evaluate_metrics(
    y_true: Tensor, y_pred: Tensor, metrics: Sequence[str], group_id: Tensor | None = None
) -> dict[str, float]:
    """Compute `metrics` in float64.

    Args:
        y_true: labels, (rows,); 0 or 1 except for MSE and MAE.
        y_pred: predictions, (rows,), on the same device: probabilities for the logloss, any scores for the rankings.
        metrics: names that `parse_metrics` accepts.
        group_id: the group of each row, (rows,), in any order.

    Returns:
        One figure per name, in the order of `metrics`.

    Raises:
        ConfigError: as `parse_metrics`.
        DataError: the tensors differ in length.
    """
    names = parse_metrics(metrics, None if group_id is None else "given")
    lengths = [tuple(t.shape) for t in (y_true, y_pred, group_id) if t is not None]
    if len(set(lengths)) > 1 or y_true.dim() != 1:
        raise DataError(f"metrics: y_true, y_pred and group_id must be 1-D and of one length, got {lengths}")
    if not names:
        return {}
    groups = _Groups(y_true, y_pred, group_id)
    figures = [groups.compute(name) if _is_group_metric(name) else _ROW_METRICS[name](y_true, y_pred) for name in names]
    undefined = y_pred.isnan().any()  # a sort would rank nan highest and give a plausible figure
    values = torch.stack(figures).masked_fill(undefined, torch.nan).tolist()
    return dict(zip(names, values, strict=True))


def auc(y_true: Tensor, y_pred: Tensor) -> Tensor:
    """Area under the ROC curve, ties counted half: a scalar, nan when only one class is present."""
    return _auc_and_size(y_true, y_pred, None)[0][0]


def logloss(y_true: Tensor, y_pred: Tensor) -> Tensor:
    """Mean binary cross entropy; probabilities are kept one float64 epsilon away from 0 and 1, as scikit-learn does."""
    y, eps = y_true.double(), torch.finfo(torch.float64).eps
    p = y_pred.double().clamp(eps, 1 - eps)
    return -torch.where(y > 0, y * p.log(), 0.0).add(torch.where(y < 1, (1 - y) * (1 - p).log(), 0.0)).mean()


def mse(y_true: Tensor, y_pred: Tensor) -> Tensor:
    """Mean squared error."""
    return (y_true.double() - y_pred.double()).square().mean()


def mae(y_true: Tensor, y_pred: Tensor) -> Tensor:
    """Mean absolute error."""
    return (y_true.double() - y_pred.double()).abs().mean()


class _Groups:
    """The group metrics of rows; what several of them need is computed once.

    Takes what `evaluate_metrics` takes.
    """

    def __init__(self, y_true: Tensor, y_pred: Tensor, group_id: Tensor | None):
        self._rows = y_true, y_pred, group_id

    def compute(self, name: str) -> Tensor:
        """The group metric called `name`: a scalar."""
        if name in ("gAUC", "avgAUC"):
            value, size = self._aucs
            weight = size if name == "gAUC" else torch.ones_like(size)
            return _average(value, weight.where(~value.isnan(), 0))
        value = self._segments.mrr() if name == "MRR" else self._segments.ndcg(_ndcg_cutoff(name))
        return _average(value, (self._segments.size > 0).long())

    @functools.cached_property
    def _aucs(self) -> tuple[Tensor, Tensor]:
        return _auc_and_size(*self._rows)

    @functools.cached_property
    def _segments(self) -> _Segments:
        return _Segments(*self._rows)


def _auc_and_size(y_true: Tensor, y_pred: Tensor, group_id: Tensor | None) -> tuple[Tensor, Tensor]:
    """AUC, in float64 and nan where it is not defined, and number of rows of every group, or of all rows: (groups,)."""
    keys = _packed(y_true, y_pred, group_id)
    if keys is not None:
        return _auc_of_keys(keys, group_id is not None)
    segments = _Segments(y_true, y_pred, group_id)
    return segments.auc(), segments.size


# Bits of a score, below those of the group and above that of the label.
_SCORE_BITS = 32


def _packed(y_true: Tensor, y_pred: Tensor, group_id: Tensor | None) -> np.ndarray | None:
    """Keys (rows,) of 64 bits in the order of (group, score, label); None where they do not fit, or on a GPU."""
    if y_pred.device.type != "cpu" or y_pred.dtype != torch.float32 or not y_pred.numel():
        return None
    bits = (y_pred + 0.0).view(torch.int32)  # there is one zero only
    keys = bits.bitwise_xor_((bits >> 31) & 0x7FFFFFFF).long()  # an integer for each float, in the same order
    if group_id is not None:
        low, high = (int(x) for x in group_id.aminmax()) if not group_id.is_floating_point() else (0, 1 << 30)
        if high - low >= 1 << 30:
            return None
        keys += (1 << 31) + ((group_id.long() - low) << _SCORE_BITS)
    return keys.mul_(2).add_(y_true > 0).numpy()


def _auc_of_keys(keys: np.ndarray, has_groups: bool) -> tuple[Tensor, Tensor]:
    """What `_auc_and_size` gives, from `_packed` keys, which are sorted in place.

    Rows of one group and score are a run; with P_j positives it spans the ranks s_j + 1 to e_j, so that twice the sum of
    its positives' midranks is P_j (s_j + e_j + 1). U and AUC are as in `_Segments.auc`.
    """
    keys.sort()
    positives = np.cumsum(keys & 1)
    keys >>= 1
    end = np.append(np.flatnonzero(keys[1:] != keys[:-1]) + 1, len(keys))  # of each run
    start = np.append(0, end[:-1])
    positives = np.diff(positives[end - 1], prepend=0)
    doubled = positives * (start + end + 1)
    first = np.zeros(1, np.int64)  # runs that groups begin with
    if has_groups:
        group = keys[start] >> _SCORE_BITS
        first = np.append(0, np.flatnonzero(group[1:] != group[:-1]) + 1)
    before = start[first]  # rows before each group
    size = np.diff(before, append=len(keys))
    positives = np.add.reduceat(positives, first)
    doubled_u = np.add.reduceat(doubled, first) - positives * (2 * before + positives + 1)
    pairs = 2.0 * torch.from_numpy(positives).double() * torch.from_numpy(size - positives).double()
    return torch.from_numpy(doubled_u).double() / pairs, torch.from_numpy(size)


class _Segments:
    """The rows in order of (group, score), with every sum a scatter into one slot per group.

    The number of groups is known only to the device, so there is a slot per row (one slot when there are no groups);
    the slots after the last group stay empty and every average leaves them out.
    """

    def __init__(self, y_true: Tensor, y_pred: Tensor, group_id: Tensor | None):
        order = torch.argsort(y_pred, stable=True)
        if group_id is not None:
            order = order[torch.argsort(group_id[order], stable=True)]
        self.label, self.score = y_true[order], y_pred[order]
        if group_id is None:
            self.segment, self.slots = torch.zeros_like(order), 1
        else:
            self.segment, self.slots = _change_count(group_id[order]), order.numel()
        self.size = self._sum(torch.ones_like(order))
        self.end = self.size.cumsum(0)  # one past the last row of each segment
        self.positives = self._sum((self.label > 0).long())

    def _sum(self, values: Tensor) -> Tensor:
        if self.slots == 1:  # where threads of a GPU would wait for each other
            return values.sum(0, keepdim=True)
        return values.new_zeros(self.slots).index_add_(0, self.segment, values)

    def auc(self) -> Tensor:
        """AUC per segment from midranks: U = (sum of the positives' ranks) - P (P + 1) / 2, AUC = U / (P Q).

        Ranks are doubled, so that midranks and their sums are exact integers.
        """
        tie = _change_count(self.score, self.segment)
        tied = torch.zeros_like(tie).index_add_(0, tie, torch.ones_like(tie))
        doubled_rank = (2 * tied.cumsum(0) - tied + 1)[tie] - 2 * (self.end - self.size)[self.segment]
        doubled_sum = self._sum(doubled_rank * (self.label > 0))
        positives, negatives = self.positives, self.size - self.positives
        doubled_u = doubled_sum - positives * (positives + 1)
        return doubled_u.double() / (2.0 * positives.double() * negatives.double())  # 0 / 0 = nan for one class

    def mrr(self) -> Tensor:
        """Per segment, the mean of 1 / position over the positives; 0 without any."""
        return _ratio(self._sum(self._gain() / self._position()), self.positives.double())

    def ndcg(self, cutoff: int) -> Tensor:
        """Per segment, sum of 1 / log2(position + 1) over positives in the first `cutoff`, over its best value."""
        position = self._position()
        discount = torch.log2(position + 1).reciprocal().where(position <= cutoff, 0.0)
        ideal = discount * (position <= self.positives[self.segment])
        return _ratio(self._sum(self._gain() * discount), self._sum(ideal))

    def _gain(self) -> Tensor:
        return (self.label > 0).double()

    def _position(self) -> Tensor:
        """1 for the highest score of a segment; of tied rows the later one comes first (ascending, reversed)."""
        row = torch.arange(self.label.numel(), device=self.label.device)
        return (self.end[self.segment] - row).double()


def _change_count(*keys: Tensor) -> Tensor:
    """For sorted rows, how many times any of `keys` has changed so far: 0, 0, 1, 1, 1, 2, ..."""
    changed = torch.zeros(keys[0].numel(), dtype=torch.long, device=keys[0].device)
    for key in keys:
        changed[1:] |= key[1:] != key[:-1]
    return changed.cumsum(0)


def _average(value: Tensor, weight: Tensor) -> Tensor:
    return value.where(weight > 0, 0.0).mul(weight).sum() / weight.sum()


def _ratio(value: Tensor, total: Tensor) -> Tensor:
    return torch.where(total > 0, value / total, 0.0)


_ROW_METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "AUC": auc, "logloss": logloss, "binary_crossentropy": logloss, "MSE": mse, "MAE": mae,
}  # fmt: skip
_GROUP_METRICS = ("gAUC", "avgAUC", "MRR")
_KNOWN = (*_ROW_METRICS, *_GROUP_METRICS, "NDCG@10", "NDCG(k=10)")


def _is_known(name: object) -> bool:
    return isinstance(name, str) and (name in _KNOWN or _NDCG.fullmatch(name) is not None)


def _is_group_metric(name: str) -> bool:
    return name in _GROUP_METRICS or name.startswith("NDCG")


def _ndcg_cutoff(name: str) -> int:
    match = _NDCG.fullmatch(name)
    assert match is not None  # parse_metrics has seen it
    return int(match[1] or match[2])


def _suggestion(name: object) -> str:
    same = [known for known in _KNOWN if known.lower() == str(name).lower()]
    return f" (did you mean '{same[0]}'?)" if same else did_you_mean(name, _KNOWN)
