# SPDX-License-Identifier: Apache-2.0
"""xDeepFM: linear part, compressed interaction network (CIN) and multilayer perceptron (arXiv 1803.05170)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import CompressedInteractionNet, FeatureEmbedding, LogisticRegression, MLP_Block
from fuxictr.pytorch.models import BaseModel
from torch import Tensor

from .layers import check_fields


class xDeepFM(BaseModel):  # noqa: N801, the paper's spelling
    """y = sigmoid(b + sum_f w_f + w_cin p + MLP(e)), p the entries of all CIN layers summed over D.

        X0 = the embeddings (F, D)
        Xk_h = sum_(i,j) Wk_hij (X0_i * X(k-1)_j) + bk_h,  p = [sum_d X1_hd | ... | sum_d XK_hd]

    Choices: the CIN is linear (the identity activation, the paper's best), every feature map goes both to the next
    layer and into p (no split), and a feature map has a bias, as fuxictr's layer does and the paper does not.

    Args:
        feature_map: the fields.
        embedding_dim: D.
        cin_hidden_units: feature maps of each CIN layer; layer k interacts at order k + 1.
        hidden_units: widths of the MLP.
        hidden_activations: its activations.
        net_dropout: dropout after each of its hidden layers.
        batch_norm: batch normalisation before each of its activations.

    Raises:
        ValueError: a field is a given vector, is not D wide, or is a sequence that is not pooled.

    Source: Lian et al., "xDeepFM", KDD 2018, arXiv 1803.05170, section 3.
    """

    def __init__(
        self,
        feature_map: FeatureMap,
        model_id: str = "xDeepFM",
        gpu: int = -1,
        learning_rate: float = 1e-3,
        embedding_dim: int = 16,
        cin_hidden_units: Sequence[int] = (32, 32),
        hidden_units: Sequence[int] = (400, 400, 400),
        hidden_activations: str = "ReLU",
        net_dropout: float = 0.0,
        batch_norm: bool = False,
        **kwargs: Any,
    ):
        super().__init__(feature_map, model_id=model_id, gpu=gpu, **kwargs)
        check_fields(feature_map, embedding_dim)
        num_fields = feature_map.get_num_fields()
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.lr_layer = LogisticRegression(feature_map, use_bias=False)  # the other parts have one
        self.cin = CompressedInteractionNet(num_fields, list(cin_hidden_units), output_dim=1)
        self.mlp = MLP_Block(
            num_fields * embedding_dim,
            list(hidden_units),
            hidden_activations,
            output_dim=1,
            dropout_rates=net_dropout,
            batch_norm=batch_norm,
        )
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        X = self.get_inputs(inputs)
        e = self.embedding_layer(X)  # (B, F, D)
        logit = self.lr_layer(X) + self.cin(e) + self.mlp(e.flatten(1))  # (B, 1)
        return {"y_pred": self.output_activation(logit)}
