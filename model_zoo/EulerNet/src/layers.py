# SPDX-License-Identifier: Apache-2.0
"""Layers of EulerNet: the complex embedding of every field and the Euler interaction layer.

Shapes: B batch, F fields, D embedding_dim, K order vectors of a layer.
"""

from __future__ import annotations

import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import FeatureEmbedding
from torch import Tensor, nn

EPSILON = 1e-8  # least squared modulus: below it the phase counts as 0 and log(modulus) as -9.2


class EulerEmbedding(nn.Module):
    """mu_j * exp(i e_j) of every field j, as its real and imaginary part (arXiv 2304.10711).

    Args:
        feature_map: the fields, all of one width.
        embedding_dim: D.

    Raises:
        ValueError: a field's own width is not `embedding_dim`, or a sequence is not pooled.
    """

    def __init__(self, feature_map: FeatureMap, embedding_dim: int):
        super().__init__()
        for field, spec in feature_map.features.items():
            width = spec.get("emb_output_dim") or spec.get("embedding_dim") or embedding_dim
            if spec["type"] != "meta" and width != embedding_dim:
                raise ValueError(
                    f"field '{field}' is {width} wide, every field must be embedding_dim = {embedding_dim}"
                )
            if spec["type"] == "sequence" and not spec.get("feature_encoder"):
                raise ValueError(f"sequence '{field}' needs a feature_encoder that pools it to one vector")
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.mu = nn.Parameter(torch.ones(feature_map.num_fields, 1))

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns r and p, (B, F, D) each."""
        e = self.embedding_layer(inputs)  # (B, F, D)
        return self.mu * torch.cos(e), self.mu * torch.sin(e)


class EulerInteraction(nn.Module):
    """Products of powers of complex features, which Euler's formula turns into sums (arXiv 2304.10711).

        lambda_j = |r_j + i p_j|, theta_j = arg(r_j + i p_j)
        explicit:  prod_j (r_j + i p_j)^alpha_kj = l_k exp(i psi_k),
                   psi_k = sum_j alpha_kj theta_j + delta_k,  l_k = exp(sum_j alpha_kj log(lambda_j) + delta'_k)
        implicit:  r' = relu(W r + b), p' = relu(W p + b), over all features at once
        r_k = l_k cos(psi_k) + r'_k,  p_k = l_k sin(psi_k) + p'_k

    Args:
        num_features: F of the first layer, K of the layer before afterwards.
        num_orders: K.
        embedding_dim: D.
        explicit_dropout: dropout of the explicit part.
        implicit_dropout: dropout of the implicit part.
        layer_norm: normalise r_k and p_k over D.
    """

    def __init__(
        self,
        num_features: int,
        num_orders: int,
        embedding_dim: int,
        explicit_dropout: float = 0.0,
        implicit_dropout: float = 0.0,
        layer_norm: bool = True,
    ):
        super().__init__()
        self.alpha = nn.Linear(num_features, num_orders, bias=False)  # over the feature axis
        self.delta_phase = nn.Parameter(0.01 * torch.randn(num_orders, embedding_dim))
        self.delta_modulus = nn.Parameter(0.01 * torch.randn(num_orders, embedding_dim))
        self.implicit = nn.Linear(num_features * embedding_dim, num_orders * embedding_dim)
        self.explicit_dropout = nn.Dropout(explicit_dropout)
        self.implicit_dropout = nn.Dropout(implicit_dropout)
        self.norm_r = nn.LayerNorm(embedding_dim) if layer_norm else nn.Identity()
        self.norm_p = nn.LayerNorm(embedding_dim) if layer_norm else nn.Identity()

    def forward(self, r: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F, D) each -> (B, K, D) each."""
        log_modulus, phase = polar(r, p)  # (B, F, D)
        psi = self.over_features(phase) + self.delta_phase  # (B, K, D)
        modulus = torch.exp(self.over_features(log_modulus) + self.delta_modulus)  # (B, K, D)
        r_out = self.explicit_dropout(modulus * torch.cos(psi)) + self.over_all(r)
        p_out = self.explicit_dropout(modulus * torch.sin(psi)) + self.over_all(p)
        return self.norm_r(r_out), self.norm_p(p_out)

    def over_features(self, x: Tensor) -> Tensor:
        """sum_j alpha_kj x_j, (B, F, D) -> (B, K, D)."""
        return torch.matmul(self.alpha.weight, x)

    def over_all(self, x: Tensor) -> Tensor:
        """relu(W x + b), (B, F, D) -> (B, K, D)."""
        implicit = torch.relu(self.implicit(x.flatten(1))).unflatten(-1, self.delta_phase.shape)
        return self.implicit_dropout(implicit)


def polar(r: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """log of the modulus and phase of r + i p; finite, and with finite gradients, at 0 too."""
    square = r.square() + p.square()
    is_zero = square < EPSILON
    log_modulus = 0.5 * torch.log(square.clamp(min=EPSILON))
    phase = torch.atan2(p.masked_fill(is_zero, 0.0), r.masked_fill(is_zero, 1.0))
    return log_modulus, phase
