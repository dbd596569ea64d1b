# SPDX-License-Identifier: Apache-2.0
"""FinalMLP: two perceptrons over gated embeddings, fused bilinearly (AAAI 2023, arXiv 2304.00902)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel
from torch import Tensor

from .layers import FeatureGate, MultiHeadBilinearFusion


class FinalMLP(BaseModel):
    """y = sigmoid(b + w_1 o_1 + w_2 o_2 + sum_h o_1h W_h o_2h), o_i = MLP_i(e * 2 sigmoid(Gate_i(x_i))).

    e: the embeddings of all fields; x_i: the context of stream i.

    Args:
        feature_map: the fields.
        embedding_dim: D.
        mlp1_hidden_units: widths of the first stream.
        mlp2_hidden_units: widths of the second stream.
        hidden_activations: activations of both.
        net_dropout: dropout after each hidden layer of both.
        batch_norm: batch normalisation before each activation of both.
        use_feature_gating: without it both streams read e.
        gate_hidden_units: widths of a gate.
        gate1_context: fields that decide on the first gate; empty: one learned vector.
        gate2_context: the same for the second.
        num_heads: H.

    Raises:
        ValueError: `num_heads` does not divide the last widths, a context field does not exist, or no hidden layer.
    """

    def __init__(
        self,
        feature_map: FeatureMap,
        model_id: str = "FinalMLP",
        gpu: int = -1,
        learning_rate: float = 1e-3,
        embedding_dim: int = 16,
        mlp1_hidden_units: Sequence[int] = (400, 400, 400),
        mlp2_hidden_units: Sequence[int] = (400, 400, 400),
        hidden_activations: str = "ReLU",
        net_dropout: float = 0.0,
        batch_norm: bool = False,
        use_feature_gating: bool = True,
        gate_hidden_units: Sequence[int] = (400,),
        gate1_context: Sequence[str] = (),
        gate2_context: Sequence[str] = (),
        num_heads: int = 1,
        **kwargs: Any,
    ):
        super().__init__(feature_map, model_id=model_id, gpu=gpu, **kwargs)
        if not (mlp1_hidden_units and mlp2_hidden_units):
            raise ValueError("mlp1_hidden_units and mlp2_hidden_units must name at least one layer each")
        specs = [spec for spec in feature_map.features.values() if spec["type"] != "meta"]
        input_dim = sum(s.get("emb_output_dim") or s.get("embedding_dim") or embedding_dim for s in specs)
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.use_feature_gating = use_feature_gating
        if use_feature_gating:
            self.gate1 = FeatureGate(feature_map, embedding_dim, gate1_context, gate_hidden_units, input_dim)
            self.gate2 = FeatureGate(feature_map, embedding_dim, gate2_context, gate_hidden_units, input_dim)
        options = {"dropout_rates": net_dropout, "batch_norm": batch_norm}
        self.mlp1 = MLP_Block(input_dim, list(mlp1_hidden_units), hidden_activations, **options)
        self.mlp2 = MLP_Block(input_dim, list(mlp2_hidden_units), hidden_activations, **options)
        self.fusion = MultiHeadBilinearFusion(mlp1_hidden_units[-1], mlp2_hidden_units[-1], num_heads)
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        fields = self.get_inputs(inputs)
        x1 = x2 = self.embedding_layer(fields, flatten_emb=True)  # (B, N)
        if self.use_feature_gating:
            x1, x2 = self.gate1(fields, x1), self.gate2(fields, x2)
        logit = self.fusion(self.mlp1(x1), self.mlp2(x2))  # (B, 1)
        return {"y_pred": self.output_activation(logit)}
