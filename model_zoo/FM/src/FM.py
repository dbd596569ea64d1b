# SPDX-License-Identifier: Apache-2.0
"""FM: factorization machine (Rendle, ICDM 2010)."""

from __future__ import annotations

from typing import Any

from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import FactorizationMachine, FeatureEmbedding
from fuxictr.pytorch.models import BaseModel
from torch import Tensor

from .layers import check_fields


class FM(BaseModel):
    """y = sigmoid(b + sum_f w_f + sum_(f<g) <e_f, e_g>), the pairs summed as (|sum_f e_f|^2 - sum_f |e_f|^2) / 2.

    A sequence is one field: its weight w is the sum over its tokens, its e what the `feature_encoder` makes of them, so
    the tokens do not interact with each other.

    Args:
        feature_map: the fields.
        embedding_dim: D, the rank of the interactions.

    Raises:
        ValueError: a field is a given vector, is not D wide, or is a sequence that is not pooled.

    Source: Rendle, "Factorization Machines", ICDM 2010, equation 1 and lemma 3.1.
    """

    def __init__(
        self,
        feature_map: FeatureMap,
        model_id: str = "FM",
        gpu: int = -1,
        learning_rate: float = 1e-3,
        embedding_dim: int = 16,
        **kwargs: Any,
    ):
        super().__init__(feature_map, model_id=model_id, gpu=gpu, **kwargs)
        check_fields(feature_map, embedding_dim)
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.fm = FactorizationMachine(feature_map)
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        X = self.get_inputs(inputs)
        e = self.embedding_layer(X)  # (B, F, D)
        return {"y_pred": self.output_activation(self.fm(X, e))}  # (B, 1)
