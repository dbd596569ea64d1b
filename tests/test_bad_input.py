# SPDX-License-Identifier: Apache-2.0
"""Bad input through the command line: one line per problem, exit status 2, nothing half-written."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import polars as pl
import pytest

from ctrbench.cli import main, run_expid

ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT / "model_zoo" / "DCNv3"


class Tiny:
    """A private copy of the tiny data with its own output folders, and one experiment on it."""

    def __init__(self, raw: Path, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.raw, self.data, self.runs = folder / "raw", folder / "data", folder / "runs"
        shutil.copytree(raw, self.raw)
        self.capsys = capsys

    def run(self, *values: str, arguments: tuple[str, ...] = ()) -> tuple[int, str]:
        """Exit status and standard error of DCNv3_tiny with `--set` values."""
        paths = [f"{split}_data={self.raw / split}.csv" for split in ("train", "valid", "test")]
        settings = [*paths, f"data_root={self.data}", f"model_root={self.runs}", "verbose=0", "epochs=1", *values]
        command = ["--expid", "DCNv3_tiny", *(word for value in settings for word in ("--set", value)), *arguments]
        self.capsys.readouterr()
        status = run_expid(ZOO, command)
        return status, self.capsys.readouterr().err

    def refuses(self, message: str, *values: str, arguments: tuple[str, ...] = ()) -> None:
        status, text = self.run(*values, arguments=arguments)
        assert status == 2, text
        assert all(line.startswith("error: ") for line in text.splitlines()), text
        assert message in text
        assert not list(self.runs.rglob("*.*")), "a run directory was left"

    def edit(self, split: str, change: object) -> None:
        path = self.raw / f"{split}.csv"
        frame = pl.read_csv(path, infer_schema=False)
        change(frame).write_csv(path)  # type: ignore[operator]

    @property
    def run_dir(self) -> Path:
        return self.runs / "tiny_ctr" / "DCNv3_tiny" / "seed_2024"


@pytest.fixture
def tiny(tiny_raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Tiny:
    return Tiny(tiny_raw, tmp_path, capsys)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("embeding_dim=8", "DCNv3_tiny.embeding_dim: unknown key, got 8 (did you mean 'embedding_dim'?)"),
        ("batch_size=big", "batch_size: must be integer, got 'big'"),
        ("num_heads=2.5", "num_heads: must be int, got 2.5"),
        ("layer_norm=1", "layer_norm: must be bool, got 1"),
        ("net_dropout=1.5", "net_dropout: must lie in [0, 1), got 1.5"),
        ("num_cross_layers=0", "num_cross_layers: must be at least 1, got 0"),
        ("learning_rate=0", "learning_rate: must be greater than 0, got 0"),
        ("metrics=[AUCC]", "unknown metric 'AUCC' (did you mean 'AUC'?)"),
        ("metrics=[gAUC]", "set group_id to the column that names them"),
        ("monitor_mode=maximize", "monitor_mode: must be 'max' or 'min', got 'maximize'"),
        ("optimizer=adamm", "no such optimizer in torch.optim"),
        ("loss=binary_crosentropy", "no such loss in torch.nn.functional (did you mean 'binary_crossentropy'?)"),
        ("embedding_regularizer=l3(1)", "must be a number, l1(x), l2(x) or l1_l2(x,y), got 'l3(1)'"),
        ("dataset_id=tiny_crt", "unknown dataset, got 'tiny_crt' (did you mean 'tiny_ctr'?); known: "),
        ("model=DCNv33", "has no model 'DCNv33' (did you mean 'DCNv3'?)"),
        ("use_features=[user_idd]", "use_features: no such column, got 'user_idd' (did you mean 'user_id'?)"),
        ("group_id=usr", "group_id: no such column, got 'usr'"),
        ("data_format=xml", "data_format: must be 'csv', 'parquet' or 'h5', got 'xml'"),
        ("embedding_dim=7", "embedding_dim must be even, every embedding is cut in two halves, got 7"),
        (
            "feature_specs=[{name: device, embedding_dim: 10}]",
            "num_heads = 1 does not divide",
        ),
        ("seed", "--set seed: must be key=value"),
        ("epochs=[1", "--set epochs: line 1"),
    ],
)
def test_configuration(tiny: Tiny, value: str, message: str) -> None:
    if message.startswith("num_heads = 1"):
        value, message = (
            "feature_specs=[{name: device, embedding_dim: 10}]",
            "num_heads = 3 does not divide the embedding",
        )
        tiny.refuses(message, value, "num_heads=3")
    else:
        tiny.refuses(message, value)


def test_several_problems_are_reported_together(tiny: Tiny) -> None:
    status, text = tiny.run("embeding_dim=8", "batch_size=big", "net_dropout=2")
    assert status == 2 and len(text.splitlines()) == 2 + 1, text


def test_unknown_expid(tiny: Tiny) -> None:
    tiny.refuses("unknown expid 'DCNv3_tny' (did you mean 'DCNv3_tiny'?); known: ", arguments=("--expid", "DCNv3_tny"))


def test_a_gpu_that_does_not_exist(tiny: Tiny) -> None:
    tiny.refuses("--gpu 99: no such GPU, this machine has ", arguments=("--gpu", "99"))


def test_missing_file(tiny: Tiny) -> None:
    (tiny.raw / "valid.csv").unlink()
    tiny.refuses("tiny_ctr.valid_data: no such file, got ")


@pytest.mark.parametrize(
    ("split", "change", "message"),
    [
        ("train", lambda f: f.drop("device"), "device"),
        ("valid", lambda f: f.drop("label"), "label"),
        ("test", lambda f: f.rename({"slot": "slott"}), "slot"),
        ("train", lambda f: f.with_columns(pl.lit("2").alias("label")), "row 1"),
        ("train", lambda f: f.head(0), "row"),
        (
            "train",
            lambda f: f.with_columns(
                pl.when(pl.int_range(pl.len()) == 6).then(pl.lit("cheap")).otherwise("price").alias("price")
            ),
            "row 7, column 'price': 'cheap'",
        ),
    ],
    ids=["missing_column", "missing_label", "columns_differ", "label_not_binary", "empty_split", "not_a_number"],
)
def test_raw_data(tiny: Tiny, split: str, change: object, message: str) -> None:
    tiny.edit(split, change)
    tiny.refuses(message)
    assert not (tiny.data / "tiny_ctr" / "manifest.json").exists()


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_damaged_h5_is_named_or_rebuilt(tiny: Tiny, damage: str) -> None:
    assert tiny.run()[0] == 0
    path = tiny.data / "tiny_ctr" / "train.h5"
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2 :] = bytes(255 - b for b in content[len(content) // 2 :])
    path.write_bytes(content)
    status, text = tiny.run()
    assert status == 0 or (status == 2 and "train.h5" in text and text.startswith("error: ")), text


def test_damaged_feature_map_is_named_or_rebuilt(tiny: Tiny) -> None:
    assert tiny.run()[0] == 0
    path = tiny.data / "tiny_ctr" / "feature_map.json"
    path.write_text(path.read_text()[:100])
    status, text = tiny.run()
    assert status == 0 or (status == 2 and "feature_map.json" in text and text.startswith("error: ")), text


def test_a_data_folder_built_from_other_settings(tiny: Tiny) -> None:
    assert tiny.run()[0] == 0
    shutil.rmtree(tiny.runs)
    tiny.refuses("built from other settings", "min_categr_count=5", "rebuild_dataset=false")
    assert tiny.run("min_categr_count=5")[0] == 0  # rebuilt


@pytest.mark.parametrize("when", ["build", "train"])
def test_full_disk(tiny: Tiny, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if when == "train":
        assert tiny.run()[0] == 0
        shutil.rmtree(tiny.runs)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ctrbench.files.os.fsync", full)
    status, text = tiny.run()
    assert status == 2 and "the disk is full" in text and text.startswith("error: "), text
    assert not list(tiny.data.rglob("*.partial")) and not list(tiny.runs.rglob("*.partial"))
    assert not (tiny.run_dir / "DONE").exists()
    assert (tiny.data / "tiny_ctr" / "manifest.json").exists() is (when == "train")
    monkeypatch.undo()
    assert tiny.run()[0] == 0  # the same command works once there is space


def test_finished_run_with_damaged_parts(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.run()[0] == 0
    run_dir = str(tiny.run_dir)
    weights = tiny.run_dir / "best.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert main(["evaluate", run_dir]) == 2
    assert "best.safetensors: not a readable checkpoint" in capsys.readouterr().err
    weights.write_bytes(whole)
    assert main(["predict", run_dir, "--output", "x.json"]) == 2
    assert "--output x.json: must end in .csv or .parquet" in capsys.readouterr().err
    assert main(["interpret", run_dir, "--rows", "100000"]) == 2
    assert "--rows 100000: the test split has rows 0 to 999" in capsys.readouterr().err
    assert main(["evaluate", str(tiny.runs)]) == 2
    assert "not a run directory, it has no config.yaml" in capsys.readouterr().err
    assert main(["leaderboard", str(tiny.data)]) == 2
    assert "no finished run" in capsys.readouterr().err
    report = tiny.run_dir / "report.json"
    report.write_text(json.dumps({**json.loads(report.read_text()), "data_hash": "0" * 64}))
    assert main(["evaluate", run_dir]) == 2
    assert "not the data that" in capsys.readouterr().err
    (tiny.run_dir / "config.yaml").write_text("expid: x\n")
    assert main(["evaluate", run_dir]) == 2
    assert "config.yaml: damaged: " in capsys.readouterr().err


def test_a_model_that_does_not_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "__init__.py").write_text("import no_such_module\n")
    shutil.copytree(ZOO / "config", tmp_path / "config")
    assert main(["check", "--zoo", str(tmp_path), "--expid", "DCNv3_tiny"]) == 2
    text = capsys.readouterr().err
    assert "src/__init__.py:1: the model does not import: ModuleNotFoundError: No module named 'no_such_module'" in text


def test_check_accepts_every_shipped_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    for zoo in sorted((ROOT / "model_zoo").glob("*/config")):
        assert main(["check", "--zoo", str(zoo.parent)]) == 0, capsys.readouterr().err
