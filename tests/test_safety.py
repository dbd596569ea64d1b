# SPDX-License-Identifier: Apache-2.0
"""Names, paths and full disks: what SECURITY.md promises, one message each. tests/soak/ tries many more inputs."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest

from ctrbench import files
from ctrbench.checkpoint import save_weights
from ctrbench.cli import main
from ctrbench.config import load_experiment, load_run
from ctrbench.errors import ConfigError, CtrbenchError
from ctrbench.files import make_folder, storage_error, write_text
from ctrbench.run import Session, run
from ctrbench.runlog import RunLog
from ctrbench.sections import check_name, check_path

ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT / "model_zoo" / "DCNv3"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 201, r"^here: names a folder, so it must not be longer than 200 bytes, got 201$"),
        ("ü" * 101, r"longer than 200 bytes, got 202$"),
        ("a\nb", r"^here: names a folder, so it must not contain control characters$"),
        ("\u202eab", r"must not contain control characters$"),
        ("../x", r"must not contain '/' or be '\.' or '\.\.'$"),
    ],
)
def test_names(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_name(name, "here")


def test_names_that_are_fine() -> None:
    for name in ("DCNv3_tiny", "x" * 200, "Ünï cödé", "a.b-c@d", "<b>"):
        check_name(name, "here")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "model_root=" + "x" * 300,
            "model_root: names a path, so no part of it may be longer than 200 bytes, got 'xxx",
        ),
        ("data_root=" + "x" * 300, "data_root: names a path, so no part of it may be longer"),
        ("train_data=" + "y" * 300, "train_data: names a path, so no part of it may be longer"),
        ('train_data="a\\0b"', "train_data: names a path, so it must not contain NUL, got 'a\\x00b'"),
        ("model=../../elsewhere", "model: no model folder, got '../../elsewhere'"),
    ],
)
def test_paths_of_a_configuration(tmp_path: Path, value: str, message: str) -> None:
    config = ROOT / "model_zoo" / "DCNv3" / "config"
    if value.startswith("model="):  # a configuration that lies in no model folder
        config = tmp_path / "config"
        config.mkdir()
        (config / "model_config.yaml").write_text((ZOO / "config" / "model_config.yaml").read_text())
    with pytest.raises(ConfigError) as refused:
        load_experiment(config, "DCNv3_tiny", None, [value], is_data_required=False)
    assert any(message in line for line in refused.value.problems), refused.value


def test_a_path_may_lie_anywhere() -> None:
    for path in ("./runs/", "../../data", "/mnt/disk/runs", ""):
        check_path(path, "here")


def test_a_run_directory_whose_names_lead_elsewhere(tmp_path: Path, tiny_overrides: list[str]) -> None:
    experiment = load_experiment(ZOO / "config", "DCNv3_tiny", ZOO, tiny_overrides)
    write_text(experiment.run_dir / "config.yaml", experiment.to_yaml())
    assert load_run(experiment.run_dir).expid == "DCNv3_tiny"
    text = experiment.to_yaml()
    path = experiment.run_dir / "config.yaml"
    for old, new in (("expid: DCNv3_tiny", "expid: ../../x"), ("  dataset_id: tiny_ctr", "  dataset_id: ../../x")):
        path.write_text(text.replace(old, new))
        with pytest.raises(ConfigError, match="names a folder, so it must not contain '/'"):
            load_run(experiment.run_dir)


def test_the_tag_of_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuner = tmp_path / "sweep.yaml"
    keys = f"base_config: {ZOO / 'config'}\nbase_expid: DCNv3_tiny\ndataset_id: tiny_ctr\n"
    tuner.write_text(keys + "tuner_space: {net_dropout: [0.1]}\n")
    assert main(["tune", "--config", str(tuner), "--tag", "../../x", "--dry-run"]) == 2
    assert "the sweep's name sweep@../../x: names a folder" in capsys.readouterr().err


# ---------------------------------------------------------------- disks


def test_folders_are_on_disk_with_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync", synced.append)
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir() and set(synced) == {tmp_path, tmp_path / "a"}


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"x: the disk is full \(\d+ MiB free in "),
        (errno.EDQUOT, r"x: the disk is full"),
        (errno.EFBIG, r"x: cannot be written: File too large: this file system or process may write no larger file"),
        (errno.EROFS, r"x: cannot be written: Read-only file system: choose a folder that may be written to$"),
        (errno.EACCES, r"x: cannot be written: Permission denied: choose a folder that may be written to$"),
    ],
)
def test_what_is_said_of_a_file_that_cannot_be_written(tmp_path: Path, number: int, message: str) -> None:
    with pytest.raises(CtrbenchError, match=message):
        raise storage_error(OSError(number, os.strerror(number)), tmp_path / "x")


def test_a_log_that_cannot_be_written_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CtrbenchError, match=r"train\.log: the disk is full"), RunLog(verbose=0) as log:
        log.open(tmp_path / "train.log", append=False)
        logging.getLogger().info("one")

        def full(text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(log._file.stream, "write", full)
        logging.getLogger().info("two")
    assert "one" in (tmp_path / "train.log").read_text()


# ---------------------------------------------------------------- resuming with parts that are not whole


@pytest.mark.parametrize("damage", ["best gone", "best damaged", "checkpoint damaged"])
def test_an_unfinished_run_with_damaged_parts_begins_anew(
    tiny_overrides: list[str], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = [*tiny_overrides, "epochs=2", "batch_size=1000"]
    experiment = load_experiment(ZOO / "config", "DCNv3_tiny", ZOO, overrides)
    whole = run(experiment, session=Session(is_quiet=True))
    (experiment.run_dir / "DONE").unlink()
    best, last = experiment.run_dir / "best.safetensors", experiment.run_dir / "last.ckpt"
    expected = best.read_bytes()
    if damage == "best gone":
        best.unlink()
    else:
        path = best if damage == "best damaged" else last
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    report = run(experiment, session=Session(is_quiet=True))
    assert not report["is_resumed"] and report["metrics"] == whole["metrics"] and best.read_bytes() == expected
    name = "last.ckpt" if damage.startswith("checkpoint") else "best.safetensors"
    assert "is damaged: starting anew (" in caplog.text and name in caplog.text


def test_older_weights_without_a_checksum_are_enough_to_resume(tiny_overrides: list[str]) -> None:
    import safetensors.torch

    experiment = load_experiment(ZOO / "config", "DCNv3_tiny", ZOO, [*tiny_overrides, "epochs=2", "batch_size=1000"])
    run(experiment, session=Session(is_quiet=True))
    (experiment.run_dir / "DONE").unlink()
    best = experiment.run_dir / "best.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(best), best)
    assert run(experiment, session=Session(is_quiet=True))["is_resumed"]


def test_weights_are_replaced_only_when_they_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    path = tmp_path / "best.safetensors"
    save_weights(path, torch.nn.Linear(2, 2))
    before = path.read_bytes()

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(CtrbenchError, match=r"best\.safetensors: the disk is full"):
        save_weights(path, torch.nn.Linear(2, 2))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["best.safetensors"]
