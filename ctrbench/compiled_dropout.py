# SPDX-License-Identifier: Apache-2.0
"""The masks of `ctrbench.dropout` as an operator that compiled code calls, so that it draws what plain code draws.

A compiler may reorder and merge calls that depend on nothing. All calls therefore claim to write to one tensor, which
keeps their number and their order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctrbench import dropout


@torch.library.custom_op("ctrbench::draw_mask", mutates_args=("calls",))
def draw_mask(calls: Tensor, count: int, p: float) -> Tensor:
    """Booleans (count,), False with probability p; counts its calls in `calls` (1,)."""
    calls.add_(1)
    return dropout.draw_mask(count, p)


@draw_mask.register_fake
def _(calls: Tensor, count: int, p: float) -> Tensor:
    return torch.empty(count, dtype=torch.bool)
