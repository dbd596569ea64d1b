# SPDX-License-Identifier: Apache-2.0
"""Products with a ragged batch of histories: what is padding costs nothing, and no history is laid out as (B, L, d).

A batch is a sparse (B, M) matrix with one entry per item of a history, M the number of distinct items. Two products are
needed, and each one's gradients are products of the same kind:

    scores        s_p = <q_row(p), e_item(p)>                     for every entry p
    weighted sum  u_b = sum over entries p of row b of a_p e_item(p)

The first is what torch calls the gradient of an embedding bag's weights, the second is an embedding bag.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor


class Pairs(NamedTuple):
    """The entries of the sparse matrix, P of them, sorted by row.

    Attributes:
        rows: the sample of each entry, (P,).
        items: the distinct item of each entry, (P,).
        row_starts: the first entry of each sample, (B,).
        by_item: the order of the entries that sorts them by item, (P,).
        item_starts: the first entry of each item in that order, (M,).
    """

    rows: Tensor
    items: Tensor
    row_starts: Tensor
    by_item: Tensor
    item_starts: Tensor


def distinct_items(target: Tensor, history: Tensor) -> tuple[Tensor, Tensor, Pairs]:
    """What has to be encoded for a batch, each item once.

    Args:
        target: the candidate items, (B,).
        history: item ids padded with 0, (B, L).

    Returns:
        The distinct ids (M,), the position of every target among them (B,), and the entries of the histories.
    """
    rows, slots = history.nonzero(as_tuple=True)  # (P,) each, sorted by row
    ids, positions = torch.cat([target, history[rows, slots]]).unique(return_inverse=True)
    targets, items = positions[: len(target)], positions[len(target) :]
    by_item = items.argsort(stable=True)
    row_starts = _starts(rows, len(target))
    return ids, targets, Pairs(rows, items, row_starts, by_item, _starts(items, len(ids)))


def _starts(groups: Tensor, count: int) -> Tensor:
    sizes = torch.zeros(count, dtype=torch.long, device=groups.device).index_add_(0, groups, torch.ones_like(groups))
    return sizes.cumsum(0) - sizes


def scores(queries: Tensor, items: Tensor, pairs: Pairs) -> Tensor:
    """Inner product of the query (B, d) and the item (M, d) of every entry: (P,)."""
    result: Tensor = _Scores.apply(queries, items, *pairs)
    return result


def weighted_sum(weights: Tensor, items: Tensor, pairs: Pairs) -> Tensor:
    """Sum of each sample's items (M, d), weighted by (P,): (B, d)."""
    result: Tensor = _WeightedSum.apply(weights, items, *pairs)
    return result


def _products(left: Tensor, right: Tensor, pairs: Pairs) -> Tensor:
    if not len(pairs.rows):
        return left.new_zeros(0)
    products: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left.contiguous(), right.contiguous(), pairs.items, pairs.row_starts, pairs.rows, 0, -1
    )
    return products


def _sum_by_row(weights: Tensor, items: Tensor, pairs: Pairs) -> Tensor:
    return functional.embedding_bag(pairs.items, items, pairs.row_starts, mode="sum", per_sample_weights=weights)


def _sum_by_item(weights: Tensor, rows: Tensor, pairs: Pairs) -> Tensor:
    order = pairs.by_item
    return functional.embedding_bag(
        pairs.rows[order], rows, pairs.item_starts, mode="sum", per_sample_weights=weights[order]
    )


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, queries: Tensor, items: Tensor, *pairs: Tensor) -> Tensor:
        context.save_for_backward(queries, items, *pairs)
        return _products(queries, items, Pairs(*pairs))

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        queries, items, *saved = context.saved_tensors
        pairs, gradient = Pairs(*saved), gradient.contiguous()
        return _sum_by_row(gradient, items, pairs), _sum_by_item(gradient, queries, pairs), *[None] * len(pairs)


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, weights: Tensor, items: Tensor, *pairs: Tensor) -> Tensor:
        context.save_for_backward(weights, items, *pairs)
        return _sum_by_row(weights, items, Pairs(*pairs))

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weights, items, *saved = context.saved_tensors
        pairs = Pairs(*saved)
        by_row = gradient.contiguous()
        return _products(by_row, items, pairs), _sum_by_item(weights, by_row, pairs), *[None] * len(pairs)
