# SPDX-License-Identifier: Apache-2.0
"""CoupledAdam against the plain form: penalty in the loss, clip_grad_norm_, torch.optim.Adam."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ctrbench import native, optim
from ctrbench.optim import CoupledAdam


def plain_step(params: list[nn.Parameter], l2: list[float], optimizer: torch.optim.Adam, loss: torch.Tensor) -> float:
    penalty = sum(weight / 2 * p.norm(2) ** 2 for p, weight in zip(params, l2, strict=True))
    optimizer.zero_grad()
    total = loss + penalty
    total.backward()
    nn.utils.clip_grad_norm_(params, 10.0)
    optimizer.step()
    return float(total.detach())


@pytest.mark.parametrize("scale", [1e-3, 100.0], ids=["not_clipped", "clipped"])
@pytest.mark.parametrize("l2", [(0.0, 0.0), (0.3, 0.0), (1e-2, 1e-3)])
def test_equals_the_plain_form(scale: float, l2: tuple[float, float]) -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(50, 4)), nn.Parameter(torch.randn(7))]
    plain = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = CoupledAdam([([ours[0]], l2[0]), ([ours[1]], l2[1])], lr=1e-2, max_norm=10.0)
    adam = torch.optim.Adam(plain, lr=1e-2)
    for _ in range(60):
        factors = [torch.randn_like(p) * scale for p in ours]
        expected = plain_step(plain, list(l2), adam, sum((p * f).sum() for p, f in zip(plain, factors, strict=True)))
        optimizer.zero_grad()
        loss = sum((p * f).sum() for p, f in zip(ours, factors, strict=True))
        loss.backward()
        assert float((loss + optimizer.step()).detach()) == pytest.approx(expected, rel=1e-5, abs=1e-5 * max(1, scale))
    for p, q in zip(ours, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_penalty_moves_parameters_that_the_loss_does_not_touch() -> None:
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = CoupledAdam([([used, unused], 0.1)], lr=1e-2, max_norm=10.0)
    used.sum().backward()
    optimizer.step()
    assert (unused < 1).all()


def test_without_penalty_a_parameter_without_gradient_stays() -> None:
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = CoupledAdam([([used, unused], 0.0)], lr=1e-2, max_norm=10.0)
    used.sum().backward()
    optimizer.step()
    assert torch.equal(unused, torch.ones(3)) and (used < 1).all()


def test_state_dict_continues_exactly() -> None:
    def train(parameter: nn.Parameter, optimizer: CoupledAdam, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            (parameter.sin() * step).sum().backward()
            optimizer.step()

    whole = nn.Parameter(torch.linspace(-1, 1, 9))
    broken = nn.Parameter(whole.detach().clone())
    train(whole, CoupledAdam([([whole], 0.1)], 1e-2, 10.0), range(20))
    first = CoupledAdam([([broken], 0.1)], 1e-2, 10.0)
    train(broken, first, range(8))
    second = CoupledAdam([([broken], 0.1)], 99.0, 10.0)
    second.load_state_dict(first.state_dict())
    train(broken, second, range(8, 20))
    assert torch.equal(whole, broken)


@pytest.mark.parametrize("count", [0, 1, 4096, 3 * 4096 + 5])
def test_sums_of_products_are_those_of_torch(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    g, w = torch.randn(2, count, 1, generator=torch.Generator().manual_seed(3))
    exact = [float((a.double() * b.double()).sum()) for a, b in ((g, g), (g, w), (w, w))]
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append([float(x) for x in optim._products(g, w)])
    torch.set_num_threads(before)
    alone = optim._products(g, None)[0]
    monkeypatch.setattr(native, "library", lambda: None)
    in_torch = [float(x) for x in optim._products(g, w)]
    assert found[0] == found[1] == pytest.approx(exact, rel=1e-5, abs=1e-4) == in_torch
    assert float(alone) == float(found[0][0]) and float(optim._products(g, None)[0]) == in_torch[0]


def test_large_and_small_gradients_are_clipped_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "LARGE", 50)
    params = [nn.Parameter(torch.zeros(n)) for n in (100, 49, 3)]
    optimizer = CoupledAdam([(params, 0.0)], lr=0.1, max_norm=10.0)
    for parameter in params:
        parameter.grad = torch.full_like(parameter, 3.0)
    _, squared_norm = optimizer._penalty_and_squared_norm()
    assert float(squared_norm) == pytest.approx(9.0 * 152)
