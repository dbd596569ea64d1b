# SPDX-License-Identifier: Apache-2.0
"""FCN, parallel form: linear and exponential cross network, fused and trained with Tri-BCE (arXiv 2407.13349 v8)."""

from __future__ import annotations

from typing import Any

import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.models import BaseModel
from torch import Tensor

from .layers import CrossNetwork, MultiHeadFeatureEmbedding


class FCN(BaseModel):
    """y = sigmoid((z_d + z_s) / 2), z_d from the exponential and z_s from the linear cross network over one embedding.

    The later relative of SDCNv3: the second half of a cross layer is no longer masked, see `CrossNetwork`.

    Args:
        feature_map: the fields.
        embedding_dim: D, the width of one head's embedding; tables are `num_heads` times as wide.
        num_deep_cross_layers: layers of the exponential network, order 2^L.
        num_shallow_cross_layers: layers of the linear network, order L + 1.
        deep_net_dropout: dropout after each exponential layer.
        shallow_net_dropout: dropout after each linear layer.
        num_heads: H.
        layer_norm: layer normalisation of the second half instead of a scale and shift.
        batch_norm: batch normalisation of both halves, one channel per head.

    Raises:
        ValueError: `embedding_dim` is odd, or a field cannot be cut as all others are.
    """

    def __init__(
        self,
        feature_map: FeatureMap,
        model_id: str = "FCN",
        gpu: int = -1,
        learning_rate: float = 1e-3,
        embedding_dim: int = 16,
        num_deep_cross_layers: int = 3,
        num_shallow_cross_layers: int = 3,
        deep_net_dropout: float = 0.0,
        shallow_net_dropout: float = 0.0,
        num_heads: int = 1,
        layer_norm: bool = False,
        batch_norm: bool = False,
        **kwargs: Any,
    ):
        super().__init__(feature_map, model_id=model_id, gpu=gpu, **kwargs)
        input_dim = feature_map.num_fields * embedding_dim
        shared = {"num_heads": num_heads, "layer_norm": layer_norm, "batch_norm": batch_norm}
        self.embedding_layer = MultiHeadFeatureEmbedding(feature_map, embedding_dim, num_heads)
        self.ECN = CrossNetwork(input_dim, num_deep_cross_layers, True, net_dropout=deep_net_dropout, **shared)
        self.LCN = CrossNetwork(input_dim, num_shallow_cross_layers, False, net_dropout=shallow_net_dropout, **shared)
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = self.embedding_layer(self.get_inputs(inputs))  # (B, H, N)
        deep, shallow = self.ECN(x), self.LCN(x)  # (B, 1) each
        logits = {"y_pred": (deep + shallow) / 2, "y_d": deep, "y_s": shallow}
        return {name: self.output_activation(logit) for name, logit in logits.items()}

    def add_loss(self, return_dict: dict[str, Tensor], y_true: Tensor) -> Tensor:
        """Tri-BCE: L + w_d L_d + w_s L_s with w = max(0, L_branch - L), gradients flowing through w as in SDCNv3."""
        loss, deep, shallow = (
            self.loss_fn(return_dict[name], y_true, reduction="mean") for name in ("y_pred", "y_d", "y_s")
        )
        return loss + deep * torch.relu(deep - loss) + shallow * torch.relu(shallow - loss)
