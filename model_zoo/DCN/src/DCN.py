# SPDX-License-Identifier: Apache-2.0
"""DCN: a cross network of rank one and a multilayer perceptron side by side (arXiv 1708.05123)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import CrossNet, FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel
from torch import Tensor, nn


class DCN(BaseModel):
    """y = sigmoid(w [x_L | h] + b),  x_(l+1) = x_0 (w_l x_l) + b_l + x_l,  h the last hidden layer of the MLP over x_0.

    x_0 holds the embeddings of all fields side by side. L cross layers reach interactions of order L + 1.

    Args:
        feature_map: the fields.
        embedding_dim: D.
        num_cross_layers: L.
        hidden_units: widths of the MLP.
        hidden_activations: its activations.
        net_dropout: dropout after each of its hidden layers.
        batch_norm: batch normalisation before each of its activations.

    Source: Wang et al., "Deep & Cross Network for Ad Click Predictions", ADKDD 2017, arXiv 1708.05123, equations 3 to 5.
    """

    def __init__(
        self,
        feature_map: FeatureMap,
        model_id: str = "DCN",
        gpu: int = -1,
        learning_rate: float = 1e-3,
        embedding_dim: int = 16,
        num_cross_layers: int = 3,
        hidden_units: Sequence[int] = (400, 400, 400),
        hidden_activations: str = "ReLU",
        net_dropout: float = 0.0,
        batch_norm: bool = False,
        **kwargs: Any,
    ):
        super().__init__(feature_map, model_id=model_id, gpu=gpu, **kwargs)
        input_dim = feature_map.sum_emb_out_dim()
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.cross_net = CrossNet(input_dim, num_cross_layers)
        self.mlp = MLP_Block(
            input_dim,
            list(hidden_units),
            hidden_activations,
            dropout_rates=net_dropout,
            batch_norm=batch_norm,
        )
        self.fc = nn.Linear(input_dim + [input_dim, *hidden_units][-1], 1)
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x_0 = self.embedding_layer(self.get_inputs(inputs), flatten_emb=True)  # (B, N)
        x_L, h = self.cross_net(x_0), self.mlp(x_0)  # (B, N), (B, hidden_units[-1])
        return {"y_pred": self.output_activation(self.fc(torch.cat([x_L, h], dim=-1)))}  # (B, 1)
