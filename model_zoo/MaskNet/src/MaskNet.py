# SPDX-License-Identifier: Apache-2.0
"""MaskNet: feature-wise multiplication by instance-guided masks (DLP-KDD 2021, arXiv 2102.07619)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel
from torch import Tensor, nn

from .layers import FieldLayerNorm, MaskBlock


class MaskNet(BaseModel):
    """Blocks y_k = relu(LN(W_k (V_mask_k * h_k))) whose mask depends on all embeddings of the sample.

        parallel: h_k = LN_EMB(e) for all k                     y = sigmoid(MLP([y_1, ..., y_K]))
        serial:   h_1 = LN_EMB(e), h_k = y_(k-1) for k > 1      y = sigmoid(w y_K + b)

    Args:
        feature_map: the fields.
        embedding_dim: D.
        structure: `parallel` or `serial`.
        num_blocks: K.
        block_dim: width of y_k.
        reduction_ratio: hidden width of a mask over the width of the mask.
        hidden_units: widths of the MLP; the serial form has none.
        hidden_activations: its activations.
        net_dropout: dropout after each block and each hidden layer.
        batch_norm: batch normalisation before each activation of the MLP.

    Raises:
        ValueError: unknown `structure`.
    """

    def __init__(
        self,
        feature_map: FeatureMap,
        model_id: str = "MaskNet",
        gpu: int = -1,
        learning_rate: float = 1e-3,
        embedding_dim: int = 16,
        structure: str = "parallel",
        num_blocks: int = 3,
        block_dim: int = 128,
        reduction_ratio: float = 2.0,
        hidden_units: Sequence[int] = (400, 400, 400),
        hidden_activations: str = "ReLU",
        net_dropout: float = 0.0,
        batch_norm: bool = False,
        **kwargs: Any,
    ):
        super().__init__(feature_map, model_id=model_id, gpu=gpu, **kwargs)
        if structure not in ("parallel", "serial"):
            raise ValueError(f"structure must be 'parallel' or 'serial', got '{structure}'")
        self.is_parallel = structure == "parallel"
        specs = [spec for spec in feature_map.features.values() if spec["type"] != "meta"]
        widths = [spec.get("emb_output_dim") or spec.get("embedding_dim") or embedding_dim for spec in specs]
        input_dims = [sum(widths)] * num_blocks if self.is_parallel else [sum(widths)] + [block_dim] * (num_blocks - 1)
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.field_norm = FieldLayerNorm(widths)
        self.blocks = nn.ModuleList(
            MaskBlock(sum(widths), input_dim, block_dim, reduction_ratio, net_dropout) for input_dim in input_dims
        )
        self.mlp = MLP_Block(
            block_dim * num_blocks if self.is_parallel else block_dim,
            list(hidden_units) if self.is_parallel else [],
            hidden_activations,
            output_dim=1,
            dropout_rates=net_dropout,
            batch_norm=batch_norm,
        )
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        e = self.embedding_layer(self.get_inputs(inputs), flatten_emb=True)  # (B, N)
        h = self.field_norm(e)  # (B, N)
        if self.is_parallel:
            h = torch.cat([block(e, h) for block in self.blocks], dim=-1)  # (B, K * block_dim)
        else:
            for block in self.blocks:
                h = block(e, h)  # (B, block_dim)
        return {"y_pred": self.output_activation(self.mlp(h))}  # (B, 1)
