# SPDX-License-Identifier: Apache-2.0
"""Layers of SDCNv3: the multi-head embedding, the shallow (linear) and the deep (exponential) cross network.

Shapes: B batch, F fields, D embedding_dim of one head, N = F*D, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import FeatureEmbedding
from torch import Tensor, nn


class MultiHeadFeatureEmbedding(nn.Module):
    """Embeds every field `num_heads` times and lays each head out as [first halves | second halves].

    The cross network multiplies the first half of its input by a linear map and the second half by the masked map, so
    every field must be present in both: each D-wide embedding is cut in two (arXiv 2407.13349).

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
            if spec["type"] != "meta" and width % (2 * num_heads):
                raise ValueError(
                    f"num_heads = {num_heads} does not divide the embedding of field '{field}' into even parts, "
                    f"its embedding_dim is {width}"
                )
            if spec["type"] != "meta" and width != common:
                raise ValueError(
                    f"field '{field}' is {width} wide, every field must be embedding_dim * num_heads = {common}"
                )
            if spec["type"] == "sequence" and not spec.get("feature_encoder"):
                raise ValueError(f"sequence '{field}' needs a feature_encoder that pools it to one vector")
        self.num_heads = num_heads
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim * num_heads)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Returns (B, H, N)."""
        x = self.embedding_layer(inputs)  # (B, F, H*D)
        x = x.unflatten(-1, (self.num_heads, 2, -1))  # (B, F, H, 2, D/2)
        return x.permute(0, 2, 3, 1, 4).flatten(2)  # (B, H, N)


class CrossNetwork(nn.Module):
    """What both networks share; they differ in the anchor that multiplies the masked map.

        h_i = W_i x_i                                  W_i: N -> N/2, shared by the heads
        c_i = [h_i, h_i * relu(LayerNorm(h_i))]        Self-Mask: half of the rows of a full N x N matrix
        x_(i+1) = anchor_i * (c_i + b_i) + x_i

    h_i is batch-normalised over the batch and all N/2 entries of a head when `batch_norm` is set.

    Args:
        input_dim: N.
        num_cross_layers: L, at least 1.
        num_heads: H.
        layer_norm: normalise h before the mask.
        batch_norm: normalise h, one channel per head.
        net_dropout: dropout of the stream after each layer.
    """

    cross_layer = "self_mask"  # what `step` computes, for ctrbench to do it in fewer passes

    def __init__(
        self,
        input_dim: int,
        num_cross_layers: int,
        num_heads: int = 1,
        layer_norm: bool = True,
        batch_norm: bool = False,
        net_dropout: float = 0.0,
    ):
        super().__init__()
        half = input_dim // 2
        self.w = nn.ModuleList(nn.Linear(input_dim, half, bias=False) for _ in range(num_cross_layers))
        self.b = nn.ParameterList(nn.Parameter(torch.rand(input_dim)) for _ in range(num_cross_layers))
        self.layer_norm = nn.ModuleList(nn.LayerNorm(half) for _ in range(num_cross_layers if layer_norm else 0))
        self.batch_norm = nn.ModuleList(nn.BatchNorm1d(num_heads) for _ in range(num_cross_layers if batch_norm else 0))
        self.dropout = nn.Dropout(net_dropout)

    def cross(self, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The linear map of layer i and its Self-Mask, (B, H, N/2) each."""
        h = self.w[i](x)
        if self.batch_norm:
            h = self.batch_norm[i](h)
        mask = torch.relu(self.layer_norm[i](h) if self.layer_norm else h)
        return h, mask

    def anchor(self, x: Tensor, x0: Tensor) -> Tensor:
        """What multiplies the masked map: x_i in the deep network, x_0 in the shallow one."""
        raise NotImplementedError

    def step(self, i: int, x: Tensor, anchor: Tensor) -> Tensor:
        """x_(i+1) from x_i, (B, H, N)."""
        h, mask = self.cross(i, x)
        return self.dropout(anchor * (torch.cat([h, h * mask], dim=-1) + self.b[i]) + x)

    def cross_all(self, x: Tensor) -> Tensor:
        """x_L from x_0, (B, H, N)."""
        x0 = x
        for i in range(len(self.w)):
            x = self.step(i, x, self.anchor(x, x0))
        return x

    @torch.no_grad()
    def field_interactions(self, num_fields: int) -> list[Tensor]:
        """Per layer, the Frobenius norm of each field-pair block of W_i, (F, F): rows are outputs, columns inputs.

        W_i is cut along the layout of the stream: N/2 outputs are (F, D/2), N inputs are two halves of (F, D/2).
        """
        half_dim = self.w[0].in_features // (2 * num_fields)  # D/2
        blocks = (w.weight.view(num_fields, half_dim, 2, num_fields, half_dim) for w in self.w)
        return [block.square().sum((1, 2, 4)).sqrt() for block in blocks]

    @torch.no_grad()
    def mask_activity(self, x: Tensor, num_fields: int) -> list[Tensor]:
        """Per layer, the share of open Self-Mask entries by sample and field, (B, F) in [0, 1]."""
        activity = []
        x0 = x
        for i in range(len(self.w)):
            _, mask = self.cross(i, x)  # (B, H, N/2)
            activity.append((mask.unflatten(-1, (num_fields, -1)) > 0).float().mean((1, 3)))
            x = self.step(i, x, self.anchor(x, x0))
        return activity


class ExponentialCrossNetwork(CrossNetwork):
    """Deep crossing, anchor x_i: order 2^L after L layers."""

    def __init__(self, input_dim: int, num_cross_layers: int, **options: Any):
        super().__init__(input_dim, num_cross_layers, **options)
        self.dfc = nn.Linear(input_dim, 1)

    def anchor(self, x: Tensor, x0: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, N) -> logit (B, 1), the mean over heads."""
        return self.dfc(self.cross_all(x)).mean(dim=1)


class LinearCrossNetwork(CrossNetwork):
    """Shallow crossing, anchor x_0: order L + 1 after L layers."""

    def __init__(self, input_dim: int, num_cross_layers: int, **options: Any):
        super().__init__(input_dim, num_cross_layers, **options)
        self.sfc = nn.Linear(input_dim, 1)

    def anchor(self, x: Tensor, x0: Tensor) -> Tensor:
        return x0

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, N) -> logit (B, 1), the mean over heads."""
        return self.sfc(self.cross_all(x)).mean(dim=1)
