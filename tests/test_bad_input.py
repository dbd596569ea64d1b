# SPDX-License-Identifier: Apache-2.0
"""Bad input through the command line: one line per problem, exit status 2, nothing half-written."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
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
        ("batch_size=big", "batch_size: must be an integer, got 'big'"),
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
        ("data_format=xml", "data_format: must be 'csv', 'parquet', 'h5' or 'npz', got 'xml'"),
        ("embedding_dim=7", "embedding_dim must be even, every embedding is cut in two halves, got 7"),
        (
            "feature_specs=[{name: device, embedding_dim: 10}]",
            "num_heads = 1 does not divide",
        ),
        ("loss=cross_entropy", "loss: cannot train one output per row towards a label of 0 or 1"),
        ("monitor=logloss", "monitor: a lower logloss is better, but monitor_mode is max: set monitor_mode: min"),
        ("sep=;;", "sep: must be one ASCII character"),
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


@pytest.mark.parametrize("damage", ["truncate", "flip", "flip 64 bytes"])
def test_damaged_h5_is_named_or_rebuilt(tiny: Tiny, damage: str) -> None:
    assert tiny.run()[0] == 0
    path = tiny.data / "tiny_ctr" / "train.h5"
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        content = content[: len(content) // 2]
    elif damage == "flip 64 bytes":
        start = len(content) // 10
        content[start : start + 64] = bytes(255 - b for b in content[start : start + 64])
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


@pytest.mark.parametrize("change", [{"labels": None}, {"labels": [3]}, {"labels": []}], ids=repr)
def test_a_feature_map_with_wrong_values(tiny: Tiny, change: dict[str, object]) -> None:
    assert tiny.run()[0] == 0
    shutil.rmtree(tiny.runs)
    path = tiny.data / "tiny_ctr" / "feature_map.json"
    stored = json.loads(path.read_text()) | change
    path.write_text(json.dumps(stored))
    manifest = path.with_name("manifest.json")
    known = json.loads(manifest.read_text())
    known["outputs"][path.name] = path.stat().st_size
    del known["checksum"], known["hashes"]
    manifest.write_text(json.dumps(known))
    tiny.refuses("feature_map.json: 'labels' must name the label columns, got ")


@pytest.mark.parametrize("suffix", ["npz", "h5", "parquet"])
def test_a_pretrained_file_that_is_gone(tiny: Tiny, suffix: str) -> None:
    keys, values = ["1", "2"], np.zeros((2, 4))
    if suffix == "npz":
        np.savez(tiny.raw / "emb.npz", key=np.array(keys), value=values)
    elif suffix == "h5":
        with h5py.File(tiny.raw / "emb.h5", "w") as file:
            file["key"], file["value"] = keys, values
    else:
        frame = pl.DataFrame(
            {"key": keys, "value": values.tolist()}, schema_overrides={"value": pl.Array(pl.Float64, 4)}
        )
        frame.write_parquet(tiny.raw / "emb.parquet")
    column = f"{{name: device, type: categorical, pretrained_emb: {tiny.raw}/emb.{suffix}, pretrain_dim: 4}}"
    columns = f"feature_cols=[{{name: slot, type: categorical}}, {column}]"
    assert tiny.run(columns) == (0, "")
    shutil.rmtree(tiny.runs)
    (tiny.data / "tiny_ctr" / f"pretrained_device.{suffix}").unlink()
    ready = [f"{split}_data={split}" for split in ("train", "valid", "test")]
    tiny.refuses(f"pretrained_device.{suffix}", columns, "data_format=h5", *ready)


def test_an_output_folder_that_cannot_be(tiny: Tiny) -> None:
    for value in ("model_root=/dev/null/x", "data_root=/dev/null/x"):
        tiny.refuses("/dev/null/x", value)


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


@pytest.mark.parametrize(
    ("zoo", "expid", "value", "message"),
    [
        ("DCNv3", "DCNv3_tiny", "embedding_dim=7", "embedding_dim must be even, every embedding is cut in two halves"),
        (
            "DCNv3",
            "DCNv3_tiny",
            "feature_specs=[{name: device, embedding_dim: 10}]",
            "field 'device' is 10 wide",
        ),
        ("DCNv3", "DCNv3_tiny", "use_features=[item_id, item_id]", "use_features: 'item_id' is named twice"),
        ("DCNv3", "DCNv3_tiny", "feature_specs=[{name: device, dim: 3}]", "feature_specs: device: unknown key 'dim'"),
        ("QIN", "QIN_tiny_mm", "attention=sum", "attention must be relu, softmax or mean, got 'sum'"),
        ("QIN", "QIN_tiny_mm", "history_field=history", "QIN: missing key 'history'"),
        (
            "QIN",
            "QIN_tiny_mm",
            "use_features=[item_seq, item_tags]",
            "QIN_tiny_mm.use_features: 'item_tags' is looked up by 'item_id': name that too",
        ),
    ],
)
def test_check_constructs_the_model(
    zoo: str, expid: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--zoo", str(ROOT / "model_zoo" / zoo), "--expid", expid, "--set", value]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and f"{expid}" in line and message in line


def test_check_of_ready_h5_data(tiny: Tiny) -> None:
    assert tiny.run()[0] == 0
    ready = ["data_format=h5", "feature_cols=[]", "label_col=[]", f"data_root={tiny.data}"]
    ready += [f"{split}_data={split}" for split in ("train", "valid", "test")]
    command = ["check", "--zoo", str(ZOO), "--expid", "DCNv3_tiny", *(w for value in ready for w in ("--set", value))]
    assert main(command) == 0
    assert tiny.capsys.readouterr().out == "DCNv3_tiny: ok\n"
    for value, message in (
        ("embedding_dim=7", "DCNv3_tiny: DCNv3: embedding_dim must be even"),
        (
            "use_features=[user, item_id]",
            "DCNv3_tiny.use_features: no such column, got 'user' (did you mean 'user_id'?)",
        ),
        ("feature_specs=[{name: [[device]]}]", "DCNv3_tiny.feature_specs: no such column, got ['device']"),
    ):
        assert main([*command, "--set", value]) == 2
        assert message in tiny.capsys.readouterr().err
    (tiny.data / "tiny_ctr" / "feature_map.json").write_text("[")
    assert main(command) == 2
    assert "feature_map.json: damaged or truncated JSON" in tiny.capsys.readouterr().err
    (tiny.data / "tiny_ctr" / "feature_map.json").unlink()
    assert main(command) == 0


def test_check_outside_a_repository(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "anywhere" / "config"
    shutil.copytree(ZOO / "config", config)
    assert main(["check", "--config", str(config), "--expid", "DCNv3_tiny"]) == 2
    text = capsys.readouterr().err
    assert f"no model folder, got 'DCNv3'; {tmp_path}/anywhere/model_zoo has none: name it with --zoo FOLDER" in text
    assert main(["check", "--config", str(config), "--expid", "DCNv3_tiny", "--zoo", str(ZOO)]) == 0


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("1 / 0", "Broken: ZeroDivisionError: division by zero"),
        ("torch.zeros(2) @ torch.zeros(3)", "Broken: RuntimeError: inconsistent tensor size"),
        ("open('no/such/file')", "Broken: no/such/file: No such file or directory"),
        ("{}['units']", "Broken: missing key 'units'"),
        ("[][0]", "Broken: IndexError: list index out of range"),
        ("torch.nn.ModuleDict({'type': self})", """Broken: attribute 'type' already exists"""),
        ("exec('raise ValueError(chr(97) + chr(10) + chr(98))')", "Broken: a"),
    ],
)
def test_what_a_constructor_raises(
    tmp_path: Path, statement: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "__init__.py").write_text(
        "import torch\nfrom fuxictr.pytorch.models import BaseModel\n\nclass Broken(BaseModel):\n"
        f"    def __init__(self, feature_map, **kwargs):\n        super().__init__(feature_map, **kwargs)\n        {statement}\n"
    )
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "model_config.yaml").write_text("B: {model: Broken, dataset_id: tiny_ctr}\n")
    shutil.copy(ROOT / "config" / "dataset_config" / "tiny_ctr.yaml", tmp_path / "config" / "dataset_config.yaml")
    assert main(["check", "--zoo", str(tmp_path), "--expid", "B"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}/config/model_config.yaml: B: {message}")


def test_check_accepts_every_shipped_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    for zoo in sorted((ROOT / "model_zoo").glob("*/config")):
        assert main(["check", "--zoo", str(zoo.parent)]) == 0, capsys.readouterr().err
