# SPDX-License-Identifier: Apache-2.0
"""What a run says of its speed, and --profile: counted exactly, seen from outside, without a trace in the result."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ctrbench import ceilings, compiled_dropout, profiling, throughput  # noqa: F401  (an operator that compiled code calls)
from ctrbench.batches import Batches
from ctrbench.ceilings import Ceilings
from ctrbench.cli import run_expid
from ctrbench.config import Experiment, load_experiment
from ctrbench.costs import count_step
from ctrbench.crosslayer import as_written
from ctrbench.embedding import embedding_parameters
from ctrbench.evidence import problems_of
from ctrbench.phases import PHASES, STEP, PhaseClock
from ctrbench.preprocess import build_dataset
from ctrbench.profiling import PROFILE, TRACE, profile_steps
from ctrbench.run import open_batches, prepare, run
from ctrbench.throughput import DataClock
from ctrbench.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT / "model_zoo" / "SDCNv3"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(ceilings, "PRODUCT_ROWS", {"cpu": (64,)})
    monkeypatch.setattr(ceilings, "SECONDS", 0.01)
    monkeypatch.setattr(profiling, "TIMED_STEPS", 4)


@pytest.fixture
def experiment(tiny_overrides: list[str]) -> Experiment:
    return load_experiment(ZOO / "config", "SDCNv3_tiny", ZOO, [*tiny_overrides, "epochs=1"])


@pytest.fixture
def trained(experiment: Experiment) -> tuple[Trainer, Batches]:
    """A trainer after one step, and its batches."""
    data = build_dataset(experiment.dataset, root=experiment.root)
    feature_map, trainer = prepare(experiment, data, gpu=-1)
    train = open_batches(experiment, data, feature_map, "train", trainer, in_order=False)
    trainer.model.train()
    trainer.step(first_of(train))
    return trainer, train


def first_of(train: Batches) -> Any:
    return next(iter(train.ordered(train.batch_size, False, 0)))


def forms_of(trainer: Trainer) -> dict[str, Any]:
    model = trainer.model
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "gradients": [p.grad for p in model.parameters()],
        "random": torch.get_rng_state(),
        "mode": model.training,
    }


def test_flops_and_bytes_of_every_matrix_product(trained: tuple[Trainer, Batches]) -> None:
    trainer, train = trained
    found = count_step(trainer.model, first_of(train))
    rows = train.batch_size
    shapes = [(m.in_features, m.out_features) for m in trainer.model.modules() if isinstance(m, nn.Linear)]
    forward = sum(2 * rows * into * out for into, out in shapes)
    assert found.rows == rows
    # Backward, a product for every weight and one for every input; the numeric fields' own need no gradient.
    given = [(into, out) for into, out in shapes if into == 1]
    assert len(given) == 2
    assert found.flops == {"forward": forward, "backward": 2 * forward - sum(2 * rows * out for _, out in given)}
    sizes = {(into, out): 4 * (rows * into + into * out + rows * out) for into, out in shapes}
    operands = sum(sizes[shape] for shape in shapes)
    biases = 4 * sum(m.bias is not None for m in trainer.model.modules() if isinstance(m, nn.Linear))
    assert found.bytes["forward"] == operands + biases
    assert found.bytes["backward"] == 2 * operands - sum(sizes[shape] for shape in given)
    weights = sum(p.numel() for p in trainer.model.parameters())
    embedding = sum(p.numel() for p in embedding_parameters(trainer.model))
    assert found.bytes["optimizer"] == 4 * (2 * 3 * weights + 2 * (weights - embedding))
    assert found.total_flops == sum(found.flops.values())
    assert found.total_bytes == sum(found.bytes.values()) - found.bytes["data"]


def test_the_floor_is_the_longer_of_both_times(trained: tuple[Trainer, Batches]) -> None:
    trainer, train = trained
    costs = count_step(trainer.model, first_of(train))
    bound_by_memory = Ceilings("", 1, "fp32", bytes_per_second=1e6, flops_per_second=1e15)
    bound_by_products = Ceilings("", 1, "fp32", bytes_per_second=1e15, flops_per_second=1e6)
    assert costs.floor_seconds(bound_by_memory) == pytest.approx(costs.total_bytes / 1e6)
    assert costs.floor_seconds(bound_by_memory, "optimizer") == pytest.approx(costs.bytes["optimizer"] / 1e6)
    assert costs.floor_seconds(bound_by_products, "backward") == pytest.approx(costs.flops["backward"] / 1e6)


def test_counting_changes_nothing(trained: tuple[Trainer, Batches]) -> None:
    trainer, train = trained
    for parameter in trainer.model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    trainer.model.eval()
    before = forms_of(trainer)
    count_step(trainer.model, first_of(train))
    after = forms_of(trainer)
    assert all(torch.equal(before["weights"][name], value) for name, value in after["weights"].items())
    assert all(a is b for a, b in zip(before["gradients"], after["gradients"], strict=True))
    assert torch.equal(before["random"], after["random"]) and after["mode"] is False


def test_the_plain_form_has_the_same_costs(trained: tuple[Trainer, Batches], experiment: Experiment) -> None:
    trainer, train = trained
    data = build_dataset(experiment.dataset, root=experiment.root)
    model = prepare(experiment, data, gpu=-1)[1].model.__class__
    from ctrbench.features import load_feature_map
    from ctrbench.zoo import build_model

    feature_map = load_feature_map(data.feature_map_file, experiment.training.dataset_id, experiment.flat())
    params = experiment.constructor_params()
    plain = Trainer(build_model(model.__mro__[1], feature_map, params, ""), experiment.training, use_fast_path=False)
    plain.model.train()
    batch = first_of(train)
    plain.step(batch)
    assert count_step(plain.model, batch) == count_step(trainer.model, batch)


def test_a_compiled_layer_is_counted_as_it_was_written(trained: tuple[Trainer, Batches]) -> None:
    trainer, train = trained
    batch = first_of(train)
    expected = count_step(trainer.model, batch)
    trainer.model.ECN.forward = torch.compile(trainer.model.ECN.forward, backend="aot_eager")
    trainer.step(batch)
    assert count_step(trainer.model, batch).flops == expected.flops


def test_phases_add_up_to_the_step_and_leave_nothing_behind(trained: tuple[Trainer, Batches]) -> None:
    trainer, train = trained
    original, batch = torch.autograd.backward, first_of(train)
    with PhaseClock(trainer.model, trainer.device) as clock:
        trainer.step(batch)  # not timed
        for _ in range(3):
            with clock.step():
                trainer.step(batch)
                time.sleep(0.05)  # comes after the backward pass
        with clock.step():
            pass  # no backward pass: no phases
    seconds = clock.seconds()
    assert [len(seconds[name]) for name in (*PHASES, STEP)] == [3, 3, 3, 3, 4]
    for i in range(3):
        assert sum(seconds[phase][i] for phase in PHASES) == pytest.approx(seconds[STEP][i], rel=1e-6)
        assert all(seconds[phase][i] > 0 for phase in PHASES) and seconds["optimizer"][i] > 0.05
    assert torch.autograd.backward is original
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.model.modules())


def test_the_phases_of_a_compiled_model_have_no_gather(trained: tuple[Trainer, Batches]) -> None:
    trainer, train = trained
    with PhaseClock(trainer.model, trainer.device, is_compiled=True) as clock, clock.step():
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.model.modules())
        trainer.step(first_of(train))
    assert set(clock.seconds()) == {*PHASES, STEP} - {"gather"}


class Event:
    """Stands in for a GPU's: elapsed times in milliseconds, one for every mark."""

    marks = 0

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        type(self).marks += 1
        self.at = type(self).marks

    def elapsed_time(self, end: Event) -> float:
        return float(end.at - self.at)


def test_phases_by_the_events_of_a_gpu(trained: tuple[Trainer, Batches], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, train = trained
    waited: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    with PhaseClock(trainer.model, torch.device("cuda")) as clock, clock.step():
        trainer.step(first_of(train))
        assert not waited
    # The step begins, gathers from here to there, the backward pass begins and ends, the step ends.
    seconds = {name: [round(1e3 * value) for value in values] for name, values in clock.seconds().items()}
    assert seconds == {"gather": [1], "forward": [2], "backward": [1], "optimizer": [1], "step": [5]} and waited


def test_steps_that_are_watched_are_the_same_steps(trained: tuple[Trainer, Batches]) -> None:
    trainer, train = trained
    state = trainer.model.state_dict()
    before, random = {name: value.clone() for name, value in state.items()}, torch.get_rng_state()
    optimizer = trainer.model.optimizer.state_dict()
    moments = {i: {n: x.clone() for n, x in s.items()} for i, s in optimizer["state"].items()}
    trainer.step(first_of(train))
    expected = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.model.load_state_dict(before)
    trainer.model.optimizer.load_state_dict({**optimizer, "state": moments})
    torch.set_rng_state(random)
    with PhaseClock(trainer.model, trainer.device, is_traced=True) as clock, clock.step():
        trainer.step(first_of(train))
    assert all(torch.equal(expected[name], value) for name, value in trainer.model.state_dict().items())


def test_the_clock_of_batches_times_training_alone() -> None:
    shown: list[tuple[int, str]] = []

    def show(items: Any, count: int, label: str) -> Iterator[Any]:
        shown.append((count, label))
        yield from items

    def slow() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.02)
            yield number

    clock = DataClock(show)
    assert list(clock(slow(), 3, "Evaluate")) == [0, 1, 2] and clock.seconds == 0
    for _ in clock(slow(), 3, "Epoch 1"):
        time.sleep(0.05)  # the step
    assert clock.batches == 3 and 0.06 <= clock.seconds < 0.14
    assert shown == [(3, "Evaluate"), (3, "Epoch 1")]
    assert list(DataClock()([7], 1, "Epoch 1")) == [7]


def test_a_short_run_reports_its_rates_and_measures_nothing(experiment: Experiment, tmp_path: Path) -> None:
    report = run(experiment)
    speed = report["speed"]
    assert set(speed) == {"train_rows_per_second", "evaluate_rows_per_second", "shares"}
    assert speed["train_rows_per_second"] == pytest.approx(report["train_rows_per_second"])
    assert sum(speed["shares"].values()) == pytest.approx(1) and min(speed["shares"].values()) > 0
    assert not (tmp_path / "cache").exists()
    assert "rows/s in training" in (experiment.run_dir / "train.log").read_text()


def test_a_long_run_counts_and_then_measures(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "COUNT_AFTER_SECONDS", 0.0)
    speed = run(experiment)["speed"]
    assert speed["flops_per_second"] > 0 and "ceilings" not in speed and not (tmp_path / "cache").exists()
    assert "ceilings are not measured" in (experiment.run_dir / "train.log").read_text()
    monkeypatch.setattr(throughput, "MEASURE_AFTER_SECONDS", 0.0)
    speed = run(experiment)["speed"]
    limits, of = speed["ceilings"], speed["shares_of_ceilings"]
    assert of["flops"] == pytest.approx(speed["flops_per_second"] / limits["flops_per_second"])
    assert of["bytes"] == pytest.approx(speed["bytes_per_second"] / limits["bytes_per_second"])
    assert of["floor"] == pytest.approx(max(of["flops"], of["bytes"]))
    assert "of this machine's ceilings" in (experiment.run_dir / "train.log").read_text()


def test_profiling_changes_nothing_but_adds_two_files(experiment: Experiment, tiny_overrides: list[str]) -> None:
    plain = run(experiment)
    weights = (experiment.run_dir / "best.safetensors").read_bytes()
    settings = [*tiny_overrides, "epochs=1"]
    arguments = ["--config", str(ZOO / "config"), "--expid", "SDCNv3_tiny", "--profile"]
    assert run_expid(ZOO, [*arguments, *(word for value in settings for word in ("--set", value))]) == 0
    profiled = json.loads((experiment.run_dir / "report.json").read_text())
    for key in ("metrics", "config_hash", "data_hash", "settings_hash", "model_hash", "best_value", "epochs"):
        assert profiled[key] == plain[key]
    assert (experiment.run_dir / "best.safetensors").read_bytes() == weights
    assert problems_of(experiment.run_dir, profiled) == []
    page = (experiment.run_dir / PROFILE).read_text()
    for name in ("data", *PHASES, STEP, "`aten::mm`", "share of the time", "of the floor"):
        assert name in page
    events = json.loads((experiment.run_dir / TRACE).read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert {f"ctrbench: {name}" for name in ("data", *PHASES, STEP)} <= names
    run(experiment)
    assert not (experiment.run_dir / PROFILE).exists() and not (experiment.run_dir / TRACE).exists()


def test_a_profile_of_phases_and_operators(trained: tuple[Trainer, Batches]) -> None:
    trainer, train = trained
    with as_written(trainer.model):
        found = profile_steps(trainer, train)
    medians = found.medians()
    assert set(medians) == {"data", *PHASES, STEP} and min(medians.values()) > 0
    assert len(found.operators) <= profiling.TOP_OPERATORS
    seconds = [operator.seconds for operator in found.operators]
    assert seconds == sorted(seconds, reverse=True) and sum(seconds) <= found.operator_seconds
    # Three products by linear layer, less the forward one where there is a bias (addmm) and the gradients of given numbers.
    products = next(operator for operator in found.operators if operator.name == "aten::mm")
    linears = [m for m in trainer.model.modules() if isinstance(m, nn.Linear)]
    assert products.calls == 3 * len(linears) - sum((m.bias is not None) + (m.in_features == 1) for m in linears)


def test_a_step_that_cannot_be_profiled_costs_no_run(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a step of its own")

    monkeypatch.setattr(profiling, "profile_steps", fail)
    monkeypatch.setattr(throughput, "count_step", fail)
    report = run(experiment, profile=True)
    log = (experiment.run_dir / "train.log").read_text()
    assert "No profile: RuntimeError: a step of its own" in log
    assert "The operations of a step cannot be counted: a step of its own" in log
    assert (experiment.run_dir / "DONE").exists() and "step" not in report["speed"]
    assert not (experiment.run_dir / PROFILE).exists()
