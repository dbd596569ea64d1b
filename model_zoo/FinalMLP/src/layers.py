# SPDX-License-Identifier: Apache-2.0
"""Layers of FinalMLP: the gate in front of a stream and the multi-head bilinear fusion behind both.

Shapes: B batch, N width of all embeddings, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import FeatureEmbedding, MLP_Block
from torch import Tensor, nn


class FeatureGate(nn.Module):
    """x * 2 sigmoid(MLP(context)): a soft selection of features, near 1 at first (arXiv 2304.00902).

    Args:
        feature_map: the fields.
        embedding_dim: D of the context.
        context: fields that decide on the gate, with embeddings of their own; empty: one learned vector for all samples.
        hidden_units: widths of the MLP.
        output_dim: N.

    Raises:
        ValueError: `context` names a field that the dataset does not have.
    """

    def __init__(
        self,
        feature_map: FeatureMap,
        embedding_dim: int,
        context: Sequence[str],
        hidden_units: Sequence[int],
        output_dim: int,
    ):
        super().__init__()
        fields = {field: spec for field, spec in feature_map.features.items() if spec["type"] != "meta"}
        for field in context:
            if field not in fields:
                raise ValueError(f"context field '{field}' is not a field of the dataset, it has {', '.join(fields)}")
        self.context: nn.Parameter | None = None
        input_dim = embedding_dim
        if context:
            self.context_embedding = FeatureEmbedding(
                feature_map, embedding_dim, required_feature_columns=list(context)
            )
            specs = [fields[field] for field in context]
            input_dim = sum(s.get("emb_output_dim") or s.get("embedding_dim") or embedding_dim for s in specs)
        else:
            # Not zero: behind a zero vector and zero biases every ReLU, and with it every gradient, is zero.
            self.context = nn.Parameter(torch.randn(1, embedding_dim))
        self.mlp = MLP_Block(input_dim, list(hidden_units), output_dim=output_dim, output_activation="Sigmoid")

    def forward(self, inputs: dict[str, Tensor], x: Tensor) -> Tensor:
        """(B, N) -> (B, N)."""
        context = self.context_embedding(inputs, flatten_emb=True) if self.context is None else self.context
        return x * 2 * self.mlp(context)


class MultiHeadBilinearFusion(nn.Module):
    """z = b + w_1 o_1 + w_2 o_2 + sum_h o_1h W_h o_2h, the streams cut into H parts (arXiv 2304.00902).

    Args:
        input_dim1: width of o_1.
        input_dim2: width of o_2.
        num_heads: H.

    Raises:
        ValueError: `num_heads` does not divide a width.
    """

    def __init__(self, input_dim1: int, input_dim2: int, num_heads: int = 1):
        super().__init__()
        for stream, width in (("mlp1", input_dim1), ("mlp2", input_dim2)):
            if width % num_heads:
                raise ValueError(f"num_heads = {num_heads} does not divide the last layer of {stream}, {width} wide")
        self.num_heads = num_heads
        self.w1 = nn.Linear(input_dim1, 1)
        self.w2 = nn.Linear(input_dim2, 1, bias=False)
        self.w3 = nn.Parameter(torch.empty(num_heads, input_dim1 // num_heads, input_dim2 // num_heads))
        self.init_weights()

    def init_weights(self) -> None:
        """As one linear layer over all products o_1i o_2j: their sum starts of the order of the linear terms."""
        nn.init.normal_(self.w3, std=(2 / (self.w3.numel() + 1)) ** 0.5)

    def forward(self, o1: Tensor, o2: Tensor) -> Tensor:
        """(B, d1), (B, d2) -> (B, 1)."""
        heads1 = o1.unflatten(-1, (self.num_heads, -1)).transpose(0, 1)  # (H, B, d1/H)
        heads2 = o2.unflatten(-1, (self.num_heads, -1)).transpose(0, 1)  # (H, B, d2/H)
        bilinear = (torch.bmm(heads1, self.w3) * heads2).sum((0, 2)).unsqueeze(-1)  # (B, 1)
        return self.w1(o1) + self.w2(o2) + bilinear
