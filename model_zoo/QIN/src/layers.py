# SPDX-License-Identifier: Apache-2.0
"""Layers of QIN: sparse target attention and the quadratic network.

Shapes: B batch, M distinct items of a batch, P history entries of a batch, d item width, R rows of a quadratic layer,
N width of the network's input.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from .ragged import Pairs, scores, weighted_sum


class TargetAttention(nn.Module):
    """Attention of the candidate item over the history, sparse: negative scores are cut to zero, not exponentiated.

        q = W_q t,  k = W_k h,  v = W_v h,  s = <q, k> / sqrt(d_a),  a = relu(s),  o = W_o sum(a v) + t

    With one query per sample, <W_q t, W_k h> = <W_k^T W_q t, h> and sum(a W_v h) = W_v sum(a h): keys and values of the
    history are never formed, and both pairs of matrices are multiplied once per batch.

    Args:
        item_dim: d.
        attention_dim: d_a, the width of queries, keys and values.
        weighting: relu (the paper's), softmax over the history, or mean, which needs neither queries nor keys.
        dropout: of the weights.
        output_bias: whether W_o has a bias.
    """

    def __init__(
        self,
        item_dim: int,
        attention_dim: int,
        weighting: str = "relu",
        dropout: float = 0.0,
        output_bias: bool = False,
    ):
        super().__init__()
        if weighting not in ("relu", "softmax", "mean"):
            raise ValueError(f"attention must be relu, softmax or mean, got {weighting!r}")
        self.weighting = weighting
        if weighting != "mean":
            self.W_q = nn.Linear(item_dim, attention_dim, bias=False)
            self.W_k = nn.Linear(item_dim, attention_dim, bias=False)
        self.W_v = nn.Linear(item_dim, attention_dim, bias=False)
        self.W_o = nn.Linear(attention_dim, item_dim, bias=output_bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, target: Tensor, items: Tensor, pairs: Pairs) -> Tensor:
        """(B, d) from the targets (B, d) and the distinct items (M, d) that the histories' entries name."""
        u = weighted_sum(self.dropout(self.weights(target, items, pairs)), items, pairs)  # (B, d)
        return functional.linear(u, self.W_o.weight @ self.W_v.weight, self.W_o.bias) + target

    def weights(self, target: Tensor, items: Tensor, pairs: Pairs) -> Tensor:
        """The weight a of every history entry, (P,)."""
        if self.weighting == "mean":
            return 1.0 / _per_row(torch.ones_like(pairs.rows, dtype=items.dtype), pairs, len(target))[pairs.rows]
        query = target @ (self.W_q.weight.T @ self.W_k.weight) / math.sqrt(self.W_k.out_features)  # (B, d)
        s = scores(query, items, pairs)
        return torch.relu(s) if self.weighting == "relu" else _softmax(s, pairs, len(target))


def _per_row(values: Tensor, pairs: Pairs, num_rows: int) -> Tensor:
    return values.new_zeros(num_rows).index_add(0, pairs.rows, values)


def _softmax(s: Tensor, pairs: Pairs, num_rows: int) -> Tensor:
    highest = s.new_full((num_rows,), -math.inf).scatter_reduce(0, pairs.rows, s.detach(), "amax")
    exponentials = (s - highest[pairs.rows]).exp()
    return exponentials / _per_row(exponentials, pairs, num_rows)[pairs.rows]


class QuadraticLayer(nn.Module):
    """x * sum over r of Dropout(W_r x + b_r): every entry of the input times linear forms of all of them.

    Without dropout the R rows add up before anything else happens, so that they are one matrix sum_r W_r.

    Args:
        dim: N.
        num_row: R.
        dropout: of each row's output.
    """

    def __init__(self, dim: int, num_row: int, dropout: float = 0.0):
        super().__init__()
        self.num_row = num_row
        self.linear = nn.Sequential(nn.Linear(dim, dim * num_row), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        linear, dropout = self.linear
        if self.training and dropout.p > 0:
            rows = zip(linear.weight.chunk(self.num_row), linear.bias.chunk(self.num_row), strict=True)
            return x * sum(dropout(functional.linear(x, w, b)) for w, b in rows)
        return x * functional.linear(x, *self.folded())

    def folded(self) -> tuple[Tensor, Tensor]:
        """sum_r W_r (N, N) and sum_r b_r (N,)."""
        linear = self.linear[0]
        return linear.weight.unflatten(0, (self.num_row, -1)).sum(0), linear.bias.unflatten(0, (self.num_row, -1)).sum(
            0
        )


class QuadraticNetwork(nn.Module):
    """L times x = x + Dropout(activation(BatchNorm(quadratic(x)))), then one linear output.

    Args:
        dim: N.
        num_layers: L.
        num_row: R.
        dropout: of each row and of each layer's output.
        batch_norm: normalise each layer's product.
        activation: PReLU (one slope a layer, the paper's) or ReLU.
    """

    def __init__(
        self,
        dim: int,
        num_layers: int,
        num_row: int,
        dropout: float = 0.0,
        batch_norm: bool = True,
        activation: str = "PReLU",
    ):
        super().__init__()
        if activation not in ("PReLU", "ReLU"):
            raise ValueError(f"activation must be PReLU or ReLU, got {activation!r}")
        self.layer = nn.ModuleList(QuadraticLayer(dim, num_row, dropout) for _ in range(num_layers))
        self.norm = nn.ModuleList(nn.BatchNorm1d(dim) for _ in range(num_layers if batch_norm else 0))
        self.activation = nn.ModuleList(getattr(nn, activation)() for _ in range(num_layers))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N) -> logit (B, 1)."""
        for i, (layer, activation) in enumerate(zip(self.layer, self.activation, strict=True)):
            q = layer(x)
            if self.norm:
                q = self.norm[i](q)
            x = x + self.dropout(activation(q))
        return self.fc(x)
