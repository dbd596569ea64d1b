# SPDX-License-Identifier: Apache-2.0
"""DCNv3: click-through-rate prediction by deep crossing alone (arXiv 2407.13349 v1; `ECN` in later versions)."""

from __future__ import annotations

from typing import Any

from fuxictr.features import FeatureMap
from fuxictr.pytorch.models import BaseModel
from torch import Tensor

from .layers import ExponentialCrossNetwork, MultiHeadFeatureEmbedding


class DCNv3(BaseModel):
    """y = sigmoid(mean over heads of w^T x_L + b), x_L the output of `num_cross_layers` exponential cross layers.

    Args:
        feature_map: the fields.
        embedding_dim: D, the width of one head's embedding; tables are `num_heads` times as wide.
        num_cross_layers: L; the highest interaction order is 2^L.
        net_dropout: dropout after each cross layer.
        num_heads: H.
        layer_norm: layer normalisation inside the Self-Mask.
        batch_norm: batch normalisation before it (not in the paper, in most of the published runs).

    Raises:
        ValueError: `embedding_dim` is odd, or a field cannot be cut as all others are.
    """

    def __init__(
        self,
        feature_map: FeatureMap,
        model_id: str = "DCNv3",
        gpu: int = -1,
        learning_rate: float = 1e-3,
        embedding_dim: int = 16,
        num_cross_layers: int = 4,
        net_dropout: float = 0.1,
        num_heads: int = 1,
        layer_norm: bool = True,
        batch_norm: bool = False,
        embedding_regularizer: float | str | None = None,
        net_regularizer: float | str | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            feature_map,
            model_id=model_id,
            gpu=gpu,
            embedding_regularizer=embedding_regularizer,
            net_regularizer=net_regularizer,
            **kwargs,
        )
        self.embedding_layer = MultiHeadFeatureEmbedding(feature_map, embedding_dim, num_heads)
        self.ECN = ExponentialCrossNetwork(
            input_dim=feature_map.num_fields * embedding_dim,
            num_cross_layers=num_cross_layers,
            num_heads=num_heads,
            layer_norm=layer_norm,
            batch_norm=batch_norm,
            net_dropout=net_dropout,
        )
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = self.embedding_layer(self.get_inputs(inputs))  # (B, H, N)
        return {"y_pred": self.output_activation(self.ECN(x))}  # (B, 1)

    def field_interactions(self) -> dict[str, Tensor]:
        """Static strength of every field pair by layer, (F, F) each; see `ExponentialCrossNetwork.field_interactions`."""
        norms = self.ECN.field_interactions(self.feature_map.num_fields)
        return {f"deep layer {i}": norm for i, norm in enumerate(norms, 1)}

    def mask_activity(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Share of open Self-Mask entries by layer, (B, F) each, for the samples of a batch."""
        x = self.embedding_layer(self.get_inputs(inputs))  # (B, H, N)
        shares = self.ECN.mask_activity(x, self.feature_map.num_fields)
        return {f"deep layer {i}": share for i, share in enumerate(shares, 1)}
