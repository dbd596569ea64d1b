# SPDX-License-Identifier: Apache-2.0
"""Several models of one experiment, which differ in their seeds, trained in one step with their parameters stacked.

The parameters of S models lie in one matrix (S, P), a row for each model and a column for each of its P numbers. A
model's own parameters and its optimizer's moments become views of its row, so that evaluation, weights and checkpoints
stay what they are without a stack. A step is one forward and one backward under `vmap`, with gradient clipping, L2 and
Adam by row:

    G_s = g_s + lambda W_s,   c_s = min(1, max_norm / (||G_s|| + 1e-6)),   W_s <- Adam(W_s, c_s G_s)

Each model has batches and dropout masks of its own, the masks drawn in the order and from the generator of its run alone.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ctrbench import hooks
from ctrbench.acceleration import set_precision
from ctrbench.crosslayer import as_written
from ctrbench.dropout import FastDropout
from ctrbench.optim import L2, CoupledAdam
from ctrbench.stacked_inputs import RandomState, copied, random_kept, signature_of, stack_batches
from ctrbench.trainer import Trainer

# By how much the loss of a model may differ from that of the model alone, in relation to it: sums are added up otherwise.
TOLERANCE = {"fp32": 1e-5, "tf32": 1e-3}
DROPOUTS = (nn.Dropout, FastDropout)


class UnstackableError(Exception):
    """These models cannot be trained in a stack, and why; nothing was changed in them."""


class Stack:
    """Trainers of one experiment whose models are trained together.

    Args:
        trainers: S of them, with models on one device that are alike but for their numbers.

    Raises:
        UnstackableError: they do not allow it.
    """

    def __init__(self, trainers: Sequence[Trainer]):
        self.trainers = list(trainers)
        self.device = trainers[0].device
        _check(self.trainers)
        set_precision(trainers[0].settings.precision)
        self._template = _TaskLoss(trainers[0])
        self._dropouts = [[m for m in t.model.modules() if type(m) in DROPOUTS] for t in trainers]
        self._plans: dict[Any, list[tuple[int, Tensor]]] = {}
        self._stack_parameters()
        self._stack_constants()

    def _stack_parameters(self) -> None:
        """Make the trained parameters of each model, and the moments of its optimizer, views of one row."""
        groups = [t.model.optimizer.param_groups for t in self.trainers]  # S x G
        self._l2 = [float(group[L2]) for group in groups[0]]
        shapes = [[p.shape for p in group["params"]] for group in groups[0]]
        sizes = [sum(shape.numel() for shape in group) for group in shapes]
        self._columns = [slice(sum(sizes[:g]), sum(sizes[: g + 1])) for g in range(len(sizes))]
        size = len(self.trainers), sum(sizes)
        self._weights, self._gradients, self._first, self._second = (
            torch.zeros(size, device=self.device) for _ in range(4)
        )
        self._steps = torch.zeros(len(self.trainers), len(sizes), device=self.device)
        matrices = self._weights, self._gradients, self._first, self._second
        names = {id(p): name for name, p in self._template.named_parameters()}
        self._names: list[str] = []
        self._gradient_views: list[Tensor] = []
        self._leaves: list[Tensor] = []
        at = 0
        for g, group in enumerate(groups[0]):
            for i, first in enumerate(group["params"]):
                views = [m[:, at : at + first.numel()].view(-1, *first.shape) for m in matrices]
                at += first.numel()
                for s, trainer in enumerate(self.trainers):
                    self._bind(trainer.model.optimizer, groups[s][g]["params"][i], views, s, g)
                self._names.append(names[id(first)])
                self._leaves.append(views[0].detach().requires_grad_())
                self._gradient_views.append(views[1])
        self._hooks = [
            [_hooks_of(groups[s][g]["params"][i]) for s in range(len(self.trainers))]
            for g, group in enumerate(shapes)
            for i in range(len(group))
        ]

    def _bind(self, optimizer: CoupledAdam, parameter: nn.Parameter, views: list[Tensor], s: int, g: int) -> None:
        """Move one parameter of model s, in group g, and its moments to their places."""
        weight, _, first, second = (view[s] for view in views)
        parameter.data = weight.copy_(parameter.data)
        if state := optimizer.state.get(parameter):
            first.copy_(state["exp_avg"])
            second.copy_(state["exp_avg_sq"])
            self._steps[s, g] = state["step"]
        optimizer.state[parameter] = {"step": self._steps[s, g], "exp_avg": first, "exp_avg_sq": second}

    def _stack_constants(self) -> None:
        """Stack what is not trained: buffers, as views as well, and frozen parameters, where they differ by model."""
        owned = [list(_buffers(_TaskLoss(t))) for t in self.trainers]
        self._buffers: dict[str, Tensor] = {}
        self._shared: dict[str, Tensor] = {}
        for places in zip(*owned, strict=True):
            values = [module._buffers[name] for _, module, name in places]
            if not values[0].is_floating_point() and values[0].dim() and all(torch.equal(values[0], v) for v in values):
                self._shared[places[0][0]] = values[0]  # indices; counters have no dimension
                continue
            stacked = torch.stack(values)
            self._buffers[places[0][0]] = stacked
            for s, (_, module, name) in enumerate(places):
                module._buffers[name] = stacked[s]
        trained = set(self._names)
        frozen = [dict(_TaskLoss(t).named_parameters()) for t in self.trainers]
        for name in frozen[0].keys() - trained:
            values = [parameters[name].detach() for parameters in frozen]
            if all(torch.equal(values[0], v) for v in values[1:]):
                self._shared[name] = values[0]
            else:
                self._buffers[name] = torch.stack(values)

    def step(self, batches: Sequence[Any], states: Sequence[RandomState]) -> tuple[Tensor, list[RandomState]]:
        """One optimizer step of every model.

        Args:
            batches: the next one of each model, alike in their shapes.
            states: of the generators of each model's run.

        Returns:
            The training losses with their penalties, (S,), detached; and the new states of the generators.

        Raises:
            UnstackableError: the models do not run under `vmap`, or compute something else there.
            RuntimeError: as the model alone raises it. In both cases nothing has changed.
        """
        signature = signature_of(batches[0])
        if signature not in self._plans:
            self._plans[signature] = self._plan(batches, states)
        factors, states = self._draw(self._plans[signature], states)
        with self._buffers_kept():
            losses = self._losses(stack_batches(batches), factors)
            gradients = torch.autograd.grad(losses.sum(), self._leaves, allow_unused=True)
        for target, gradient, by_model in zip(self._gradient_views, gradients, self._hooks, strict=True):
            if gradient is None:
                target.zero_()
                continue
            target.copy_(gradient)
            for s, own in enumerate(by_model):
                for hook in own:
                    if (replaced := hook(target[s])) is not None:
                        target[s].copy_(replaced)
        return losses.detach() + self._update(), states

    @torch.no_grad()
    def _update(self) -> Tensor:
        """Penalty, clipping and Adam by row; returns the penalties (S,)."""
        weights, gradients = self._weights, self._gradients
        penalty = torch.zeros(len(self.trainers), device=self.device)
        for columns, l2 in zip(self._columns, self._l2, strict=True):
            if l2:
                part = weights[:, columns]
                penalty += torch.linalg.vector_norm(part, dim=1).square_().mul_(l2 / 2)
                gradients[:, columns].add_(part, alpha=l2)
        optimizers = [t.model.optimizer for t in self.trainers]
        norms = torch.linalg.vector_norm(gradients, dim=1)  # (S,)
        gradients.mul_((optimizers[0].max_norm / (norms + 1e-6)).clamp(max=1.0).unsqueeze(1))
        self._steps += 1
        # Models and groups by learning rate: one call while no evaluation has cut one.
        parts: dict[float, list[tuple[int, int]]] = {}
        for s, optimizer in enumerate(optimizers):
            for g, group in enumerate(optimizer.param_groups):
                if group["params"]:
                    parts.setdefault(group["lr"], []).append((s, g))
        matrices = weights, gradients, self._first, self._second
        for rate, places in parts.items():
            w, grads, m, v = ([matrix[s, self._columns[i]] for s, i in places] for matrix in matrices)
            torch._fused_adam_(
                w,
                grads,
                m,
                v,
                [],
                [self._steps[s, i] for s, i in places],
                lr=rate,
                beta1=optimizers[0].betas[0],
                beta2=optimizers[0].betas[1],
                weight_decay=0.0,
                eps=optimizers[0].eps,
                amsgrad=False,
                maximize=False,
                grad_scale=None,
                found_inf=None,
            )
        return penalty

    def _losses(self, batch: Any, factors: list[Tensor]) -> Tensor:
        """The task loss of every model, (S,)."""

        def loss(
            parameters: dict[str, Tensor], buffers: dict[str, Tensor], batch: Any, factors: list[Tensor]
        ) -> Tensor:
            with _given(self._dropouts[0], factors):
                value: Tensor = functional_call(self._template, {**parameters, **buffers, **self._shared}, (batch,))
            return value.reshape(())

        parameters = dict(zip(self._names, self._leaves, strict=True))
        with warnings.catch_warnings(), as_written(self._template):  # `vmap` cannot look into compiled functions
            # An operation without a batching rule runs once for each model, which is no slower than without a stack.
            warnings.filterwarnings("ignore", "There is a performance drop because we have not yet implemented")
            losses: Tensor = vmap(loss)(parameters, self._buffers, batch, factors)
        return losses

    def _draw(
        self, plan: list[tuple[int, Tensor]], states: Sequence[RandomState]
    ) -> tuple[list[Tensor], list[RandomState]]:
        """What each dropout of a forward multiplies with, (S, ...), drawn for each model as it would draw alone."""
        factors = [torch.empty((len(self.trainers), *ones.shape), device=self.device) for _, ones in plan]
        after = []
        with random_kept(self.device):
            for s, state in enumerate(states):
                state.restore()
                for target, (number, ones) in zip(factors, plan, strict=True):
                    dropout = self._dropouts[s][number]
                    target[s] = dropout(ones.clone() if _is_inplace(dropout) else ones)
                after.append(RandomState(self.device))
        return factors, after

    def _plan(self, batches: Sequence[Any], states: Sequence[RandomState]) -> list[tuple[int, Tensor]]:
        """Find out which dropouts draw what on batches of this shape, and that the stack computes what a model alone does.

        Raises:
            UnstackableError: it does not, or something else draws random numbers.
        """
        trainer, plan = self.trainers[0], []
        numbers = {id(module): i for i, module in enumerate(self._dropouts[0])}

        def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if module.training and vars(module)["p"]:
                plan.append((numbers[id(module)], torch.ones_like(inputs[0])))

        handles = [module.register_forward_pre_hook(record) for module in self._dropouts[0]]
        try:
            with random_kept(self.device), self._buffers_kept(always=True), torch.no_grad():
                states[0].restore()
                alone = hooks.task_loss(trainer.model, copied(batches[0]), trainer._has_old_add_loss).reshape(())
                drawn = RandomState(self.device)
        finally:
            for handle in handles:
                handle.remove()
        factors, after = self._draw(plan, states)
        if not after[0].equals(drawn):
            raise UnstackableError("it draws random numbers outside of its dropout layers")
        try:
            with random_kept(self.device), self._buffers_kept(always=True), torch.no_grad():
                together = self._losses(stack_batches([copied(batch) for batch in batches]), factors)[0]
        except Exception as error:
            what = f"{type(error).__name__}: {_first_line(error)}"
            raise UnstackableError(f"it does not run under vmap: {what}") from error
        difference = float((together - alone).abs())
        if not difference <= TOLERANCE[trainer.settings.precision] * max(1.0, float(alone.abs())) and bool(
            alone.isfinite()
        ):
            raise UnstackableError(f"its loss is {float(together):.6g} under vmap, but {float(alone):.6g} alone")
        return plan

    def release(self, trainer: Trainer) -> None:
        """Give a model that leaves the stack, and its optimizer, memory of their own."""
        optimizer = trainer.model.optimizer
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.data = parameter.data.clone()
                optimizer.state[parameter] = {name: x.clone() for name, x in optimizer.state[parameter].items()}
        for name, module, own_name in _buffers(trainer.model):
            module._buffers[own_name] = trainer.model.get_buffer(name).clone()

    @contextlib.contextmanager
    def _buffers_kept(self, always: bool = False) -> Iterator[None]:
        """Undo what the block does to buffers, if it fails."""
        before = {name: buffer.clone() for name, buffer in self._buffers.items()}
        is_done = False
        try:
            yield
            is_done = not always
        finally:
            if not is_done:
                for name, buffer in self._buffers.items():
                    buffer.copy_(before[name])


class _TaskLoss(nn.Module):
    """A model's loss without penalties as a function of a batch."""

    def __init__(self, trainer: Trainer):
        super().__init__()
        self.model = trainer.model
        self._is_old = trainer._has_old_add_loss

    def forward(self, batch: Any) -> Tensor:
        return hooks.task_loss(self.model, batch, self._is_old)


def _check(trainers: Sequence[Trainer]) -> None:
    first = trainers[0]
    settings = first.settings
    if settings.compile or settings.cuda_graph or settings.precision == "bf16":
        raise UnstackableError("its settings ask for a form of the step that a stack does not have")
    for trainer in trainers:
        optimizer = trainer.model.optimizer
        if not trainer.uses_fast_path or type(optimizer) is not CoupledAdam:
            raise UnstackableError("it has a training step of its own")
        for mine, theirs in zip(first.model.optimizer.param_groups, optimizer.param_groups, strict=True):
            for a, b in zip(mine["params"], theirs["params"], strict=True):
                if a.shape != b.shape or b.dtype != torch.float32:
                    raise UnstackableError("its parameters differ in shape from seed to seed, or are not of 32 bits")
                if b._post_accumulate_grad_hooks:
                    raise UnstackableError("it hooks into its gradients")


def _buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every buffer once: its full name, its module and its name there."""
    names = {id(buffer): name for name, buffer in model.named_buffers()}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) in names:
                yield names.pop(id(buffer)), module, name


def _hooks_of(parameter: nn.Parameter) -> list[Callable[[Tensor], Tensor | None]]:
    return list((parameter._backward_hooks or {}).values())


@contextlib.contextmanager
def _given(dropouts: Sequence[nn.Module], factors: Sequence[Tensor]) -> Iterator[None]:
    """Let dropouts multiply with what was drawn before, in the order of their calls."""
    remaining = iter(factors)

    def multiply(p: float, x: Tensor) -> Tensor:
        return x * next(remaining) if p else x

    for module in dropouts:
        vars(module)["forward"] = functools.partial(multiply, float(vars(module)["p"]))
    try:
        yield
    finally:
        for module in dropouts:
            del vars(module)["forward"]


def _is_inplace(module: nn.Module) -> bool:
    return bool(getattr(module, "inplace", False))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
