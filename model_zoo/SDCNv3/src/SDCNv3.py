# SPDX-License-Identifier: Apache-2.0
"""SDCNv3: shallow and deep crossing, fused and trained with Tri-BCE (arXiv 2407.13349 v1; `FCN` in later versions)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.models import BaseModel
from torch import Tensor

from .layers import CrossNetwork, ExponentialCrossNetwork, LinearCrossNetwork, MultiHeadFeatureEmbedding


class SDCNv3(BaseModel):
    """y = sigmoid((z_d + z_s) / 2), z_d from the deep and z_s from the shallow cross network over one embedding.

    Args:
        feature_map: the fields.
        embedding_dim: D, the width of one head's embedding; tables are `num_heads` times as wide.
        num_deep_cross_layers: layers of the exponential network, order 2^L.
        num_shallow_cross_layers: layers of the linear network, order L + 1.
        deep_net_dropout: dropout after each deep layer.
        shallow_net_dropout: dropout after each shallow layer.
        num_heads: H.
        layer_norm: layer normalisation inside the Self-Mask.
        batch_norm: batch normalisation before it (not in the paper, in most of the published runs).

    Raises:
        ValueError: `embedding_dim` is odd, or a field cannot be cut as all others are.
    """

    def __init__(
        self,
        feature_map: FeatureMap,
        model_id: str = "SDCNv3",
        gpu: int = -1,
        learning_rate: float = 1e-3,
        embedding_dim: int = 16,
        num_deep_cross_layers: int = 4,
        num_shallow_cross_layers: int = 4,
        deep_net_dropout: float = 0.1,
        shallow_net_dropout: float = 0.3,
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
        input_dim = feature_map.num_fields * embedding_dim
        shared = {"num_heads": num_heads, "layer_norm": layer_norm, "batch_norm": batch_norm}
        self.embedding_layer = MultiHeadFeatureEmbedding(feature_map, embedding_dim, num_heads)
        self.ECN = ExponentialCrossNetwork(input_dim, num_deep_cross_layers, net_dropout=deep_net_dropout, **shared)
        self.LCN = LinearCrossNetwork(input_dim, num_shallow_cross_layers, net_dropout=shallow_net_dropout, **shared)
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = self.embedding_layer(self.get_inputs(inputs))  # (B, H, N)
        deep, shallow = self.ECN(x), self.LCN(x)  # (B, 1) each
        logits = {"y_pred": (deep + shallow) / 2, "y_d": deep, "y_s": shallow}
        return {name: self.output_activation(logit) for name, logit in logits.items()}

    def add_loss(self, return_dict: dict[str, Tensor], y_true: Tensor) -> Tensor:
        """Tri-BCE: L + w_d L_d + w_s L_s with w = max(0, L_branch - L).

        The released code lets gradients flow through the weights, where the paper treats them as constants; so do we.
        """
        loss, deep, shallow = (
            self.loss_fn(return_dict[name], y_true, reduction="mean") for name in ("y_pred", "y_d", "y_s")
        )
        return loss + deep * torch.relu(deep - loss) + shallow * torch.relu(shallow - loss)

    def field_interactions(self) -> dict[str, Tensor]:
        """Static strength of every field pair by layer, (F, F) each; see `CrossNetwork.field_interactions`."""
        return self._by_layer(lambda network: network.field_interactions(self.feature_map.num_fields))

    def mask_activity(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Share of open Self-Mask entries by layer, (B, F) each, for the samples of a batch."""
        x = self.embedding_layer(self.get_inputs(inputs))  # (B, H, N)
        return self._by_layer(lambda network: network.mask_activity(x, self.feature_map.num_fields))

    def _by_layer(self, describe: Callable[[CrossNetwork], list[Tensor]]) -> dict[str, Tensor]:
        networks = {"deep": self.ECN, "shallow": self.LCN}
        return {f"{kind} layer {i}": v for kind, net in networks.items() for i, v in enumerate(describe(net), 1)}
