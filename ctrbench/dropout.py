# SPDX-License-Identifier: Apache-2.0
"""Dropout at a fraction of the cost of torch's on a CPU, with the same distribution.

torch draws one double per element with a Mersenne Twister, in one thread. Here torch's generator only gives a seed, from
which each block of 65,536 elements gets two faster generators (SFC64, started by SplitMix64). An element takes a single
byte of the first: it is kept when the byte lies above 256 p; the one byte in 256 that lies on the edge is decided by 64 bits of
the second, so that the probability is exact to 2^-72. Masks do not depend on the number of threads, nor on whether the
compiled functions of `ctrbench.native` draw them or NumPy.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from ctrbench import native

# Elements of a block: few enough to stay in the cache, and a whole number of 64-bit draws.
BLOCK = 1 << 16
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
    seed = int(torch.randint(2**63 - 1, ()))
    edge = int(p * 256)
    above_edge = int((p * 256 - edge) * 2**64)  # of 2^64: the share of bytes on the edge that are dropped
    if native.library() is None:
        return torch.from_numpy(_numpy_mask(count, seed, edge, above_edge))
    mask = torch.empty(count, dtype=torch.bool)
    native.call("draw_mask", mask, count, seed, edge, above_edge, torch.get_num_threads())
    return mask


def _numpy_mask(count: int, seed: int, edge: int, above_edge: int) -> np.ndarray:
    """What `draw_mask` of masks.c draws."""
    mask = np.empty(count, dtype=bool)
    for number, first in enumerate(range(0, count, BLOCK)):
        state = _split_mix(seed + 0xD1342543DE82EF95 * number)
        of_bytes, of_ties = _generator(state), _generator(state)
        kept = mask[first : first + BLOCK]
        draws = of_bytes.random_raw((len(kept) + 7) // 8).view(np.uint8)[: len(kept)]
        np.greater(draws, edge, out=kept)
        on_edge = np.flatnonzero(draws == edge)
        kept[on_edge] = of_ties.random_raw(len(on_edge)) >= np.uint64(above_edge)
    return mask


def _generator(state: Iterator[int]) -> np.random.SFC64:
    generator = np.random.SFC64(0)
    words = np.array([next(state), next(state), next(state), 1], dtype=np.uint64)
    generator.state = {**generator.state, "state": {"state": words}}
    generator.random_raw(12, output=False)  # until the three seeds have mixed
    return generator


def _split_mix(state: int) -> Iterator[int]:
    """SplitMix64."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        yield z ^ (z >> 31)


def speed_up_dropout(model: nn.Module) -> nn.Module:
    """Replace every plain `nn.Dropout` of `model` by `FastDropout`, in place. Returns `model`."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Dropout and not child.inplace and child.p < 1:
                setattr(module, name, FastDropout(child.p))
    return model
