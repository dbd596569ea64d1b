# SPDX-License-Identifier: Apache-2.0
"""The quadratic network of QNN-alpha.

Shapes: B batch, F fields, D embedding_dim, N = F*D, H heads, R rows of a quadratic layer.
"""

from __future__ import annotations

from torch import Tensor, nn


class QuadraticLayer(nn.Module):
    """Multi-head Khatri-Rao product with mid-activation: every entry of x times R activated linear maps of x.

        g       = Dropout(relu(BN(W x + b))) as (H, R, N/H)         W: N -> N*R
        x_h     = entries [hD/H, (h+1)D/H) of every field            (N/H)
        x_(i+1) = [x_1 * sum_r g_1r, ..., x_H * sum_r g_Hr] + x

    Args:
        input_dim: N.
        num_fields: F, needed when H > 1.
        num_heads: H.
        num_rows: R.
        net_dropout: dropout of g.
        batch_norm: batch normalisation of g.
    """

    def __init__(
        self, input_dim: int, num_fields: int, num_heads: int, num_rows: int, net_dropout: float, batch_norm: bool
    ):
        super().__init__()
        width = input_dim * num_rows
        self.linear = nn.Sequential(
            nn.Linear(input_dim, width), nn.BatchNorm1d(width) if batch_norm else nn.Identity(), nn.ReLU()
        )
        self.dropout = nn.Dropout(net_dropout)
        self.num_fields, self.num_heads, self.num_rows = num_fields, num_heads, num_rows

    def forward(self, x: Tensor) -> Tensor:
        """(B, N) -> (B, N)."""
        g = self.dropout(self.linear(x)).unflatten(-1, (self.num_heads, self.num_rows, -1))  # (B, H, R, N/H)
        return (self.split_heads(x) * g.sum(dim=2)).flatten(1) + x  # (B, N)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, N) -> (B, H, N/H)."""
        if self.num_heads == 1:
            return x.unsqueeze(1)
        return x.unflatten(-1, (self.num_fields, self.num_heads, -1)).transpose(1, 2).flatten(2)


class QuadraticNetwork(nn.Module):
    """Quadratic layers, each followed by dropout, and a linear output.

    Args:
        input_dim: N.
        num_layers: L; the highest interaction order is 2^L.
        net_dropout: dropout inside and after each layer.
        options: of each `QuadraticLayer`.
    """

    def __init__(self, input_dim: int, num_layers: int, net_dropout: float, **options: int):
        super().__init__()
        self.layer = nn.ModuleList(
            QuadraticLayer(input_dim, net_dropout=net_dropout, **options) for _ in range(num_layers)
        )
        self.dropout = nn.Dropout(net_dropout)
        self.fc = nn.Linear(input_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N) -> logit (B, 1)."""
        for layer in self.layer:
            x = self.dropout(layer(x))
        return self.fc(x)
