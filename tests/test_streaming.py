# SPDX-License-Identifier: Apache-2.0
"""Streamed splits against resident ones."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from small_repository import SmallRepository

from ctrbench import streaming
from ctrbench.batches import Batches
from ctrbench.config import load_experiment
from ctrbench.errors import DataError, InterruptedRunError
from ctrbench.features import FeatureMap
from ctrbench.run import Session, run
from ctrbench.storage import SplitWriter, column_specs
from ctrbench.streaming import StreamedBatches

ROWS = 1003


@pytest.fixture
def feature_map() -> FeatureMap:
    feature_map = FeatureMap("test", "unused")
    sequence = {"source": "", "type": "sequence", "padding_idx": 0, "vocab_size": 300, "max_len": 3}
    feature_map.features["number"] = {"source": "", "type": "categorical", "padding_idx": 0, "vocab_size": 70000}
    feature_map.features["sequence"] = sequence
    feature_map.features["real"] = {"source": "", "type": "numeric"}
    feature_map.features["user"] = {"source": "", "type": "meta"}
    feature_map.labels = ["label"]
    return feature_map


@pytest.fixture
def path(tmp_path: Path, feature_map: FeatureMap) -> Path:
    number = np.arange(ROWS)
    path = tmp_path / "train.h5"
    with SplitWriter(path, column_specs(feature_map)) as writer:
        columns = {
            "number": number,
            "sequence": np.stack([number % 300, (number + 1) % 300, number * 0], axis=1),
            "real": (number / 2).astype(np.float32),
            "user": number + 2**40,
            "label": (number % 2).astype(np.float32),
        }
        writer.append(columns)
    return path


def both(path: Path, feature_map: FeatureMap, buffer_rows: int, **options: Any) -> tuple[Batches, StreamedBatches]:
    settings = {"batch_size": 64, "seed": 5, **options}
    return (
        Batches.from_file(path, feature_map, **settings),
        StreamedBatches(path, feature_map, **settings, buffer_rows=buffer_rows),
    )


def assert_equal(first: list[Any], second: list[Any]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert list(a) == list(b)
        assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("buffer_rows", [ROWS, 10 * ROWS])
def test_a_buffer_that_covers_the_split_gives_the_resident_batches(
    path: Path, feature_map: FeatureMap, shuffle: bool, buffer_rows: int
) -> None:
    resident, streamed = both(path, feature_map, buffer_rows, shuffle=shuffle)
    assert (streamed.num_rows, len(streamed), streamed.names) == (ROWS, 16, resident.names)
    for _ in range(3):  # epochs
        assert_equal(list(resident), list(streamed))
    assert_equal(list(resident.at(1, 7)), list(streamed.at(1, 7)))


@pytest.mark.parametrize("buffer_rows", [1, 50, 64, 100, 640, 1002])
def test_a_smaller_buffer_yields_every_row_once_in_full_batches(
    path: Path, feature_map: FeatureMap, buffer_rows: int
) -> None:
    _, streamed = both(path, feature_map, buffer_rows, shuffle=True)
    first, second = list(streamed), list(streamed)
    assert [len(batch["number"]) for batch in first] == [64] * 15 + [43]
    for epoch in (first, second):
        rows = torch.cat([batch["number"] for batch in epoch]).long()
        assert sorted(rows.tolist()) == list(range(ROWS))
        assert torch.equal(torch.cat([batch["real"] for batch in epoch]), rows.float() / 2)
        assert torch.equal(torch.cat([batch["user"] for batch in epoch]), rows + 2**40)
    assert not torch.equal(first[0]["number"], second[0]["number"])
    for batch in (0, 1, 6, 15):  # an epoch that goes on where it was
        assert_equal(first[batch:], list(streamed.at(0, batch)))


def test_rows_of_a_window_come_from_all_over_the_split(path: Path, feature_map: FeatureMap) -> None:
    _, streamed = both(path, feature_map, 320, shuffle=True)
    window = torch.cat([batch["number"] for batch in list(streamed)[:5]]).float()
    assert window.std() > 0.8 * torch.arange(ROWS).float().std()
    assert streamed.num_blocks == 4


@pytest.mark.parametrize("buffer_rows", [50, 640])
def test_unshuffled_rows_keep_the_order_of_the_file(path: Path, feature_map: FeatureMap, buffer_rows: int) -> None:
    resident, streamed = both(path, feature_map, buffer_rows, shuffle=False)
    assert_equal(list(resident), list(streamed))


def test_columns_and_rows_are_those_of_a_resident_split(path: Path, feature_map: FeatureMap) -> None:
    resident, streamed = both(path, feature_map, 100)
    for name in resident.names:
        assert torch.equal(resident.column(name), streamed.column(name))
        assert resident.column(name).dtype == streamed.column(name).dtype
    assert_equal([resident.rows([3, 1002, 0])], [streamed.rows([3, 1002, 0])])
    assert_equal(list(resident.ordered(200, False, 1)), list(streamed.ordered(200, False, 1)))
    assert streamed.batch_size == 64


def test_the_reader_ends_with_an_epoch_that_is_left_early(path: Path, feature_map: FeatureMap) -> None:
    _, streamed = both(path, feature_map, 100, shuffle=True)
    before = threading.active_count()
    epoch = iter(streamed)
    next(epoch)
    assert threading.active_count() == before + 1
    epoch.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_an_error_of_the_reader_reaches_the_trainer(path: Path, feature_map: FeatureMap) -> None:
    _, streamed = both(path, feature_map, 100, shuffle=True)
    with h5py.File(path, "r+") as file:
        for name in list(file):
            file[name].resize(ROWS - 1, axis=0)
        file.attrs["num_rows"] = ROWS - 1
    with pytest.raises(DataError, match=r"train\.h5: changed while it was read: build the dataset again"):
        list(streamed)


def test_damage_is_found_before_training(path: Path, feature_map: FeatureMap) -> None:
    with h5py.File(path, "r+") as file:
        file["real"][500] += 1
    with pytest.raises(DataError, match="checksum of column 'real' does not match"):
        StreamedBatches(path, feature_map, 64)


def test_memory_is_two_windows(path: Path, feature_map: FeatureMap, monkeypatch: pytest.MonkeyPatch) -> None:
    _, streamed = both(path, feature_map, 100, shuffle=True)
    sizes = []
    make = StreamedBatches._buffer

    def record(self: StreamedBatches, rows: int) -> Any:
        sizes.append(rows)
        return make(self, rows)

    monkeypatch.setattr(StreamedBatches, "_buffer", record)
    list(streamed)
    assert len(sizes) == 2 and max(sizes) <= 100


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, tiny_raw: Path) -> SmallRepository:
    return SmallRepository.make(tmp_path_factory.mktemp("repository"), tiny_raw, models=("DCNv3",))


def train(repository: SmallRepository, *overrides: str, fresh: bool = True, **session: Any) -> dict[str, Any]:
    zoo = repository.folder / "model_zoo" / "DCNv3"
    experiment = load_experiment(zoo / "config", "DCNv3_tiny", zoo, ["epochs=2", "verbose=0", *overrides])
    return run(experiment, fresh=fresh, session=Session(is_quiet=True, **session))


def test_training_is_the_same_when_the_buffer_covers_the_split(repository: SmallRepository) -> None:
    resident = train(repository)
    streamed = train(repository, "device_cache=stream")
    assert streamed["metrics"] == resident["metrics"]
    assert streamed["evidence"]["best.safetensors"] == resident["evidence"]["best.safetensors"]
    assert streamed["config_hash"] != resident["config_hash"]
    narrow = train(repository, "device_cache=stream", "shuffle_buffer=100")
    assert narrow["evidence"]["best.safetensors"] != resident["evidence"]["best.safetensors"]


def test_a_streamed_run_that_was_stopped_goes_on_to_the_same_weights(repository: SmallRepository) -> None:
    settings = ("device_cache=stream", "shuffle_buffer=100", "batch_size=32")
    whole = train(repository, *settings)
    steps = iter(range(1000))
    with pytest.raises(InterruptedRunError):
        train(repository, *settings, should_stop=lambda: next(steps) == 20)
    resumed = train(repository, *settings, fresh=False)
    assert resumed["is_resumed"] and resumed["evidence"]["best.safetensors"] == whole["evidence"]["best.safetensors"]


def test_a_split_that_does_not_fit_is_streamed_and_says_so(
    repository: SmallRepository, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ctrbench.batches.free_memory", lambda device: 1000)
    with caplog.at_level(logging.WARNING):
        report = train(repository, "shuffle_buffer=200")
    assert "does not fit cpu: it is streamed, and shuffled within 200 rows (shuffle_buffer)" in caplog.text
    assert report["metrics"]["test"]
    with pytest.raises(DataError, match=r"set device_cache: stream, or use fewer columns"):
        train(repository, "device_cache=resident")


def test_chunks_are_small_enough_to_mix() -> None:
    assert streaming.CHUNK_ROWS * streaming.CHUNKS_PER_WINDOW == 1 << 20
