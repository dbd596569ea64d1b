# SPDX-License-Identifier: Apache-2.0
"""The gated cross network of GDCN. Shapes: B batch, N width of all embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GatedCrossNetwork(nn.Module):
    """Cross layers whose every output passes an information gate (arXiv 2311.04635).

        c_(l+1) = c_0 * (W_l c_l + b_l) * sigmoid(G_l c_l) + c_l

    Args:
        input_dim: N.
        num_cross_layers: order L + 1 after L layers.
    """

    def __init__(self, input_dim: int, num_cross_layers: int):
        super().__init__()
        self.w = nn.ModuleList(nn.Linear(input_dim, input_dim) for _ in range(num_cross_layers))
        self.gate = nn.ModuleList(nn.Linear(input_dim, input_dim, bias=False) for _ in range(num_cross_layers))

    def forward(self, c0: Tensor) -> Tensor:
        """(B, N) -> (B, N)."""
        c = c0
        for w, gate in zip(self.w, self.gate, strict=True):
            c = c0 * w(c) * torch.sigmoid(gate(c)) + c
        return c
