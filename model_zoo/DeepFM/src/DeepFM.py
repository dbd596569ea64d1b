# SPDX-License-Identifier: Apache-2.0
"""DeepFM: a factorization machine and a multilayer perceptron over the same embeddings (arXiv 1703.04247)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import FactorizationMachine, FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel
from torch import Tensor

from .layers import check_fields


class DeepFM(BaseModel):
    """y = sigmoid(FM + MLP(e)),  FM = b + sum_f w_f + sum_(f<g) <e_f, e_g>,  e = [e_1 | ... | e_F].

    Args:
        feature_map: the fields.
        embedding_dim: D.
        hidden_units: widths of the MLP.
        hidden_activations: its activations.
        net_dropout: dropout after each hidden layer.
        batch_norm: batch normalisation before each activation (the paper has none).

    Raises:
        ValueError: a field is a given vector, is not D wide, or is a sequence that is not pooled.

    Source: Guo et al., "DeepFM", IJCAI 2017, arXiv 1703.04247, equations 1 to 4.
    """

    def __init__(
        self,
        feature_map: FeatureMap,
        model_id: str = "DeepFM",
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
        check_fields(feature_map, embedding_dim)
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.fm = FactorizationMachine(feature_map)
        self.mlp = MLP_Block(
            feature_map.get_num_fields() * embedding_dim,
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
        X = self.get_inputs(inputs)
        e = self.embedding_layer(X)  # (B, F, D)
        logit = self.fm(X, e) + self.mlp(e.flatten(1))  # (B, 1)
        return {"y_pred": self.output_activation(logit)}
