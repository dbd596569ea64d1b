# SPDX-License-Identifier: Apache-2.0
"""AFN+: the adaptive factorization network beside a multilayer perceptron (AAAI 2020, arXiv 1909.03276)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel
from torch import Tensor, nn

from .layers import LogarithmicTransformation


class AFNPlus(BaseModel):
    """y = sigmoid(w_1 z_afn + w_2 z_dnn + b), z_afn = MLP(LTL(e)), z_dnn = MLP'(e'), e and e' separate embeddings.

    LTL: the logarithmic transformation layer, K products prod_j |e_j|^w_kj.

    Args:
        feature_map: the fields.
        embedding_dim: D, of both embeddings.
        num_logarithmic_neurons: K.
        afn_hidden_units: widths of the MLP over the products.
        dnn_hidden_units: widths of the MLP over the plain embeddings.
        hidden_activations: activations of both.
        net_dropout: dropout after each hidden layer of both.
        batch_norm: batch normalisation before each activation of both; the LTL always has its own.

    Raises:
        ValueError: the fields are not all of one width, or a sequence is not pooled.
    """

    def __init__(
        self,
        feature_map: FeatureMap,
        model_id: str = "AFNPlus",
        gpu: int = -1,
        learning_rate: float = 1e-3,
        embedding_dim: int = 16,
        num_logarithmic_neurons: int = 100,
        afn_hidden_units: Sequence[int] = (400, 400, 400),
        dnn_hidden_units: Sequence[int] = (400, 400, 400),
        hidden_activations: str = "ReLU",
        net_dropout: float = 0.0,
        batch_norm: bool = False,
        **kwargs: Any,
    ):
        super().__init__(feature_map, model_id=model_id, gpu=gpu, **kwargs)
        for field, spec in feature_map.features.items():
            width = spec.get("emb_output_dim") or spec.get("embedding_dim") or embedding_dim
            if spec["type"] != "meta" and width != embedding_dim:
                raise ValueError(
                    f"field '{field}' is {width} wide, every field must be embedding_dim = {embedding_dim}"
                )
            if spec["type"] == "sequence" and not spec.get("feature_encoder"):
                raise ValueError(f"sequence '{field}' needs a feature_encoder that pools it to one vector")
        options = {"output_dim": 1, "dropout_rates": net_dropout, "batch_norm": batch_norm}
        num_fields, K = feature_map.num_fields, num_logarithmic_neurons
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.embedding_layer_dnn = FeatureEmbedding(feature_map, embedding_dim)
        self.ltl = LogarithmicTransformation(num_fields, K)
        self.afn_mlp = MLP_Block(K * embedding_dim, list(afn_hidden_units), hidden_activations, **options)
        self.dnn_mlp = MLP_Block(num_fields * embedding_dim, list(dnn_hidden_units), hidden_activations, **options)
        self.fc = nn.Linear(2, 1)
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        fields = self.get_inputs(inputs)
        products = self.ltl(self.embedding_layer(fields))  # (B, K, D)
        z_afn = self.afn_mlp(products.flatten(1))  # (B, 1)
        z_dnn = self.dnn_mlp(self.embedding_layer_dnn(fields, flatten_emb=True))  # (B, 1)
        logit = self.fc(torch.cat([z_afn, z_dnn], dim=-1))  # (B, 1)
        return {"y_pred": self.output_activation(logit)}
