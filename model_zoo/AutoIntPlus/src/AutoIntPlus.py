# SPDX-License-Identifier: Apache-2.0
"""AutoInt+: self-attention over the fields (AutoInt) with a multilayer perceptron in parallel (arXiv 1810.11921)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel
from torch import Tensor, nn

from .layers import InteractingLayer, check_fields


class AutoIntPlus(BaseModel):
    """y = sigmoid(w [v_1 | ... | v_F] + b + MLP(e)), v the fields after the interacting layers over e.

    Choices: the two logits are added. The attention is the paper's, its dot products not scaled, its residual projected
    and followed by ReLU; no layer norm, no dropout in it and no linear part, none of which the paper's equations have.

    Args:
        feature_map: the fields.
        embedding_dim: D.
        num_attention_layers: interacting layers, at least 1.
        attention_dim: width of one head.
        num_heads: H.
        hidden_units: widths of the MLP.
        hidden_activations: its activations.
        net_dropout: dropout after each of its hidden layers.
        batch_norm: batch normalisation before each of its activations.

    Raises:
        ValueError: a field is not D wide, or is a sequence that is not pooled.

    Source: Song et al., "AutoInt", CIKM 2019, arXiv 1810.11921; AutoInt+ is its joint model.
    """

    def __init__(
        self,
        feature_map: FeatureMap,
        model_id: str = "AutoIntPlus",
        gpu: int = -1,
        learning_rate: float = 1e-3,
        embedding_dim: int = 16,
        num_attention_layers: int = 3,
        attention_dim: int = 32,
        num_heads: int = 2,
        hidden_units: Sequence[int] = (400, 400, 400),
        hidden_activations: str = "ReLU",
        net_dropout: float = 0.0,
        batch_norm: bool = False,
        **kwargs: Any,
    ):
        super().__init__(feature_map, model_id=model_id, gpu=gpu, **kwargs)
        check_fields(feature_map, embedding_dim)
        num_fields = feature_map.get_num_fields()
        widths = [embedding_dim] + [num_heads * attention_dim] * num_attention_layers
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.attention = nn.Sequential(*(InteractingLayer(width, attention_dim, num_heads) for width in widths[:-1]))
        self.fc = nn.Linear(num_fields * widths[-1], 1)
        self.mlp = MLP_Block(
            num_fields * embedding_dim,
            list(hidden_units),
            hidden_activations,
            output_dim=1,
            dropout_rates=net_dropout,
            batch_norm=batch_norm,
        )
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        e = self.embedding_layer(self.get_inputs(inputs))  # (B, F, D)
        v = self.attention(e)  # (B, F, H*A), A attention_dim
        logit = self.fc(v.flatten(1)) + self.mlp(e.flatten(1))  # (B, 1)
        return {"y_pred": self.output_activation(logit)}
