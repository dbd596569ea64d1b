# SPDX-License-Identifier: Apache-2.0
"""Adam with coupled L2 and global gradient clipping in one pass over the parameters.

FuxiCTR adds (lambda/2)*||W||^2 over whole tables to the loss, clips the norm of the total gradient and calls Adam: five
sweeps over the parameters and an autograd graph for the norms. With g the gradient of the task loss alone,

    G = g + lambda W,   c = min(1, max_norm / (||G|| + 1e-6)),   W <- Adam(W, c G)

and ||G||^2 = g.g + 2 lambda g.W + lambda^2 W.W, so that one read-only sweep gives both the penalty and c, and one fused
sweep does the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctrbench import native

L2 = "l2"
# Gradients of so many numbers are summed up one by one, smaller ones together.
LARGE = 1 << 18


class CoupledAdam:
    """Adam (Kingma and Ba) on the clipped gradient of `loss + sum over groups of l2/2 * ||W||^2`.

    It has what FuxiCTR's models and trainers use of a `torch.optim.Optimizer`: `param_groups` (with `lr`), `zero_grad`,
    `step`, `state_dict` and `load_state_dict`. Not deriving from it saves the import of the compiler at start-up.

    Args:
        groups: pairs of parameters and their L2 coefficient lambda.
        lr: learning rate.
        max_norm: bound of the global gradient norm, over all groups together.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
    """

    def __init__(
        self,
        groups: Iterable[tuple[Iterable[nn.Parameter], float]],
        lr: float,
        max_norm: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        self.max_norm = max_norm
        self.betas = betas
        self.eps = eps
        self.param_groups: list[dict[str, Any]] = [
            {"params": list(params), L2: float(l2), "lr": lr} for params, l2 in groups
        ]
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> Tensor:
        """Update all parameters that have a gradient, of the loss or of the penalty.

        Returns:
            The penalty, sum of l2/2 * ||W||^2 over the parameters before the update, a scalar on their device.
        """
        for group in self.param_groups:
            if group[L2]:  # the penalty has a gradient even where the loss has none
                for parameter in group["params"]:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
        penalty, squared_norm = self._penalty_and_squared_norm()
        shrink = (self.max_norm / (squared_norm.sqrt() + 1e-6)).clamp(max=1.0)  # c
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._adam(group, params, shrink)
        return penalty

    def _penalty_and_squared_norm(self) -> tuple[Tensor, Tensor]:
        device = next(p.device for group in self.param_groups for p in group["params"])
        penalty = torch.zeros((), device=device)
        squared_norm = torch.zeros((), device=device)
        for group in self.param_groups:
            l2 = group[L2]
            given = [(p, p.grad) for p in group["params"] if p.grad is not None]
            apart = [l2 or g.numel() >= LARGE for _, g in given]
            if small := [g for (_, g), is_apart in zip(given, apart, strict=True) if not is_apart]:
                squared_norm += torch.stack(torch._foreach_norm(small)).square().sum()
            for parameter, g in itertools.compress(given, apart):
                g_g, g_w, w_w = _products(g, parameter if l2 else None)
                squared_norm += g_g
                if l2:
                    penalty += w_w * (l2 / 2)
                    squared_norm += w_w * l2**2 + g_w * (2 * l2)
        # Rounding may take the expanded square below zero when the two terms cancel.
        return penalty, squared_norm.clamp_(min=0.0)

    def _adam(self, group: dict[str, Any], params: list[nn.Parameter], shrink: Tensor) -> None:
        states = [self._state_of(p) for p in params]
        steps = [s["step"] for s in states]
        torch._foreach_add_(steps, 1)
        grads = [p.grad for p in params if p.grad is not None]
        weights: list[Tensor] = list(params)
        l2, weight_decay = group[L2], 0.0
        if l2 and shrink.device.type == "cpu":
            # The kernel adds weight_decay * W after it has divided the gradient by grad_scale: c g + (c lambda) W.
            weight_decay = l2 * float(shrink)
        elif l2:
            # The same without asking the device for c, which would stall it.
            torch._foreach_add_(grads, weights, alpha=l2)
        torch._fused_adam_(
            weights,
            grads,
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            steps,
            lr=group["lr"],
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=weight_decay,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=shrink.reciprocal(),
            found_inf=None,
        )

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        if parameter not in self.state:
            self.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return self.state[parameter]

    def state_dict(self) -> dict[str, Any]:
        """Moments and learning rates, by position of the parameter."""
        params = [p for group in self.param_groups for p in group["params"]]
        return {
            "lr": [group["lr"] for group in self.param_groups],
            "state": {i: self.state[p] for i, p in enumerate(params) if p in self.state},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict` of the same parameters in the same order."""
        params = [p for group in self.param_groups for p in group["params"]]
        for group, lr in zip(self.param_groups, state_dict["lr"], strict=True):
            group["lr"] = lr
        for i, saved in state_dict["state"].items():
            for name, value in saved.items():
                self._state_of(params[i])[name].copy_(value)


def _products(g: Tensor, w: Tensor | None) -> Sequence[Tensor | float]:
    """g.g, g.w and w.w of a gradient and its weights, where these are given, on their device."""
    is_plain = g.device.type == "cpu" and g.dtype == torch.float32 and g.is_contiguous()
    if is_plain and native.library() is not None and (w is None or w.is_contiguous()):
        sums = torch.empty(3, dtype=torch.float64)
        native.call("squared_norms", g, w, g.numel(), torch.get_num_threads(), sums)
        return sums.tolist()
    g = g.flatten()
    if w is None:
        return torch.dot(g, g), 0.0, 0.0
    w = w.flatten()
    return torch.dot(g, g), torch.dot(g, w), torch.dot(w, w)
