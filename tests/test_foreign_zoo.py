# SPDX-License-Identifier: Apache-2.0
"""Model folders in FuxiCTR's layout, run unchanged: the same weights and metrics as FuxiCTR's own loop gives.

The reference is FuxiCTR: its config loader, feature map, model and `fit`, on batches that are sliced from the stored
columns (or made by the folder's own loader from the raw files) without ctrbench.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fuxictr.features
import h5py
import numpy as np
import polars as pl
import pytest
import safetensors.torch
import torch
from fuxictr.pytorch.models import BaseModel
from fuxictr.pytorch.torch_utils import seed_everything
from fuxictr.utils import load_config
from sklearn.metrics import log_loss, roc_auc_score

from ctrbench.cli import main
from ctrbench.config import load_experiment
from ctrbench.errors import InterruptedRunError
from ctrbench.estimate import estimate
from ctrbench.preprocess import build_dataset
from ctrbench.run import Session, open_batches, prepare, run
from ctrbench.sections import find_root
from ctrbench.trainer import Trainer
from ctrbench.tuner.space import parse_space
from ctrbench.yamlfile import dump_yaml, load_yaml
from ctrbench.zoo import _import_package, load_model_class

FOLDERS = Path(__file__).resolve().parent / "foreign_zoo"
SPLITS = {"train": 500, "valid": 200, "test": 150}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The raw files that the folders' configurations name."""
    folder = tmp_path_factory.mktemp("foreign") / "data"
    rng = np.random.default_rng(7)
    for split, rows in SPLITS.items():
        for name, frame in (("tiny_clicks", clicks(rng, rows)), ("tiny_history", histories(rng, rows))):
            (folder / name).mkdir(parents=True, exist_ok=True)
            if name == "tiny_clicks":
                frame.write_csv(folder / name / f"{split}.csv")
            else:
                frame.write_parquet(folder / name / f"{split}.parquet")
    item_info(rng).write_parquet(folder / "tiny_history" / "item_info.parquet")
    return folder


def clicks(rng: np.random.Generator, rows: int) -> pl.DataFrame:
    user, item, cate, hour = (rng.integers(0, n, rows) for n in (25, 30, 6, 8))
    price = rng.normal(size=rows).round(3)
    logit = np.sin(item) + 0.8 * np.cos(3 * cate) * np.sin(hour) + 0.5 * price
    history = rng.integers(0, 30, (rows, 6))
    lengths = rng.integers(0, 7, rows)

    def tokens(values: np.ndarray) -> list[str]:
        return ["^".join(map(str, row[:n])) for row, n in zip(values, lengths, strict=True)]

    return pl.DataFrame(
        {
            "click": (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(int),
            "like": (rng.random(rows) < 1 / (1 + np.exp(1 - np.cos(hour)))).astype(int),
            "watch": (2 * np.sin(item) + 0.1 * rng.normal(size=rows)).round(4),
            "user_id": [f"u{u}" for u in user],
            "item_id": item,
            "cate_id": cate,
            "hour": hour,
            "price": price,
            "hist_items": tokens(history),
            "hist_cates": tokens(history % 6),
        }
    )


def histories(rng: np.random.Generator, rows: int) -> pl.DataFrame:
    lengths = rng.integers(0, 9, (rows, 1))
    sequence = rng.integers(1, 40, (rows, 8)) * (np.arange(8) >= 8 - lengths)
    target, likes = rng.integers(1, 40, rows), rng.integers(0, 6, rows)
    logit = np.sin(target) + ((sequence % 5) == (target % 5)[:, None]).sum(1) - 0.3 * likes
    return pl.DataFrame(
        {
            "user_id": rng.integers(0, 20, rows),
            "item_seq": sequence.tolist(),
            "item_id": target,
            "likes_level": likes,
            "views_level": rng.integers(0, 6, rows),
            "label": (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(int),
        }
    )


def item_info(rng: np.random.Generator) -> pl.DataFrame:
    ids = np.arange(41)
    real = (ids > 0)[:, None]
    return pl.DataFrame(
        {
            "item_id": ids,
            "item_kind": (ids % 8 + 1) * (ids > 0),
            "item_tags": (rng.integers(0, 13, (41, 3)) * real).tolist(),
            "item_emb": (rng.normal(size=(41, 5)) * real).tolist(),
        }
    )


@pytest.fixture
def zoo(data: Path, tmp_path: Path) -> Path:
    """A copy of all folders, with the data beside them."""
    shutil.copytree(FOLDERS, tmp_path / "zoo")
    (tmp_path / "zoo" / "data").symlink_to(shutil.copytree(data, tmp_path / "raw"))
    return tmp_path / "zoo"


class Ran:
    """A finished `ctrbench run --zoo <folder>`."""

    def __init__(self, folder: Path, expid: str, *options: str):
        self.folder, self.expid = folder, expid
        assert main(["run", "--zoo", str(folder), "--expid", expid, *options]) == 0
        (self.run_dir,) = folder.glob(f"checkpoints/**/{expid}/seed_*")
        self.report = json.loads((self.run_dir / "report.json").read_text())
        self.metrics = self.report["metrics"]
        self.weights = safetensors.torch.load_file(self.run_dir / "best.safetensors")

    def curve(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]

    def predictions(self, split: str = "test") -> pl.DataFrame:
        output = self.run_dir / f"{split}.csv"
        assert main(["predict", str(self.run_dir), "--split", split, "--output", str(output)]) == 0
        return pl.read_csv(output)


class Columns:
    """Batches of a stored split as FuxiCTR's loaders give them: int64 and float64 columns, copies every time."""

    def __init__(self, path: Path, batch_size: int):
        with h5py.File(path) as file:
            arrays = {name: column[:] for name, column in file.items()}
        self.columns = {n: torch.from_numpy(a.astype(float if a.dtype.kind == "f" else int)) for n, a in arrays.items()}
        self.num_rows, self.batch_size = len(next(iter(self.columns.values()))), batch_size

    def __len__(self) -> int:
        return -(-self.num_rows // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, self.num_rows, self.batch_size):
            yield {name: x[start : start + self.batch_size].clone() for name, x in self.columns.items()}


class Stock:
    """The same experiment in FuxiCTR: its configuration, feature map, constructor and `fit`."""

    def __init__(self, ran: Ran, monkeypatch: pytest.MonkeyPatch, **changes: Any):
        monkeypatch.chdir(ran.folder)  # as FuxiCTR's scripts do
        self.params = {**load_config("./config/", ran.expid), "gpu": -1, "model_root": "./stock/", **changes}
        data_dir = Path(self.params["data_root"]) / self.params["dataset_id"]
        self.splits = {split: self.loader(data_dir, split) for split in SPLITS}
        seed_everything(self.params["seed"])
        feature_map = fuxictr.features.FeatureMap(self.params["dataset_id"], str(data_dir))
        feature_map.load(str(data_dir / "feature_map.json"), self.params)
        model_class = load_model_class(ran.folder, self.params["model"])
        self.model: BaseModel = model_class(feature_map, **self.params)
        Path(self.model.model_dir).mkdir(parents=True)

    def loader(self, data_dir: Path, split: str) -> Any:
        return Columns(data_dir / f"{split}.h5", self.params["batch_size"])

    def fit(self) -> Stock:
        self.model.fit(self.splits["train"], validation_data=self.splits["valid"], **self.params)
        return self

    def evaluate(self, metrics: list[str]) -> dict[str, dict[str, float]]:
        return {split: self.model.evaluate(self.splits[split], metrics=metrics) for split in ("valid", "test")}


def assert_same(ran: Ran, stock: Stock, metrics: tuple[str, ...] = ("AUC", "logloss"), rtol: float = 1e-4) -> None:
    """The weights that were kept and the metrics that were reported are FuxiCTR's."""
    expected = stock.model.state_dict()
    assert ran.weights.keys() == expected.keys()
    for name, value in ran.weights.items():
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for split, values in stock.evaluate(list(metrics)).items():
        assert {name: ran.metrics[split][name] for name in values} == pytest.approx(values, abs=1e-4), split


def g_auc(y_true: np.ndarray, y_pred: np.ndarray, groups: np.ndarray) -> float:
    """AUC within groups, weighted by their size; groups of one class do not count."""
    sizes, values = [], []
    for group in np.unique(groups):
        rows = groups == group
        if 0 < y_true[rows].sum() < rows.sum():
            sizes.append(rows.sum())
            values.append(roc_auc_score(y_true[rows], y_pred[rows]))
    return float(np.average(values, weights=sizes))


def test_a_plain_folder(zoo: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    ran = Ran(zoo / "Plain", "Plain_test")
    assert ran.report["uses_fast_path"] and ran.report["own_hooks"] == []
    assert_same(ran, Stock(ran, monkeypatch).fit())
    (warning,) = [r.getMessage() for r in caplog.records if "nothing reads" in r.getMessage()]
    for key in ("accumulation_steps", "factor (here: lr_decay_factor)", "num_workers", "pickle_feature_encoder"):
        assert key in warning
    assert ran.predictions().columns == ["y_pred", "click"]
    assert (zoo / "data" / "tiny_clicks" / "feature_map.json").is_file()  # data_root is meant from the folder


def test_regression(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = Ran(zoo / "Plain", "Plain_regression")
    frame = ran.predictions()
    error = frame["y_pred"].to_numpy() - frame["watch"].to_numpy()
    assert ran.metrics["test"] == pytest.approx({"MSE": (error**2).mean(), "MAE": np.abs(error).mean()}, abs=1e-6)
    stock = Stock(ran, monkeypatch)
    monkeypatch.setattr(
        stock.model, "evaluate_metrics", lambda y, p, metrics, g=None: {"MSE": float(((y - p) ** 2).mean())}
    )  # FuxiCTR has no metric of a regression
    assert_same(ran, stock.fit(), metrics=("MSE",))


def test_a_metric_that_no_regression_has(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "--zoo", str(zoo / "Plain"), "--expid", "Plain_regression", "--set", "metrics=[RMSE]"]
    assert main(command) == 2
    assert "metrics: unknown metric 'RMSE' (did you mean 'MSE'?); known: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["AuxLoss", "OwnLosses"])
def test_own_losses(zoo: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = Ran(zoo / name, f"{name}_test")
    assert ran.report["uses_fast_path"] is (name == "AuxLoss")
    hooks = {"AuxLoss": ["add_loss"], "OwnLosses": ["compute_loss", "regularization_loss"]}[name]
    assert ran.report["own_hooks"] == hooks
    assert_same(ran, Stock(ran, monkeypatch).fit())
    # Without them the weights are others.
    stock = Stock(ran, monkeypatch, model_root="./without/")
    for hook in hooks:
        monkeypatch.setattr(stock.model, hook, types.MethodType(getattr(BaseModel, hook), stock.model))
    stock.fit()
    assert any(not torch.allclose(ran.weights[n], x, rtol=1e-2) for n, x in stock.model.state_dict().items())


def test_add_loss_of_fuxictr_2_0(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = Ran(zoo / "OldAddLoss", "OldAddLoss_test")
    stock = Stock(ran, monkeypatch)

    def train_step(self: BaseModel, batch_data: Any) -> torch.Tensor:  # FuxiCTR 2.0's
        self.optimizer.zero_grad()
        loss = self.add_loss(batch_data) + self.regularization_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters(), self._max_gradient_norm)
        self.optimizer.step()
        return loss

    monkeypatch.setattr(stock.model, "train_step", types.MethodType(train_step, stock.model))
    assert_same(ran, stock.fit())


def test_an_own_train_step_accumulates(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = Ran(zoo / "Accumulation", "Accumulation_test")
    assert not ran.report["uses_fast_path"] and ran.report["own_hooks"] == ["train_step"]
    stock = Stock(ran, monkeypatch).fit()
    assert stock.model.num_updates == 6 and stock.model.scheduler.get_last_lr()[0] < 0.01
    assert ran.curve()[-1]["learning_rate"] == pytest.approx(stock.model.scheduler.get_last_lr()[0])
    assert_same(ran, stock, rtol=1e-6)


@pytest.mark.parametrize("stop_at", [5, 8, 13])
def test_an_own_train_step_continues_where_it_stopped(zoo: Path, stop_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accumulated gradients, the schedule and the model's own counter survive with weights and optimizer."""
    whole = Ran(zoo / "Accumulation", "Accumulation_test", "--set", "model_root=checkpoints/whole")
    step, steps = Trainer.step, 0

    def stopping(self: Trainer, batch: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        self.should_stop = lambda: steps == stop_at
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", stopping)
    command = ["run", "--zoo", str(zoo / "Accumulation"), "--expid", "Accumulation_test"]
    assert main([*command, "--set", "model_root=checkpoints/broken"]) == 130
    monkeypatch.setattr(Trainer, "step", step)
    assert main([*command, "--set", "model_root=checkpoints/broken"]) == 0
    (run_dir,) = (zoo / "Accumulation").glob("checkpoints/broken/*/*/seed_*")
    assert json.loads((run_dir / "report.json").read_text())["is_resumed"]
    for name, value in safetensors.torch.load_file(run_dir / "best.safetensors").items():
        assert torch.equal(value, whole.weights[name]), name


def test_own_inputs_labels_and_groups(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = Ran(zoo / "OwnBatch", "OwnBatch_test")
    assert ran.report["own_hooks"] == ["get_inputs", "get_labels", "get_group_id"]
    stock = Stock(ran, monkeypatch).fit()
    stock.model.feature_map.group_id = None  # FuxiCTR computes group metrics in processes that it forks
    assert_same(ran, stock)
    for split in ("valid", "test"):
        frame = ran.predictions(split)  # its labels are the data's
        y_true, y_pred = 1 - frame["click"].to_numpy(), frame["y_pred"].to_numpy()
        groups = torch.cat([batch["user_id"] for batch in stock.splits[split]]).numpy() // 2
        expected = {"AUC": roc_auc_score(y_true, y_pred), "logloss": log_loss(y_true, y_pred)}
        expected["gAUC"] = g_auc(y_true, y_pred, groups)
        assert ran.metrics[split] == pytest.approx(expected, abs=1e-6)
        assert main(["evaluate", str(ran.run_dir), "--split", split]) == 0
    assert ran.metrics["valid"]["AUC"] > 0.6  # the resident rows were not written to, or a second look would differ


def test_several_tasks(zoo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(zoo / "MultiTask", "MultiTask_test")
    stock = Stock(ran, monkeypatch).fit()
    assert_same(ran, stock)
    names = [f"{label}_{name}" for label in ("click", "like") for name in ("logloss", "AUC")] + ["logloss", "AUC"]
    assert list(ran.metrics["test"]) == names == list(ran.metrics["valid"])
    assert ran.curve()[0].keys() >= {"AUC", "click_AUC", "like_AUC"}
    frame = ran.predictions()
    assert frame.columns == ["click_pred", "like_pred", "click", "like"] and frame.height == SPLITS["test"]
    for label in ("click", "like"):
        auc = roc_auc_score(frame[label], frame[f"{label}_pred"])
        assert ran.metrics["test"][f"{label}_AUC"] == pytest.approx(auc, abs=1e-6)
        expected = np.array(stock.model.predict(stock.splits["test"])[label])
        np.testing.assert_allclose(frame[f"{label}_pred"], expected, atol=1e-5)
    capsys.readouterr()
    assert main(["evaluate", str(ran.run_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(ran.metrics["test"], abs=1e-9)
    scored = ran.run_dir / "scored.parquet"
    raw = zoo / "data" / "tiny_clicks" / "test.csv"
    assert main(["predict", str(ran.run_dir), "--data", str(raw), "--output", str(scored)]) == 0
    np.testing.assert_allclose(pl.read_parquet(scored)["like_pred"], frame["like_pred"], atol=1e-6)
    capsys.readouterr()
    assert main(["predict", str(ran.run_dir), "--submission", str(zoo / "challenge")]) == 2
    assert "MultiTask has the outputs click_pred, like_pred: one is wanted here" in capsys.readouterr().err


def test_tasks_of_two_kinds(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(zoo / "MultiTask", "MultiTask_mixed")
    frame = ran.predictions()
    errors = {label: ((frame[label] - frame[f"{label}_pred"]) ** 2).mean() for label in ("click", "watch")}
    expected = {f"{label}_MSE": error for label, error in errors.items()} | {"MSE": sum(errors.values()) / 2}
    assert ran.metrics["test"] == pytest.approx(expected, abs=1e-6)
    command = ["run", "--zoo", str(zoo / "MultiTask"), "--expid", "MultiTask_mixed"]
    assert main([*command, "--set", "metrics=[AUC]"]) == 2
    assert "AUC needs labels 0 and 1, but one task of the list is regression: use MSE" in capsys.readouterr().err
    assert main([*command, "--set", "loss=[mse_loss, mse_loss, mse_loss]"]) == 2
    assert "MultiTask_mixed.loss: names 3 losses, but task names 2, got" in capsys.readouterr().err
    assert main([*command, "--set", "task=[binary_classification, binary]"]) == 2
    assert "task: must be 'binary_classification' or 'regression', got 'binary'" in capsys.readouterr().err
    assert main([*command, "--set", "num_tasks=3"]) == 2
    assert "MultiTask: the number of tasks must equal the length of" in capsys.readouterr().err


@pytest.mark.parametrize("expid", ["SequenceNet_test", "SequenceNet_list"])
def test_sequences_with_shared_tables(zoo: Path, expid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = Ran(zoo / "SequenceNet", expid)
    assert_same(ran, Stock(ran, monkeypatch).fit())
    assert torch.equal(
        ran.weights["embedding_layer.embedding_layers.item_id.weight"],
        ran.weights["embedding_layer.embedding_layers.hist_items.weight"],
    )
    # A tuple of fields is one attention, a list is several; also for a run that is read back.
    assert ("attention_layers.1.W_q.weight" in ran.weights) is (expid == "SequenceNet_list")
    assert ("!!python/tuple" in (ran.run_dir / "config.yaml").read_text()) is (expid == "SequenceNet_test")
    y_pred = ran.predictions()["y_pred"].to_numpy()
    assert roc_auc_score(ran.predictions()["click"], y_pred) == pytest.approx(ran.metrics["test"]["AUC"], abs=1e-6)


def test_a_tuple_and_a_list_are_different_settings(zoo: Path) -> None:
    folder = zoo / "SequenceNet"
    options = ["target_field=[item_id, cate_id]", "sequence_field=[hist_items, hist_cates]"]
    one = load_experiment(folder / "config", "SequenceNet_test", folder)
    other = load_experiment(folder / "config", "SequenceNet_test", folder, options)
    assert one.model_params["target_field"] == ("item_id", "cate_id") and one.config_hash != other.config_hash


class RowByRow(Stock):
    """Stock FuxiCTR with the folder's own loader."""

    def loader(self, data_dir: Path, split: str) -> Any:
        loader = _import_package(Path("src/__init__.py")).HistoryDataLoader
        feature_map = fuxictr.features.FeatureMap(self.params["dataset_id"], str(data_dir))
        feature_map.load(str(data_dir / "feature_map.json"), self.params)
        return loader(feature_map, self.params[f"{split}_data"], **{**self.params, "shuffle": False})


def test_batches_of_columns_items_and_mask(
    zoo: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ran = Ran(zoo / "LongHistory", "LongHistory_test")
    assert ran.report["own_hooks"] == ["train_step", "get_inputs", "get_labels", "get_group_id"]
    assert "own data loader HistoryDataLoader is not run: batches (batch_dict, item_dict, mask) are made" in caplog.text
    stock = RowByRow(ran, monkeypatch).fit()
    stock.model.feature_map.group_id = None
    assert_same(ran, stock, rtol=1e-5)
    frame = ran.predictions()
    expected = g_auc(*(frame[name].to_numpy() for name in ("label", "y_pred", "user_id")))
    assert ran.metrics["test"]["gAUC"] == pytest.approx(expected, abs=1e-6)
    assert main(["evaluate", str(ran.run_dir)]) == 0


def test_tuple_batches_equal_the_folders_own(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = Ran(zoo / "LongHistory", "LongHistory_test", "--set", "epochs=1")
    experiment = load_experiment(ran.folder / "config", ran.expid, ran.folder)
    data = build_dataset(experiment.dataset, root=experiment.root)
    feature_map, trainer = prepare(experiment, data, -1)
    ours = open_batches(experiment, data, feature_map, "test", trainer)
    assert ours.batch_size == 50  # as in training: a model that unpacks its batches may need any memory
    for got, expected in zip(ours, RowByRow(ran, monkeypatch).splits["test"], strict=True):
        context, items, mask = got
        assert context.keys() == expected[0].keys() and items.keys() == expected[1].keys()
        for name in context:
            torch.testing.assert_close(context[name].double(), expected[0][name].double())
        for name in items:
            torch.testing.assert_close(items[name].double(), expected[1][name].double())
            assert items[name].dtype in (torch.int64, torch.float32)
        assert torch.equal(mask, expected[2]) and mask.shape == (len(mask), 6)


def test_a_loader_of_its_own_whose_batches_nobody_knows(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = zoo / "LongHistory"
    model = (folder / "src" / "LongHistory.py").read_text()
    model = model.replace("batch_dict, item_dict, mask = inputs", "batch_dict, item_dict, mask, graph = inputs")
    (folder / "src" / "LongHistory.py").write_text(model)
    assert main(["run", "--zoo", str(folder), "--expid", "LongHistory_test"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("error: LongHistory fails on the first rows of tiny_history: ValueError: ")
    assert line.endswith(
        "its folder's own data loader HistoryDataLoader is not run: supported batches are {column: tensor} and, for a "
        "dataset with item_info and a history of item ids, (batch_dict, item_dict, mask)"
    )
    assert not list(folder.glob("checkpoints"))


def test_an_own_compile_makes_the_optimizer(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = Ran(zoo / "Overrides", "OwnCompile_test")
    assert not ran.report["uses_fast_path"] and ran.report["own_hooks"] == ["compile", "model_to_device"]
    assert_same(ran, Stock(ran, monkeypatch).fit(), rtol=1e-6)


def test_own_decisions_and_decay(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--set", "epochs=30", "--set", "early_stop_patience=3")
    ran = Ran(zoo / "Overrides", "OwnDecisions_test", *options)
    assert ran.report["own_hooks"] == ["checkpoint_and_earlystop", "lr_decay", "model_to_device"]
    stock = Stock(ran, monkeypatch, epochs=30, early_stop_patience=3).fit()
    calls = stock.model.calls
    assert calls[0] == "model_to_device" and calls.count("lr_decay") >= 3
    assert ran.report["epochs"] == calls.count("checkpoint_and_earlystop") < 30  # it stopped early
    rates = [record["learning_rate"] for record in ran.curve()]
    assert min(rates) == pytest.approx(0.01 * 0.5 ** (calls.count("lr_decay") - 1))
    assert_same(ran, stock)


def test_own_weights_are_saved_and_loaded(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = Ran(zoo / "Overrides", "OwnWeights_test")
    assert {"save_weights", "load_weights"} <= set(ran.report["own_hooks"])
    stock = Stock(ran, monkeypatch).fit()
    assert stock.model.calls[-1] == "load_weights"
    assert_same(ran, stock)
    frame = ran.predictions()  # read back by its own load_weights
    assert roc_auc_score(frame["click"], frame["y_pred"]) == pytest.approx(ran.metrics["test"]["AUC"], abs=1e-6)


def test_own_metrics_and_predictions(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = Ran(zoo / "Overrides", "OwnEvaluation_test")
    stock = Stock(ran, monkeypatch).fit()
    assert_same(ran, stock)
    frame = ran.predictions()
    assert frame["y_pred"].min() < 0  # logits
    np.testing.assert_allclose(frame["y_pred"], stock.model.predict(stock.splits["test"]), atol=1e-4)
    flipped = log_loss(1 - frame["click"].to_numpy(), 1 / (1 + np.exp(frame["y_pred"].to_numpy())))
    assert ran.metrics["test"]["logloss"] == pytest.approx(flipped, abs=1e-6)


@pytest.mark.parametrize(("expid", "hook"), [("OwnFit_test", "fit"), ("OwnEpoch_test", "train_epoch")])
def test_an_own_loop_runs_as_written(
    zoo: Path, expid: str, hook: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ran = Ran(zoo / "Overrides", expid)
    assert ran.report["own_hooks"] == [hook, "model_to_device"] and not ran.report["uses_fast_path"]
    assert f"brings its own {hook}: it runs as written; if interrupted, it starts over" in caplog.text
    assert_same(ran, Stock(ran, monkeypatch).fit(), rtol=1e-6)
    curve = ran.curve()
    assert [record["epoch"] for record in curve] == [1, 2, 3] and ran.report["epochs"] == 3
    assert ran.report["best_value"] == max(record["AUC"] for record in curve)
    assert curve[ran.report["best_epoch"] - 1]["AUC"] == ran.report["best_value"]
    assert main(["evaluate", str(ran.run_dir)]) == 0 and ran.predictions().height == SPLITS["test"]


def test_an_own_loop_needs_a_validation_split(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "--zoo", str(zoo / "Overrides"), "--expid", "OwnFit_test", "--set", "valid_data=null"]
    assert main(command) == 2
    message = "error: OwnFit brings its own fit, which needs a validation split: set valid_data"
    assert message in capsys.readouterr().err


def test_an_own_loop_can_be_stopped(zoo: Path) -> None:
    experiment = load_experiment(zoo / "Overrides" / "config", "OwnFit_test", zoo / "Overrides")
    asked: list[int] = []

    def should_stop() -> bool:
        asked.append(1)
        return len(asked) == 4

    with pytest.raises(InterruptedRunError, match="stopped in the model's own loop"):
        run(experiment, session=Session(should_stop=should_stop))
    assert not (experiment.run_dir / "DONE").exists() and len(asked) == 4
    assert not run(experiment)["is_resumed"]


def fails(folder: Path, capsys: pytest.CaptureFixture[str], expid: str = "Plain_test", *options: str) -> list[str]:
    """The error lines of a run that is refused."""
    assert main(["run", "--zoo", str(folder), "--expid", expid, *options]) in (1, 2)
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    ("file", "code", "message"),
    [
        ("src/Plain.py", "def broken(:\n", r"src/Plain.py:1: the model does not import: SyntaxError: invalid syntax"),
        (
            "src/Plain.py",
            "import torch\nimport no_such_package\n",
            "src/Plain.py:2: the model does not import: ModuleNotFoundError: No module named 'no_such_package': install "
            "the package that has it",
        ),
        (
            "src/__init__.py",
            "from .Plain import Plain\nfrom .missing import Other\n",
            "src/__init__.py:2: the model does not import: ModuleNotFoundError: No module named 'src.missing'",
        ),
        (
            "src/Plain.py",
            "import sys\nsys.exit('no')\n",
            "src/Plain.py:2: the model does not import: SystemExit: no",
        ),
        ("src/Plain.py", "class Other: pass\nPlain = 3\n", "src/__init__.py: has no model 'Plain'; it has none"),
        (
            "src/Plain.py",
            "class Plain: pass\n",
            "'Plain' is not a model: it must derive from fuxictr.pytorch.models.BaseModel",
        ),
    ],
)
def test_a_folder_that_does_not_import(
    zoo: Path, file: str, code: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (zoo / "Plain" / file).write_text(code)
    (line,) = fails(zoo / "Plain", capsys)
    assert line.endswith(message)


def test_errors_of_a_models_own_code_say_where(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def edited(name: str, old: str, new: str) -> Path:
        file = zoo / name / "src" / f"{name}.py"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
        return zoo / name

    folder = edited("Plain", "self.num_labels = len(", "self.num_labels = lenn(")
    (line,) = fails(folder, capsys)
    assert re.search(r"Plain_test: Plain: NameError: name 'lenn' .*\(.*src/Plain\.py:\d+\)$", line)
    folder = edited("Accumulation", "self.num_updates += 1", "self.num_upd += 1")
    (line,) = fails(folder, capsys, "Accumulation_test")
    assert re.search(r"Accumulation\.py:\d+: Accumulation fails in epoch 1, batch 3: AttributeError: .*num_upd", line)
    folder = edited("OwnBatch", '{"y_pred": ', '{"prediction": ')
    (line,) = fails(folder, capsys, "OwnBatch_test")
    assert line.endswith("OwnBatch: forward gives prediction: it must give a dict with 'y_pred', or with 'click_pred'")
    folder = edited("AuxLoss", "self.lr(X)", "self.lr(X).squeeze()")
    (line,) = fails(folder, capsys, "AuxLoss_test")
    assert "AuxLoss.py:" in line and "AuxLoss fails in epoch 1, batch 1: ValueError: Using a target size" in line
    folder = edited("OwnLosses", "self.mlp(feature_emb)", "self.mlp(feature_emb).squeeze()")
    (line,) = fails(folder, capsys, "OwnLosses_test")
    assert re.search(r"/OwnLosses.py:\d+: OwnLosses fails in epoch 1, batch 1: ValueError: Using a target", line)


def test_a_history_in_a_file_of_its_own(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = zoo / "LongHistory" / "config" / "dataset_config.yaml"
    config.write_text(config.read_text().replace("    item_info:", "    user_info: ../data/u.parquet\n    item_info:"))
    (line,) = fails(zoo / "LongHistory", capsys, "LongHistory_test")
    assert line.endswith(
        "dataset_config.yaml: tiny_history.user_info: a file of histories by user is not read: give every row its history, "
        "a list of item ids in a column of type meta, got '../data/u.parquet'"
    )


def test_a_folder_inside_a_repository_is_its_own_root(zoo: Path) -> None:
    for part in ("model_zoo/Ours/config", "model_zoo/Ours/src", "config/dataset_config"):
        (zoo.parent / part).mkdir(parents=True)
    (zoo.parent / "model_zoo" / "Ours" / "src" / "__init__.py").touch()
    assert find_root(zoo / "Plain" / "config") == zoo / "Plain"
    assert find_root(zoo.parent / "model_zoo" / "Ours" / "config") == zoo.parent
    assert find_root(zoo.parent / "config") == zoo.parent
    ran = Ran(zoo / "Plain", "Plain_test", "--set", "epochs=1")
    assert ran.run_dir.is_relative_to(zoo / "Plain") and ran.predictions().height == SPLITS["test"]


def test_check(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of models that read the dataset's files, before it is built, and of those that take tuples."""
    for name, expid in (("Plain", "Plain_test"), ("LongHistory", "LongHistory_test"), ("MultiTask", "MultiTask_mixed")):
        assert main(["check", "--zoo", str(zoo / name), "--expid", expid]) == 0
        assert capsys.readouterr().out == f"{expid}: ok\n"
    assert not list(zoo.glob("*/checkpoints"))


@pytest.mark.parametrize(("name", "expid"), [("LongHistory", "LongHistory_test"), ("MultiTask", "MultiTask_test")])
def test_estimate(zoo: Path, name: str, expid: str) -> None:
    ran = Ran(zoo / name, expid, "--set", "epochs=1")
    found = estimate(load_experiment(ran.folder / "config", expid, ran.folder), gpu=-1)
    assert found.parameters == ran.report["parameters"]["total"] and found.epoch_seconds


def test_keys_of_a_folder(zoo: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    options = ["--set", "hiden_units=[4]", "--set", "batch_norm=3", "--set", "net_dropout={}"]
    assert [line.partition(": Plain_test.")[2] for line in fails(zoo / "Plain", capsys, "Plain_test", *options)] == [
        "net_dropout: must be float | str | list | None, got {}",
        "batch_norm: must be bool | list | None, got 3",
        "hiden_units: unknown key, got [4] (did you mean 'hidden_units'?)",
    ]
    (line,) = fails(zoo / "AuxLoss", capsys, "AuxLoss_test", "--set", "aux_wieght=0.1")
    assert "aux_wieght: unknown key, got 0.1 (did you mean 'aux_weight'?)" in line  # read from **kwargs
    assert "max_len: unknown key" in fails(zoo / "Plain", capsys, "Plain_test", "--set", "max_len=3")[0]
    config = zoo / "Overrides" / "config" / "model_config.yaml"
    config.write_text(config.read_text().replace("Base:\n", "Base:\n    use_magic: True\n"))
    assert "Base.use_magic: unknown key" in fails(zoo / "Overrides", capsys, "OwnCompile_test")[0]
    # A key of another model of the folder is at home in Base.
    model = zoo / "Overrides" / "src" / "Loops.py"
    model.write_text(
        model.read_text() + "\n\nclass Magic(Net):\n    def __init__(self, feature_map, use_magic=False, **kwargs):\n"
        "        super().__init__(feature_map, **kwargs)\n"
    )
    (zoo / "Overrides" / "src" / "__init__.py").open("a").write("from .Loops import Magic\n")
    caplog.clear()
    for name in [m for m in sys.modules if m.startswith("ctrbench_zoo_Overrides")]:
        del sys.modules[name]
    Ran(zoo / "Overrides", "OwnCompile_test")
    assert "Keys that nothing reads, accepted for FuxiCTR's sake: " in caplog.text and "use_magic" in caplog.text


SHORT = {"short_seq_len": 3, "topk": 4, "dnn_hidden_units": [8]}
LONG_CTR: dict[str, dict[str, Any]] = {
    "DCNv2": {"parallel_dnn_hidden_units": [8], "stacked_dnn_hidden_units": [8]},
    "DIEN": {"dnn_hidden_units": [8]},
    "DIN": {"dnn_hidden_units": [8]},
    "ETA": SHORT,
    "FinalMLP": {"mlp1_hidden_units": [8], "mlp2_hidden_units": [8]},
    "MIRRN": SHORT,
    "SDIM": {"short_seq_len": 3, "dnn_hidden_units": [8]},
    "SIM": SHORT,
    "TWIN": SHORT,
    "TransAct": {},
}


@pytest.mark.parametrize("name", LONG_CTR)
def test_fuxictrs_long_history_models(zoo: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models that the wheel carries, as they are."""
    source = Path(fuxictr.__file__).parents[1] / "model_zoo" / "LongCTR" / name / f"{name}.py"
    folder = zoo / "LongHistory"
    shutil.copy(source, folder / "src")
    (folder / "src" / "__init__.py").write_text(
        f"from .history_dataloader import HistoryDataLoader\nfrom .{name} import *\n"
    )
    config = folder / "config" / "model_config.yaml"
    sections = load_yaml(config)
    section = {k: v for k, v in sections["LongHistory_test"].items() if "units" not in k}
    if name in ("FinalMLP", "TransAct"):
        section = {k: v for k, v in section.items() if k not in ("net_dropout", "batch_norm")}
    section |= {"model": name, "epochs": 1, **LONG_CTR[name]}
    config.write_text(dump_yaml({"Base": sections["Base"], "LongHistory_test": section}))
    ran = Ran(folder, "LongHistory_test")
    stock = RowByRow(ran, monkeypatch).fit()
    stock.model.feature_map.group_id = None
    assert_same(ran, stock, rtol=1e-5)


def test_a_sweep_keeps_tuples_through_its_store() -> None:
    problems: list[str] = []
    space = parse_space({"target": [("a", "b"), "a"], "sequence": ("c", "d")}, [], True, str, problems)
    assert not problems and space.size() == 2
    values = {"target": ("a", "b"), "sequence": ("c", "d"), "units": [8, 8], "dropout": 0.1}
    assert space.restored(json.loads(json.dumps(values))) == values


def test_two_threads_may_ask_for_a_folder_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "Slow"
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "__init__.py").write_text(
        "import time\ntime.sleep(0.3)\nfrom torch import nn\nclass Slow(nn.Module):\n    pass\n"
    )
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: load_model_class(folder, "Slow"), range(2)))
    assert found[0] is found[1]
