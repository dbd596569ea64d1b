# SPDX-License-Identifier: Apache-2.0
"""Dropout at a sixth of the cost of torch's on a CPU, with the same distribution.

torch draws one double per element with a Mersenne Twister. Here torch's generator only seeds a faster one (SFC64), one
64-bit draw serves two elements, and each element keeps its entry when its 32 bits reach p * 2^32: the probability is
exact to 2^-33. The comparison writes the factors, 0 or 1 / (1 - p), that forward and backward multiply with.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

# Elements drawn at a time: few enough to stay in the cache, and below the size from which torch shares an operation
# out to threads, which here would only wait for each other.
BLOCK = (1 << 15) - 2


class FastDropout(nn.Module):
    """`nn.Dropout(p)` by integer comparison; without parameters, so a `state_dict` does not see it.

    Args:
        p: probability of a zero, in [0, 1).
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        return x * draw_factors(x, self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def draw_factors(like: Tensor, p: float) -> Tensor:
    """Factors of the shape and type of `like`, on the CPU: 0 with probability p, else 1 / (1 - p)."""
    # Drawn through torch's global generator, so that whoever saves and restores its state gets the same factors again.
    generator = np.random.SFC64(int(torch.randint(2**63 - 1, ())))
    factors = torch.empty(like.numel(), dtype=like.dtype)
    threshold, scale = round(p * 2**32) - 2**31, 1.0 / (1.0 - p)
    for block in factors.split(BLOCK):
        draws = generator.random_raw((len(block) + 1) // 2)
        bits = torch.from_numpy(draws.view(np.int32)[: len(block)])
        torch.ge(bits, threshold, out=block).mul_(scale)
    return factors.view(like.shape)


def speed_up_dropout(model: nn.Module) -> nn.Module:
    """Replace every plain `nn.Dropout` of `model` by `FastDropout`, in place. Returns `model`."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Dropout and not child.inplace and child.p < 1:
                setattr(module, name, FastDropout(child.p))
    return model
