# SPDX-License-Identifier: Apache-2.0
"""The cross layers of DCNv3 and SDCNv3 with one pass over the batch each way, for training on a CPU.

A layer as it is written makes a dozen tensors of the size of its input and keeps most of them for the backward pass: on
MovieLens-1M 80 MB in all, which no cache holds, so that the step waits for memory. Here a layer keeps its input, the
product W x and a byte for each element of the dropout mask. What lies between the matrix products is computed by
`crosslayer.c` in one pass forward and, once more, in one pass backward.

`fuse_cross_layers(model)` finds the networks that say by an attribute `cross_layer` what their `step` computes. Results
equal those of the step as written, to rounding. Where the package was installed without a C compiler, layers run as written.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ctrbench import native
from ctrbench.dropout import FastDropout, draw_mask

# What a network's attribute `cross_layer` says of its `step(i, x, anchor)`, where `anchor` is x if it is not given:
#     h = batch_norm[i](w[i](x)),  mask = relu(layer_norm[i](h)),  dropout(anchor * ([h, h * mask] + b[i]) + x)
SELF_MASK = "self_mask"


def fuse_cross_layers(model: nn.Module) -> nn.Module:
    """Let every such network of `model` take its layers in one pass each way, in place. Returns `model`.

    On a CPU in single precision, in training and in evaluation without gradients. Else, and where torch compiles the model,
    a layer runs as it is written.
    """
    for module in model.modules():
        network: Any = module
        if getattr(network, "cross_layer", None) == SELF_MASK and _is_known(network) and native.library() is not None:
            network.step = _FusedStep(network, network.step)
    return model


@contextlib.contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Run all layers as they are written inside."""
    steps = [(m, m.step) for m in model.modules() if isinstance(vars(m).get("step"), _FusedStep)]
    for network, _ in steps:
        del network.step
    try:
        yield
    finally:
        for network, step in steps:
            network.step = step


def _is_known(network: Any) -> bool:
    """Whether the parts of a network are those that the equations are about."""
    return (
        all(type(norm) is nn.BatchNorm1d and norm.track_running_stats and norm.momentum for norm in network.batch_norm)
        and all(type(norm) is nn.LayerNorm for norm in network.layer_norm)
        and all(
            norm.weight is not None and norm.bias is not None for norm in (*network.batch_norm, *network.layer_norm)
        )
        and all(type(linear) is nn.Linear and linear.bias is None for linear in network.w)
        and type(network.dropout) is FastDropout
    )


class _FusedStep:
    """Takes the place of a network's `step`."""

    def __init__(self, network: Any, plain: Any):
        self._network, self._plain = network, plain

    def __call__(self, i: int, x: Tensor, *anchor: Tensor) -> Tensor:
        network = self._network
        if torch.compiler.is_compiling() or not _is_fit(network, i, x):
            as_written: Tensor = self._plain(i, x, *anchor)
            return as_written
        weight, b = network.w[i].weight, network.b[i]
        batch_norm = network.batch_norm[i] if network.batch_norm else None
        layer_norm = network.layer_norm[i] if network.layer_norm else None
        bn: tuple[Any, Any] = (batch_norm.weight, batch_norm.bias) if batch_norm else (None, None)
        ln: tuple[Any, Any] = (layer_norm.weight, layer_norm.bias) if layer_norm else (None, None)
        eps = layer_norm.eps if layer_norm else 0.0
        other = anchor[0] if anchor and anchor[0] is not x else None
        if not network.training:
            return _cross(x, other, weight, b, *bn, *ln, batch_norm, eps, 0.0)[0]
        x_next: Tensor = _CrossLayer.apply(x, other, weight, b, *bn, *ln, batch_norm, eps, network.dropout.p)
        return x_next


def _is_fit(network: Any, i: int, x: Tensor) -> bool:
    """Whether layer i is to be computed where and as crosslayer.c does it: trained with gradients, or evaluated without."""
    parts = (network, network.dropout, *network.batch_norm[i : i + 1])
    return (
        x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and x.dtype == network.w[i].weight.dtype == torch.float32
        and all(part.training is torch.is_grad_enabled() for part in parts)
    )


class _CrossLayer(torch.autograd.Function):
    """x_(i+1) from x_i (B, H, N), its anchor and the parameters of the layer."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Of the arguments of `_cross`."""
        _, anchor, weight, *_, eps, p = arguments
        x_next, held, rstd = _cross(*arguments)
        ctx.save_for_backward(*held, weight, rstd)
        ctx.has_anchor, ctx.eps, ctx.p = anchor is not None, eps, p
        return x_next

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        *held, weight, rstd = ctx.saved_tensors
        mean, _, _, ln_weight, _, b, x, _, product, _ = held
        layer = ctypes.byref(_layer(held, ctx.eps, ctx.p))
        gradient = gradient.contiguous()
        dx, dproduct = torch.empty_like(x), torch.empty_like(product)
        danchor = torch.empty_like(x) if ctx.has_anchor else None
        parameters = b.new_empty(2 * len(b))
        by_head = torch.empty(x.shape[1], 2, dtype=torch.float64)
        to = native.Gradients(*map(native.address, (dx, danchor, dproduct, parameters, by_head)))
        native.call("cross_backward", layer, gradient, ctypes.byref(to))
        bn_gradients: tuple[Tensor | None, ...] = (None, None)
        if mean is not None:
            of_dh, of_centered = by_head.t().float().contiguous()
            bn_gradients = of_centered * rstd, of_dh
            count = product.numel() // len(mean)
            means = of_dh / count, of_centered * rstd.square() / count
            native.call("cross_finish", layer, *means, dproduct)
        rows = dproduct.flatten(0, 1)  # (B*H, N/2)
        dx.flatten(0, 1).addmm_(rows, weight)
        db, dln_weight, dln_bias = parameters.split([len(b), len(b) // 2, len(b) // 2])
        ln_gradients = (None, None) if ln_weight is None else (dln_weight, dln_bias)
        return dx, danchor, rows.t() @ x.flatten(0, 1), db, *bn_gradients, *ln_gradients, None, None, None


def _cross(
    x: Tensor,
    anchor: Tensor | None,
    weight: Tensor,
    b: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    batch_norm: nn.BatchNorm1d | None,
    eps: float,
    p: float,
) -> tuple[Tensor, tuple[Tensor | None, ...], Tensor | None]:
    """x_(i+1), what `_layer` takes, and the reciprocal standard deviation by head (H,), if there is batch normalisation."""
    x = x.contiguous()
    anchor = x if anchor is None else anchor.contiguous()
    product = x @ weight.t()  # (B, H, N/2)
    mean = rstd = scale = None
    if batch_norm is not None and bn_weight is not None:
        mean, rstd = _statistics(product, batch_norm)
        scale = rstd * bn_weight
    kept = draw_mask(x.numel(), p) if p else None
    held = (mean, scale, bn_bias, ln_weight, ln_bias, b, x, anchor, product, kept)
    x_next = torch.empty_like(x)
    native.call("cross_forward", ctypes.byref(_layer(held, eps, p)), x_next)
    return x_next, held, rstd


def _statistics(product: Tensor, batch_norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation by head, (H,) each: of the batch, which move the running ones, or these."""
    assert batch_norm.running_mean is not None and batch_norm.running_var is not None
    if not batch_norm.training:
        return batch_norm.running_mean, (batch_norm.running_var + batch_norm.eps).rsqrt()
    assert batch_norm.num_batches_tracked is not None and batch_norm.momentum is not None
    batch, heads, half = product.shape
    count = batch * half
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {product.shape}")
    moments = torch.empty(2, heads, dtype=torch.float64)
    native.call("cross_moments", product, batch * heads, half, heads, torch.get_num_threads(), moments)
    mean, variance = moments[0].float(), moments[1]
    batch_norm.num_batches_tracked.add_(1)
    batch_norm.running_mean.lerp_(mean, batch_norm.momentum)
    batch_norm.running_var.lerp_((variance * (count / (count - 1))).float(), batch_norm.momentum)
    return mean, (variance + batch_norm.eps).rsqrt().float()


def _layer(held: Any, eps: float, p: float) -> native.Layer:
    product = held[-2]
    batch, heads, half = product.shape
    threads = torch.get_num_threads()
    return native.Layer(batch * heads, half, heads, threads, eps, 1.0 / (1.0 - p), *map(native.address, held))
