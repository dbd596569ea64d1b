# SPDX-License-Identifier: Apache-2.0
"""EulerNet: interactions of learned orders in the complex plane (SIGIR 2023, arXiv 2304.10711)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fuxictr.features import FeatureMap
from fuxictr.pytorch.models import BaseModel
from torch import Tensor, nn

from .layers import EulerEmbedding, EulerInteraction


class EulerNet(BaseModel):
    """y = sigmoid(z_re + z_im), z = w r + i w p + b, r + i p the complex features after all Euler layers.

    Every feature starts as mu_j exp(i e_j); a layer makes K products of powers of its inputs, see `EulerInteraction`.

    Args:
        feature_map: the fields.
        embedding_dim: D.
        num_orders: order vectors K of each Euler layer.
        explicit_dropout: dropout of each layer's explicit part.
        implicit_dropout: dropout of each layer's implicit part.
        layer_norm: layer normalisation after each layer.

    Raises:
        ValueError: the fields are not all of one width, a sequence is not pooled, or there is no layer.
    """

    def __init__(
        self,
        feature_map: FeatureMap,
        model_id: str = "EulerNet",
        gpu: int = -1,
        learning_rate: float = 1e-3,
        embedding_dim: int = 16,
        num_orders: Sequence[int] = (30,),
        explicit_dropout: float = 0.0,
        implicit_dropout: float = 0.0,
        layer_norm: bool = True,
        **kwargs: Any,
    ):
        super().__init__(feature_map, model_id=model_id, gpu=gpu, **kwargs)
        if not num_orders:
            raise ValueError("num_orders must name at least one layer")
        self.embedding_layer = EulerEmbedding(feature_map, embedding_dim)
        self.layers = nn.ModuleList(
            EulerInteraction(num_in, num_out, embedding_dim, explicit_dropout, implicit_dropout, layer_norm)
            for num_in, num_out in zip([feature_map.num_fields, *num_orders], num_orders, strict=False)
        )
        self.fc = nn.Linear(num_orders[-1] * embedding_dim, 1)
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        r, p = self.embedding_layer(self.get_inputs(inputs))  # (B, F, D) each
        for layer in self.layers:
            r, p = layer(r, p)  # (B, K, D) each
        logit = self.fc((r + p).flatten(1))  # (B, 1)
        return {"y_pred": self.output_activation(logit)}
