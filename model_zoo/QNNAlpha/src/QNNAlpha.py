# SPDX-License-Identifier: Apache-2.0
"""QNN-alpha: a quadratic network trained to agree with itself under dropout (KDD 2025, arXiv 2505.17999)."""

from __future__ import annotations

from typing import Any

from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import FeatureEmbedding
from fuxictr.pytorch.models import BaseModel
from torch import Tensor

from .layers import QuadraticNetwork


class QNNAlpha(BaseModel):
    """y = sigmoid(QNN(e)), e the embeddings of all fields side by side; see `QuadraticLayer`.

    In training two passes over the same e, with dropout masks of their own, give y_1 and y_2 and y = (y_1 + y_2) / 2.

    Args:
        feature_map: the fields.
        embedding_dim: D.
        num_layers: quadratic layers; the highest interaction order is 2^L.
        num_heads: H.
        num_rows: R, linear maps per entry.
        net_dropout: dropout inside and after each layer; without it both passes are the same.
        batch_norm: batch normalisation before each activation.

    Raises:
        ValueError: with more than one head, `num_heads` does not divide a width or the fields are not all of one width.
    """

    def __init__(
        self,
        feature_map: FeatureMap,
        model_id: str = "QNNAlpha",
        gpu: int = -1,
        learning_rate: float = 1e-3,
        embedding_dim: int = 16,
        num_layers: int = 3,
        num_heads: int = 1,
        num_rows: int = 2,
        net_dropout: float = 0.1,
        batch_norm: bool = False,
        **kwargs: Any,
    ):
        super().__init__(feature_map, model_id=model_id, gpu=gpu, **kwargs)
        if num_heads > 1:
            check_heads(feature_map, embedding_dim, num_heads)
        specs = [spec for spec in feature_map.features.values() if spec["type"] != "meta"]
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.qnn = QuadraticNetwork(
            sum(s.get("emb_output_dim") or s.get("embedding_dim") or embedding_dim for s in specs),
            num_layers,
            net_dropout,
            num_fields=feature_map.num_fields,
            num_heads=num_heads,
            num_rows=num_rows,
            batch_norm=batch_norm,
        )
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        e = self.embedding_layer(self.get_inputs(inputs), flatten_emb=True)  # (B, N)
        if not self.training:
            return {"y_pred": self.output_activation(self.qnn(e))}  # (B, 1)
        y1, y2 = self.output_activation(self.qnn(e)), self.output_activation(self.qnn(e))  # (B, 1) each
        return {"y_pred": (y1 + y2) / 2, "y_1": y1, "y_2": y2}

    def add_loss(self, return_dict: dict[str, Tensor], y_true: Tensor) -> Tensor:
        """Self-ensemble loss: BCE(y, label) + BCE(y_1, y) + BCE(y_2, y), y a constant in the last two."""
        ensemble = return_dict["y_pred"]
        loss = self.loss_fn(ensemble, y_true, reduction="mean")
        if "y_1" in return_dict:
            target = ensemble.detach()
            loss = loss + sum(self.loss_fn(return_dict[name], target, reduction="mean") for name in ("y_1", "y_2"))
        return loss


def check_heads(feature_map: FeatureMap, embedding_dim: int, num_heads: int) -> None:
    """Raises ValueError unless every field is `embedding_dim` wide and `num_heads` divides that."""
    if embedding_dim % num_heads:
        raise ValueError(f"num_heads = {num_heads} does not divide embedding_dim = {embedding_dim}")
    for field, spec in feature_map.features.items():
        width = spec.get("emb_output_dim") or spec.get("embedding_dim") or embedding_dim
        if spec["type"] != "meta" and width != embedding_dim:
            raise ValueError(f"field '{field}' is {width} wide, every field must be embedding_dim = {embedding_dim}")
