# SPDX-License-Identifier: Apache-2.0
"""Encoded data of FuxiCTR as datasets: read as they are, refused in one line where they are not what they should be."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ctrbench.manifest
from ctrbench.batches import Batches
from ctrbench.config import load_experiment
from ctrbench.errors import ConfigError, CtrbenchError, DataError
from ctrbench.features import load_feature_map
from ctrbench.foreign_files import EncodedSplit, encoded_files
from ctrbench.leaderboard.rebuild import _found, altered_files
from ctrbench.preprocess import DataFolder, build_dataset
from ctrbench.ready_data import is_encoded
from ctrbench.run import run
from ctrbench.schema import DatasetConfig

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["item", "history", "price", "image", "user", "click"]
FEATURES: list[dict[str, dict[str, Any]]] = [
    {"item": {"source": "", "type": "categorical", "padding_idx": 0, "vocab_size": 9}},
    {"history": {"source": "", "type": "sequence", "padding_idx": 0, "vocab_size": 9, "max_len": 3}},
    {"price": {"source": "", "type": "numeric"}},
    {"image": {"source": "", "type": "embedding", "pretrain_dim": 2}},
    {"user": {"type": "meta"}},
]
FORMATS = ("h5", "parquet", "npz")


def rows(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """In the types that FuxiCTR writes; histories are padded on the left."""
    random = np.random.default_rng(seed)
    history = random.integers(1, 9, (count, 3)).astype(np.int32)
    history[: count // 2, 0] = 0
    return {
        "item": random.integers(1, 9, count),
        "history": history,
        "price": random.normal(size=count),
        "image": random.normal(size=(count, 2)),
        "user": random.integers(0, 1 << 40, count),
        "click": random.integers(0, 2, count).astype(float),
    }


def write(path: Path, columns: dict[str, Any]) -> Path:
    """One file, its columns in another order than the feature map's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    turned = dict(reversed(columns.items()))
    if path.suffix == ".npz":
        np.savez(path, **turned)
    elif path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            for name, values in turned.items():
                file[name] = values
    else:
        pl.DataFrame({n: v.tolist() if getattr(v, "ndim", 1) == 2 else v for n, v in turned.items()}).write_parquet(
            path
        )
    return path


class Foreign:
    """A data_root with the dataset `their` in it."""

    def __init__(self, root: Path, data_format: str):
        self.root, self.format, self.folder = root, data_format, root / "data" / "their"
        self.write_map()

    def write_map(self, features: list[dict[str, dict[str, Any]]] = FEATURES, **changes: Any) -> None:
        content = {"dataset_id": "their", "num_fields": 4, "total_features": 10, "input_length": 8, "labels": ["click"]}
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "feature_map.json").write_text(json.dumps({**content, "features": features, **changes}))

    def write(self, split: str = "train", columns: dict[str, Any] | None = None, **changes: Any) -> Path:
        columns = {**(rows(20) if columns is None else columns), **changes}
        return write(
            self.folder / f"{split}.{self.format}", {n: v for n, v in columns.items() if not isinstance(v, str)}
        )

    def section(self, **changes: Any) -> DatasetConfig:
        values = {"dataset_id": "their", "data_format": self.format, "train_data": f"data/their/train.{self.format}"}
        return DatasetConfig.model_validate({**values, **changes})

    def open(self, task: str = "binary_classification", **changes: Any) -> DataFolder:
        return build_dataset(self.section(**changes), root=self.root, task=task)


def batch(data: DataFolder, split: str = "train", **params: Any) -> dict[str, np.ndarray]:
    """All rows in order."""
    feature_map = load_feature_map(data.feature_map_file, "their", {"embedding_dim": 4, **params})
    (whole,) = Batches.from_file(data.splits[split], feature_map, 1 << 20, labels_required=split != "test")
    return {name: values.numpy() for name, values in whole.items()}


@pytest.fixture(params=FORMATS)
def foreign(request: pytest.FixtureRequest, tmp_path: Path) -> Foreign:
    return Foreign(tmp_path, request.param)


@pytest.fixture
def parquet(tmp_path: Path) -> Foreign:
    return Foreign(tmp_path, "parquet")


@pytest.fixture
def npz(tmp_path: Path) -> Foreign:
    return Foreign(tmp_path, "npz")


# ---------------------------------------------------------------- read as they are


def assert_same(found: dict[str, np.ndarray], columns: dict[str, np.ndarray]) -> None:
    assert found.keys() == columns.keys()
    for name, values in columns.items():
        wanted = values.astype(np.float32) if values.dtype.kind == "f" else values
        np.testing.assert_array_equal(found[name], wanted, err_msg=name)


def test_a_file_for_each_split(foreign: Foreign) -> None:
    for seed, split in enumerate(("train", "valid", "test")):
        foreign.write(split, rows(20 + seed, seed))
    before = {path.name: path.read_bytes() for path in foreign.folder.iterdir()}
    paths = {f"{split}_data": f"data/their/{split}.{foreign.format}" for split in ("valid", "test")}
    data = foreign.open(**paths)
    assert data.num_rows == {"train": 20, "valid": 21, "test": 22}
    for seed, split in enumerate(("train", "valid", "test")):
        assert_same(batch(data, split), rows(20 + seed, seed))
    feature_map = load_feature_map(data.feature_map_file, "their", {"embedding_dim": 4})
    assert list(feature_map.features) == NAMES[:-1]
    after = {path.name: path.read_bytes() for path in foreign.folder.iterdir() if path.is_file()}
    assert after == before, "the folder is FuxiCTR's"
    assert foreign.open(**paths) == data


def test_a_folder_of_blocks_in_the_order_of_their_numbers(foreign: Foreign) -> None:
    parts = {number: rows(number, number) for number in (1, 2, 10)}
    for number, columns in parts.items():
        write(foreign.folder / "train" / f"part_{number}.{foreign.format}", columns)
    whole = {name: np.concatenate([parts[n][name] for n in (1, 2, 10)]) for name in NAMES}
    assert_same(batch(foreign.open(train_data="data/their/train/")), whole)


def test_names_without_suffix_and_from_the_dataset_s_folder(foreign: Foreign) -> None:
    foreign.write()
    for text in ("train", f"train.{foreign.format}", "data/their/train"):
        assert foreign.open(train_data=text).num_rows == {"train": 20}


def test_a_test_split_may_have_no_labels(foreign: Foreign) -> None:
    foreign.write()
    foreign.write("test", click="absent")
    data = foreign.open(test_data="test")
    assert set(batch(data, "test")) == set(NAMES[:-1])
    foreign.write("valid", click="absent")
    with pytest.raises(DataError, match=r"valid\.\w+: (label )?column 'click' is missing.*this split needs labels"):
        foreign.open(valid_data="valid")


def test_npz_that_is_compressed_or_column_major(npz: Foreign) -> None:
    columns = rows(5000)
    np.savez_compressed(npz.folder / "train.npz", **{**columns, "history": np.asfortranarray(columns["history"])})
    assert_same(batch(npz.open()), columns)


@pytest.mark.parametrize("kind", ["list", "fixed size", "large", "tensor"])
def test_parquet_sequences_in_every_form(parquet: Foreign, kind: str) -> None:
    columns = rows(6)
    flat, offsets = pa.array(columns["history"].reshape(-1)), np.arange(0, 19, 3)
    array: pa.Array = pa.LargeListArray.from_arrays(pa.array(offsets.astype(np.int64)), flat)
    if kind == "list":
        array = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), flat)
    elif kind == "fixed size":
        array = pa.FixedSizeListArray.from_arrays(flat, 3)
    metadata = {"ARROW:extension:name": "ray.data.arrow_tensor_v2", "ARROW:extension:metadata": "[3]"}
    field = pa.field("history", array.type, metadata=metadata if kind == "tensor" else None)
    others = {n: v.tolist() for n, v in columns.items() if n != "history"}
    table = pa.table(others).append_column(field, array)
    pq.write_table(table, parquet.folder / "train.parquet")
    np.testing.assert_array_equal(batch(parquet.open())["history"], columns["history"])


@pytest.mark.parametrize("data_format", ["parquet", "npz"])
def test_ids_that_were_stored_as_reals(tmp_path: Path, data_format: str) -> None:
    foreign = Foreign(tmp_path, data_format)
    foreign.write(item=rows(20)["item"].astype(float))
    np.testing.assert_array_equal(batch(foreign.open())["item"], rows(20)["item"])


def test_vectors_of_unstated_width(npz: Foreign) -> None:
    features = [e if "image" not in e else {"image": {"type": "embedding", "source": ""}} for e in FEATURES]
    npz.write_map(features)
    npz.write()
    specs = [{"name": "image", "pretrain_dim": 2}]
    np.testing.assert_array_equal(batch(npz.open(), feature_specs=specs)["image"], rows(20)["image"].astype(np.float32))


# ---------------------------------------------------------------- when a dataset is encoded


def column(**changes: Any) -> dict[str, Any]:
    return {"name": "item", "dtype": "int", "type": "categorical", "vocab_size": 9, **changes}


def test_parquet_is_encoded_where_the_folder_has_a_foreign_feature_map(parquet: Foreign) -> None:
    raw = {"train_data": "raw/train.parquet", "feature_cols": [column()], "label_col": [{"name": "click"}]}
    own = {**raw, "train_data": "./data/their/../their/train.parquet"}
    assert is_encoded(parquet.section(), parquet.folder)
    assert is_encoded(parquet.section(**own), parquet.folder)
    assert is_encoded(parquet.section(**{**own, "train_data": str(parquet.folder / "train.parquet")}), parquet.folder)
    assert is_encoded(parquet.section(**raw, rebuild_dataset=False), parquet.folder)
    assert not is_encoded(parquet.section(**raw), parquet.folder), "raw files elsewhere are built"
    assert not is_encoded(parquet.section(**{**own, "data_format": "csv"}), parquet.folder)
    (parquet.folder / ".build.lock").touch()
    assert not is_encoded(parquet.section(**own), parquet.folder), "a build was begun here"
    (parquet.folder / ".build.lock").unlink()
    (parquet.folder / "feature_map.json").unlink()
    assert not is_encoded(parquet.section(**own), parquet.folder)


def test_an_experiment_on_it(foreign: Foreign, tmp_path: Path) -> None:
    """Through the configuration, with and without feature_cols."""
    for split in ("train", "valid", "test"):
        foreign.write(split, rows(60))
    config = tmp_path / "config"
    config.mkdir()
    section = {f"{split}_data": f"{foreign.folder / split}.{foreign.format}" for split in ("train", "valid", "test")}
    section |= {"data_root": str(tmp_path / "data"), "data_format": foreign.format}
    (config / "dataset_config.yaml").write_text(json.dumps({"their": section}))
    model = {"model": "FM", "dataset_id": "their", "epochs": 1, "verbose": 0, "embedding_dim": 4}
    model |= {"batch_size": 10, "model_root": str(tmp_path / "runs"), "use_features": ["item", "price"]}
    (config / "model_config.yaml").write_text(json.dumps({"FM_their": model}))
    experiment = load_experiment(config, "FM_their", ROOT / "model_zoo" / "FM")
    first = run(experiment)
    assert first["rows"] == {"train": 60, "valid": 60, "test": 60}
    assert run(experiment)["metrics"] == first["metrics"]
    assert altered_files(experiment) == []
    if foreign.format != "h5":  # which has no copy
        with h5py.File(foreign.folder / "ctrbench" / "valid.h5", "r+") as file:
            file["click"][:] = 1 - file["click"][:]
        _found.clear()
        (line,) = altered_files(experiment)
        assert "valid.h5 is not what" in line and "ctrbench, it is made again" in line
    (foreign.folder / f"valid.{foreign.format}").unlink()
    with pytest.raises(ConfigError, match=r"valid_data: no such file"):
        load_experiment(config, "FM_their", ROOT / "model_zoo" / "FM")


# ---------------------------------------------------------------- copies


def test_changed_files_are_copied_anew(npz: Foreign) -> None:
    npz.write()
    first = npz.open()
    npz.write(columns=rows(30, 1))
    second = npz.open()
    assert second.num_rows == {"train": 30} and second.data_hash != first.data_hash
    features = [dict(entry) for entry in FEATURES]
    features[0]["item"] = {**features[0]["item"], "vocab_size": 12}
    npz.write_map(features)
    assert npz.open().data_hash not in (first.data_hash, second.data_hash)
    assert batch(npz.open())["item"].max() < 12


def test_an_interrupted_copy_is_not_taken_for_whole(npz: Foreign, monkeypatch: pytest.MonkeyPatch) -> None:
    npz.write()

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ctrbench.manifest, "write", fail)
        with pytest.raises(KeyboardInterrupt):
            npz.open()
    assert not (npz.folder / "ctrbench" / "manifest.json").exists()
    assert_same(batch(npz.open()), rows(20))


def test_files_that_change_meanwhile(npz: Foreign, monkeypatch: pytest.MonkeyPatch) -> None:
    npz.write()
    monkeypatch.setattr(ctrbench.manifest, "unchanged", lambda _: False)
    with pytest.raises(DataError, match="changed while they were read"):
        npz.open()


def test_a_folder_that_cannot_be_written(npz: Foreign) -> None:
    npz.write()
    (npz.folder / "ctrbench").write_text("a file where a folder should be")
    with pytest.raises(CtrbenchError, match="cannot be written"):
        npz.open()


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"item": "absent"}, r"column 'item' is missing: these files and feature_map.json are not of one dataset"),
        ({"item": np.full(20, 9)}, r"row 1, column 'item': 9 is not an id from 0 to 8 \(vocab_size 9\)"),
        ({"item": np.arange(20) - 15}, r"row 1, column 'item': -15 is not an id from 0 to 8"),
        ({"item": np.full(20, 1.5)}, r"row 1, column 'item': 1.5 is not a whole number, but the column holds ids"),
        ({"user": np.full(20, np.inf)}, r"row 1, column 'user': inf is not a whole number"),
        ({"history": np.ones((20, 4), int)}, r"column 'history' has 4 values in a row, the feature map says 3 values"),
        ({"history": np.ones(20, int)}, r"column 'history' has a single value in a row, the feature map says 3 values"),
        ({"item": np.ones((20, 2), int)}, r"column 'item' has 2 values in a row, the feature map says a single value"),
        (
            {"price": np.r_[np.zeros(7), np.nan, np.zeros(12)]},
            r"row 8, column 'price': nan is not a finite 32-bit number",
        ),
        ({"price": np.full(20, 1e39)}, r"row 1, column 'price': 1e\+39 is not a finite 32-bit number"),
        ({"click": np.full(20, 0.5)}, r"row 1, column 'click': 0.5 is not a binary label \(0 or 1\)"),
        ({"click": np.full(20, np.nan)}, r"row 1, column 'click': nan is not a finite 32-bit number"),
        ({"click": "absent"}, r"column 'click' is missing: this split needs labels"),
    ],
    ids=str,
)
@pytest.mark.parametrize("data_format", ["parquet", "npz"])
def test_values_that_do_not_belong_to_the_feature_map(
    tmp_path: Path, data_format: str, changes: dict[str, Any], message: str
) -> None:
    foreign = Foreign(tmp_path, data_format)
    foreign.write(**changes)
    with pytest.raises(DataError, match=message):
        foreign.open()
    assert not list((foreign.folder / "ctrbench").glob("*.h5"))


def test_labels_of_a_regression_are_any_number(npz: Foreign) -> None:
    npz.write(click=np.linspace(0, 5, 20))
    data = npz.open(task="regression")
    assert batch(data)["click"].max() == 5
    with pytest.raises(DataError, match="is not a binary label"):
        npz.open()  # not what was copied for the other task


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1, 2, 3], [1, 2]], r"row 2, column 'history': a list of 2 values where the first row has 3"),
        ([[1, 2, 3], None], r"row 2, column 'history': the value is missing: encoded data has none"),
        ([[1, 2, 3], [1, None, 3]], r"row 2, column 'history': a value of the list is missing"),
        ([[], []], r"row 1, column 'history': a list of 0 values"),
        (["1^2^3", "1^2^3"], r"column 'history' holds String, not ids or numbers: it is not encoded data"),
        ([["a"], ["b"]], r"column 'history' holds .*, not ids or numbers"),
    ],
    ids=str,
)
def test_parquet_lists(parquet: Foreign, values: list[Any], message: str) -> None:
    columns = {name: list(values) for name, values in rows(2).items()}
    pl.DataFrame({**columns, "history": values}).write_parquet(parquet.folder / "train.parquet")
    with pytest.raises(DataError, match=message):
        parquet.open()


def test_objects_are_never_unpickled(npz: Foreign) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return pytest.fail, ("unpickled",)

    npz.write(item=np.array([Trap()] * 20, dtype=object))
    with pytest.raises(DataError, match=r"train.npz: .*an array of Python objects, which are never loaded"):
        npz.open()


@pytest.mark.parametrize(
    "content", [lambda c: c[: len(c) // 2], lambda c: b"text", lambda c: b""], ids=["cut", "text", "empty"]
)
def test_damaged_files(foreign: Foreign, content: Any) -> None:
    path = foreign.write(columns=rows(4000))
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(DataError, match=r"train.\w+: damaged"):
        foreign.open()


def test_npz_with_a_flipped_bit(npz: Foreign) -> None:
    path = npz.write(columns=rows(4000))
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("price.npy").header_offset
    content = bytearray(path.read_bytes())
    content[offset + 5000] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"train.npz: damaged.*CRC"):
        npz.open()


def test_npz_arrays_of_other_sizes(npz: Foreign) -> None:
    npz.write(price=np.zeros(19))
    with pytest.raises(DataError, match=r"train.npz: its columns have different numbers of rows"):
        npz.open()
    npz.write(price=np.float64(1))
    with pytest.raises(DataError, match=r"an array without rows"):
        npz.open()
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<i8", "fortran_order": False, "shape": (20,)})
    with zipfile.ZipFile(npz.folder / "train.npz", "w") as archive:
        archive.writestr("item.npy", stream.getvalue() + b"1234")
    npz.write_map(FEATURES[:1], labels=["item"])
    with pytest.raises(DataError, match=r"an array has another size than its header says"):
        npz.open(task="regression")


def test_places_and_names(npz: Foreign) -> None:
    npz.write()
    with pytest.raises(DataError, match=r"their.train_data: .*trian.npz does not exist \(did you mean 'train.npz'\?\)"):
        npz.open(train_data="data/their/trian.npz")
    with pytest.raises(ConfigError, match=r"train_data: missing: name the npz files"):
        npz.open(train_data=None)
    (npz.folder / "train").mkdir()
    with pytest.raises(DataError, match=r"train: the folder holds no \*.npz file"):
        npz.open(train_data="data/their/train/")
    write(npz.folder / "train.parquet", rows(3))
    with pytest.raises(DataError, match=r"train.parquet: must end in .npz, as data_format is npz"):
        npz.open(train_data="data/their/train.parquet")
    with pytest.raises(DataError, match=r"nothing.npz: no such file"):
        EncodedSplit(encoded_files(npz.folder / "nothing.npz", "npz"))
    npz.write_map(dataset_id="other")
    with pytest.raises(DataError, match=r"belongs to dataset_id 'other', not 'their'"):
        npz.open()


def test_an_empty_split(parquet: Foreign) -> None:
    parquet.write(columns={name: values[:0] for name, values in rows(1).items()})
    with pytest.raises(DataError, match=r"no rows: the split is empty"):
        parquet.open()


# ---------------------------------------------------------------- built by the installed FuxiCTR


@pytest.fixture
def ray() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [0, 100])
def test_data_that_fuxictr_built(tmp_path: Path, ray: Any, block_size: int) -> None:
    from fuxictr.preprocess import FeatureProcessor
    from fuxictr.preprocess import build_dataset as fuxictr_build

    random, raw = np.random.default_rng(0), tmp_path / "raw"
    raw.mkdir()
    for split in ("train", "valid"):
        tokens = [f"t{i}" for i in range(9)]
        frame = {
            "item": random.choice(tokens, 300).tolist(),
            "price": random.normal(size=300).tolist(),
            "history": ["^".join(random.choice(tokens, random.integers(1, 5))) for _ in range(300)],
            "user": random.integers(0, 5, 300).tolist(),
            "click": random.integers(0, 2, 300).astype(float).tolist(),
        }
        pl.DataFrame(frame).write_parquet(raw / f"{split}.parquet")
    columns = [
        {"name": "item", "active": True, "dtype": "str", "type": "categorical"},
        {"name": "price", "active": True, "dtype": "float", "type": "numeric"},
        {"name": "history", "active": True, "dtype": "str", "type": "sequence", "max_len": 3, "padding": "pre"},
        {"name": "user", "active": True, "dtype": "int", "type": "meta"},
    ]
    shared = {"dataset_id": "their", "feature_cols": columns, "label_col": {"name": "click", "dtype": "float"}}
    processor = FeatureProcessor(**shared, data_root=str(tmp_path / "data"))
    raw_files = {f"{split}_data": str(raw / f"{split}.parquet") for split in ("train", "valid")}
    options = {"data_format": "parquet", "data_block_size": block_size}
    train, valid, _ = fuxictr_build(processor, **raw_files, **options)
    section = DatasetConfig.model_validate(
        {**shared, "data_root": "data", "data_format": "parquet", "train_data": train, "valid_data": valid}
    )
    opened = build_dataset(section, root=tmp_path)
    own = DatasetConfig.model_validate({**shared, "data_root": "own", "data_format": "parquet", **raw_files})
    built = build_dataset(own, root=tmp_path)
    for split in ("train", "valid"):
        theirs, ours = batch(opened, split), batch(built, split)
        if block_size:  # FuxiCTR writes the blocks in the order in which its workers finish
            theirs, ours = ({n: v[np.argsort(b["price"])] for n, v in b.items()} for b in (theirs, ours))
        for name in ours:
            np.testing.assert_array_equal(theirs[name], ours[name], err_msg=name)
