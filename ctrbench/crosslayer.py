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
        nothing = [None] * len(network.w)  # looked up once: a list of modules searches by name
        self._layers = list(
            zip(network.w, network.b, network.batch_norm or nothing, network.layer_norm or nothing, strict=True)
        )

    def __call__(self, i: int, x: Tensor, *anchor: Tensor) -> Tensor:
        network, (linear, b, batch_norm, layer_norm) = self._network, self._layers[i]
        weight = linear.weight
        if torch.compiler.is_compiling() or not _is_fit(network, batch_norm, weight, x):
            as_written: Tensor = self._plain(i, x, *anchor)
            return as_written
        bn: tuple[Any, Any] = (batch_norm.weight, batch_norm.bias) if batch_norm else (None, None)
        ln: tuple[Any, Any] = (layer_norm.weight, layer_norm.bias) if layer_norm else (None, None)
        eps = layer_norm.eps if layer_norm else 0.0
        other = anchor[0] if anchor and anchor[0] is not x else None
        if not network.training:
            return _cross(x, other, weight, b, *bn, *ln, batch_norm, eps, 0.0)[0]
        x_next: Tensor = _CrossLayer.apply(x, other, weight, b, *bn, *ln, batch_norm, eps, network.dropout.p)
        return x_next


def _is_fit(network: Any, batch_norm: nn.Module | None, weight: Tensor, x: Tensor) -> bool:
    """Whether a layer is to be computed where and as crosslayer.c does it: trained with gradients, or evaluated without."""
    is_training = torch.is_grad_enabled()
    return (
        x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and x.dtype == weight.dtype == torch.float32
        and network.training is network.dropout.training is is_training
        and (batch_norm is None or batch_norm.training is is_training)
    )


class _CrossLayer(torch.autograd.Function):
    """x_(i+1) from x_i (B, H, N), its anchor and the parameters of the layer."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Of the arguments of `_cross`."""
        _, anchor, weight, *_, batch_norm, eps, p = arguments
        x_next, held = _cross(*arguments)
        ctx.save_for_backward(*held, weight)
        ctx.has_anchor, ctx.settings = anchor is not None, (batch_norm, eps, p)
        return x_next

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        *held, weight = ctx.saved_tensors
        moments, _, _, ln_weight, _, b, x, _, product, _ = held
        gradient = gradient.contiguous()
        dx, dproduct = torch.empty_like(x), torch.empty_like(product)
        danchor = torch.empty_like(x) if ctx.has_anchor else None
        width, heads = len(b), x.shape[1]
        parameters = b.new_empty(2 * (width + heads))
        to = native.Gradients(*map(native.address, (dx, danchor, dproduct, parameters)))
        native.call("cross_backward", ctypes.byref(_layer(held, *ctx.settings)), gradient, ctypes.byref(to))
        rows = x.view(-1, width)  # (B*H, N)
        dx.view(-1, width).addmm_(dproduct, weight)
        db, dln_weight, dln_bias, *dbn = parameters.split([width, width // 2, width // 2, heads, heads])
        dln = (None, None) if ln_weight is None else (dln_weight, dln_bias)
        dbn = [None, None] if moments is None else dbn
        return dx, danchor, torch.mm(dproduct.t(), rows), db, *dbn, *dln, None, None, None


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
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """x_(i+1), and what `_layer` takes."""
    x = x.contiguous()
    anchor = x if anchor is None else anchor.contiguous()
    product = torch.mm(x.view(-1, x.shape[-1]), weight.t())  # (B*H, N/2)
    moments = None
    if batch_norm is not None:
        moments = x.new_empty(2, x.shape[1])
        if batch_norm.training:
            if product.numel() == x.shape[1]:
                raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
            assert batch_norm.num_batches_tracked is not None
            batch_norm.num_batches_tracked.add_(1)
    kept = draw_mask(x.numel(), p) if p else None
    held = (moments, bn_weight, bn_bias, ln_weight, ln_bias, b, x, anchor, product, kept)
    x_next = torch.empty_like(x)
    native.call("cross_forward", ctypes.byref(_layer(held, batch_norm, eps, p)), x_next)
    return x_next, held


def _layer(held: Any, batch_norm: nn.BatchNorm1d | None, eps: float, p: float) -> native.Layer:
    moments, gain, shift, *others, product, kept = held
    rows, half = product.shape
    heads = others[-1].shape[1]  # of the anchor
    to_rstd: int | None = None
    running: tuple[int | None, ...] = (None, None)
    is_training, batch_eps, momentum = False, 0.0, 0.0
    if batch_norm is not None:
        to_rstd = moments.data_ptr() + heads * moments.element_size()
        running = native.address(batch_norm.running_mean), native.address(batch_norm.running_var)
        is_training, batch_eps, momentum = batch_norm.training, batch_norm.eps, batch_norm.momentum or 0.0
    numbers = rows, half, heads, torch.get_num_threads(), is_training, eps, 1.0 / (1.0 - p), batch_eps, momentum
    normalised = native.address(moments), to_rstd, native.address(gain), native.address(shift), *running
    return native.Layer(*numbers, *normalised, *map(native.address, (*others, product, kept)))
