# SPDX-License-Identifier: Apache-2.0
"""LR: logistic regression over the one-hot encoded fields (Richardson et al., WWW 2007)."""

from __future__ import annotations

from typing import Any

from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import LogisticRegression
from fuxictr.pytorch.models import BaseModel
from torch import Tensor


class LR(BaseModel):
    """y = sigmoid(b + sum_f w_f(x_f)): one weight per id, or per unit of a numeric field.

    The weights are tables of width 1, so `embedding_regularizer` is the L2 penalty on them. A sequence adds the weights
    of its tokens, as a multi-hot encoding does, whatever its `feature_encoder`.

    Args:
        feature_map: the fields.
        embedding_dim: 1, the width of the weight tables; no other value is possible.

    Raises:
        ValueError: `embedding_dim` is not 1, or a field is a given vector, which has no ids to weigh.

    Source: Richardson, Dominowska and Ragno, "Predicting Clicks", WWW 2007.
    """

    def __init__(
        self,
        feature_map: FeatureMap,
        model_id: str = "LR",
        gpu: int = -1,
        learning_rate: float = 1e-3,
        embedding_dim: int = 1,
        **kwargs: Any,
    ):
        super().__init__(feature_map, model_id=model_id, gpu=gpu, **kwargs)
        if embedding_dim != 1:
            raise ValueError(f"embedding_dim must be 1, a weight is a number, got {embedding_dim}")
        for field, spec in feature_map.features.items():
            if spec["type"] == "embedding":
                raise ValueError(f"field '{field}' is of type embedding, it has no ids to weigh one by one")
        self.lr_layer = LogisticRegression(feature_map, use_bias=True)
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        logit = self.lr_layer(self.get_inputs(inputs))  # (B, 1)
        return {"y_pred": self.output_activation(logit)}
