# SPDX-License-Identifier: Apache-2.0
"""The logarithmic transformation layer of AFN. Shapes: B batch, F fields, D embedding_dim, K logarithmic neurons."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LogarithmicTransformation(nn.Module):
    """Products of powers of the fields, with learned exponents (arXiv 1909.03276).

        y_k = BN(exp(sum_j w_kj BN(ln |e_j|))) = BN(prod_j |e_j|^w_kj) but for the inner normalisation

    BN normalises per field inside and per neuron outside, over the batch and D.

    Args:
        num_fields: F.
        num_neurons: K.
        floor: least |e_j| that the logarithm sees.
    """

    def __init__(self, num_fields: int, num_neurons: int, floor: float = 1e-7):
        super().__init__()
        self.floor = floor
        self.w = nn.Parameter(torch.empty(num_neurons, num_fields))
        self.log_norm = nn.BatchNorm1d(num_fields)
        self.exp_norm = nn.BatchNorm1d(num_neurons)
        self.init_weights()

    def init_weights(self) -> None:
        """Exponents near 0: each product starts near 1, whatever the size of the embeddings."""
        nn.init.normal_(self.w, std=0.1)

    def forward(self, e: Tensor) -> Tensor:
        """(B, F, D) -> (B, K, D)."""
        log_e = self.log_norm(torch.log(e.abs().clamp(min=self.floor)))  # (B, F, D)
        return self.exp_norm(torch.exp(torch.matmul(self.w, log_e)))  # (B, K, D)
