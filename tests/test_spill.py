# SPDX-License-Identifier: Apache-2.0
"""The rows between fitting and encoding: nothing is lost, nothing is left, and a killed build starts again cleanly."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import ctrbench.counting
import ctrbench.encoding
import ctrbench.interning
import ctrbench.rawdata
import ctrbench.spill
from ctrbench.errors import CtrbenchError, DataError
from ctrbench.interning import Coded
from ctrbench.preprocess import build_dataset
from ctrbench.rawdata import Block
from ctrbench.schema import DatasetConfig
from ctrbench.sources import ahead
from ctrbench.spill import CodedBlock, Spill, scratch_folder

ROOT = Path(__file__).resolve().parents[1]


def section(**changes: Any) -> DatasetConfig:
    token = {"active": True, "dtype": "str", "type": "categorical"}
    columns = [
        {"name": "user", "active": True, "dtype": "str", "type": "meta"},
        {**token, "name": "item"},
        {**token, "name": "other", "share_embedding": "item"},
        {**token, "name": "number", "dtype": "int"},
        {**token, "name": "history", "type": "sequence", "splitter": "^", "max_len": 0},
        {"name": "price", "active": True, "dtype": "float", "type": "numeric", "normalizer": "StandardScaler"},
    ]
    values: dict[str, Any] = {
        "dataset_id": "tiny",
        "data_root": "data",
        "train_data": "train.csv",
        "test_data": "test.csv",
        "min_categr_count": 2,
        "feature_cols": columns,
        "label_col": {"name": "click", "dtype": "float"},
    }
    return DatasetConfig.model_validate({**values, **changes})


def write_raw(root: Path, rows: int = 3000) -> None:
    root.mkdir(exist_ok=True)
    for seed, split in enumerate(["train", "test"]):
        generator = np.random.default_rng(seed)
        rank = (generator.random((3, rows)) ** 4 * 2000).astype(np.int64)
        lengths = generator.integers(0, 4, rows)
        frame = {
            "user": [f"u{i}" for i in rank[0] % 300],
            "item": [f"i{i}" for i in rank[0]],
            "other": [f"i{i}" for i in rank[1]],
            "number": rank[2] - 5,
            "history": ["^".join(f"h{(r + k) % 200}" for k in range(n)) for r, n in zip(rank[1], lengths, strict=True)],
            "price": generator.normal(3, 2, rows).round(3),
            "click": generator.integers(0, 2, rows),
        }
        pl.DataFrame(frame).write_csv(root / f"{split}.csv")


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a dataset but its manifest, which names paths and times."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("manifest.json", ".build.lock")
    }


def files(root: Path) -> set[str]:
    return {path.name for path in (root / "data/tiny").iterdir()}


def count_seals(monkeypatch: pytest.MonkeyPatch, seals: list[ctrbench.interning.Interner]) -> None:
    seal = ctrbench.interning.Interner.seal

    def counted(interner: ctrbench.interning.Interner) -> None:
        seals.append(interner)
        seal(interner)

    monkeypatch.setattr(ctrbench.interning.Interner, "seal", counted)


def test_spilled_vocabularies_give_the_same_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_raw(tmp_path)
    for changes in ({}, {"valid_size": 0.2, "split_type": "random"}):
        monkeypatch.undo()
        wanted = content(build_dataset(section(**changes), root=tmp_path, fresh=True).path)
        monkeypatch.setattr(ctrbench.rawdata, "BLOCK_ROWS", 500)
        in_blocks = content(build_dataset(section(**changes), root=tmp_path, fresh=True).path)
        for name in ("feature_map.json", "feature_vocab.json"):
            assert in_blocks[name] == wanted[name]
        seals: list[ctrbench.interning.Interner] = []
        count_seals(monkeypatch, seals)
        monkeypatch.setattr(ctrbench.counting, "TOKENS_IN_MEMORY", 400)
        monkeypatch.setattr(ctrbench.interning, "_CHUNK", 100)
        spilled = content(build_dataset(section(**changes), root=tmp_path, fresh=True).path)
        assert len(seals) > 20
        assert spilled == in_blocks


def test_blocks_come_back_as_they_were(tmp_path: Path) -> None:
    frame = pl.DataFrame({"label": [1.0, 0.0], "vector": [[1.0, 2.0], None]})
    coded = {
        "a": Coded(np.array([1, 2], np.uint16), 3),
        "b": Coded(np.array([7, 8, 9], np.uint32), 0, np.array([3, 0], np.int32)),
    }
    with Spill(tmp_path) as spill:
        spill.append("train", CodedBlock(Block(frame, Path("x.csv"), 40), coded))
        spill.append("train", CodedBlock(Block(pl.DataFrame(), Path("y.csv"), 0), {"b": coded["b"]}))
        assert "train" in spill and "test" not in spill and list(spill.blocks("test")) == []
        first, second = spill.blocks("train")
    assert first.block.frame.equals(frame) and first.block.place(1, "a") == "x.csv: row 42, column 'a'"
    assert first.num_rows == second.num_rows == 2 and second.block.frame.width == 0
    for block in (first, second):
        for name, column in block.coded.items():
            assert column.codes.tolist() == coded[name].codes.tolist() and column.codes.dtype == coded[name].codes.dtype
            assert column.generation == coded[name].generation
            assert (column.lengths is None) == (coded[name].lengths is None)
    assert second.coded["b"].lengths is not None and second.coded["b"].lengths.tolist() == [3, 0]
    assert list(tmp_path.iterdir()) == []  # read once, then gone


def test_full_disk_while_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_raw(tmp_path)
    monkeypatch.setattr(ctrbench.rawdata, "BLOCK_ROWS", 100)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pl.DataFrame, "write_ipc", full)
    with pytest.raises(CtrbenchError, match=r"train-\d+.block: the disk is full .* free some space and run the same"):
        build_dataset(section(), root=tmp_path)
    assert files(tmp_path) <= {".build.lock"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, DataError("no")], ids=repr)
def test_nothing_is_left_of_an_interrupted_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write_raw(tmp_path)

    def interrupted(*_: object) -> None:
        assert len(list((tmp_path / "data/tiny").glob(".build.*.partial/*"))) > 0
        raise error

    monkeypatch.setattr(ctrbench.encoding.SplitEncoder, "arrays", interrupted)
    with pytest.raises(type(error) if isinstance(error, Exception) else KeyboardInterrupt):
        build_dataset(section(), root=tmp_path)
    assert files(tmp_path) <= {".build.lock"}


def test_a_killed_build_starts_again_cleanly(tmp_path: Path) -> None:
    write_raw(tmp_path)
    write_raw(tmp_path / "other")
    wanted = content(build_dataset(section(), root=tmp_path / "other").path)
    (tmp_path / "section.json").write_text(json.dumps(section().model_dump(mode="json", by_alias=True)))
    script = (
        "import json, sys, time; from pathlib import Path; import ctrbench.encoding\n"
        "from ctrbench.preprocess import build_dataset; from ctrbench.schema import DatasetConfig\n"
        "ctrbench.encoding.SplitEncoder.arrays = lambda *_: (Path('here').touch(), time.sleep(60))\n"
        "build_dataset(DatasetConfig.model_validate(json.loads(Path('section.json').read_text())), root=Path('.'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (tmp_path / "here").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1].decode()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = files(tmp_path)
    assert any(name.startswith(".build.") and name.endswith(".partial") for name in left)
    assert "manifest.json" not in left and not any(name.endswith(".h5") and name[0] != "." for name in left)
    built = build_dataset(section(), root=tmp_path)
    assert content(built.path) == wanted


def test_leftovers_go_and_a_link_is_not_followed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    folder = tmp_path / "data"
    (folder / ".build.1.partial" / "deep").mkdir(parents=True)
    (folder / ".train.h5.1.partial").touch()
    (folder / ".link.partial").symlink_to(kept)
    with scratch_folder(folder) as scratch:
        assert [path.name for path in folder.iterdir()] == [scratch.name]
        (scratch / "file").touch()
    assert list(folder.iterdir()) == [] and (kept / "file").exists()
    (tmp_path / "file").touch()
    with pytest.raises(CtrbenchError, match="cannot be written"), scratch_folder(tmp_path / "file"):
        pass


def test_reading_ahead_passes_values_and_errors_on() -> None:
    assert list(ahead(iter(range(5)))) == list(range(5))

    def broken() -> Iterator[int]:
        yield 1
        raise DataError("broken")

    values = ahead(broken())
    assert next(values) == 1
    with pytest.raises(DataError, match="broken"):
        next(values)
    unfinished = ahead(iter(range(5)))
    assert next(unfinished) == 0
    unfinished.close()  # type: ignore[attr-defined]
