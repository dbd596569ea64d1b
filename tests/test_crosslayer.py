# SPDX-License-Identifier: Apache-2.0
"""Cross layers in one pass each way, and the other compiled functions, against the same in torch and NumPy."""

from __future__ import annotations

import copy
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from test_trainer import make_columns, make_model, make_settings
from torch import Tensor, nn

from ctrbench import crosslayer, dropout, embedding, native
from ctrbench.batches import Batches
from ctrbench.costs import count_step
from ctrbench.crosslayer import as_written, fuse_cross_layers
from ctrbench.dropout import speed_up_dropout
from ctrbench.trainer import Trainer
from ctrbench.zoo import load_model_class

ZOO = Path(__file__).resolve().parents[1] / "model_zoo"
FIELDS, DIM = 5, 6
needs_native = pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_network(kind: str, **options: Any) -> nn.Module:
    """A cross network of SDCNv3 or, as `DCNv3`, of DCNv3, its parameters away from their initial values."""
    model, name = ("DCNv3", "ExponentialCrossNetwork") if kind == "DCNv3" else ("SDCNv3", kind)
    module = sys.modules[load_model_class(ZOO / model, model).__module__.rpartition(".")[0] + ".layers"]
    torch.manual_seed(1)
    network = speed_up_dropout(getattr(module, name)(FIELDS * DIM, 3, **options))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return network


def run_both_ways(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of one pass; the same masks every time."""
    x = x.clone().requires_grad_()
    torch.manual_seed(2)
    y = network(x)
    (y * torch.linspace(-1, 1, len(x)).unsqueeze(1)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients, **dict(network.named_buffers())}


@needs_native
@pytest.mark.parametrize("batch", [1, 37, 300])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(
    "norms", [{}, {"batch_norm": True}, {"layer_norm": False}, {"batch_norm": True, "layer_norm": False}]
)
@pytest.mark.parametrize("kind", ["DCNv3", "ExponentialCrossNetwork", "LinearCrossNetwork"])
def test_a_fused_layer_is_the_layer_as_written(kind: str, norms: dict[str, bool], heads: int, batch: int) -> None:
    written = make_network(kind, num_heads=heads, net_dropout=0.3, **norms)
    fused = fuse_cross_layers(copy.deepcopy(written))
    x = torch.randn(batch, heads, FIELDS * DIM, generator=torch.Generator().manual_seed(3)) + 0.5
    expected, found = run_both_ways(written, x), run_both_ways(fused, x)
    for name, value in expected.items():
        assert_close_to_largest(found[name], value, name)
    written.eval(), fused.eval()
    with torch.no_grad():
        assert_close_to_largest(fused(x), written(x), "y in evaluation")


def assert_close_to_largest(found: Tensor, expected: Tensor, name: str) -> None:
    """To rounding of the largest number, of which sums that cancel are made."""
    atol = 1e-5 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=atol, msg=lambda m: f"{name}: {m}")


@needs_native
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    x = torch.randn(700, 2, FIELDS * DIM)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        network = make_network("LinearCrossNetwork", num_heads=2, batch_norm=True, net_dropout=0.3)
        layer = fuse_cross_layers(network).step
        given = x.clone().requires_grad_()
        torch.manual_seed(2)
        layer(0, given, x).square().sum().backward()
        results.append(
            [given.grad, network.b[0].grad, network.layer_norm[0].weight.grad, network.batch_norm[0].running_var]
        )
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][1:], others[1:], strict=True))
        torch.testing.assert_close(results[0][0], others[0])  # a matrix product of torch is in it


def normalised(x: Tensor, norm: nn.BatchNorm1d) -> Tensor:
    """Mean and reciprocal standard deviation by head, (2, H), of the first halves of x (B, H, N), as a layer takes them."""
    width = x.shape[-1]
    weight, b = torch.eye(width // 2, width), torch.zeros(width)
    _, held = crosslayer._cross(x, None, weight, b, norm.weight, norm.bias, None, None, norm, 0.0, 0.0)
    assert held[0] is not None
    return held[0]


@needs_native
def test_batch_statistics_keep_their_digits_far_from_zero() -> None:
    x = torch.randn(1000, 2, 30) * 0.01 + torch.tensor([300.0, -5.0]).view(1, 2, 1)
    norm, theirs = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    mean, rstd = normalised(x, norm)
    exact = x[..., :15].double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), exact.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd.double(), (exact.var(1, correction=0) + norm.eps).rsqrt(), rtol=1e-4, atol=0)
    theirs(x[..., :15])
    for mine, other in zip(norm.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
    norm.eval()
    mean, rstd = normalised(x, norm)
    assert torch.equal(mean, norm.running_mean)
    torch.testing.assert_close(rstd, (norm.running_var + norm.eps).rsqrt())
    assert int(norm.num_batches_tracked) == 1


@needs_native
def test_a_batch_norm_of_one_number_is_refused_as_by_torch() -> None:
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training, got input size"):
        normalised(torch.ones(1, 2, 2), nn.BatchNorm1d(2))


@needs_native
def test_what_is_not_known_runs_as_written() -> None:
    x = torch.randn(8, 1, FIELDS * DIM)
    network = make_network("ExponentialCrossNetwork", net_dropout=0.3, batch_norm=True)
    calls = []
    network.step = lambda *arguments, plain=network.step: calls.append(1) or plain(*arguments)
    fuse_cross_layers(network)
    network(x)
    assert not calls
    network.eval()(x)  # with gradients
    with torch.autocast("cpu", torch.bfloat16):
        network.train()(x)
    with torch.no_grad():
        network(x)
    network.dropout.eval()
    network(x)
    network.train()
    for norm in network.batch_norm:
        norm.eval()  # whose gradient is another
    network(x)
    assert len(calls) == 5 * 3
    for name, other in (("dropout", nn.Dropout(0.1)), ("layer_norm", nn.ModuleList([nn.RMSNorm(15)] * 3)),
                        ("batch_norm", nn.ModuleList([nn.BatchNorm1d(1, momentum=None)] * 3)),
                        ("w", nn.ModuleList([nn.Linear(30, 15)] * 3)), ("cross_layer", "of another kind")):  # fmt: skip
        changed = make_network("ExponentialCrossNetwork")
        setattr(changed, name, other)
        assert "step" not in vars(fuse_cross_layers(changed)), name


@needs_native
def test_fused_layers_come_apart_and_together_again() -> None:
    network = fuse_cross_layers(make_network("DCNv3"))
    fused = network.step
    with as_written(network):
        assert "step" not in vars(network)
    assert network.step is fused


def test_training_follows_the_plain_trajectory_and_counts_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, costs = [], []
    for is_plain in (False, True):
        if is_plain:
            monkeypatch.setattr(native, "library", lambda: None)
        settings = make_settings(embedding_regularizer=1e-3)
        trainer = Trainer(make_model(settings, 0.2), settings)
        assert ("step" in vars(trainer.model.ECN)) is (native.library() is not None)
        trainer.model.train()
        torch.manual_seed(7)
        batches = list(Batches(make_columns(8 * 64 + 10), 64, shuffle=True, seed=3))
        losses.append([float(trainer.step(batch)) for batch in batches])
        costs.append(count_step(trainer.model, batches[0]))
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)  # equal masks as well
    assert costs[0] == costs[1] and costs[0].total_flops > 0


@needs_native
@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.998])
def test_compiled_masks_are_those_of_numpy(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (1, 7, 8, 9, dropout.BLOCK, dropout.BLOCK + 1, 3 * dropout.BLOCK + 4099):
        masks = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(4)
            masks.append(dropout.draw_mask(count, p))
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: None)
            torch.manual_seed(4)
            masks.append(dropout.draw_mask(count, p))
        assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])


@needs_native
@pytest.mark.parametrize("is_weighted", [False, True])
def test_a_scattered_gradient_is_that_of_index_add(is_weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(5)
    rows = torch.randint(0, 50, (300, 4), generator=random, dtype=torch.int32)
    values = torch.randn(300 if is_weighted else 1200, 7, generator=random)
    weights = torch.rand(300, 4, generator=random) * (rows > 5) if is_weighted else None
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(embedding._scatter(torch.Size((50, 7)), rows, values, weights))
    monkeypatch.setattr(native, "library", lambda: None)
    expected = embedding._scatter(torch.Size((50, 7)), rows, values, weights)
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)
    if not is_weighted:
        assert torch.equal(found[0], expected)


def test_weighted_sums_of_rows_are_those_of_an_embedding_bag() -> None:
    random = torch.Generator().manual_seed(6)
    rows = torch.randint(0, 9, (20, 3), generator=random, dtype=torch.int32)
    weights = torch.rand(20, 3, generator=random)
    tables = [torch.randn(9, 4, generator=random).requires_grad_()]
    tables.append(tables[0].detach().clone().requires_grad_())
    mine = embedding._average_rows(tables[0], rows, weights)
    theirs = functional.embedding_bag(rows, tables[1], mode="sum", per_sample_weights=weights)
    assert torch.equal(mine, theirs)
    mine.square().sum().backward(), theirs.square().sum().backward()
    torch.testing.assert_close(tables[0].grad, tables[1].grad)


def test_a_missing_or_foreign_library_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Spec:
        origin = str(tmp_path / "_native.so")

    for spec in (None, Spec):
        native.library.cache_clear()
        monkeypatch.setattr("importlib.util.find_spec", lambda name, spec=spec: spec)
        assert native.library() is None
    native.library.cache_clear()
    other, older = SimpleNamespace(), SimpleNamespace(native_interface=lambda: native.INTERFACE - 1)
    for built in (other, older):
        monkeypatch.setattr(ctypes, "CDLL", lambda path, built=built: built)
        assert native.library() is None
        native.library.cache_clear()


def test_short_memory_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Short:
        @staticmethod
        def cross_forward(*arguments: Any) -> int:
            return -1

    monkeypatch.setattr(native, "library", lambda: Short)
    with pytest.raises(MemoryError, match="not enough memory for cross_forward"):
        native.call("cross_forward", torch.zeros(1))


def test_missing_functions_are_said_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    settings = make_settings()
    with caplog.at_level("INFO"):
        Trainer(make_model(settings), settings)
    assert (
        "No compiled functions, so that training is slower: have a C compiler and install ctrbench again" in caplog.text
    )
