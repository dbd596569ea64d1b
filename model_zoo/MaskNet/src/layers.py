# SPDX-License-Identifier: Apache-2.0
"""Layers of MaskNet: the instance-guided mask, the MaskBlock and the layer normalisation of every field.

Shapes: B batch, F fields, D embedding_dim, N = F*D (the sum of the fields' widths where they differ).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FieldLayerNorm(nn.Module):
    """LN_EMB(e) = [LN(e_1), ..., LN(e_F)], every field with a scale and shift of its own (arXiv 2102.07619).

    Args:
        widths: of the fields, N in all.
    """

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.widths = list(widths)
        self.norm = nn.ModuleList(nn.LayerNorm(width) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N) -> (B, N)."""
        return torch.cat([norm(e) for norm, e in zip(self.norm, x.split(self.widths, dim=-1), strict=True)], dim=-1)


class MaskBlock(nn.Module):
    """Multiplies its input by a mask that all embeddings of the sample decide on (arXiv 2102.07619).

        V_mask = W_2 relu(W_1 e + b_1) + b_2                   e: the plain embeddings; W_1: N -> r*z, W_2: r*z -> z
        y      = Dropout(relu(LayerNorm(W (V_mask * h))))      h: the z-wide input

    Args:
        mask_dim: N.
        input_dim: z.
        output_dim: width of y.
        reduction_ratio: r, above 1 in the paper: the mask's hidden layer is wider than the mask.
        net_dropout: dropout of y.
    """

    def __init__(self, mask_dim: int, input_dim: int, output_dim: int, reduction_ratio: float, net_dropout: float):
        super().__init__()
        hidden_dim = int(input_dim * reduction_ratio)
        self.mask = nn.Sequential(nn.Linear(mask_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, input_dim))
        self.w = nn.Linear(input_dim, output_dim, bias=False)
        self.layer_norm = nn.LayerNorm(output_dim)
        self.dropout = nn.Dropout(net_dropout)

    def forward(self, e: Tensor, h: Tensor) -> Tensor:
        """(B, N), (B, z) -> (B, output_dim)."""
        return self.dropout(torch.relu(self.layer_norm(self.w(self.mask(e) * h))))
