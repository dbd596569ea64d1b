# SPDX-License-Identifier: Apache-2.0
"""The interacting layer of AutoInt, and what the fields must be for it.

Shapes: B batch, F fields, D embedding_dim, H heads, A attention_dim of one head.
"""

from __future__ import annotations

from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import ScaledDotProductAttention
from torch import Tensor, nn


class InteractingLayer(nn.Module):
    """Multi-head self-attention over the fields with a projected residual (arXiv 1810.11921).

        a^h_mk = softmax over k of <Q^h e_m, K^h e_k>
        u_m = [sum_k a^1_mk V^1 e_k | ... | sum_k a^H_mk V^H e_k]
        output_m = relu(u_m + R e_m)

    Args:
        input_dim: width of one field's vector.
        attention_dim: A.
        num_heads: H; a field's output is H*A wide.
    """

    def __init__(self, input_dim: int, attention_dim: int, num_heads: int):
        super().__init__()
        width = num_heads * attention_dim
        self.num_heads = num_heads
        self.query = nn.Linear(input_dim, width, bias=False)
        self.key = nn.Linear(input_dim, width, bias=False)
        self.value = nn.Linear(input_dim, width, bias=False)
        self.residual = nn.Linear(input_dim, width, bias=False)
        self.attention = ScaledDotProductAttention()

    def forward(self, e: Tensor) -> Tensor:
        """(B, F, input_dim) -> (B, F, H*A)."""
        Q, K, V = (self._heads(projection(e)) for projection in (self.query, self.key, self.value))  # (B, H, F, A)
        u, _ = self.attention(Q, K, V)  # (B, H, F, A)
        return (u.transpose(1, 2).flatten(2) + self.residual(e)).relu()  # (B, F, H*A)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def check_fields(feature_map: FeatureMap, embedding_dim: int) -> None:
    """Refuses a field that cannot attend to the others.

    Raises:
        ValueError: a field is not `embedding_dim` wide, or is a sequence that is not pooled.
    """
    for field, spec in feature_map.features.items():
        width = spec.get("emb_output_dim") or spec.get("embedding_dim") or embedding_dim
        if spec["type"] != "meta" and width != embedding_dim:
            raise ValueError(f"field '{field}' is {width} wide, every field must be embedding_dim = {embedding_dim}")
        if spec["type"] == "sequence" and not spec.get("feature_encoder"):
            raise ValueError(f"sequence '{field}' needs a feature_encoder that pools it to one vector")
