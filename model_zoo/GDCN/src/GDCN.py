# SPDX-License-Identifier: Apache-2.0
"""GDCN: gated deep and cross network (CIKM 2023, arXiv 2311.04635)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel
from torch import Tensor, nn

from .layers import GatedCrossNetwork


class GDCN(BaseModel):
    """A gated cross network c(e) beside (GDCN-P) or below (GDCN-S) a multilayer perceptron, e the embeddings.

        parallel: y = sigmoid(w [c(e), MLP(e)] + b)
        stacked:  y = sigmoid(w MLP(c(e)) + b)

    Args:
        feature_map: the fields.
        embedding_dim: D.
        structure: `parallel` or `stacked`.
        num_cross_layers: L; the highest interaction order of the cross network is L + 1.
        hidden_units: widths of the MLP.
        hidden_activations: its activations.
        net_dropout: dropout after each of its hidden layers.
        batch_norm: batch normalisation before each of its activations.

    Raises:
        ValueError: unknown `structure`, or no hidden layer.
    """

    def __init__(
        self,
        feature_map: FeatureMap,
        model_id: str = "GDCN",
        gpu: int = -1,
        learning_rate: float = 1e-3,
        embedding_dim: int = 16,
        structure: str = "parallel",
        num_cross_layers: int = 3,
        hidden_units: Sequence[int] = (400, 400, 400),
        hidden_activations: str = "ReLU",
        net_dropout: float = 0.0,
        batch_norm: bool = False,
        **kwargs: Any,
    ):
        super().__init__(feature_map, model_id=model_id, gpu=gpu, **kwargs)
        if structure not in ("parallel", "stacked"):
            raise ValueError(f"structure must be 'parallel' or 'stacked', got '{structure}'")
        if not hidden_units:
            raise ValueError("hidden_units must name at least one layer")
        self.is_parallel = structure == "parallel"
        specs = [spec for spec in feature_map.features.values() if spec["type"] != "meta"]
        input_dim = sum(s.get("emb_output_dim") or s.get("embedding_dim") or embedding_dim for s in specs)
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.cross_network = GatedCrossNetwork(input_dim, num_cross_layers)
        self.mlp = MLP_Block(
            input_dim, list(hidden_units), hidden_activations, dropout_rates=net_dropout, batch_norm=batch_norm
        )
        self.fc = nn.Linear(hidden_units[-1] + (input_dim if self.is_parallel else 0), 1)
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        e = self.embedding_layer(self.get_inputs(inputs), flatten_emb=True)  # (B, N)
        c = self.cross_network(e)  # (B, N)
        h = torch.cat([c, self.mlp(e)], dim=-1) if self.is_parallel else self.mlp(c)
        return {"y_pred": self.output_activation(self.fc(h))}  # (B, 1)
