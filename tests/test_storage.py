# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from ctrbench.errors import CtrbenchError, DataError
from ctrbench.features import FeatureMap
from ctrbench.storage import ColumnSpec, SplitWriter, column_specs, open_split, smallest_int


def make_map() -> FeatureMap:
    feature_map = FeatureMap("tiny", ".")
    feature_map.labels = ["click"]
    feature_map.features.update(
        {
            "item": {"type": "categorical", "vocab_size": 300},
            "history": {"type": "sequence", "vocab_size": 9, "max_len": 3},
            "price": {"type": "numeric"},
            "image": {"type": "embedding", "pretrain_dim": 2},
            "user": {"type": "meta"},
        }
    )
    feature_map.refresh_counts()
    return feature_map


def make_rows(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "item": random.integers(0, 300, count),
        "history": random.integers(0, 9, (count, 3)),
        "price": random.normal(size=count),
        "image": random.normal(size=(count, 2)),
        "user": random.integers(0, 1 << 40, count),
        "click": random.integers(0, 2, count),
    }


def write(path: Path, blocks: list[dict[str, np.ndarray]], **options: Any) -> Path:
    feature_map = make_map()
    with SplitWriter(path, column_specs(feature_map, **options), feature_map_hash=feature_map.content_hash()) as writer:
        for block in blocks:
            writer.append(block)
    return path


def test_smallest_int() -> None:
    sizes = (1, 256, 257, 65536, 65537, 2**31, 2**31 + 1)
    assert [smallest_int(size).name for size in sizes] == [
        "uint8",
        "uint8",
        "uint16",
        "uint16",
        "int32",
        "int32",
        "int64",
    ]


def test_round_trip_from_a_second_thread(tmp_path: Path) -> None:
    blocks = [make_rows(100, 1), make_rows(7, 2), make_rows(300, 3)]
    feature_map = make_map()
    writer = SplitWriter(tmp_path / "train.h5", column_specs(feature_map), feature_map_hash=feature_map.content_hash())
    with ThreadPoolExecutor(1) as thread:
        for block in blocks:
            thread.submit(writer.append, block).result()
        thread.submit(writer.close).result()
    with open_split(tmp_path / "train.h5", feature_map) as split:
        assert split.num_rows == 407 and split.has_labels
        assert split.columns == ["item", "history", "price", "image", "user", "click"]
        for name in split.columns:
            whole = np.concatenate([block[name] for block in blocks])
            np.testing.assert_allclose(split.read(name), whole, rtol=1e-6)
            np.testing.assert_allclose(split.read(name, 95, 110), whole[95:110], rtol=1e-6)
        types = {name: split.read(name, 0, 1).dtype.name for name in split.columns}
    assert types == {
        "item": "uint16",
        "history": "uint8",
        "price": "float32",
        "image": "float32",
        "user": "int64",
        "click": "float32",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["train.h5"]


def test_meta_size_and_missing_labels(tmp_path: Path) -> None:
    rows = make_rows(5)
    rows["user"] %= 200
    del rows["click"]
    path = write(tmp_path / "test.h5", [rows], has_labels=False, meta_sizes={"user": 200})
    with open_split(path, make_map(), labels_required=False) as split:
        assert not split.has_labels
        assert split.read("user").dtype == np.uint8
    with pytest.raises(DataError, match=r"test.h5: label column 'click' is missing"):
        open_split(path, make_map())


def test_selected_features_open_the_same_file(tmp_path: Path) -> None:
    path = write(tmp_path / "train.h5", [make_rows(5)])
    feature_map = make_map()
    feature_map._stored = feature_map.to_dict()
    del feature_map.features["price"]
    with open_split(path, feature_map) as split:
        assert "price" not in split.columns
        with pytest.raises(DataError, match=r"no column 'pric'"):
            split.read("pric")


def fuxictr_2_0(path: Path, **changes: np.ndarray | None) -> Path:
    """As fuxictr 2.0.1 saves it: contiguous 64-bit columns, no attributes."""
    rows = make_rows(6)
    rows = {
        name: values.astype(np.float64 if name in ("price", "click", "image") else np.int64)
        for name, values in rows.items()
    }
    rows["history"] = rows["history"].astype(np.int32)
    with h5py.File(path, "w") as file:
        for name, values in {**rows, **changes}.items():
            if values is not None:
                file.create_dataset(name, data=values)
    return path


def test_fuxictr_2_0_file(tmp_path: Path) -> None:
    with open_split(fuxictr_2_0(tmp_path / "train.h5"), make_map()) as split:
        assert split.num_rows == 6
        assert split.checksums() is None
        np.testing.assert_array_equal(split.read("item"), make_rows(6)["item"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"item": None, "itm": np.zeros(6)}, r"column 'item' of the feature map is missing \(did you mean 'itm'\?\)"),
        ({"click": None}, "label column 'click' is missing"),
        ({"history": np.zeros((6, 4), int)}, r"column 'history' has shape \(6, 4\), not \(N, 3\)"),
        ({"price": np.zeros((6, 1))}, r"column 'price' has shape \(6, 1\), not \(N,\)"),
        ({"price": np.zeros(5)}, "column 'price' has 5 rows, the others 6"),
        ({"item": np.zeros(6)}, "column 'item' holds float64, not numbers|holds float64"),
        ({"user": np.array([b"a"] * 6)}, "column 'user' holds .*, not numbers"),
        ({"item": np.full(6, 300)}, r"column 'item' holds ids outside 0..299"),
        ({"history": np.full((6, 3), -1)}, r"column 'history' holds ids outside 0..8"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = fuxictr_2_0(tmp_path / "train.h5", **changes)
    with pytest.raises(DataError, match=message) as caught:
        open_split(path, make_map())
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_empty_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train.h5: no such file"):
        open_split(tmp_path / "train.h5", make_map())
    (tmp_path / "text.h5").write_text("not H5")
    with pytest.raises(DataError, match=r"text.h5: damaged file: truncated or not an H5 file"):
        open_split(tmp_path / "text.h5", make_map())
    with pytest.raises(DataError, match=r"empty.h5: the split is empty"):
        open_split(write(tmp_path / "empty.h5", []), make_map())
    with h5py.File(tmp_path / "group.h5", "w") as file:
        file.create_group("item")
        file["click"] = np.zeros(3)
    with pytest.raises(DataError, match="column 'item' is a group"):
        open_split(tmp_path / "group.h5", make_map())


def test_truncated_file(tmp_path: Path) -> None:
    path = write(tmp_path / "train.h5", [make_rows(5000)])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"train.h5: damaged file: truncated"):
        open_split(path, make_map())


@pytest.mark.parametrize("verify", [True, False])
def test_damage_anywhere_is_one_line(tmp_path: Path, verify: bool) -> None:
    """64 flipped bytes at 200 places: in the H5 structures, in attributes, in the columns."""
    path = write(tmp_path / "train.h5", [make_rows(50)])
    whole = path.read_bytes()
    refused = 0
    for start in range(0, len(whole), max(1, len(whole) // 200)):
        damaged = bytes(255 - b for b in whole[start : start + 64])
        path.write_bytes(whole[:start] + damaged + whole[start + 64 :])
        try:
            with open_split(path, make_map(), verify=verify) as split:
                for name in split.columns:
                    split.read(name)
        except DataError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            refused += 1
    assert refused > (100 if verify else 20)


def test_flipped_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "train.h5", [make_rows(500)])
    with h5py.File(path, "r+") as file:
        file["history"][250, 1] ^= 1
    with pytest.raises(DataError, match=r"checksum of column 'history' does not match"):
        open_split(path, make_map())
    open_split(path, make_map(), verify=False).close()


def test_attributes_that_do_not_match(tmp_path: Path) -> None:
    path = write(tmp_path / "train.h5", [make_rows(5)])
    other = make_map()
    other.features["item"]["vocab_size"] = 299
    with pytest.raises(DataError, match=r"its ids belong to another feature_map.json"):
        open_split(path, other)
    with h5py.File(path, "r+") as file:
        file.attrs["num_rows"] = 6
    with pytest.raises(DataError, match="5 rows, its header says 6"):
        open_split(path, make_map())
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 99
    with pytest.raises(DataError, match="format version 99"):
        open_split(path, make_map())


def test_nothing_appears_before_close_or_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "train.h5"
    writer = SplitWriter(path, column_specs(make_map()))
    writer.append(make_rows(5))
    assert not path.exists()
    writer.abort()
    with pytest.raises(KeyboardInterrupt), SplitWriter(path, column_specs(make_map())) as writer:
        writer.append(make_rows(5))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError("errno = 28, 'No space left on device'")])
@pytest.mark.parametrize("method", ["__setitem__", "resize"])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, method: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    writer = SplitWriter(tmp_path / "train.h5", column_specs(make_map()))
    monkeypatch.setattr(h5py.Dataset, method, full)
    with pytest.raises(CtrbenchError, match=r"train.h5: the disk is full .* free some space"):
        writer.append(make_rows(5))
    assert list(tmp_path.iterdir()) == []


def test_full_disk_at_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("Can't decrement id ref count (No space left on device)")

    writer = SplitWriter(tmp_path / "train.h5", column_specs(make_map()))
    writer.append(make_rows(5))
    close = h5py.File.close
    monkeypatch.setattr(h5py.File, "close", full)
    with pytest.raises(CtrbenchError, match=r"train.h5: the disk is full"):
        writer.close()
    monkeypatch.setattr(h5py.File, "close", close)
    assert list(tmp_path.iterdir()) == []


def test_final_name_taken_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "train.h5").mkdir()
    writer = SplitWriter(tmp_path / "train.h5", column_specs(make_map()))
    writer.append(make_rows(5))
    with pytest.raises(CtrbenchError, match=r"train.h5: cannot be written"):
        writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["train.h5"]


def test_blocks_that_do_not_fit(tmp_path: Path) -> None:
    with SplitWriter(tmp_path / "a.h5", [ColumnSpec("a", np.dtype(np.uint8)), ColumnSpec("b", np.dtype("f4"), 2)]) as w:
        w.append({"a": np.arange(0), "b": np.zeros((0, 2))})
        w.append({"a": np.arange(3), "b": np.zeros((3, 2))})
        with pytest.raises(ValueError, match="must hold the columns"):
            w.append({"a": np.arange(3)})
        with pytest.raises(ValueError, match="equally many rows"):
            w.append({"a": np.arange(3), "b": np.zeros((2, 2))})
        with pytest.raises(ValueError, match="takes blocks of shape"):
            w.append({"a": np.arange(3), "b": np.zeros(3)})
        with pytest.raises(ValueError, match="ids that do not fit uint8"):
            w.append({"a": np.array([256, 0, 0]), "b": np.zeros((3, 2))})
