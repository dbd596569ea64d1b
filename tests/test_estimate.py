# SPDX-License-Identifier: Apache-2.0
"""What an experiment will take is told from its model and its data, and the random rows that time it fit every model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_script

from ctrbench import estimate as module
from ctrbench import memory
from ctrbench.batches import Batches, load_items
from ctrbench.cli import main
from ctrbench.config import Experiment, load_experiment
from ctrbench.errors import ConfigError, TrainingError
from ctrbench.estimate import BYTES_PER_PARAMETER, Estimate, construct, estimate, random_batch
from ctrbench.features import load_feature_map
from ctrbench.guards import check_predictions, warn_of_explosion
from ctrbench.preprocess import DataFolder, build_dataset
from ctrbench.run import count_parameters, open_batches, prepare
from ctrbench.storage import open_split

ROOT = Path(__file__).resolve().parents[1]
EXPIDS = ["SDCNv3_tiny", "DCNv3_tiny", "QIN_tiny_mm", "DIN_tiny_mm"]


@pytest.fixture(scope="module")
def tiny_mm_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    load_script(ROOT / "data" / "make_tiny.py")
    folder = tmp_path_factory.mktemp("raw") / "tiny_mm"
    sys.modules["make_tiny_mm"].make_tiny_mm(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_mm_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def load(tiny_raw: Path, tiny_data_root: Path, tiny_mm_raw: Path, tiny_mm_root: Path, tmp_path: Path) -> Any:
    def load_tiny(expid: str, *overrides: str) -> Experiment:
        raw, data_root, suffix = tiny_raw, tiny_data_root, "csv"
        files = []
        if expid.endswith("_mm"):
            raw, data_root, suffix = tiny_mm_raw, tiny_mm_root, "parquet"
            files = [f"item_info={raw / 'item_info.parquet'}"]
        files += [f"{split}_data={raw / split}.{suffix}" for split in ("train", "valid", "test")]
        places = [f"data_root={data_root}", f"model_root={tmp_path / 'runs'}", "verbose=0"]
        zoo = ROOT / "model_zoo" / expid.split("_")[0]
        return load_experiment(zoo / "config", expid, zoo, [*files, *places, *overrides])

    return load_tiny


def build(experiment: Experiment) -> DataFolder:
    return build_dataset(experiment.dataset, root=experiment.root, task=experiment.training.task)


@pytest.mark.parametrize("expid", EXPIDS)
def test_parameters_and_bytes(load: Any, expid: str) -> None:
    experiment = load(expid)
    data = build(experiment)
    _, trainer = prepare(experiment, data, -1)
    found = estimate(experiment)
    assert found.parameters == count_parameters(trainer)["total"] and found.epoch_seconds is None
    assert found.model_bytes == BYTES_PER_PARAMETER * found.parameters == 16 * found.parameters
    assert found.num_rows == data.num_rows["train"] and not experiment.run_dir.exists()


@pytest.mark.parametrize(
    "expid",
    EXPIDS,
)
def test_bytes_of_the_data(load: Any, expid: str) -> None:
    experiment = load(expid)
    data = build(experiment)
    feature_map, _ = prepare(experiment, data, -1)
    held = []
    for path in data.splits.values():
        split = Batches.from_file(path, feature_map, 1 << 13, labels_required=False)
        held += [split._ids, split._reals]
    held += (feature_map.item_table or {}).values()
    assert estimate(experiment).data_bytes == pytest.approx(sum(x.numel() * x.element_size() for x in held), rel=0.05)


@pytest.mark.parametrize("expid", EXPIDS)
def test_random_rows_look_like_those_of_the_data_and_fit_the_model(load: Any, expid: str) -> None:
    experiment = load(expid, "batch_size=64")
    data = build(experiment)
    feature_map, trainer = prepare(experiment, data, -1)
    batch = random_batch(feature_map, experiment.training, torch.device("cpu"))
    with open_split(data.splits["train"], feature_map) as split:
        assert split.num_rows > 64
    real = next(iter(Batches.from_file(data.splits["train"], feature_map, 64)))
    assert set(real) <= set(batch)
    for name, values in real.items():
        assert batch[name].shape == values.shape and batch[name].dtype == values.dtype, name
        size = feature_map.features.get(name, {}).get("vocab_size")
        assert size is None or (int(batch[name].min()) >= 0 and int(batch[name].max()) < size), name
    label = feature_map.labels[0]
    assert sorted(batch[label].unique().tolist()) == [0.0, 1.0]
    assert all(torch.equal(batch[n], v) for n, v in random_batch(feature_map, experiment.training, "cpu").items())
    trainer.model.train()
    assert torch.isfinite(torch.tensor(float(trainer.step(batch))))
    trainer.model.eval()
    with torch.no_grad():
        assert trainer.model(batch)["y_pred"].shape == (64, 1)


@pytest.mark.parametrize("expid", EXPIDS)
def test_the_time_of_an_epoch(load: Any, expid: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    experiment = load(expid, "batch_size=64")
    rows = build(experiment).num_rows["train"]
    monkeypatch.setattr(module, "TIMED_STEPS", 1)
    ticks = iter([0.0, 9.0, 10.0, 10.5])  # a step that is not counted, and one of half a second
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(ticks))
    found = estimate(experiment, gpu=-1)
    assert found.epoch_seconds == 0.5 * -(-rows // 64)
    assert not (tmp_path / "runs").exists()


def test_the_median_step_counts(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = load("DCNv3_tiny", "batch_size=4000")
    build(experiment)
    ticks = iter([0.0, 9.0, 10.0, 13.0, 20.0, 21.0, 30.0, 32.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(ticks))
    assert estimate(experiment, gpu=-1).epoch_seconds == 2.0


def test_nothing_is_known_before_the_data_is_built(load: Any, tmp_path: Path) -> None:
    for expid in EXPIDS:
        experiment = load(expid, f"data_root={tmp_path / 'none'}")
        assert estimate(experiment, gpu=-1) == Estimate(None, None, None, None, None)
    assert not (tmp_path / "none").exists()


def test_nothing_is_known_of_data_of_other_settings(load: Any) -> None:
    build(load("DCNv3_tiny"))
    assert estimate(load("DCNv3_tiny")).parameters is not None
    assert estimate(load("DCNv3_tiny", "min_categr_count=7")) == Estimate(None, None, None, None)


def test_a_draft_says_so(load: Any, tmp_path: Path) -> None:
    made = construct(load("DCNv3_tiny", f"data_root={tmp_path}"))
    assert made is not None and made[2] is False
    build(load("DCNv3_tiny"))
    made = construct(load("DCNv3_tiny"))
    assert made is not None and made[2] is True
    assert sum(p.numel() for p in made[0].parameters()) == estimate(load("DCNv3_tiny")).parameters


def test_ready_data_that_is_not_there(load: Any, tmp_path: Path) -> None:
    files = [f"{split}_data={split}" for split in ("train", "valid", "test")]
    zoo = ROOT / "model_zoo" / "DCNv3"
    overrides = ["data_format=h5", f"data_root={tmp_path}", *files]
    experiment = load_experiment(zoo / "config", "DCNv3_tiny", zoo, overrides, is_data_required=False)
    assert construct(experiment) is None and estimate(experiment) == Estimate(None, None, None, None)


def test_what_does_not_fit_is_told_with_its_place(load: Any) -> None:
    experiment = load("DCNv3_tiny", "embedding_dim=7")
    build(experiment)
    with pytest.raises(
        ConfigError, match=r"model_config\.yaml: DCNv3_tiny: DCNv3: embedding_dim must be even, .* got 7$"
    ):
        estimate(experiment)


def test_rows_of_a_meta_column_and_a_vector(load: Any) -> None:
    experiment = load("DIN_tiny_mm", "batch_size=8")
    data = build(experiment)
    feature_map = load_feature_map(data.feature_map_file, "tiny_mm", experiment.flat())
    assert data.items_file is not None
    without = random_batch(feature_map, experiment.training, torch.device("cpu"))
    feature_map.item_table = load_items(data.items_file, feature_map, "cpu")
    batch = random_batch(feature_map, experiment.training, torch.device("cpu"))
    assert set(batch) >= set(without)
    history = batch["item_seq"]
    assert history.dim() == 2 and int(history.min()) >= 0 and int(history.max()) < 601


# ---------------------------------------------------------------- the command


def values_of(*overrides: str) -> list[str]:
    return [word for value in overrides for word in ("--set", value)]


def test_the_command(
    load: Any, tiny_raw: Path, tiny_data_root: Path, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = load("DCNv3_tiny")
    rows = build(experiment).num_rows["train"]
    command = ["estimate", "--expid", "DCNv3_tiny", *values_of(*tiny_overrides)]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    total = estimate(experiment).parameters
    assert lines[0] == "DCNv3_tiny: DCNv3 on tiny_ctr, batches of 128, cpu"
    assert lines[1].startswith(f"parameters: {total:,}, of them ")
    assert [line.split(":")[0] for line in lines[1:]] == ["parameters", *["memory"] * 4, "time"]
    assert f"weights, gradients and optimizer: {16 * total / 2**20:.2f} MiB" in lines[2]
    assert "are free on cpu" in lines[5] and f"for an epoch of {rows:,} rows" in lines[6]
    assert not experiment.run_dir.exists()


def test_the_command_before_the_data_are_built(
    tmp_path: Path, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*tiny_overrides, f"data_root={tmp_path / 'none'}"]
    assert main(["estimate", "--expid", "DCNv3_tiny", *values_of(*overrides)]) == 0
    text = capsys.readouterr().out
    assert "parameters: at least (vocabularies are known when tiny_ctr is built)" in text
    assert "memory: data: not known" in text and "for a million rows, evaluation apart" in text
    assert not (tmp_path / "none").exists()


def test_tables_that_do_not_fit_are_refused_before_they_are_allocated(
    tmp_path: Path, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_SMALL", 0)
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    for command in ("estimate", "run", "check"):
        assert main([command, "--expid", "DCNv3_tiny", *values_of(*tiny_overrides)]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "DCNv3_tiny: not enough memory for the embedding tables, which need " in line
        assert "the largest is 'user_id' with " in line and "rows of width 16: lower embedding_dim" in line
    assert not (tmp_path / "runs").exists()


def test_activations_grow_with_the_batch(load: Any) -> None:
    found = []
    for size in (64, 128, 5120):
        experiment = load("DCNv3_tiny", f"batch_size={size}")
        feature_map = load_feature_map(build(experiment).feature_map_file, "tiny_ctr", experiment.flat())
        found.append(module._activation_bytes(experiment, feature_map, -1))
    assert found[1] == pytest.approx(2 * found[0], rel=0.1)
    assert found[2] == pytest.approx(80 * found[0], rel=0.1)


# ---------------------------------------------------------------- memory


def test_free_memory_heeds_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 5000 kB\n")
    (tmp_path / "max").write_text("3000000\n")
    (tmp_path / "current").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 400\nactive_file 100\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUPS", ((tmp_path, "max", "current"),))
    assert memory.free_memory("cpu") == 2000500
    (tmp_path / "max").write_text("max\n")
    assert memory.free_memory("cpu") == 5000 * 1024
    (tmp_path / "meminfo").unlink()
    assert memory.free_memory("cpu") is None


def test_what_is_out_of_memory() -> None:
    assert memory.is_out_of_memory(MemoryError())
    assert memory.is_out_of_memory(
        RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried")
    )
    error = ValueError("x")
    error.__cause__ = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    assert memory.is_out_of_memory(error)
    assert not memory.is_out_of_memory(RuntimeError("shape mismatch")) and not memory.is_out_of_memory(None)


def test_a_batch_that_is_too_large_is_told_with_one_that_fits(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = load("DCNv3_tiny", "batch_size=100")
    data = build(experiment)
    feature_map, trainer = prepare(experiment, data, -1)
    step, limit = trainer.built_step, 40

    def limited(batch: Any) -> torch.Tensor:
        if len(batch["label"]) > limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return step(batch)

    trainer.built_step = limited
    train = open_batches(experiment, data, feature_map, "train", trainer, in_order=False)
    message = "not enough memory on cpu for a batch of 100 rows: set batch_size: 32, which fits$"
    with pytest.raises(TrainingError, match=message):
        trainer.fit(train, None)
    limit = 0
    with pytest.raises(TrainingError, match=r"of 100 rows: lower batch_size and embedding_dim$"):
        trainer.fit(train, None)

    def too_large(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer.evaluator, "evaluate", too_large)
    with pytest.raises(
        TrainingError, match="for batches of 100 rows without gradients: set eval_batch_size to 25 or less"
    ):
        trainer.evaluate(train)


# ---------------------------------------------------------------- signs that a model does not learn


def test_constant_and_non_finite_predictions(caplog: pytest.LogCaptureFixture) -> None:
    check_predictions({"y_pred": torch.tensor([0.1, 0.2])})
    check_predictions({"y_pred": torch.zeros(0)})
    assert not caplog.records
    check_predictions({"y_pred": torch.full((5,), 0.5)})
    assert "All 5 predictions (y_pred) are 0.5: the model tells no row from another" in caplog.text
    for value in (float("nan"), float("inf")):
        with pytest.raises(
            TrainingError, match=r"the predictions \(y_pred\) are no longer finite: .* lower learning_rate"
        ):
            check_predictions({"y_pred": torch.tensor([0.5, value])})


def test_an_exploding_loss(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_explosion(9.0, [])
    warn_of_explosion(4.0, [{"train_loss": 0.5}, {"train_loss": 0.6}])
    assert not caplog.records
    warn_of_explosion(10.0, [{"train_loss": 0.5}, {"train_loss": 0.6}])
    assert "The training loss explodes: 10, 20 times the lowest so far: lower learning_rate" in caplog.text
