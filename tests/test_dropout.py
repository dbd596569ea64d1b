# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import nn

from ctrbench.dropout import FastDropout, draw_factors, speed_up_dropout


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_share_of_zeros_is_p(p: float) -> None:
    torch.manual_seed(0)
    count = 2_000_001
    share = (draw_factors(torch.empty(count), p) == 0).double().mean().item()
    assert abs(share - p) < 5 * (p * (1 - p) / count) ** 0.5  # five standard errors


def test_entries_are_independent_of_their_neighbours() -> None:
    torch.manual_seed(0)
    mask = draw_factors(torch.empty(1_000_000), 0.5).double()
    for lag in (1, 2, 3):
        assert abs(torch.corrcoef(torch.stack([mask[:-lag], mask[lag:]]))[0, 1].item()) < 5e-3


def test_forward_and_backward_use_one_mask_and_the_scale_of_nn_dropout() -> None:
    torch.manual_seed(0)
    x = torch.ones(64, 33, requires_grad=True)
    y = FastDropout(0.25)(x)
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 1 / 0.75]))
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_is_the_identity_in_evaluation_and_repeats_with_a_seed() -> None:
    dropout, x = FastDropout(0.5), torch.randn(100)
    torch.manual_seed(3)
    first = dropout(x)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), first)
    assert dropout.eval()(x) is x


def test_only_plain_dropout_is_replaced() -> None:
    model = nn.Sequential(nn.Dropout(0.1), nn.AlphaDropout(0.1), nn.Sequential(nn.Dropout(0.2)))
    speed_up_dropout(model)
    assert repr(model[0]) == "FastDropout(p=0.1)" and type(model[1]) is nn.AlphaDropout
    assert isinstance(model[2][0], FastDropout)
