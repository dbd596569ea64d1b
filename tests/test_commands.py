# SPDX-License-Identifier: Apache-2.0
"""The commands on a trained run: what they print, what they write, and the exit status they end with."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import polars as pl
import pytest
import torch

from ctrbench.batches import Batches
from ctrbench.checkpoint import load_weights
from ctrbench.cli import main, run_expid
from ctrbench.metrics import evaluate_metrics
from ctrbench.preprocess import DataFolder, build_dataset
from ctrbench.run import load_trained
from ctrbench.schema import DatasetConfig
from ctrbench.trainer import Trainer
from ctrbench.yamlfile import dump_yaml, load_yaml
from ctrbench.zoo import load_model_class

ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT / "model_zoo" / "DCNv3"
SMALL = ["epochs=2", "batch_size=256", "embedding_dim=8", "num_cross_layers=3", "num_heads=2", "group_id=user_id"]
Capture = pytest.CaptureFixture[str]


def run_command(*overrides: str) -> list[str]:
    command = ["run", "--expid", "DCNv3_tiny", "--zoo", str(ZOO)]
    return command + [word for value in (*SMALL, *overrides) for word in ("--set", value)]


@pytest.fixture(scope="module")
def trained(tiny_raw: Path, tiny_data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run, which no test changes."""
    runs = tmp_path_factory.mktemp("runs")
    files = [f"{split}_data={tiny_raw / split}.csv" for split in ("train", "valid", "test")]
    assert main(run_command(*files, f"data_root={tiny_data_root}", f"model_root={runs}", "verbose=0")) == 0
    return runs / "tiny_ctr" / "DCNv3_tiny" / "seed_2024"


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A private copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


@pytest.fixture(scope="module")
def predictions(trained: Path) -> np.ndarray:
    """The trained model's predictions of the test split, in row order."""
    _, data, feature_map, trainer = load_trained(trained)
    return trainer.predict(Batches.from_file(data.splits["test"], feature_map, 1 << 13)).numpy()


@pytest.fixture
def refused(capsys: Capture) -> Callable[..., str]:
    """Runs a command that must end with status 2; returns its one line of standard error."""

    def run(*command: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in command]) == 2
        output = capsys.readouterr()
        assert output.out == "" and output.err.startswith("error: ") and output.err.count("\n") == 1, output.err
        return output.err

    return run


def run_dir_of(overrides: list[str], seed: int = 2024) -> Path:
    [model_root] = [Path(v.partition("=")[2]) for v in overrides if v.startswith("model_root=")]
    return model_root / "tiny_ctr" / "DCNv3_tiny" / f"seed_{seed}"


def report_of(run_dir: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run_dir / "report.json").read_text())
    return report


def test_run_leaves_a_complete_directory(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} - {".lock"} == {
        "config.yaml",
        "train.log",
        "metrics.jsonl",
        "report.json",
        "data_hash.json",
        "best.safetensors",
        "last.ckpt",
        "DONE",
    }
    report = report_of(trained)
    assert (report["expid"], report["seed"], report["epochs"]) == ("DCNv3_tiny", 2024, 2)
    assert report["rows"] == {"train": 4000, "valid": 1000, "test": 1000} and not report["is_resumed"]
    curve = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in curve] == [1, 2]
    best = max(record["AUC"] for record in curve)
    assert report["metrics"]["valid"]["AUC"] == best == curve[report["best_epoch"] - 1]["AUC"]
    [row] = (trained.parents[2] / "results.csv").read_text().splitlines()
    assert f"[test] AUC: {report['metrics']['test']['AUC']:.6f} - logloss: " in row and "[exp_id] DCNv3_tiny" in row
    log = (trained / "train.log").read_text()
    assert "Total number of parameters: " in log and "Training finished." in log


def test_run_expid(tiny_overrides: list[str], capsys: Capture, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # which has a folder config too
    command = ["--expid", "DCNv3_tiny", *(word for v in [*SMALL, *tiny_overrides] for word in ("--set", v))]
    assert run_expid(ZOO, [*command, "--config", "./config/", "--seed", "7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    run_dir = run_dir_of(tiny_overrides, seed=7)
    for split, line in zip(("valid", "test"), lines, strict=False):
        assert line.split() == [split] + [
            w for k, v in report_of(run_dir)["metrics"][split].items() for w in (k, f"{v:.6f}")
        ]
    assert lines[2:] == [f"everything about this run: {run_dir}"]
    assert report_of(run_dir)["metrics"] != report_of(trained)["metrics"]  # another seed


def interrupt_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.step
    left = iter(range(steps))

    def interrupted(self: Trainer, batch: Any) -> torch.Tensor:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", interrupted)


def test_an_interrupted_run_continues_to_the_same_result(
    tiny_overrides: list[str], trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    run_dir = run_dir_of(tiny_overrides)
    interrupt_after(20, monkeypatch)  # in the second epoch of 16 steps
    assert main(run_command(*tiny_overrides)) == 130
    assert (
        "interrupted: the same command continues from the last checkpoint, if there is one\n" in capsys.readouterr().err
    )
    assert (run_dir / "last.ckpt").exists() and not (run_dir / "DONE").exists()
    assert "KeyboardInterrupt" in (run_dir / "train.log").read_text().splitlines()[-1]
    monkeypatch.undo()
    assert main(run_command(*tiny_overrides)) == 0
    assert report_of(run_dir)["is_resumed"] and (run_dir / "DONE").exists()
    assert (run_dir / "best.safetensors").read_bytes() == (trained / "best.safetensors").read_bytes()
    assert report_of(run_dir)["metrics"] == report_of(trained)["metrics"]
    log = (run_dir / "train.log").read_text()
    assert "Epoch=1 start" in log and "Resume after epoch 1, step 16" in log
    assert log.count("Epoch=1 end") == 1


@pytest.mark.parametrize("how", ["fresh", "other configuration", "damaged checkpoint"])
def test_an_interrupted_run_that_cannot_or_must_not_continue(
    how: str, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = run_dir_of(tiny_overrides)
    interrupt_after(20, monkeypatch)
    assert main(run_command(*tiny_overrides)) == 130
    monkeypatch.undo()
    command = run_command(*tiny_overrides, "epochs=1")
    if how == "fresh":
        command = [*run_command(*tiny_overrides), "--fresh"]
    elif how == "damaged checkpoint":
        command = run_command(*tiny_overrides)
        (run_dir / "last.ckpt").write_bytes((run_dir / "last.ckpt").read_bytes()[:-100])
    assert main(command) == 0
    assert not report_of(run_dir)["is_resumed"]
    reasons = {
        "other configuration": "is of another configuration or data: starting anew",
        "damaged checkpoint": "is damaged: starting anew",
    }
    log = (run_dir / "train.log").read_text()
    assert ("starting anew" in log) is (how in reasons) and reasons.get(how, "") in log


def test_a_run_that_diverges_ends_with_status_1(tiny_overrides: list[str], capsys: Capture) -> None:
    assert main(run_command(*tiny_overrides, "learning_rate=1e30")) == 1
    error = capsys.readouterr().err
    assert re.search(r"^error: the training loss became (nan|inf) in epoch 1, batch \d+: lower learning_rate", error)
    run_dir = run_dir_of(tiny_overrides)
    assert not (run_dir / "DONE").exists() and not (run_dir / "report.json").exists()
    assert "TrainingError: the training loss became" in (run_dir / "train.log").read_text().splitlines()[-1]


def test_two_processes_do_not_share_a_run_directory(tiny_overrides: list[str], refused: Callable[..., str]) -> None:
    run_dir = run_dir_of(tiny_overrides)
    run_dir.mkdir(parents=True)
    with filelock.FileLock(run_dir / ".lock"):
        message = refused(*run_command(*tiny_overrides))
    assert f"{run_dir}: another process is running this experiment: wait for it, or use another seed" in message
    assert [path.name for path in run_dir.iterdir()] == [".lock"]


def test_usage(capsys: Capture) -> None:
    for command, status in ((["--version"], 0), (["no-such-command"], 2), ([], 2), (["run", "--gpu", "x"], 2)):
        with pytest.raises(SystemExit) as caught:
            main(command)
        assert caught.value.code == status


def test_help(capsys: Capture) -> None:
    for command, texts in (
        ("run", ["override a configured value; repeat it for more of them"]),
        ("evaluate", ["rows to read; default: test"]),
    ):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        output = " ".join(capsys.readouterr().out.split())
        assert all(text in output for text in texts)


def test_a_file_that_the_system_refuses(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: OSError) -> None:
        def read(*_: object) -> None:
            raise error

        monkeypatch.setattr("ctrbench.leaderboard.collect.read_runs", read)

    fail(IsADirectoryError(21, "Is a directory", "some/folder"))
    assert refused("leaderboard") == "error: some/folder: Is a directory\n"
    fail(OSError("not about a file"))
    with pytest.raises(OSError, match="not about a file"):
        main(["leaderboard"])


@pytest.mark.parametrize("buffering", [1, -1], ids=["line by line", "at the end"])
def test_a_reader_that_closes_early(buffering: int, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=buffering) as stream:
        monkeypatch.setattr("sys.stdout", stream)
        assert main(["leaderboard", str(trained)]) == 141


def test_which_experiment(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # model folders are found from anywhere
    assert "--expid, --zoo or --config is needed: ctrbench run --expid SDCNv3_tiny" in refused("run")
    assert re.search(
        r"--expid DCNv3_tyny: no model folder in \S+/model_zoo has it \(did you mean 'S?DCNv3_tiny'\?\)",
        refused("run", "--expid", "DCNv3_tyny"),
    )
    assert f"--expid is needed; {ZOO}/config has DCNv3_tiny, " in refused("run", "--zoo", ZOO)
    assert "config: not a configuration folder" in refused("check", "--config", tmp_path / "config")


def test_check(capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_overrides: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = [word for value in tiny_overrides for word in ("--set", value)]
    assert main(["check", "--expid", "DCNv3_tiny", *overrides]) == 0
    assert capsys.readouterr().out == "DCNv3_tiny: ok\n"
    missing = ["--set", f"data_root={tmp_path}", "--set", "train_data=no.csv", "--set", "test_data=no.csv"]
    assert main(["check", "--config", str(ZOO / "config"), "--expid", "DCNv3_tiny", *overrides, *missing]) == 0
    assert capsys.readouterr().out == "DCNv3_tiny: ok, but its data is missing: train_data, test_data\n"
    assert main(["check", "--zoo", str(ZOO), "--set", "epochs=0", "--set", "seed=-1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "error: --set: DCNv3_tiny.epochs: must be greater than or equal to 1, got 0" in lines
    assert len(lines) == len(set(lines)) and len(lines) % 2 == 0 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_evaluate(trained: Path, split: str, capsys: Capture) -> None:
    assert main(["evaluate", str(trained), "--split", split, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert list(values) == ["AUC", "logloss"]
    if split != "train":
        assert values == report_of(trained)["metrics"][split]
    assert main(["evaluate", str(trained), "--split", split]) == 0
    assert capsys.readouterr().out == f"AUC: {values['AUC']:.6f}\nlogloss: {values['logloss']:.6f}\n"


def test_evaluate_other_metrics(
    trained: Path, predictions: np.ndarray, capsys: Capture, refused: Callable[..., str], tiny_raw: Path
) -> None:
    assert main(["evaluate", str(trained), "--json", "--metrics", "gAUC", "MRR", "logloss"]) == 0
    values = json.loads(capsys.readouterr().out)
    rows = pl.read_csv(tiny_raw / "test.csv")
    # Ids out of the vocabulary fall into one group, so the groups are those of the stored data.
    _, data, feature_map, _ = load_trained(trained)
    users = Batches.from_file(data.splits["test"], feature_map, 1000).column("user_id")
    label = torch.from_numpy(rows["label"].to_numpy()).float()
    assert values == evaluate_metrics(label, torch.from_numpy(predictions), ["gAUC", "MRR", "logloss"], users)
    assert "metrics: unknown metric 'AUCC' (did you mean 'AUC'?)" in refused("evaluate", trained, "--metrics", "AUCC")


def test_evaluating_changes_nothing(trained: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in trained.iterdir()}
    assert main(["evaluate", str(trained)]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in trained.iterdir()} == before


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_predict(
    trained: Path, predictions: np.ndarray, suffix: str, tmp_path: Path, capsys: Capture, tiny_raw: Path
) -> None:
    output = tmp_path / "new" / f"out.{suffix}"
    assert main(["predict", str(trained), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"1000 predictions: {output}\n"
    frame = pl.read_csv(output) if suffix == "csv" else pl.read_parquet(output)
    assert frame.columns == ["y_pred", "label"]  # the groups' numbers are of our making and would say nothing
    assert np.array_equal(frame["y_pred"].to_numpy().astype(np.float32), predictions)
    rows = pl.read_csv(tiny_raw / "test.csv")
    assert frame["label"].to_list() == rows["label"].to_list()
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_predict_other_splits(trained: Path, tmp_path: Path) -> None:
    for split, rows in (("train", 4000), ("valid", 1000)):
        assert main(["predict", str(trained), "--split", split, "--output", str(tmp_path / "out.csv")]) == 0
        frame = pl.read_csv(tmp_path / "out.csv")
        assert frame.height == rows and frame["y_pred"].is_between(0, 1).all()
        if split == "valid":
            auc = evaluate_metrics(frame["label"].to_torch().float(), frame["y_pred"].to_torch().float(), ["AUC"])
            assert auc["AUC"] == pytest.approx(report_of(trained)["metrics"]["valid"]["AUC"], abs=1e-12)


@pytest.mark.parametrize("has_label", [True, False])
def test_predict_raw_rows(
    trained: Path, predictions: np.ndarray, has_label: bool, tmp_path: Path, tiny_raw: Path
) -> None:
    rows = pl.read_csv(tiny_raw / "test.csv", infer_schema=False)
    order = np.random.default_rng(0).permutation(rows.height)[:300]
    rows = rows[order].select(sorted(rows.columns, reverse=True))  # columns are found by name
    (rows if has_label else rows.drop("label")).write_csv(tmp_path / "rows.csv")
    output = tmp_path / "out.parquet"
    assert main(["predict", str(trained), "--data", str(tmp_path / "rows.csv"), "--output", str(output)]) == 0
    frame = pl.read_parquet(output)
    assert frame.columns == (["y_pred", "label"] if has_label else ["y_pred"])
    np.testing.assert_allclose(frame["y_pred"].to_numpy(), predictions[order], rtol=1e-6)
    if has_label:
        assert frame["label"].cast(pl.Int64).cast(pl.String).to_list() == rows["label"].to_list()
    assert {path.name for path in tmp_path.iterdir()} == {"rows.csv", "out.parquet"}


def test_predict_raw_rows_of_a_run_whose_splits_were_cut(
    tiny_overrides: list[str], tiny_raw: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    """The vocabularies must again be those of the training rows alone."""
    cut = ["valid_data=", "test_data=", "valid_size=0", "test_size=0.2", f"data_root={tmp_path / 'data'}", "epochs=1"]
    assert main(run_command(*tiny_overrides, *cut)) == 0
    run_dir = run_dir_of(tiny_overrides)
    assert "No validation split: training for all 1 epochs" in (run_dir / "train.log").read_text()
    assert list(report_of(run_dir)["metrics"]) == ["test"]
    pl.read_csv(tiny_raw / "train.csv", infer_schema=False)[3200:].write_csv(tmp_path / "rows.csv")
    raw = ["--data", str(tmp_path / "rows.csv")]
    for name, extra in (("split.parquet", []), ("raw.parquet", raw)):
        assert main(["predict", str(run_dir), "--output", str(tmp_path / name), *extra]) == 0
    assert pl.read_parquet(tmp_path / "split.parquet").equals(pl.read_parquet(tmp_path / "raw.parquet"))
    message = refused("evaluate", run_dir, "--split", "valid")
    assert "tiny_ctr: no valid split; it has train, test: set valid_data in dataset_config" in message


def test_predict_refuses_an_output(trained: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "--output x.json: must end in .csv or .parquet" in refused("predict", trained, "--output", "x.json")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").touch()
    for name in ("folder.csv", "file/out.csv"):
        assert f"{name}: cannot be written: " in refused("predict", trained, "--output", tmp_path / name)


def test_predict_refuses_data(trained: Path, tmp_path: Path, tiny_raw: Path, refused: Callable[..., str]) -> None:
    output, data = tmp_path / "out.csv", tmp_path / "rows.csv"
    predict = ("predict", trained, "--output", output, "--data")
    message = refused(*predict, tiny_raw / "tset.csv")
    assert f"--data: {tiny_raw / 'tset.csv'} does not exist (did you mean 'test.csv'?)" in message
    rows = pl.read_csv(tiny_raw / "test.csv", infer_schema=False)
    rows.drop("device").write_csv(data)
    assert f"{data}: column 'device' is missing" in refused(*predict, data)
    rows.head(0).write_csv(data)
    assert f"{data}: no rows" in refused(*predict, data)
    rows.write_parquet(tmp_path / "rows.parquet")
    message = refused(*predict, tmp_path / "rows.parquet")
    assert "rows.parquet: must be csv, as the files that the run was trained on" in message
    assert not output.exists()


def test_predict_raw_rows_under_another_encoding(
    trained: Path, tmp_path: Path, tiny_raw: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(dataset: DatasetConfig, **options: Any) -> DataFolder:
        return build_dataset(dataset.model_copy(update={"min_categr_count": 50}), **options)

    monkeypatch.setattr("ctrbench.predict.build_dataset", build)
    message = refused("predict", trained, "--output", tmp_path / "out.csv", "--data", tiny_raw / "test.csv")
    assert "test.csv: the training split gives other vocabularies than the run's: run the experiment again" in message


def test_predict_raw_rows_needs_raw_training_rows(
    copy: Path, tmp_path: Path, tiny_raw: Path, refused: Callable[..., str]
) -> None:
    """Ready H5 data is whatever lies in the folder: here the very files that the run was trained on."""
    config = load_yaml(copy / "config.yaml")
    files = {f"{split}_data": split for split in ("train", "valid", "test")}
    config["dataset"] |= {"data_format": "h5", **files}
    (copy / "config.yaml").write_text(dump_yaml(config))
    assert main(["evaluate", str(copy)]) == 0
    message = refused("predict", copy, "--output", tmp_path / "out.csv", "--data", tiny_raw / "test.csv")
    assert "test.csv: tiny_ctr is ready H5 data, with no raw rows to fit the encoding on" in message


def test_a_run_directory_that_is_incomplete_or_damaged(copy: Path, refused: Callable[..., str]) -> None:
    (copy / "report.json").write_text("[]")
    assert "report.json: damaged: run the experiment again" in refused("evaluate", copy)
    (copy / "report.json").write_text('{"metrics": {')
    assert "report.json: damaged: run the experiment again" in refused("evaluate", copy)
    (copy / "best.safetensors").unlink()
    (copy / "report.json").unlink()
    assert "best.safetensors: no such file" in refused("evaluate", copy)
    assert "--gpu -2: no such GPU, this machine has " in refused("evaluate", copy, "--gpu", "-2")
    assert "no_run: not a run directory, it has no config.yaml" in refused("evaluate", copy / "no_run")


def test_weights_belong_to_their_model(trained: Path, copy: Path, refused: Callable[..., str]) -> None:
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("num_cross_layers: 3", "num_cross_layers: 4"))
    assert "best.safetensors: weights of another model or feature map: Missing key(s)" in refused("evaluate", copy)
    _, _, _, trainer = load_trained(trained)
    before = [p.clone() for p in trainer.model.parameters()]
    load_weights(trained / "best.safetensors", trainer.model)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_interpret(trained: Path, predictions: np.ndarray, tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "plots"
    assert main(["interpret", str(trained), "--rows", "5", "0", "999", "--output", str(output)]) == 0
    names = ["field_interactions.png", "mask_activity.png", "interpretation.json"]
    assert capsys.readouterr().out.splitlines() == [str(output / name) for name in names]
    assert sorted(path.name for path in output.iterdir()) == sorted(names)
    for name in names[:2]:
        content = (output / name).read_bytes()
        width, height = (int.from_bytes(content[i : i + 4]) for i in (16, 20))
        assert content.startswith(b"\x89PNG\r\n") and width > 400 and height > 200
    numbers = json.loads((output / "interpretation.json").read_text())
    fields = ["user_id", "item_id", "category", "device", "weekday", "slot", "price", "age", "history"]
    assert numbers["fields"] == fields and numbers["rows"] == [5, 0, 999]
    np.testing.assert_allclose(numbers["predictions"], predictions[[5, 0, 999]], rtol=1e-6)
    layers = [f"deep layer {i}" for i in (1, 2, 3)]
    assert list(numbers["field_interactions"]) == list(numbers["mask_activity"]) == layers
    for layer in layers:
        interactions = np.array(numbers["field_interactions"][layer])
        activity = np.array(numbers["mask_activity"][layer])
        assert interactions.shape == (9, 9) and (interactions > 0).all()
        assert activity.shape == (3, 9) and ((activity >= 0) & (activity <= 1)).all()


def test_interpret_another_split_into_the_run_directory(copy: Path) -> None:
    assert main(["interpret", str(copy), "--rows", "3", "--split", "valid"]) == 0
    _, data, feature_map, trainer = load_trained(copy)
    expected = trainer.predict(Batches.from_file(data.splits["valid"], feature_map, 1000))[3]
    numbers = json.loads((copy / "interpretation.json").read_text())
    assert numbers["predictions"] == pytest.approx([float(expected)], rel=1e-6)


def test_interpret_refuses(trained: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    for row in ("1000", "-1"):
        assert f"--rows {row}: the test split has rows 0 to 999" in refused("interpret", trained, "--rows", "0", row)
    monkeypatch.delattr(load_model_class(ZOO, "DCNv3"), "mask_activity")
    assert "DCNv3 has neither field_interactions nor mask_activity" in refused("interpret", trained)
