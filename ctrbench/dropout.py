# SPDX-License-Identifier: Apache-2.0
"""Dropout at a fraction of the cost of torch's on a CPU, with the same distribution.

torch draws one double per element with a Mersenne Twister. Here torch's generator only seeds a faster one (SFC64), and an
element takes a single byte of it: it is kept when the byte lies above 256 p, and the one byte in 256 that lies on the
edge is decided by 64 further bits, so that the probability is exact to 2^-72.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

# Elements drawn at a time: few enough to stay in the cache, and a whole number of 64-bit draws.
BLOCK = 1 << 17
# What the operator of `ctrbench.compiled_dropout` counts its calls in.
CALLS = torch.zeros(1, dtype=torch.int64)


class FastDropout(nn.Module):
    """`nn.Dropout(p)` with masks of `draw_mask`; without parameters, so a `state_dict` does not see it.

    Args:
        p: probability of a zero, in [0, 1).
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        if torch.compiler.is_compiling():
            mask: Tensor = torch.ops.ctrbench.draw_mask(CALLS, x.numel(), self.p)
            return x * (mask.view(x.shape).to(x.dtype) * (1.0 / (1.0 - self.p)))
        return x * draw_factors(x, self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def draw_factors(like: Tensor, p: float) -> Tensor:
    """Factors of the shape and type of `like`, on the CPU: 0 with probability p, else 1 / (1 - p)."""
    mask = draw_mask(like.numel(), p)
    factors = torch.empty(like.numel(), dtype=like.dtype)
    scale = 1.0 / (1.0 - p)
    for block, kept in zip(factors.split(BLOCK), mask.split(BLOCK), strict=True):
        block.copy_(kept.view(torch.uint8)).mul_(scale)  # bytes are converted five times as fast as booleans
    return factors.view(like.shape)


def draw_mask(count: int, p: float) -> Tensor:
    """Booleans (count,), False with probability p."""
    # Drawn through torch's global generator, so that whoever saves and restores its state gets the same mask again.
    generator = np.random.SFC64(int(torch.randint(2**63 - 1, ())))
    edge = int(p * 256)
    above_edge = p * 256 - edge  # a byte on the edge is kept with probability 1 - above_edge
    mask = np.empty(count, dtype=bool)
    for first in range(0, count, BLOCK):
        kept = mask[first : first + BLOCK]
        draws = generator.random_raw((len(kept) + 7) // 8).view(np.uint8)[: len(kept)]
        np.greater(draws, edge, out=kept)
        on_edge = np.flatnonzero(draws == edge)
        kept[on_edge] = generator.random_raw(len(on_edge)) >= np.uint64(above_edge * 2**64)
    return torch.from_numpy(mask)


def speed_up_dropout(model: nn.Module) -> nn.Module:
    """Replace every plain `nn.Dropout` of `model` by `FastDropout`, in place. Returns `model`."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Dropout and not child.inplace and child.p < 1:
                setattr(module, name, FastDropout(child.p))
    return model
