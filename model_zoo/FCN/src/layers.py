# SPDX-License-Identifier: Apache-2.0
"""Layers of FCN: the multi-head embedding, the linear and the exponential cross network.

Shapes: B batch, F fields, D embedding_dim of one head, N = F*D, H heads.
"""

from __future__ import annotations

import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import FeatureEmbedding
from torch import Tensor, nn


class MultiHeadFeatureEmbedding(nn.Module):
    """Embeds every field `num_heads` times and lays each head out as [first halves | second halves], as SDCNv3 does.

    Args:
        feature_map: the fields; one with an `embedding_dim` of its own must keep the common width.
        embedding_dim: D, even.
        num_heads: H; the tables are H*D wide.

    Raises:
        ValueError: `embedding_dim` is odd, a field's own width is not the common one, or a sequence is not pooled.
    """

    def __init__(self, feature_map: FeatureMap, embedding_dim: int, num_heads: int = 1):
        super().__init__()
        if embedding_dim % 2:
            raise ValueError(f"embedding_dim must be even, every embedding is cut in two halves, got {embedding_dim}")
        common = embedding_dim * num_heads
        for field, spec in feature_map.features.items():
            width = spec.get("emb_output_dim") or spec.get("embedding_dim") or common
            if spec["type"] != "meta" and width != common:
                raise ValueError(
                    f"field '{field}' is {width} wide, every field must be embedding_dim * num_heads = {common}"
                )
            if spec["type"] == "sequence" and not spec.get("feature_encoder"):
                raise ValueError(f"sequence '{field}' needs a feature_encoder that pools it to one vector")
        self.num_heads = num_heads
        self.embedding_layer = FeatureEmbedding(feature_map, common)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Returns (B, H, N)."""
        x = self.embedding_layer(inputs)  # (B, F, H*D)
        x = x.unflatten(-1, (self.num_heads, 2, -1))  # (B, F, H, 2, D/2)
        return x.permute(0, 2, 3, 1, 4).flatten(2)  # (B, H, N)


class CrossNetwork(nn.Module):
    """The linear or the exponential cross network; they differ in the anchor that multiplies the aggregated map.

        h_i = W_i x_i                                  W_i: N -> N/2, shared by the heads
        a_i = gamma_i * h_i + beta_i                   or LayerNorm(h_i)
        c_i = BatchNorm([h_i, a_i])                    if batch_norm; one channel per head
        x_(i+1) = anchor_i * (c_i + b_i) + x_i         anchor_i = x_i (exponential) or x_0 (linear)

    Args:
        input_dim: N.
        num_cross_layers: L, at least 1.
        is_exponential: order 2^L after L layers; otherwise L + 1.
        num_heads: H.
        layer_norm: a_i normalises h_i over its N/2 entries first.
        batch_norm: normalise c_i.
        net_dropout: dropout of the stream after each layer.
    """

    def __init__(
        self,
        input_dim: int,
        num_cross_layers: int,
        is_exponential: bool,
        num_heads: int = 1,
        layer_norm: bool = False,
        batch_norm: bool = False,
        net_dropout: float = 0.0,
    ):
        super().__init__()
        half, layers = input_dim // 2, range(num_cross_layers)
        self.is_exponential = is_exponential
        self.w = nn.ModuleList(nn.Linear(input_dim, half, bias=False) for _ in layers)
        self.b = nn.ParameterList(nn.Parameter(torch.rand(input_dim)) for _ in layers)
        self.scale = nn.ModuleList(nn.LayerNorm(half) if layer_norm else Affine(half) for _ in layers)
        self.norm = nn.ModuleList(nn.BatchNorm1d(num_heads) if batch_norm else nn.Identity() for _ in layers)
        self.dropout = nn.Dropout(net_dropout)
        self.fc = nn.Linear(input_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, N) -> logit (B, 1), the mean over heads."""
        x0 = x
        for w, b, scale, norm in zip(self.w, self.b, self.scale, self.norm, strict=True):
            h = w(x)  # (B, H, N/2)
            c = norm(torch.cat([h, scale(h)], dim=-1))  # (B, H, N)
            x = self.dropout((x if self.is_exponential else x0) * (c + b) + x)
        return self.fc(x).mean(dim=1)


class Affine(nn.Module):
    """gamma * x + beta, 1 and 0 at first."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return self.weight * x + self.bias
