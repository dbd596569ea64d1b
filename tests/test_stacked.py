# SPDX-License-Identifier: Apache-2.0
"""Several seeds in one stack: every one is trained as it would be alone, and leaves what it would leave alone."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuxictr.pytorch.torch_utils import seed_everything
from torch import Tensor, nn

from ctrbench.batches import Batches
from ctrbench.checkpoint import load_checkpoint
from ctrbench.cli import main
from ctrbench.config import Experiment, load_experiment
from ctrbench.errors import ConfigError, InterruptedRunError, TrainingError
from ctrbench.evidence import read_ledger
from ctrbench.leaderboard.verify import verify
from ctrbench.preprocess import build_dataset
from ctrbench.run import Session, open_batches, prepare, run
from ctrbench.seeds import is_tiny
from ctrbench.stacked import Stack, UnstackableError
from ctrbench.stacked_inputs import RandomState, stack_batches
from ctrbench.stacked_runs import run_together
from ctrbench.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (5, 6, 7)  # none of which meets a gradient that is rounding alone, which Adam would blow up
CPU = torch.device("cpu")
# Of MLP_Block: Linear, BatchNorm1d, ReLU, Dropout, Linear, ...
NO_EFFECT = re.compile(r"mlp\.mlp\.(0|4)\.bias|mlp\.mlp\.(1|5)\.running_mean")
# A high learning rate makes of a rounding a difference that shows within two epochs, also without a stack.
CALM = ("learning_rate=1.e-3", "epochs=2")
OPTIONS = {
    "SDCNv3": ("deep_net_dropout=0.2", "shallow_net_dropout=0.3", "batch_norm=true", "net_regularizer=1.e-3"),
    "DCNv3": ("net_dropout=0.2", "batch_norm=true", "layer_norm=true"),
    "DNN": ("net_dropout=0.2", "batch_norm=true"),
    "DeepFM": ("net_dropout=0.2", "batch_norm=true"),
}


@pytest.fixture
def experiment(tiny_overrides: list[str]) -> Callable[..., Experiment]:
    def load(model: str, seed: int, *overrides: str) -> Experiment:
        zoo = ROOT / "model_zoo" / model
        values = [*tiny_overrides, *CALM, *OPTIONS.get(model, ()), *overrides]
        return load_experiment(zoo / "config", f"{model}_tiny", zoo, values, seed)

    return load


def elsewhere(experiment: Experiment) -> str:
    """An override that keeps runs alone apart from those in a stack."""
    return f"model_root={Path(experiment.training.model_root) / 'alone'}"


def begin(experiment: Experiment) -> tuple[Trainer, RandomState, Batches]:
    """What a run has when it begins to train."""
    seed_everything(experiment.training.seed)
    data = build_dataset(experiment.dataset, root=experiment.root, task=experiment.training.task)
    feature_map, trainer = prepare(experiment, data, -1)
    batches = open_batches(experiment, data, feature_map, "train", trainer, in_order=False)
    trainer.model.train()
    return trainer, RandomState(CPU), batches


def step_together(begun: list[tuple[Trainer, RandomState, Batches]], steps: int) -> Tensor:
    """Losses (steps, S) of the first steps, in a stack."""
    stack, states = Stack([trainer for trainer, _, _ in begun]), [state for _, state, _ in begun]
    losses = []
    for _, batches in zip(range(steps), zip(*(batches for _, _, batches in begun), strict=True), strict=False):
        loss, states = stack.step(batches, states)
        losses.append(loss)
    return torch.stack(losses)


def step_alone(begun: list[tuple[Trainer, RandomState, Batches]], steps: int) -> Tensor:
    """The same, each alone."""
    losses = []
    for trainer, state, batches in begun:
        state.restore()
        losses.append(torch.stack([trainer.step(batch) for _, batch in zip(range(steps), batches, strict=False)]))
    return torch.stack(losses, dim=1)


@pytest.mark.parametrize("model", OPTIONS)
def test_the_steps_of_a_stack_are_those_of_each_model_alone(experiment: Any, model: str) -> None:
    alone, together = ([begin(experiment(model, seed)) for seed in SEEDS] for _ in range(2))
    steps = len(alone[0][2])  # a whole epoch, its last batch smaller
    assert alone[0][2].num_rows % alone[0][2].batch_size
    torch.testing.assert_close(step_together(together, steps), step_alone(alone, steps), rtol=1e-6, atol=1e-6)
    first_weights = [next(iter(trainer.model.state_dict().values())) for trainer, _, _ in together]
    assert len({float(weight.sum()) for weight in first_weights}) == len(SEEDS)
    for (mine, _, _), (theirs, _, _) in zip(together, alone, strict=True):
        assert_close_weights(mine.model, theirs.model)
        steps_of = [
            {float(s["step"]) for s in t.model.optimizer.state_dict()["state"].values()} for t in (mine, theirs)
        ]
        assert steps_of[0] == steps_of[1] == {float(steps)}


def assert_close_weights(mine: nn.Module, theirs: nn.Module) -> None:
    """Compare all but biases in front of a batch norm and the means that follow them: their gradient is rounding alone."""
    weights = theirs.state_dict()
    for name, value in mine.state_dict().items():
        if not NO_EFFECT.fullmatch(name):
            torch.testing.assert_close(value, weights[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_each_model_has_its_own_clipping_and_learning_rate(experiment: Any) -> None:
    alone, together = (
        [begin(experiment("DCNv3", seed, "max_gradient_norm=0.05", "net_regularizer=1.e-2")) for seed in SEEDS]
        for _ in range(2)
    )
    for begun in (alone, together):
        for i, (trainer, _, _) in enumerate(begun):
            with torch.no_grad():  # gradients of other norms
                trainer.model.ECN.fc.weight.mul_(1 + i)
            for group in trainer.model.optimizer.param_groups:
                group["lr"] *= 0.3**i
    torch.testing.assert_close(step_together(together, 20), step_alone(alone, 20), rtol=1e-6, atol=1e-6)
    for (mine, _, _), (theirs, _, _) in zip(together, alone, strict=True):
        torch.testing.assert_close(mine.model.state_dict(), theirs.model.state_dict(), rtol=1e-5, atol=1e-5)


def test_a_model_that_leaves_goes_on_alone(experiment: Any) -> None:
    alone, together = ([begin(experiment("SDCNv3", seed)) for seed in SEEDS] for _ in range(2))
    step_alone(alone, 10)
    stack, states = Stack([trainer for trainer, _, _ in together]), [state for _, state, _ in together]
    for _, batches in zip(range(5), zip(*(batches for _, _, batches in together), strict=True), strict=False):
        _, states = stack.step(batches, states)
    leaving, state, batches = together[1][0], states[1], together[1][2]
    stack.release(leaving)
    before = [trainer.model.state_dict() for trainer, _, _ in (together[0], together[2])]
    before = [{name: x.clone() for name, x in weights.items()} for weights in before]
    state.restore()
    for _, batch in zip(range(5), batches.at(0, 5), strict=False):
        leaving.step(batch)
    torch.testing.assert_close(leaving.model.state_dict(), alone[1][0].model.state_dict(), rtol=1e-5, atol=1e-5)
    for weights, (trainer, _, _) in zip(before, (together[0], together[2]), strict=True):
        torch.testing.assert_close(trainer.model.state_dict(), weights, rtol=0, atol=0)


def curve(run_dir: Path) -> list[dict[str, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith("seconds")} for line in lines]


def assert_close_figures(mine: dict[str, float], theirs: dict[str, float]) -> None:
    """To 1e-6, but for the AUC of a thousand rows, where one pair that changes places by rounding is 4e-6."""
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert mine[name] == pytest.approx(value, abs=1e-5 if name == "AUC" else 1e-6), name


def assert_as_alone(experiments: list[Experiment], reports: list[Any], override: str, load: Any, *values: str) -> None:
    """Compare runs with those of each seed alone."""
    for experiment, report in zip(experiments, reports, strict=True):
        assert not isinstance(report, BaseException), report
        alone = load(experiment.training.model, experiment.training.seed, *values, override)
        expected = run(alone)
        for split, figures in expected["metrics"].items():
            assert_close_figures(report["metrics"][split], figures)
        assert [report[key] for key in ("epochs", "best_epoch", "rows", "parameters", "data_hash")] == [
            expected[key] for key in ("epochs", "best_epoch", "rows", "parameters", "data_hash")
        ]
        mine, theirs = curve(experiment.run_dir), curve(alone.run_dir)
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert_close_figures(a, b)
        assert {p.name for p in experiment.run_dir.iterdir()} == {p.name for p in alone.run_dir.iterdir()}


@pytest.mark.parametrize("model", OPTIONS)
def test_runs_are_complete_and_proven(experiment: Any, model: str) -> None:
    # The batch norm of an MLP_Block follows a bias that only rounding moves (NO_EFFECT), which shows in an evaluation.
    values = ("batch_norm=false",) if model in ("DNN", "DeepFM") else ()
    experiments = [experiment(model, seed, *values) for seed in SEEDS]
    reports: list[Any] = run_together(experiments, commands=[f"command {seed}" for seed in SEEDS])
    assert_as_alone(experiments, reports, elsewhere(experiments[0]), experiment, *values)
    for e, report in zip(experiments, reports, strict=True):
        assert report["stack"] == {"seeds": list(SEEDS), "steps": curve(e.run_dir)[-1]["step"]}
        assert report["command"] == f"command {e.training.seed}" and report["seed"] == e.training.seed
        log = (e.run_dir / "train.log").read_text()
        assert log.count("Start training") == 1 and log.count("Evaluation @epoch 1") == 1
        verdict = verify(e.run_dir)
        assert not verdict.problems and verdict.metrics["test"] == pytest.approx(report["metrics"]["test"], abs=1e-9)
    ledger = read_ledger(experiments[0].root / experiments[0].training.model_root / "ledger.jsonl")
    assert sorted(entry["seed"] for entry in ledger) == list(SEEDS)


def test_seeds_stop_when_they_would_stop_alone(experiment: Any) -> None:
    values = ("epochs=10", "early_stop_patience=1", "learning_rate=2.e-2", "batch_size=500")
    values += ("num_deep_cross_layers=1", "num_shallow_cross_layers=1", "net_regularizer=0")
    experiments = [experiment("SDCNv3", seed, *values) for seed in SEEDS]
    reports: list[Any] = run_together(experiments)
    assert_as_alone(experiments, reports, elsewhere(experiments[0]), experiment, *values)
    epochs = sorted(report["epochs"] for report in reports)
    assert epochs[0] < epochs[-1] < 10  # so that the stack shrank
    for report in reports:  # a last one would go on alone
        assert report["stack"]["steps"] == min(report["epochs"], epochs[-2]) * 8


def stops_after(calls: int) -> Callable[[], bool]:
    remaining = [calls]

    def should_stop() -> bool:
        remaining[0] -= 1
        return remaining[0] < 0

    return should_stop


def test_interrupted_runs_go_on_from_wherever_each_was(experiment: Any) -> None:
    experiments = [experiment("SDCNv3", seed) for seed in SEEDS]
    # The first in the middle of an epoch, the second in another place, the third never.
    sessions = [Session(should_stop=stops_after(calls)) for calls in (10, 40, 10**9)]
    first, second, third = run_together(experiments, sessions=sessions)
    assert isinstance(first, InterruptedRunError) and isinstance(second, InterruptedRunError)
    assert isinstance(third, dict)
    done = (experiments[2].run_dir / "DONE").stat().st_mtime_ns
    reports: list[Any] = run_together(experiments)
    assert (experiments[2].run_dir / "DONE").stat().st_mtime_ns == done  # it is not run again
    assert reports[2] == third and [report["is_resumed"] for report in reports[:2]] == [True, True]
    assert "stack" in reports[0]
    assert_as_alone(experiments, reports, elsewhere(experiments[0]), experiment)


def test_finished_runs_are_run_anew(experiment: Any) -> None:
    experiments = [experiment("DNN", seed, "epochs=1") for seed in SEEDS]
    first: list[Any] = run_together(experiments)
    again: list[Any] = run_together(experiments)
    assert [r["metrics"] for r in first] == [r["metrics"] for r in again]
    assert not any(report["is_resumed"] for report in again)


def test_a_key_press_ends_all_and_the_next_call_goes_on(experiment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    experiments = [experiment("SDCNv3", seed) for seed in SEEDS]
    step, remaining = Stack.step, [45]

    def interrupted(self: Stack, *arguments: Any) -> Any:
        remaining[0] -= 1
        if not remaining[0]:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(Stack, "step", interrupted)
    level = logging.getLogger().level
    with pytest.raises(KeyboardInterrupt):
        run_together(experiments)
    assert logging.getLogger().level == level
    assert not any((e.run_dir / "DONE").exists() for e in experiments)
    assert "KeyboardInterrupt" in (experiments[0].run_dir / "train.log").read_text()
    assert [load_checkpoint(e.run_dir / "last.ckpt")["progress"]["epoch"] for e in experiments] == [1, 1, 1]
    reports: list[Any] = run_together(experiments)
    assert all(report["is_resumed"] for report in reports)
    assert_as_alone(experiments, reports, elsewhere(experiments[0]), experiment)


def test_one_seed_that_fails_leaves_the_others_as_they_were(experiment: Any) -> None:
    values = ("batch_norm=false",)
    experiments = [experiment("DNN", seed, *values) for seed in SEEDS]
    calls = [0]

    def spoil(trainer: Trainer) -> None:
        def should_stop() -> bool:
            calls[0] += 1
            if calls[0] == 20:
                next(p for p in trainer.model.mlp.parameters()).data.fill_(float("nan"))
            return False

        trainer.should_stop = should_stop

    sessions = [Session(), Session(on_trainer=spoil), Session()]
    first, second, third = run_together(experiments, sessions=sessions)
    assert isinstance(second, TrainingError) and "the training loss became nan in epoch 1, batch 21" in str(second)
    kept = [experiments[0], experiments[2]]
    assert_as_alone(kept, [first, third], elsewhere(experiments[0]), experiment, *values)
    assert isinstance(third, dict) and third["stack"]["steps"] == 63  # the one that failed was made alone


def branches(trainer: Trainer) -> None:
    """A forward that looks at values."""
    forward = trainer.model.forward
    trainer.model.forward = lambda batch: forward(batch) if float(batch["label"].sum()) >= 0 else {}


def draws(trainer: Trainer) -> None:
    """A forward that draws random numbers without a dropout layer."""
    forward = trainer.model.forward

    def noisy(batch: Any) -> Any:
        given = forward(batch)
        return {"y_pred": (given["y_pred"] + 0.01 * torch.rand(1)).clamp(0, 1)}

    trainer.model.forward = noisy


@pytest.mark.parametrize(
    "change, reason",
    [
        (branches, "it does not run under vmap: RuntimeError: vmap: It looks like you're calling .item"),
        (draws, "it draws random numbers outside of its dropout layers"),
    ],
)
def test_models_that_cannot_be_stacked_are_run_one_after_the_other(
    experiment: Any, caplog: pytest.LogCaptureFixture, change: Callable[[Trainer], None], reason: str
) -> None:
    experiments = [experiment("DNN", seed) for seed in SEEDS]
    with caplog.at_level(logging.DEBUG, "ctrbench.stacked_runs"):
        reports = run_together(experiments, sessions=[Session(on_trainer=change) for _ in SEEDS])
    assert f"DNN cannot be stacked, its seeds are run one after the other: {reason}" in caplog.text
    for seed, report in zip(SEEDS, reports, strict=True):
        alone = experiment("DNN", seed, elsewhere(experiments[0]))
        expected = run(alone, session=Session(on_trainer=change))
        assert isinstance(report, dict) and report["metrics"] == expected["metrics"] and "stack" not in report


def test_a_model_with_another_optimizer_is_not_stacked(experiment: Any, caplog: pytest.LogCaptureFixture) -> None:
    experiments = [experiment("DNN", seed, "optimizer=SGD", "epochs=1") for seed in SEEDS]
    with caplog.at_level(logging.DEBUG, "ctrbench.stacked_runs"):
        reports = run_together(experiments)
    assert "it has a training step of its own" in caplog.text
    assert all(isinstance(report, dict) and "stack" not in report for report in reports)
    trainers = [begin(e)[0] for e in experiments[:2]]
    with pytest.raises(UnstackableError, match="a training step of its own"):
        Stack(trainers)


def test_models_of_other_shapes_are_not_stacked(experiment: Any) -> None:
    trainers = [begin(experiment("DNN", 1, f"embedding_dim={width}"))[0] for width in (4, 8)]
    with pytest.raises(UnstackableError, match="its parameters differ in shape from seed to seed"):
        Stack(trainers)


def test_runs_that_cannot_go_together(experiment: Any) -> None:
    with pytest.raises(ConfigError, match="--seeds: 1 is there twice: name every seed once"):
        run_together([experiment("DNN", 1), experiment("DNN", 1)])
    with pytest.raises(ConfigError, match="must be of one experiment and differ in their seeds alone"):
        run_together([experiment("DNN", 1), experiment("DNN", 2, "embedding_dim=4")])


def test_batches_are_stacked_by_their_packed_matrices() -> None:
    columns = {"a": torch.arange(20).int(), "b": torch.arange(40).view(20, 2).int(), "x": torch.rand(20)}
    batches = [next(iter(Batches(columns, 8, shuffle=True, seed=seed))) for seed in SEEDS]
    stacked = stack_batches(batches)
    assert stacked["a"].untyped_storage().data_ptr() == stacked["b"].untyped_storage().data_ptr()
    for name in columns:
        torch.testing.assert_close(stacked[name], torch.stack([batch[name] for batch in batches]), rtol=0, atol=0)
    free = [(batch["x"].clone(), {"b": batch["b"].long()}) for batch in batches]
    torch.testing.assert_close(stack_batches(free), (stacked["x"], {"b": stacked["b"].long()}), rtol=0, atol=0)


def test_a_stack_is_chosen_where_it_is_faster(experiment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cores = {"count": 2}
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores["count"])))
    small, large = experiment("DNN", 1, "batch_size=64", "embedding_dim=4"), experiment("DNN", 1, "batch_size=4096")
    assert is_tiny(small) and not is_tiny(large)
    cores["count"] = 16
    assert not is_tiny(small)


@pytest.mark.parametrize("form", ["stack", "processes"])
def test_the_command_line(tiny_overrides: list[str], capsys: pytest.CaptureFixture[str], form: str) -> None:
    values = [word for value in [*tiny_overrides, "epochs=1"] for word in ("--set", value)]
    command = ["run", "--expid", "DNN_tiny", "--seeds", "1", "2", "--together", form, *values]
    assert main(command) == 0
    printed = capsys.readouterr().out
    folder = Path(next(v for v in tiny_overrides if v.startswith("model_root")).partition("=")[2]) / "tiny_ctr/DNN_tiny"
    for seed in (1, 2):
        report = json.loads((folder / f"seed_{seed}" / "report.json").read_text())
        assert ("stack" in report) == (form == "stack")
        assert f"seed {seed}: test  AUC {report['metrics']['test']['AUC']:.6f}" in printed
        assert not verify(folder / f"seed_{seed}").problems


@pytest.mark.parametrize(
    "options, status, message",
    [
        (["--seeds", "1", "2", "--seed", "3"], 2, "error: --seeds: several runs at once, so neither --seed nor"),
        (["--seeds", "1", "2", "--profile"], 2, "error: --seeds: several runs at once, so neither --seed nor"),
        (["--seeds", "1", "1"], 2, "error: --seeds: 1 is there twice: name every seed once"),
        (["--seeds", "1", "2", "--together", "stack", "--set", "learning_rate=1.e+30"], 1,
         "error: seed 1: the training loss became nan in epoch 1, batch 2"),
    ],
)  # fmt: skip
def test_what_the_command_line_refuses(
    tiny_overrides: list[str], capsys: pytest.CaptureFixture[str], options: list[str], status: int, message: str
) -> None:
    values = [word for value in tiny_overrides for word in ("--set", value)]
    assert main(["run", "--expid", "DNN_tiny", *values, *options]) == status
    assert message in capsys.readouterr().err


def test_model_code_that_fails_leaves_no_run_locked(experiment: Any) -> None:
    def fails(trainer: Trainer) -> None:
        forward = trainer.model.forward

        def broken(batch: Any) -> Any:
            if trainer.model.training:
                raise LookupError("broken on purpose")
            return forward(batch)

        trainer.model.forward = broken

    experiments = [experiment("DNN", seed, "epochs=1") for seed in SEEDS]
    reports = run_together(experiments, sessions=[Session(on_trainer=fails) for _ in SEEDS])
    assert all(str(report).endswith("broken on purpose") for report in reports), reports
    assert all(isinstance(report, dict) for report in run_together(experiments))
