# SPDX-License-Identifier: Apache-2.0
"""A build over shards leaves the same bytes as one that reads file after file."""

from __future__ import annotations

import copy
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import ctrbench.counting
import ctrbench.rawdata
import ctrbench.shards
from ctrbench.cli import main
from ctrbench.counting import Statistics
from ctrbench.engines import LocalEngine, RayEngine, check_is_shared, open_engine
from ctrbench.errors import ConfigError, CtrbenchError, DataError
from ctrbench.files import sha256_of_file
from ctrbench.preprocess import build_dataset
from ctrbench.rawdata import Block
from ctrbench.schema import DatasetConfig, FeatureColumn

COLUMNS = [
    {"name": "user", "active": True, "dtype": "str", "type": "meta", "remap": True},
    {"name": "token", "active": True, "dtype": "str", "type": "categorical"},
    {"name": "number", "active": True, "dtype": "int", "type": "categorical"},
    {"name": "words", "active": True, "dtype": "str", "type": "sequence", "share_embedding": "token", "splitter": "^"},
    {"name": "price", "active": True, "dtype": "float", "type": "numeric", "normalizer": "StandardScaler"},
]


class InThisProcess:
    """An engine whose tasks and results are copied, as on their way to another process and back."""

    def __init__(self, workers: int = 2):
        self.workers = workers

    def map(self, function: Callable[[Any, Any], Any], shared: Any, tasks: Sequence[Any]) -> Iterator[Any]:
        for task in tasks:
            yield copy.deepcopy(function(*copy.deepcopy((shared, task))))


def section(**changes: Any) -> DatasetConfig:
    values: dict[str, Any] = {
        "dataset_id": "sharded",
        "data_root": "data",
        "train_data": "train",
        "valid_data": "valid",
        "test_data": "test.csv",
        "min_categr_count": 2,
        "feature_cols": COLUMNS,
        "label_col": {"name": "click", "dtype": "float"},
    }
    return DatasetConfig.model_validate({**values, **changes})


def write_raw(root: Path) -> None:
    """Five files of train, one of them without a row, two of valid, one of test."""
    lengths = {"train/a": 40, "train/b": 25, "train/c": 0, "train/d": 33, "train/e": 1, "valid/a": 9, "valid/b": 12}
    generator = np.random.default_rng(5)
    for name, length in {**lengths, "test": 10}.items():
        frame = pl.DataFrame(
            {
                "user": [f"u{i}" for i in generator.integers(0, 30, length)],
                "token": [None if i == 0 else f"t{i}" for i in generator.integers(0, 15, length)],
                "number": generator.integers(-5, 9, length),
                "words": [
                    "^".join(f"t{i}" for i in generator.integers(0, 20, i)) for i in generator.integers(0, 5, length)
                ],
                "price": generator.normal(3.0, 2.0, length),
                "click": generator.integers(0, 2, length),
            },
            schema_overrides={"user": pl.String, "token": pl.String, "words": pl.String},
        )
        path = root / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        frame.write_csv(path)


def build(root: Path, engine: Any, **changes: Any) -> dict[str, str]:
    """SHA-256 of every file of the dataset."""
    built = build_dataset(section(**changes), root=root, engine=engine, fresh=True)
    files = [path for path in sorted(built.path.iterdir()) if not path.name.startswith(".")]
    assert {"train.h5", "feature_map.json", "feature_vocab.json", "manifest.json"} <= {path.name for path in files}
    return {path.name: sha256_of_file(path) for path in files}


SETTINGS = [
    pytest.param({}, id="files"),
    pytest.param({"valid_data": None, "test_data": None, "valid_size": 0.2, "test_size": 0.1}, id="random cut"),
    pytest.param({"valid_data": None, "test_data": None, "valid_size": 20, "split_type": "sequential"}, id="cut"),
    pytest.param(
        {
            "rebuild_dataset": False,
            "feature_cols": [
                {"name": "number", "active": True, "dtype": "int", "type": "categorical", "vocab_size": 20},
                {"name": "price", "active": True, "dtype": "float", "type": "numeric"},
            ],
        },
        id="ids given",
    ),
]


@pytest.mark.parametrize("changes", SETTINGS)
@pytest.mark.parametrize("tokens_in_memory", [1 << 20, 8], ids=["in memory", "on disk"])
def test_every_byte_is_that_of_one_process(
    changes: dict[str, Any], tokens_in_memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctrbench.rawdata, "BLOCK_ROWS", 16)
    monkeypatch.setattr(ctrbench.counting, "TOKENS_IN_MEMORY", tokens_in_memory)
    monkeypatch.setattr(ctrbench.shards, "TOKENS_IN_MEMORY", tokens_in_memory)
    write_raw(tmp_path)
    if "rebuild_dataset" in changes:
        for path in tmp_path.rglob("*.csv"):
            pl.read_csv(path, infer_schema=False).with_columns(pl.col("number").str.strip_chars("-")).write_csv(path)
    assert build(tmp_path, InThisProcess(), **changes) == build(tmp_path, None, **changes)


def test_two_processes_leave_the_same_bytes(tmp_path: Path) -> None:
    write_raw(tmp_path)
    assert build(tmp_path, LocalEngine(2)) == build(tmp_path, None)


@pytest.fixture(scope="module")
def ray_engine() -> Iterator[RayEngine]:
    pytest.importorskip("ray")
    engine = RayEngine(2)
    yield engine
    engine.close()


def test_two_ray_workers_leave_the_same_bytes(ray_engine: RayEngine, tmp_path: Path) -> None:
    write_raw(tmp_path)
    assert build(tmp_path, ray_engine) == build(tmp_path, None)


def test_an_error_of_a_ray_worker_is_the_one_of_a_build_in_one_process(ray_engine: RayEngine, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"b\.csv: row 3, column 'click': 7 is not a binary label \(0 or 1\)"):
        build(spoilt(tmp_path), ray_engine)


def _exit(shared: int, task: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return shared + task


def test_a_lost_ray_worker_is_said(ray_engine: RayEngine) -> None:
    def exit_(shared: int, task: int) -> None:  # workers cannot import this module, so it has to be sent along
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(CtrbenchError, match=r"--engine ray: a worker was lost .*: run the same command again"):
        list(ray_engine.map(exit_, 1, [1]))


def spoilt(root: Path) -> Path:
    """The raw files, with a label of 7 in the third row of train/b.csv."""
    write_raw(root)
    path = root / "train" / "b.csv"
    lines = path.read_text().splitlines()
    lines[3] = lines[3].rsplit(",", 1)[0] + ",7"
    path.write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("engine", [None, InThisProcess(), LocalEngine(2)], ids=["none", "here", "processes"])
def test_an_error_names_the_file_and_the_row_whoever_reads_it(engine: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"b\.csv: row 3, column 'click': 7 is not a binary label \(0 or 1\)"):
        build(spoilt(tmp_path), engine)
    assert not list((tmp_path / "data" / "sharded").glob("*.json"))
    assert not list((tmp_path / "data" / "sharded").glob(".build.*.partial"))


def test_a_source_without_a_row_is_refused(tmp_path: Path) -> None:
    write_raw(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "valid" / f"{name}.csv").write_text("user,token,number,words,price,click\n")
    with pytest.raises(DataError, match=r"a\.csv and 1 more: no rows: the split is empty"):
        build(tmp_path, InThisProcess())


def test_a_killed_process_is_said() -> None:
    with pytest.raises(CtrbenchError, match="a worker process was killed, most often because memory ran out"):
        list(LocalEngine(2).map(_exit, 1, [1, 2]))


def test_a_worker_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(CtrbenchError, match="does not see it: data_root and the raw files must lie on a file system"):
        check_is_shared(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dask", 2), "--engine dask: must be one of local, ray"),
        (("local", 0), "--workers 0: must be at least 1"),
        (("local", 2, "10.0.0.1:6379"), "--address: of a Ray cluster, so it goes with --engine ray"),
    ],
)
def test_engines_that_there_are_not(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message), open_engine(*arguments):
        pass


def test_ray_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="--engine ray: ray is not installed: pip install ray"):
        RayEngine(2)


def test_joining_is_associative(tmp_path: Path) -> None:
    column = FeatureColumn.model_validate({"name": "x", "dtype": "str", "type": "categorical"})
    price = FeatureColumn.model_validate(
        {"name": "price", "dtype": "float", "type": "numeric", "normalizer": "StandardScaler"}
    )

    def fresh() -> Statistics:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        return Statistics([column, price], folder, ids_given=False)

    def part(tokens: list[str], prices: list[float]) -> Statistics:
        statistics = fresh()
        with ThreadPoolExecutor(1) as threads:
            statistics.add(Block(pl.DataFrame({"x": tokens, "price": prices}), Path("raw.csv"), 0), True, threads)
        return statistics

    parts = [
        part(["a", "b", "a"], [0.1, 0.7, 3.3]).part(),
        part(["b", "c"], [1e8, -2.0]).part(),
        part(["c", "d", "c"], [0.3, 0.3, 0.9]).part(),
    ]
    left, right, inner = fresh(), fresh(), fresh()
    for one in parts:
        left.join(one)
    for one in parts[1:]:
        inner.join(one)
    right.join(parts[0])
    right.join(inner.part())
    found = [one.interners["x"].counts(1)[0].sort("token").rows() for one in (left, right)]
    assert found[0] == found[1] == [("a", 2), ("b", 2), ("c", 3), ("d", 1)]
    assert left.moments("price") == right.moments("price")


def test_the_command_builds_what_a_run_then_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_raw(tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "model_zoo").mkdir()
    values = section().model_dump(mode="json", exclude_unset=True)
    (tmp_path / "config" / "dataset_config.yaml").write_text(f"sharded: {values}\n".replace("None", "null"))
    monkeypatch.chdir(tmp_path)
    assert main(["build", "sharded", "--config", "config", "--workers", "2"]) == 0
    assert "train 99, valid 21, test 10 rows, data hash" in capsys.readouterr().out
    before = (tmp_path / "data" / "sharded" / "manifest.json").stat().st_mtime_ns
    build_dataset(section(), root=tmp_path)
    assert (tmp_path / "data" / "sharded" / "manifest.json").stat().st_mtime_ns == before
    assert main(["build", "sharded", "--config", "config", "--engine", "spark"]) == 2
    assert "error: --engine spark: must be one of local, ray" in capsys.readouterr().err


@pytest.mark.parametrize("are_ids_given", [True, False])
def test_histories_and_the_item_table_are_the_same(are_ids_given: bool, tmp_path: Path) -> None:
    def rows(seed: int, length: int) -> pl.DataFrame:
        generator = np.random.default_rng(seed)
        filled = generator.integers(0, 5, length)
        items = [[0] * (4 - n) + generator.integers(1, 9, n).tolist() for n in filled.tolist()]
        columns = {
            "item": generator.integers(1, 9, length),
            "history": items,
            "click": generator.integers(0, 2, length),
        }
        return pl.DataFrame(columns, schema_overrides={"history": pl.List(pl.Int64)})

    (tmp_path / "train").mkdir()
    for number, length in enumerate((30, 7, 20)):
        rows(number, length).write_parquet(tmp_path / "train" / f"{number}.parquet")
    rows(9, 12).write_parquet(tmp_path / "valid.parquet")
    table = pl.DataFrame({"item": list(range(9)), "tag": [0, 1, 2, 1, 3, 2, 2, 1, 3]})
    table.write_parquet(tmp_path / "items.parquet")
    size = {"vocab_size": 10} if are_ids_given else {}
    columns = [
        {"name": "history", "active": True, "dtype": "int", "type": "meta"},
        {"name": "item", "active": True, "dtype": "int", "type": "categorical", "source": "item", **size},
        {"name": "tag", "active": True, "dtype": "int", "type": "categorical", "source": "item", **size},
    ]
    changes = {
        "data_format": "parquet",
        "rebuild_dataset": not are_ids_given,
        "item_info": "items.parquet",
        "valid_data": "valid.parquet",
        "test_data": None,
        "min_categr_count": 1,
        "feature_cols": columns,
    }
    with_shards = build(tmp_path, InThisProcess(), **changes)
    assert "items.h5" in with_shards
    assert with_shards == build(tmp_path, None, **changes)
