# SPDX-License-Identifier: Apache-2.0
"""DNN: a multilayer perceptron over the embeddings of all fields (YouTube's network, RecSys 2016, without its first stage)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel
from torch import Tensor


class DNN(BaseModel):
    """y = sigmoid(MLP(e)), e the embeddings of all fields side by side.

    Args:
        feature_map: the fields.
        embedding_dim: D.
        hidden_units: widths of the network.
        hidden_activations: its activations.
        net_dropout: dropout after each hidden layer.
        batch_norm: batch normalisation before each activation.
    """

    def __init__(
        self,
        feature_map: FeatureMap,
        model_id: str = "DNN",
        gpu: int = -1,
        learning_rate: float = 1e-3,
        embedding_dim: int = 16,
        hidden_units: Sequence[int] = (400, 400, 400),
        hidden_activations: str = "ReLU",
        net_dropout: float = 0.0,
        batch_norm: bool = False,
        **kwargs: Any,
    ):
        super().__init__(feature_map, model_id=model_id, gpu=gpu, **kwargs)
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.mlp = MLP_Block(
            feature_map.sum_emb_out_dim(),
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
        x = self.embedding_layer(self.get_inputs(inputs), flatten_emb=True)  # (B, N)
        return {"y_pred": self.output_activation(self.mlp(x))}  # (B, 1)
