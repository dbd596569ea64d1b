# SPDX-License-Identifier: Apache-2.0
"""`prepare` under trouble: full disks, interruptions, two at once, leftovers; nothing half-written is taken for whole."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from conftest import ROOT
from filelock import FileLock

from ctrbench.cli import main
from ctrbench.datasets import preparation, writing
from ctrbench.datasets.catalog import find_dataset
from ctrbench.datasets.preparation import RECORD, SCRATCH, prepare, read_record
from ctrbench.errors import CtrbenchError, DataError

MOVIELENS = find_dataset("MovielensLatest_x1", ROOT)
SPLITS = ("train", "valid", "test")


@pytest.fixture
def raw(tmp_path):
    return write(tmp_path / "raw", 1)


def write(folder, first, rows=2000):
    folder.mkdir(exist_ok=True)
    for split in SPLITS:
        lines = [f"{i % 2} {first}:1 {i}:1 {i * 7919 % 10007}:1\n" for i in range(rows)]
        (folder / f"{split}.libsvm").write_text("".join(lines))
    return folder


def leftovers(folder):
    return sorted(
        p.name for p in folder.iterdir() if p.name not in {*(f"{s}.parquet" for s in SPLITS), RECORD, ".prepare.lock"}
    )


@pytest.fixture
def small_disk():
    """Writes beyond some bytes fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("size", [100, 5_000, 20_000])
def test_a_disk_that_is_full_half_way(tmp_path, raw, small_disk, size):
    """100 bytes: in the scratch text; more: in later writes."""
    small_disk(size)
    with pytest.raises(CtrbenchError, match=r"out: cannot be written: File too large") as error:
        prepare(MOVIELENS, raw, tmp_path / "out", is_sample=True)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        pl.exceptions.ComputeError("No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_while_parquet_is_written(tmp_path, raw, monkeypatch, error):
    prepare(MOVIELENS, raw, tmp_path / "out", is_sample=True)
    before = {name: (tmp_path / "out" / name).read_bytes() for name in (*(f"{s}.parquet" for s in SPLITS), RECORD)}

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(writing.SplitText, "_write", fail)
    with pytest.raises(CtrbenchError, match=r"out: the disk is full \(\d+ MiB free in .*run the same command again"):
        prepare(MOVIELENS, write(tmp_path / "raw", 2), tmp_path / "out", is_sample=True)
    assert before == {name: (tmp_path / "out" / name).read_bytes() for name in before}  # the earlier split is as it was
    assert not leftovers(tmp_path / "out")


def test_a_folder_that_cannot_be_written(tmp_path, raw):
    (tmp_path / "file").touch()
    with pytest.raises(CtrbenchError, match=r"cannot be written"):
        prepare(MOVIELENS, raw, tmp_path / "file" / "out", is_sample=True)


def test_an_interruption_leaves_nothing(tmp_path, raw, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing.SplitText, "_write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(MOVIELENS, raw, tmp_path / "out", is_sample=True)
    assert not (tmp_path / "out").exists()
    assert prepare(MOVIELENS, raw, tmp_path / "out", is_sample=True).rows == dict.fromkeys(SPLITS, 2000)


def test_killed_half_way_and_started_again(tmp_path, raw):
    """SIGKILL while it works: what is left is not taken for a dataset, and the next run starts cleanly."""
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom ctrbench.datasets import writing\n"
        "from ctrbench.datasets.catalog import find_dataset\nfrom ctrbench.datasets.preparation import prepare\n"
        "done = writing.SplitText._write\n"
        "def slow(*arguments):\n    done(*arguments)\n    print('written', flush=True)\n    time.sleep(60)\n"
        "writing.SplitText._write = slow\n"
        "prepare(find_dataset('MovielensLatest_x1', Path(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3]), is_sample=True)\n"
    )
    command = [sys.executable, "-c", program, ROOT, raw, tmp_path / "out"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout.readline() == b"written\n"
    with pytest.raises(DataError, match=r"out: another process prepares this folder: wait until it is done"):
        prepare(MOVIELENS, raw, tmp_path / "out", is_sample=True)
    process.kill()
    process.wait()
    process.stdout.close()
    assert (tmp_path / "out" / SCRATCH / "train.parquet").exists() and read_record(tmp_path / "out") is None
    assert not list((tmp_path / "out").glob("*.parquet"))
    prepare(MOVIELENS, raw, tmp_path / "out", is_sample=True)
    assert not leftovers(tmp_path / "out") and read_record(tmp_path / "out") is not None


@pytest.mark.parametrize("stage", range(4))
def test_two_splits_never_stand_mixed(tmp_path, raw, monkeypatch, stage):
    """Killed between two renames: files of one split only, and no record that calls them complete."""
    prepare(MOVIELENS, raw, tmp_path / "out", is_sample=True)
    count = 0

    def replace(source, target):
        nonlocal count
        if count == stage:
            raise SystemExit("killed")
        count += 1
        os.rename(source, target)

    write(tmp_path / "raw", 2)
    monkeypatch.setattr(preparation.os, "replace", replace)
    with pytest.raises(SystemExit):
        prepare(MOVIELENS, tmp_path / "raw", tmp_path / "out", is_sample=True)
    assert read_record(tmp_path / "out") is None
    users = {
        user for path in (tmp_path / "out").glob("*.parquet") for user in pl.read_parquet(path)["user_id"].unique()
    }
    assert users <= {"2"} and len(list((tmp_path / "out").glob("*.parquet"))) == stage


def test_the_other_format_replaces_the_first(tmp_path, raw):
    prepare(MOVIELENS, raw, tmp_path / "out", is_sample=True)
    prepare(MOVIELENS, raw, tmp_path / "out", is_sample=True, file_format="csv")
    assert not list((tmp_path / "out").glob("*.parquet")) and set(read_record(tmp_path / "out")["files"]) == {
        f"{split}.csv" for split in SPLITS
    }


def test_a_record_cannot_name_files_elsewhere(tmp_path, raw):
    prepare(MOVIELENS, raw, tmp_path / "out", is_sample=True)
    (tmp_path / "precious").touch()
    record = read_record(tmp_path / "out")
    record["files"]["../precious"] = {"rows": 1, "bytes": 0}
    (tmp_path / "out" / RECORD).write_text(json.dumps(record))
    prepare(MOVIELENS, raw, tmp_path / "out", is_sample=True)
    assert (tmp_path / "precious").exists()
    for text in ("", "[]", '{"files": 1}', '{"files": {"a": 1}}', "\xff"):
        (tmp_path / "out" / RECORD).write_bytes(text.encode("latin-1"))
        assert read_record(tmp_path / "out") is None


def test_the_same_input_gives_the_same_bytes(tmp_path, raw):
    for name in ("a", "b"):
        prepare(MOVIELENS, raw, tmp_path / name, is_sample=True)
    for name in (*(f"{split}.parquet" for split in SPLITS), RECORD):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_output_onto_the_raw_files(tmp_path, raw):
    with pytest.raises(DataError, match=r"--output is the folder of the raw files and would replace them"):
        prepare(MOVIELENS, raw, raw, is_sample=True)
    assert sorted(p.name for p in raw.iterdir()) == sorted(f"{split}.libsvm" for split in SPLITS)


# --- the commands


def run(capsys, *arguments):
    status = main([*map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def test_prepare_prints_counts_beside_the_published_ones(tmp_path, raw, capsys):
    status, out, _ = run(
        capsys, "prepare", "movielenslatest-x1", "--raw", raw, "--output", tmp_path / "out", "--sample"
    )
    lines = out.splitlines()
    assert status == 0
    start = next(i for i, line in enumerate(lines) if line.startswith("file"))
    header, first = lines[start : start + 2]
    assert header.split() == ["file", "rows", "published", "MD5", "of", "the", "CSV"]
    assert first.split()[:3] == ["train.parquet", "2,000", "1,404,801"] and "(published: efc8" in first
    assert header.index("rows") + 4 == first.index("2,000") + 5  # right-aligned
    assert "positive labels: 3,000, 50.00%" in lines
    assert any(line.startswith("split: random 7:2:1") and "seed unpublished" in line for line in lines)
    assert any(line.startswith("warning: train: 2,000 rows, published are 1,404,801") for line in lines)


def test_prepare_fails_with_one_line_and_status_2(tmp_path, raw, capsys):
    status, _, err = run(capsys, "prepare", "MovielensLatest_x1", "--raw", raw, "--output", tmp_path / "out")
    assert status == 2 and err.count("\n") == 1
    assert err.startswith(f"error: {raw}: train: 2,000 rows, published are 1,404,801; the MD5 of the CSV is")
    assert "or pass --sample" in err and not (tmp_path / "out").exists()
    status, _, err = run(capsys, "prepare", "Criteo_x5", "--raw", raw)
    assert (
        status == 2 and "Criteo_x5: unknown dataset (did you mean 'Criteo_x4'?): known are Avazu_x4, Criteo_x4" in err
    )
    status, _, err = run(capsys, "prepare", "Criteo_x4")
    assert (
        status == 2 and "--raw is needed: train.txt or dac.tar.gz" in err and "pass --download (terms: Criteo's" in err
    )
    status, _, err = run(capsys, "prepare", "KDD12", "--download", "--raw", tmp_path / "new")
    assert (
        status == 2 and "KDD12: --download: It cannot be fetched without you: sign in at https://www.kaggle.com" in err
    )


def test_interrupting_the_command(tmp_path):
    """Ctrl-C while it reads: status 130, one line, nothing left."""
    command = [
        sys.executable,
        "-c",
        "import sys; from ctrbench.cli import main; sys.exit(main())",
        "prepare",
        "Criteo_x4",
    ]
    command += ["--raw", str(tmp_path / "raw"), "--output", str(tmp_path / "out"), "--sample"]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "train.txt").write_bytes((b"0" + b"\t" * 39 + b"\n") * 2_000_000)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    assert "the labels" in process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted: nothing of the split was kept" in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def repository(folder: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    (folder / "model_zoo").mkdir()
    (folder / "data" / "prepare").symlink_to(ROOT / "data" / "prepare")
    return folder


def test_datasets_lists_what_is_known_and_on_disk(tmp_path, raw, capsys, monkeypatch):
    root = repository(tmp_path / "repository")
    monkeypatch.chdir(root)
    status, out, _ = run(capsys, "datasets")
    table, commands, terms = (block.splitlines() for block in out.split("\n\n"))
    names = ["Avazu_x4", "Criteo_x4", "Frappe_x1", "iPinYou_x1", "KDD12", "KKBox_x1", "MicroLens_1M_x1", "ML_1M",
             "ML_1M_AutoInt", "MovielensLatest_x1"]  # fmt: skip
    assert status == 0 and all([line.split()[0] for line in block[1:]] == names for block in (table, commands, terms))
    assert table[2].split() == ["Criteo_x4", "45,840,617", "11.0", "GB", "-"]
    ends = {line.index(line.split()[1]) + len(line.split()[1]) for line in table[1:]}
    assert len(ends) == 1  # the rows are right-aligned
    assert "ctrbench prepare KDD12 --raw PATH" in commands[5] and "ctrbench prepare Criteo_x4 --download" in commands[2]
    assert "no redistribution" in terms[8]

    output = root / "data" / "raw" / "MovielensLatest_x1"
    prepare(MOVIELENS, raw, output, is_sample=True)
    assert "MB, not the published figures" in run(capsys, "datasets")[1]
    published = dataclasses.replace(MOVIELENS.published, md5=read_record(output)["csv_md5"])
    prepare(MOVIELENS, raw, output, published=published)
    assert "MB, MD5 as published" in run(capsys, "datasets")[1]
    (output / "test.parquet").write_bytes(b"short")
    assert "test.parquet has been removed or changed: prepare it again" in run(capsys, "datasets")[1]
    (output / RECORD).unlink()
    assert "MB, without a record" in run(capsys, "datasets")[1]
    (output / SCRATCH).mkdir()
    assert "unfinished: prepare it again" in run(capsys, "datasets")[1]


def test_datasets_says_all_of_one(capsys):
    status, out, _ = run(capsys, "datasets", "ml-1m")
    assert status == 0 and out.startswith("ML_1M\n")
    for text in (
        "train 591,209 / valid 73,901 / test 73,902",
        "the published seed is unknown",
        "https://files.grouplens.org",
    ):
        assert text in out
    assert "MD5 train" in run(capsys, "datasets", "kkbox_x1")[1]


def test_outside_of_a_repository_the_package_knows_its_own(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "datasets")[0] == 0


def test_the_lock_is_free_after_an_error(tmp_path, raw):
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError):
        prepare(MOVIELENS, raw, tmp_path / "out")
    with FileLock(tmp_path / "out" / ".prepare.lock", timeout=0):
        assert not leftovers(tmp_path / "out")


def test_a_raw_file_that_grows_between_the_passes(tmp_path):
    criteo = find_dataset("Criteo_x4", ROOT)
    raw = tmp_path / "train.txt"
    raw.write_bytes((b"0" + b"\t" * 39 + b"\n") * 50)

    def grow(line):
        if "into 10 folds" in line:
            raw.write_bytes(raw.read_bytes() + b"0" + b"\t" * 39 + b"\n")

    with pytest.raises(DataError, match=r"train.txt: it changed while it was read: run again when it is complete"):
        prepare(criteo, raw, tmp_path / "out", is_sample=True, report=grow)
    assert not (tmp_path / "out").exists()
