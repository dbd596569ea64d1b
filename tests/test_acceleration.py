# SPDX-License-Identifier: Apache-2.0
"""`compile`, `precision`, `cuda_graph` and `speed`: the same trajectory where they promise it, and a clear word where not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import make_columns, make_model, make_settings
from torch import Tensor

from ctrbench import acceleration, cudagraph
from ctrbench.allocator import keep_freed_memory
from ctrbench.batches import Batches
from ctrbench.config import load_experiment
from ctrbench.errors import ConfigError
from ctrbench.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _default_precision() -> Iterator[None]:
    yield
    acceleration.set_precision("fp32")


def train(num_steps: int, dropout: float = 0.2, device: str = "cpu", **values: Any) -> tuple[list[float], Trainer]:
    settings = make_settings(embedding_regularizer=1e-3, **values)
    model = make_model(settings, dropout)
    model.device = torch.device(device)
    trainer = Trainer(model.to(device), settings)
    trainer.model.train()
    torch.manual_seed(7)
    batches = Batches({n: x.to(device) for n, x in make_columns(num_steps * 64 + 10).items()}, 64, shuffle=True, seed=3)
    return [float(trainer.step(batch)) for batch in batches], trainer


def largest_difference(first: Trainer, second: Trainer) -> float:
    pairs = zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def test_compiled_steps_follow_the_plain_trajectory() -> None:
    """With dropout, batch norm, L2 and a last batch of another size: equal masks in the same order, equal to rounding."""
    plain, trainer = train(8)
    compiled, compiled_trainer = train(8, compile=True)
    assert compiled == pytest.approx(plain, abs=2e-5)
    assert largest_difference(trainer, compiled_trainer) < 2e-3
    without_dropout, _ = train(8, dropout=0.0)
    assert max(abs(a - b) for a, b in zip(plain, without_dropout, strict=True)) > 1e-3


def test_a_model_that_torch_cannot_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class UnsupportedError(Exception):
        __module__ = "torch._dynamo.exc"

    def refuse(loss: Any) -> Any:
        def call(batch: Any) -> Tensor:
            raise UnsupportedError("\nno C++ compiler\nat length")

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(
        ConfigError, match=r"compile: true: torch could not compile SDCNv3 here: no C\+\+ compiler: set"
    ):
        train(1, compile=True)


def test_an_error_of_the_model_itself_stays_as_it_is() -> None:
    def broken(batch: Any) -> Tensor:
        raise ZeroDivisionError("the model's own")

    compiled = acceleration.Compiled.__new__(acceleration.Compiled)
    compiled._plain = compiled._compiled = broken
    compiled._batch_size, compiled._model, compiled._is_tried = 2, "M", False
    with pytest.raises(ZeroDivisionError, match="the model's own"):
        compiled({"x": torch.zeros(2)})


def test_bf16_rounds_training_but_not_evaluation() -> None:
    plain, trainer = train(8, dropout=0.0)
    rounded, rounded_trainer = train(8, dropout=0.0, precision="bf16")
    difference = max(abs(a - b) for a, b in zip(plain, rounded, strict=True))
    assert 1e-6 < difference < 0.02
    assert all(p.dtype == torch.float32 for p in rounded_trainer.model.parameters())
    trainer.model.load_state_dict(rounded_trainer.model.state_dict())
    batches = Batches(make_columns(200), 64, shuffle=False)
    assert torch.equal(trainer.predict(batches), rounded_trainer.predict(batches))


def test_bf16_refuses_a_model_that_ends_in_bfloat16() -> None:
    settings = make_settings(precision="bf16")
    trainer = Trainer(make_model(settings), settings)
    forward = trainer.model.forward
    trainer.model.forward = lambda batch: {"y_pred": forward(batch)["y_pred"].bfloat16()}
    with pytest.raises(ConfigError, match="precision: bf16: SDCNv3 gives 'y_pred' without its output_activation"):
        trainer.step(next(iter(Batches(make_columns(64), 64, shuffle=False))))


def test_tf32_holds_for_training_alone() -> None:
    _, trainer = train(1, precision="tf32")
    assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    seen = []
    forward = trainer.model.forward
    trainer.model.forward = lambda batch: seen.append(torch.get_float32_matmul_precision()) or forward(batch)
    trainer.evaluate(Batches(make_columns(200), 64, shuffle=False), ["AUC"])
    assert set(seen) == {"highest"} and torch.get_float32_matmul_precision() == "high"
    train(1)
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32


def test_speed_plain_is_the_models_own_step() -> None:
    fast, _ = train(6, dropout=0.0)
    plain, trainer = train(6, dropout=0.0, speed="plain")
    assert not trainer.uses_fast_path and plain == pytest.approx(fast, abs=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cuda_graph": True}, "cuda_graph: true: needs a GPU: set cuda_graph: false, or choose a GPU with --gpu"),
        ({"speed": "plain", "compile": True}, "compile: with speed: plain a model is trained by its own step"),
        ({"optimizer": "SGD", "compile": True}, "compile: SDCNv3 is trained by its own step or optimizer"),
        ({"optimizer": "SGD", "cuda_graph": True}, "cuda_graph: SDCNv3 is trained by its own step or optimizer"),
        ({"optimizer": "SGD", "precision": "bf16"}, "precision: bf16: SDCNv3 is trained by its own step or optimizer"),
    ],
)
def test_what_cannot_be_had_is_said_before_training(values: dict[str, Any], message: str) -> None:
    settings = make_settings(**values)
    trainer = Trainer(make_model(settings), settings)  # evaluating such a run elsewhere is no problem
    with pytest.raises(ConfigError, match=re.escape(message)):
        _ = trainer.built_step


def test_bf16_needs_an_add_loss_that_does_not_run_the_model() -> None:
    settings = make_settings(precision="bf16")
    with pytest.raises(ConfigError, match="precision: bf16: add_loss of SDCNv3 runs the model itself"):
        acceleration.make_fast_step(make_model(settings), settings, is_old=True)


def test_hashes_of_earlier_runs_stay_and_new_settings_change_them() -> None:
    zoo = ROOT / "model_zoo" / "SDCNv3"

    def config_hash(*overrides: str) -> str:
        return load_experiment(zoo / "config", "SDCNv3_tiny", zoo, overrides, is_data_required=False).config_hash

    given = config_hash("precision=fp32", "compile=false", "cuda_graph=false", "speed=auto")
    assert config_hash() == given
    others = [config_hash(x) for x in ("precision=bf16", "compile=true", "cuda_graph=true", "speed=plain")]
    assert len({given, *others}) == 5


def test_rows_and_tensors_of_a_batch_of_any_form() -> None:
    batch = ({"a": torch.zeros(5, 2)}, [torch.ones(7)], "no tensor")
    assert acceleration.num_rows(batch) == 5
    assert [tuple(x.shape) for x in acceleration.tensors_of(batch)] == [(5, 2), (7,)]


def test_a_recorded_batch_reads_from_its_own_memory() -> None:
    batches = list(Batches(make_columns(128), 64, shuffle=True))
    stores = cudagraph._stores(batches[0])
    assert len(stores) == 2  # ids and reals, however many columns
    own = {key: store.clone() for key, store in stores.items()}
    placed = cudagraph._placed(batches[0], own)
    for copy, store in zip(own.values(), cudagraph._stores(batches[1]).values(), strict=True):
        copy.copy_(store)
    assert placed.keys() == batches[1].keys()
    assert all(torch.equal(placed[name], batches[1][name]) for name in placed)


def test_the_c_library_keeps_freed_memory_where_it_can() -> None:
    assert keep_freed_memory() in (True, False)
    assert keep_freed_memory.cache_info().currsize == 1


@needs_gpu
@pytest.mark.parametrize("values", [{}, {"compile": True}, {"learning_rate": 1e-2}])
def test_a_recorded_step_follows_the_plain_trajectory(values: dict[str, Any]) -> None:
    plain, trainer = train(12, dropout=0.0, device="cuda", **values)
    recorded, recorded_trainer = train(12, dropout=0.0, device="cuda", cuda_graph=True, **values)
    assert recorded == pytest.approx(plain, abs=2e-5)
    assert largest_difference(trainer, recorded_trainer) < 2e-3


@needs_gpu
def test_a_recorded_step_follows_the_learning_rate() -> None:
    def run(is_graph: bool) -> Trainer:
        settings = make_settings(cuda_graph=is_graph)
        model = make_model(settings)
        model.device = torch.device("cuda")
        trainer = Trainer(model.to("cuda"), settings)
        columns = {n: x.to("cuda") for n, x in make_columns(640).items()}
        for i, batch in enumerate(Batches(columns, 64, shuffle=False)):
            if i == 6:
                trainer.model.optimizer.param_groups[0]["lr"] *= 0.1
            trainer.step(batch)
        return trainer

    assert largest_difference(run(False), run(True)) < 2e-3


@needs_gpu
def test_a_step_that_asks_the_device_cannot_be_recorded() -> None:
    settings = make_settings(cuda_graph=True)
    model = make_model(settings)
    model.device = torch.device("cuda")
    trainer = Trainer(model.to("cuda"), settings)
    forward = model.forward
    model.forward = lambda batch: {name: y * float(y.sum() * 0 + 1) for name, y in forward(batch).items()}
    columns = {n: x.to("cuda") for n, x in make_columns(640).items()}
    with pytest.raises(ConfigError, match="cuda_graph: true: the step of SDCNv3 cannot be recorded"):
        for batch in Batches(columns, 64, shuffle=False):
            trainer.step(batch)
