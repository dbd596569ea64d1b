# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import json
import logging
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ctrbench.manifest
import ctrbench.preprocess
import ctrbench.rawdata
from ctrbench.columns import draft_feature_map
from ctrbench.errors import ConfigError, CtrbenchError, DataError
from ctrbench.features import load_feature_map
from ctrbench.preprocess import build_dataset
from ctrbench.schema import DatasetConfig
from ctrbench.storage import open_split
from ctrbench.transforms import parse_preprocess
from ctrbench.vocabulary import pad_sequences

LABEL = {"name": "click", "dtype": "float"}
ITEM = {"name": "item", "active": True, "dtype": "str", "type": "categorical"}


def section(**changes: Any) -> DatasetConfig:
    values: dict[str, Any] = {
        "dataset_id": "tiny",
        "data_root": "data",
        "train_data": "train.csv",
        "feature_cols": [ITEM],
        "label_col": LABEL,
    }
    return DatasetConfig.model_validate({**values, **changes})


def column(name: str, kind: str = "categorical", dtype: str = "str", **more: Any) -> dict[str, Any]:
    return {"name": name, "active": True, "dtype": dtype, "type": kind, **more}


def write(root: Path, name: str = "train.csv", text: str = "item,click\na,1\nb,0\na,0\n") -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def ids(root: Path, name: str, split: str = "train") -> list[Any]:
    with h5py.File(root / "data/tiny" / f"{split}.h5") as file:
        return file[name][:].tolist()


def feature_map(root: Path) -> dict[str, Any]:
    return json.loads((root / "data/tiny/feature_map.json").read_text())


def vocabulary(root: Path) -> dict[str, Any]:
    return json.loads((root / "data/tiny/feature_vocab.json").read_text())


# ---------------------------------------------------------------- the same as FuxiCTR

TOKENS = st.none() | st.sampled_from(["a", "b", "Z", "zz", "10", "9", "ä", "x y"])
SEQUENCES = st.none() | st.lists(st.sampled_from(["a", "b", "c", "Z", "", "q"]), max_size=5).map("^".join)
ROW = st.tuples(
    TOKENS,
    st.none() | st.integers(-3, 5),
    SEQUENCES,
    st.none() | st.sampled_from([-1.5, 0.0, 0.25, 3.0]),
    st.sampled_from(["u1", "u2", "u3", "u10"]),
    st.sampled_from([0, 1]),
)
SCHEMA = {
    "tok": pl.String,
    "num": pl.Int64,
    "seq": pl.String,
    "real": pl.Float64,
    "user": pl.String,
    "click": pl.Float64,
}
FRAME = st.lists(ROW, min_size=1, max_size=25).map(lambda rows: pl.DataFrame(rows, schema=SCHEMA, orient="row"))


def fuxictr_reference(frames: dict[str, pl.DataFrame], config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Feature map, vocabulary and encoded columns of the installed FuxiCTR."""
    preprocess = pytest.importorskip("fuxictr.preprocess")
    processor = preprocess.FeatureProcessor(**{**config, "data_root": str(folder)})
    lazy = {split: processor.preprocess(frame.lazy()) for split, frame in frames.items()}
    meta = [column["name"] for column in config["feature_cols"] if column["type"] == "meta"]
    meta_frame = pl.concat([frame.select(meta) for frame in lazy.values()]) if meta else None
    processor.fit(lazy["train"], meta_ddf=meta_frame, min_categr_count=config["min_categr_count"])
    place = folder / config["dataset_id"]
    return {
        "feature_map": json.loads((place / "feature_map.json").read_text()),
        "vocabulary": json.loads((place / "feature_vocab.json").read_text()),
        "columns": {
            split: processor.transform(frame.collect().to_dict(as_series=False)) for split, frame in lazy.items()
        },
    }


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    train=FRAME,
    valid=FRAME,
    min_count=st.integers(1, 3),
    padding=st.sampled_from(["pre", "post"]),
    max_len=st.sampled_from([0, 1, 3]),
    share=st.booleans(),
    fill=st.sampled_from([None, 0, -3]),
    normalizer=st.sampled_from(["StandardScaler", "MinMaxScaler"]),
    blocks=st.sampled_from([4, 1000]),
)
def test_equals_fuxictr(
    train: pl.DataFrame,
    valid: pl.DataFrame,
    min_count: int,
    padding: str,
    max_len: int,
    share: bool,
    fill: int | None,
    normalizer: str,
    blocks: int,
) -> None:
    frames = {"train": train, "valid": valid}
    integers = column("num", dtype="int", source="user", embedding_dim=4, **({} if fill is None else {"fill_na": fill}))
    sequence = column(
        "seq", "sequence", max_len=max_len, padding=padding, **({"share_embedding": "tok"} if share else {})
    )
    config = {
        "dataset_id": "tiny",
        "data_root": "data",
        "train_data": "train.csv",
        "valid_data": "valid.csv",
        "min_categr_count": min_count,
        "label_col": LABEL,
        "feature_cols": [
            column("user", "meta"),
            column("tok"),
            integers,
            column("real", "numeric", "float", normalizer=normalizer),
            sequence,
        ],
    }
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for split, frame in frames.items():
            frame.write_csv(root / f"{split}.csv")
        dataset = DatasetConfig.model_validate(config)
        try:
            wanted = fuxictr_reference(frames, config, root / "reference")
        except IndexError:  # its way of saying that a column keeps no token
            with pytest.raises(DataError, match="distinct tokens occurs min_categr_count"):
                build_dataset(dataset, root=root)
            return
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ctrbench.rawdata, "BLOCK_ROWS", blocks)
            built = build_dataset(dataset, root=root)
        assert feature_map(root) == wanted["feature_map"]
        assert vocabulary(root) == wanted["vocabulary"]
        assert [list(v) for v in vocabulary(root).values()] == [list(v) for v in wanted["vocabulary"].values()]
        loaded = load_feature_map(built.feature_map_file, "tiny", {})
        for split, frame in frames.items():
            assert built.num_rows[split] == frame.height
            with open_split(built.splits[split], loaded) as stored:
                for name, values in wanted["columns"][split].items():
                    np.testing.assert_allclose(stored.read(name), np.array(values), rtol=1e-5, atol=1e-6, err_msg=name)


def test_pretrained_keys_follow_oov_as_in_fuxictr(tmp_path: Path) -> None:
    frames = {"train": pl.DataFrame({"item": ["a", "b", "a"], "hist": ["a^c", "b", None], "click": [1.0, 0.0, 1.0]})}
    np.savez(tmp_path / "emb.npz", key=np.array(["z", "a", "y"]), value=np.zeros((3, 8)))
    frames["train"].write_csv(tmp_path / "train.csv")
    config = {
        "dataset_id": "tiny",
        "min_categr_count": 1,
        "label_col": LABEL,
        "feature_cols": [
            {**ITEM, "pretrained_emb": str(tmp_path / "emb.npz"), "pretrain_dim": 8},
            column("hist", "sequence", share_embedding="item"),
        ],
    }
    wanted = fuxictr_reference(frames, config, tmp_path / "reference")
    build_dataset(section(feature_cols=config["feature_cols"]), root=tmp_path)
    assert feature_map(tmp_path) == wanted["feature_map"]
    assert vocabulary(tmp_path) == wanted["vocabulary"]
    assert (tmp_path / "data/tiny/pretrained_item.npz").read_bytes() == (tmp_path / "emb.npz").read_bytes()
    assert ids(tmp_path, "hist") == wanted["columns"]["train"]["hist"].tolist()


def test_list_columns_of_parquet_equal_fuxictr(tmp_path: Path) -> None:
    frame = pl.DataFrame({"seq": [["1", "2", "3"], [], ["2", None], ["5"]], "click": [1.0, 0.0, 1.0, 0.0]})
    config = {
        "dataset_id": "tiny",
        "min_categr_count": 1,
        "label_col": LABEL,
        "feature_cols": [column("seq", "sequence")],
    }
    # FuxiCTR means to join lists to text, but fails on polars 2 when it fills the missing ones.
    joined = frame.with_columns(pl.col("seq").list.join("^"))
    wanted = fuxictr_reference({"train": joined}, config, tmp_path / "reference")
    frame.write_parquet(tmp_path / "train.parquet")
    dataset = section(data_format="parquet", train_data="train.parquet", feature_cols=config["feature_cols"])
    build_dataset(dataset, root=tmp_path)
    assert feature_map(tmp_path) == wanted["feature_map"]
    assert vocabulary(tmp_path) == wanted["vocabulary"]
    assert ids(tmp_path, "seq") == wanted["columns"]["train"]["seq"].tolist()


@pytest.mark.parametrize("name", ["convert_to_bucket", "convert_hour", "convert_weekday", "convert_weekend"])
def test_integer_functions_equal_fuxictr(name: str) -> None:
    pytest.importorskip("fuxictr.preprocess")
    from fuxictr.datasets import avazu, criteo

    if name == "convert_to_bucket":
        frame = pl.DataFrame({"v": [-3.7, -1.0, 0.0, 1.9, 2.0, 2.01, 3.0, 7.389, 20.1, 1e6, 2.5e8]})
        expected = criteo.CustomizedFeatureProcessor.convert_to_bucket(None, "v")
    else:
        frame = pl.DataFrame({"hour": ["14102100", "14102123", "14102512", "14102607", "14110103"]})
        expected = getattr(avazu.CustomizedFeatureProcessor, name)(None)
    transform = parse_preprocess(name, "v")
    assert not isinstance(transform, str)
    ours = frame.select(transform.expression(pl.col(transform.source))).to_series()
    assert ours.to_list() == frame.select(expected).to_series().to_list()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("extract_country_code", ["USABC1", "TW", "x", "", None]),
        (
            "bucketize_age",
            [None, "-5", "0", "0.5", "1", "10", "10.5", "11", "20", "37", "60", "60.5", "61", "95", "96"],
        ),
    ],
)
def test_text_functions_equal_fuxictr(name: str, values: list[str | None]) -> None:
    pytest.importorskip("fuxictr.preprocess")
    from fuxictr.datasets import kkbox

    frame = pl.DataFrame({"v": values})
    transform = parse_preprocess(f"{name}(v)", "other")
    assert not isinstance(transform, str)
    expected = frame.select(getattr(kkbox.CustomizedFeatureProcessor, name)(None, "v")).to_series()
    assert frame.select(transform.expression(pl.col("v"))).to_series().to_list() == expected.to_list()


# ---------------------------------------------------------------- what is stored


def test_functions_read_columns_in_fuxictr_order(tmp_path: Path) -> None:
    write(tmp_path, text="hour,click\n14102100,1\n14102512,0\n14102512,1\n")
    names = ["hour", "weekday", "weekend"]
    columns = [column(n, preprocess=f"convert_{n}") for n in names] + [column("raw", preprocess="copy_from(hour)")]
    build_dataset(section(feature_cols=columns), root=tmp_path)
    stored = {name: vocabulary(tmp_path)[name] for name in [*names, "raw"]}
    assert stored["hour"] == {"__PAD__": 0, "12": 1, "00": 2, "__OOV__": 3} or stored["hour"]["12"] == 1
    assert stored["weekday"]["6"] == 1 and stored["weekday"]["2"] == 2
    assert stored["weekend"] == {"__PAD__": 0, "1": 1, "0": 2, "__OOV__": 3}
    assert stored["raw"]["14102512"] == 1  # the raw hour, although `hour` itself is converted


def test_criteo_counts(tmp_path: Path) -> None:
    write(tmp_path, text="I1,click\n100,1\n,0\n1,1\n2,0\n100,1\n")
    columns = [column("I1", dtype="float", fill_na=0, preprocess="convert_to_bucket")]
    build_dataset(section(feature_cols=columns), root=tmp_path)
    assert vocabulary(tmp_path)["I1"] == {"__PAD__": 0, "1": 1, "2": 2, "21": 3, "__OOV__": 4}
    assert ids(tmp_path, "I1") == [3, 4, 1, 2, 3]


def test_smallest_types_and_attributes(tmp_path: Path) -> None:
    rows = "".join(f"t{i},{i / 7},{i % 2}\n" for i in range(300))
    write(tmp_path, text="item,price,click\n" + rows)
    built = build_dataset(section(feature_cols=[ITEM, column("price", "numeric", "float")]), root=tmp_path)
    with h5py.File(built.splits["train"]) as file:
        assert {name: data.dtype.name for name, data in file.items()} == {
            "item": "uint16",
            "price": "float32",
            "click": "float32",
        }
        assert file.attrs["num_rows"] == 300


def test_unseen_tokens_are_oov_and_meta_ids_cover_all_splits(tmp_path: Path) -> None:
    write(tmp_path, text="item,user,click\na,u1,1\nb,u1,0\n")
    write(tmp_path, "valid.csv", "item,user,click\nnew,u2,1\na,u1,0\n")
    built = build_dataset(section(feature_cols=[ITEM, column("user", "meta")], valid_data="valid.csv"), root=tmp_path)
    assert ids(tmp_path, "item", "valid") == [3, 1]
    assert ids(tmp_path, "user", "valid") == [2, 1]
    assert built.num_rows == {"train": 2, "valid": 2}


def test_remap_false_keeps_integers(tmp_path: Path) -> None:
    write(tmp_path, text="item,user,click\n7,70,1\n3,30,0\n")
    columns = [{**ITEM, "remap": False}, column("user", "meta", remap=False)]
    build_dataset(section(feature_cols=columns), root=tmp_path)
    assert ids(tmp_path, "item") == [7, 3]
    assert feature_map(tmp_path)["features"][0]["item"]["vocab_size"] == 9
    assert ids(tmp_path, "user") == [70, 30]


def test_ids_given(tmp_path: Path) -> None:
    write(tmp_path, text="item,hist,click\n4,1^2^3,1\n0,,0\n")
    columns = [{**ITEM, "vocab_size": 5}, column("hist", "sequence", vocab_size=5, max_len=2, padding="pre")]
    build_dataset(section(feature_cols=columns, rebuild_dataset=False), root=tmp_path)
    assert ids(tmp_path, "item") == [4, 0]
    assert ids(tmp_path, "hist") == [[2, 3], [0, 0]]
    assert feature_map(tmp_path)["total_features"] == 10


def test_embedding_columns(tmp_path: Path) -> None:
    frame = pl.DataFrame({"image": [[1.0, 2.0, 3.0], None, [4.0, 5.0, 6.0]], "click": [1, 0, 1]})
    frame.write_parquet(tmp_path / "train.parquet")
    vectors = column("image", "embedding", "float")
    build_dataset(section(data_format="parquet", train_data="train.parquet", feature_cols=[vectors]), root=tmp_path)
    assert ids(tmp_path, "image") == [[1, 2, 3], [0, 0, 0], [4, 5, 6]]
    assert feature_map(tmp_path)["features"][0]["image"]["pretrain_dim"] == 3


def test_vectors_written_as_text(tmp_path: Path) -> None:
    write(tmp_path, text="image,click\n0.5^1.5,1\n,0\n")
    build_dataset(section(feature_cols=[column("image", "embedding", "float", pretrain_dim=2)]), root=tmp_path)
    assert ids(tmp_path, "image") == [[0.5, 1.5], [0, 0]]


def test_folders_and_globs(tmp_path: Path) -> None:
    for part in range(3):
        write(tmp_path, f"raw/part{part}.csv", f"item,click\na{part},1\nb,0\n")
    for path in ("raw", "raw/*.csv", str(tmp_path / "raw/part?.csv")):
        built = build_dataset(section(train_data=path), root=tmp_path)
        assert built.num_rows == {"train": 6}


def test_pandas_categories_and_nan(tmp_path: Path) -> None:
    frame = pl.DataFrame({"item": ["a", "b", "a"], "price": [1.0, float("nan"), 3.0], "click": [1, 0, 1]})
    frame.with_columns(pl.col("item").cast(pl.Categorical)).write_parquet(tmp_path / "train.parquet")
    columns = [ITEM, column("price", "numeric", "float", fill_na=9.0)]
    build_dataset(section(data_format="parquet", train_data="train.parquet", feature_cols=columns), root=tmp_path)
    assert ids(tmp_path, "price") == [1, 9, 3]


def test_inactive_columns_are_not_needed(tmp_path: Path) -> None:
    write(tmp_path)
    build_dataset(section(feature_cols=[ITEM, {**column("gone"), "active": False}]), root=tmp_path)
    assert [name for entry in feature_map(tmp_path)["features"] for name in entry] == ["item"]


@pytest.mark.parametrize("split_type", ["sequential", "random"])
@pytest.mark.parametrize(("valid_size", "test_size"), [(0.2, 0.1), (20, 10)])
def test_cut_splits(tmp_path: Path, split_type: str, valid_size: float, test_size: float) -> None:
    write(tmp_path, text="item,n,click\n" + "".join(f"a,{i},{i % 2}\n" for i in range(100)))
    columns = [ITEM, column("n", "numeric", "float")]
    changes = {"valid_size": valid_size, "test_size": test_size, "split_type": split_type, "feature_cols": columns}
    built = build_dataset(section(**changes), root=tmp_path)
    assert built.num_rows == {"train": 70, "valid": 20, "test": 10}
    rows = {split: ids(tmp_path, "n", split) for split in built.splits}
    assert sorted(n for split in rows.values() for n in split) == list(range(100))
    assert (rows["test"] == list(range(90, 100))) is (split_type == "sequential")
    assert (rows["valid"] == list(range(70, 90))) is (split_type == "sequential")


def test_vocabulary_ignores_rows_cut_for_validation(tmp_path: Path) -> None:
    write(tmp_path, text="item,click\na,1\nb,0\nonly_valid,1\n")
    build_dataset(section(valid_size=1), root=tmp_path)
    assert "only_valid" not in vocabulary(tmp_path)["item"]
    assert ids(tmp_path, "item", "valid") == [3]


def test_test_split_without_labels(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path, "test.csv", "item\na\n")
    built = build_dataset(section(test_data="test.csv"), root=tmp_path)
    loaded = load_feature_map(built.feature_map_file, "tiny", {})
    with open_split(built.splits["test"], loaded, labels_required=False) as stored:
        assert not stored.has_labels and stored.columns == ["item"]


def test_regression_labels(tmp_path: Path) -> None:
    write(tmp_path, text="item,click\na,2.5\nb,-1\n")
    build_dataset(section(), root=tmp_path, task="regression")
    assert ids(tmp_path, "click") == [2.5, -1]


def test_n_rows(tmp_path: Path) -> None:
    write(tmp_path)
    assert build_dataset(section(n_rows=2), root=tmp_path).num_rows == {"train": 2}


def test_chained_sharing_has_one_size(tmp_path: Path) -> None:
    write(tmp_path, text="item,a,b,click\nx,y,z,1\nx,x,w,0\n")
    columns = [ITEM, column("a", share_embedding="item"), column("b", share_embedding="a")]
    build_dataset(section(feature_cols=columns), root=tmp_path)
    specs = [spec for entry in feature_map(tmp_path)["features"] for spec in entry.values()]
    assert [spec["vocab_size"] for spec in specs] == [6, 6, 6]
    assert feature_map(tmp_path)["total_features"] == 6


def test_pad_sequences_sides() -> None:
    flat, lengths = np.array([1, 2, 3, 4]), np.array([3, 0, 1])
    assert pad_sequences(flat, lengths, 2, "post").tolist() == [[1, 2], [0, 0], [4, 0]]
    assert pad_sequences(flat, lengths, 2, "pre").tolist() == [[2, 3], [0, 0], [0, 4]]


# ---------------------------------------------------------------- reuse, staleness, interruption


def test_reuse_and_rebuild(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    source = write(tmp_path)
    first = build_dataset(section(), root=tmp_path)
    stamp = first.splits["train"].stat().st_mtime_ns
    assert build_dataset(section(), root=tmp_path) == first
    os.utime(source, ns=(1, 1))  # touched, same content
    assert build_dataset(section(), root=tmp_path) == first
    assert first.splits["train"].stat().st_mtime_ns == stamp
    other = build_dataset(section(min_categr_count=2), root=tmp_path)
    assert other.data_hash != first.data_hash
    assert "built from other settings" in caplog.text
    write(tmp_path, text="item,click\na,1\nc,0\na,0\n")
    build_dataset(section(min_categr_count=2), root=tmp_path)
    assert "the content of train has changed" in caplog.text
    again = build_dataset(section(), root=tmp_path, fresh=True)
    assert again.data_hash != first.data_hash
    (again.path / "train.h5").unlink()
    build_dataset(section(), root=tmp_path)
    assert "train.h5 is missing or incomplete" in caplog.text
    write(tmp_path, "valid.csv")
    assert "valid" in build_dataset(section(valid_data="valid.csv"), root=tmp_path).splits
    assert "other source files" in caplog.text


def test_same_data_hash_twice(tmp_path: Path) -> None:
    write(tmp_path)
    first = build_dataset(section(), root=tmp_path)
    assert build_dataset(section(), root=tmp_path, fresh=True).data_hash == first.data_hash


def test_stale_data_is_refused_when_rebuilding_is_off(tmp_path: Path) -> None:
    write(tmp_path)
    columns = [{**ITEM, "vocab_size": 9}]
    build_dataset(section(feature_cols=columns), root=tmp_path)
    assert build_dataset(section(feature_cols=columns, rebuild_dataset=False), root=tmp_path).num_rows == {"train": 3}
    with pytest.raises(DataError, match=r"built from other settings.*rebuild_dataset is false"):
        build_dataset(section(feature_cols=columns, rebuild_dataset=False, min_categr_count=2), root=tmp_path)


def test_sources_may_go_once_built(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write(tmp_path)
    first = build_dataset(section(), root=tmp_path)
    source.unlink()
    assert build_dataset(section(), root=tmp_path) == first
    assert "source files are gone" in caplog.text
    with pytest.raises(DataError, match="source files are gone, so it cannot be built"):
        build_dataset(section(min_categr_count=2), root=tmp_path)


def test_newer_format_is_rebuilt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write(tmp_path)
    path = build_dataset(section(), root=tmp_path).path / "manifest.json"
    whole = json.loads(path.read_text())
    path.write_text(
        json.dumps({key: value for key, value in whole.items() if key != "checksum"} | {"format_version": 99})
    )
    build_dataset(section(), root=tmp_path)
    assert "format version 99" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        {"sources": []},
        {"sources": {"train": [1]}},
        {"sources": {"train": 1}},
        {"sources": {"train": [{"path": "x", "size": 1, "mtime_ns": 1}]}},
        {"outputs": [1]},
        {"outputs": {"train.h5": "1"}},
        {"num_rows": [1]},
        {"num_rows": {"train": None}},
        {"data_hash": 1},
        {"settings_hash": None},
        {"hashes": None},
    ],
    ids=repr,
)
def test_a_manifest_of_another_shape_is_none(tmp_path: Path, damage: dict[str, Any]) -> None:
    write(tmp_path)
    built = build_dataset(section(), root=tmp_path)
    path = built.path / "manifest.json"
    whole = json.loads(path.read_text())
    del whole["checksum"]
    path.write_text(json.dumps(whole | damage))
    assert ctrbench.manifest.read(built.path) is None
    assert build_dataset(section(), root=tmp_path) == built  # built anew
    assert ctrbench.manifest.read(built.path) is not None


def test_a_damaged_manifest_is_none(tmp_path: Path) -> None:
    write(tmp_path)
    built = build_dataset(section(), root=tmp_path)
    path = built.path / "manifest.json"
    path.write_text(path.read_text().replace(f'"data_hash": "{built.data_hash[:2]}', '"data_hash": "zz'))
    assert ctrbench.manifest.read(built.path) is None
    assert build_dataset(section(), root=tmp_path) == built


def test_a_damaged_vocabulary_is_built_anew_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write(tmp_path)
    built = build_dataset(section(), root=tmp_path)
    path = built.path / "feature_vocab.json"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b":", b";", 1))
    build_dataset(section(), root=tmp_path)
    assert "feature_vocab.json is damaged, its checksum does not match" in caplog.text
    assert path.read_bytes() == whole


@pytest.mark.parametrize("function", ["fit", "write_splits", "_write_vocabulary"])
def test_interrupted_build_is_not_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    write(tmp_path)
    build_dataset(section(), root=tmp_path)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ctrbench.preprocess, function, interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_dataset(section(min_categr_count=2), root=tmp_path)
    assert not (tmp_path / "data/tiny/manifest.json").exists()
    assert build_dataset(section(min_categr_count=2), root=tmp_path).num_rows == {"train": 3}


def test_error_in_the_middle_leaves_no_split(tmp_path: Path) -> None:
    write(tmp_path, text="item,click\na,1\nb,0\nc,7\n")
    with pytest.raises(DataError, match=r"row 3, column 'click': 7 is not a binary label"):
        build_dataset(section(), root=tmp_path)
    left = {path.name for path in (tmp_path / "data/tiny").iterdir()}
    assert left <= {".build.lock"}


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(h5py.Dataset, "__setitem__", full)
    with pytest.raises(CtrbenchError, match=r"train.h5: the disk is full"):
        build_dataset(section(), root=tmp_path)
    assert {path.name for path in (tmp_path / "data/tiny").iterdir()} <= {".build.lock"}


def test_unwritable_folder(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path, "data", "a file where a folder should be")
    with pytest.raises(CtrbenchError, match="cannot be written"):
        build_dataset(section(), root=tmp_path)


def test_source_changed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    monkeypatch.setattr(ctrbench.manifest, "unchanged", lambda _: False)
    with pytest.raises(DataError, match="changed while they were read"):
        build_dataset(section(), root=tmp_path)
    assert not (tmp_path / "data/tiny/manifest.json").exists()


def test_second_process_waits_and_reuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    write(tmp_path)
    calls, build = [], ctrbench.preprocess._build

    def slow(*arguments: Any) -> None:
        calls.append(1)
        time.sleep(0.5)
        build(*arguments)

    monkeypatch.setattr(ctrbench.preprocess, "_build", slow)
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(build_dataset(section(), root=tmp_path))) for _ in "ab"]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and results[0] == results[1]
    assert "Waiting for the process that builds" in caplog.text


# ---------------------------------------------------------------- ready H5 files


def test_h5_format_uses_files_as_they_are(tmp_path: Path) -> None:
    write(tmp_path)
    built = build_dataset(section(), root=tmp_path)
    ready = section(data_format="h5", train_data="data/tiny/train.h5", feature_cols=[], label_col=[])
    assert build_dataset(ready, root=tmp_path) == built
    (built.path / "manifest.json").unlink()
    by_checksum = build_dataset(section(data_format="h5", train_data="train.h5"), root=tmp_path)
    assert by_checksum.num_rows == {"train": 3} and by_checksum.data_hash != built.data_hash
    with pytest.raises(DataError, match=r"nowhere.h5: no such file"):
        build_dataset(section(data_format="h5", train_data="nowhere.h5"), root=tmp_path)
    with pytest.raises(ConfigError, match="train_data: missing: name the H5 files"):
        build_dataset(section(data_format="h5", train_data=None), root=tmp_path)


# ---------------------------------------------------------------- one clear line per mistake

RAW_PROBLEMS = [
    ("item,clck\na,1\n", {}, r"train.csv: column 'click' is missing \(did you mean 'clck'\?\)"),
    ("itm,click\na,1\n", {}, r"train.csv: column 'item' is missing \(did you mean 'itm'\?\)"),
    ("item,click\n", {}, "train.csv: no rows"),
    ("", {}, "the file is empty"),
    ("item,click\na,1\nb,yes\n", {}, r"row 2, column 'click': 'yes' is not a number"),
    ("item,click\na,1\nb,\n", {}, r"row 2, column 'click': the label is missing"),
    ("item,click\na,0\nb,2\n", {}, r"row 2, column 'click': 2 is not a binary label \(0 or 1\)"),
    ("item,click\na,inf\n", {}, r"row 1, column 'click': inf is not a finite number"),
    ("item,click\na,1\n__OOV__,1\n", {}, "column 'item' holds the reserved token '__OOV__'"),
    ("item,click\n__PAD__,1\n", {}, "column 'item' holds the reserved token '__PAD__'"),
    (
        "item,click\na,1\nb,0\n",
        {"min_categr_count": 2},
        "column 'item': none of its 2 distinct tokens occurs min_categr",
    ),
    (
        "item,click\n3,1\nabc,0\n",
        {"feature_cols": [column("item", "numeric", "float")]},
        "row 2, column 'item': 'abc' is not a number",
    ),
    (
        "item,click\n3,1\n1.5,0\n",
        {"feature_cols": [column("item", dtype="int")]},
        "row 2, column 'item': '1.5' is not an integer",
    ),
    ("item,click\nx,1\n", {"feature_cols": [{**ITEM, "remap": False}]}, "remap: false, but token 'x' is no integer"),
    (
        "item,click\nx,1\n",
        {"feature_cols": [column("item", "meta", remap=False)]},
        "row 1, column 'item': 'x' is not an integer id",
    ),
    (
        "item,click\n3,1\n5,0\n",
        {"rebuild_dataset": False, "feature_cols": [{**ITEM, "vocab_size": 5}]},
        r"row 2, column 'item': 5 is not an id from 0 to 4 \(vocab_size 5\)",
    ),
    (
        "item,click\n3,1\n1^7,0\n",
        {"rebuild_dataset": False, "feature_cols": [column("item", "sequence", vocab_size=5, max_len=2)]},
        r"row 2, column 'item': '7' is not an id from 0 to 4",
    ),
    (
        "item,hour,click\na,14102100,1\nb,noon,1\n",
        {"feature_cols": [column("d", preprocess="convert_hour")]},
        r"row 2, column 'hour': 'noon' is not a time as YYMMDDHH \(for column 'd'\)",
    ),
    (
        "item,click\nold,1\n",
        {"feature_cols": [{**ITEM, "preprocess": "bucketize_age"}]},
        "row 1, column 'item': 'old' is not a number",
    ),
    (
        "item,click\n1^2^3,1\n",
        {"feature_cols": [column("item", "embedding", "float", pretrain_dim=2)]},
        "row 1, column 'item': the vector has 3 numbers, pretrain_dim is 2",
    ),
    (
        "item,click\n1^x,1\n",
        {"feature_cols": [column("item", "embedding", "float", pretrain_dim=2)]},
        "row 1, column 'item': the vector holds a value that is not a finite",
    ),
    ("item,click\n,1\n", {"feature_cols": [column("item", "embedding", "float")]}, "of type embedding holds no vector"),
    ("item,click\na,1\n", {"valid_size": 0.5}, "1 rows cannot give 0 rows of validation and 0 of test"),
    ('item,click\n"a,1\n', {}, "train.csv: cannot be read|no rows"),
    ("item,click\na,1\nb,1e39\n", {}, r"row 2, column 'click': 1e\+39 is beyond 32-bit numbers \(3.4e\+38\): correct"),
    (
        "item,click\n3,1\n-1e39,0\n",
        {"feature_cols": [column("item", "numeric", "float", normalizer="StandardScaler")]},
        r"row 2, column 'item': -1e\+39 is beyond 32-bit numbers",
    ),
    ("item,click,item\na,1,b\n", {}, "train.csv: column 'item' is named twice in the header: rename or remove one"),
    ("item,click,click,click\na,1,0,1\n", {}, "train.csv: column 'click' is named twice in the header"),
    ("item\na\n", {}, r"train.csv: column 'click' is missing: correct the name in dataset_config$"),
    (
        "click\n1\n",
        {},
        r"column 'item' is missing: correct the name in dataset_config or set the column active: false$",
    ),
]


def test_a_draft_of_the_feature_map(tmp_path: Path) -> None:
    """It knows what the settings tell; the lengths of sequences and vectors once the data is built from them."""
    write(tmp_path, text="item,tags,image,click\na,1^2^3^4,0.5^1.5,1\nb,2,1^1,0\n")
    columns = [ITEM, column("tags", "sequence", share_embedding="item"), column("image", "embedding", "float")]
    dataset, params = section(feature_cols=columns), {"embedding_dim": 5, "task": "binary_classification"}

    def lengths(dataset: DatasetConfig) -> tuple[int, int]:
        draft = draft_feature_map(dataset, tmp_path / "data/tiny", params)
        assert draft is not None and draft.labels == ["click"] and list(draft.features) == ["item", "tags", "image"]
        assert draft.features["tags"]["share_embedding"] == "item" and draft.features["item"]["vocab_size"] == 8
        return draft.features["tags"]["max_len"], draft.features["image"]["pretrain_dim"]

    assert lengths(dataset) == (3, 5)
    build_dataset(dataset, root=tmp_path)
    assert lengths(dataset) == (4, 2)
    assert lengths(section(feature_cols=columns, min_categr_count=2)) == (3, 5)


@pytest.mark.parametrize(("text", "changes", "message"), RAW_PROBLEMS)
def test_raw_data_problems(tmp_path: Path, text: str, changes: dict[str, Any], message: str) -> None:
    write(tmp_path, text=text)
    with pytest.raises(DataError, match=message) as caught:
        build_dataset(section(**changes), root=tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert not (tmp_path / "data/tiny/manifest.json").exists()


def test_row_numbers_hold_across_blocks_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctrbench.rawdata, "BLOCK_ROWS", 10)
    write(tmp_path, "raw/0.csv", "item,click\n" + "a,1\n" * 57)
    write(tmp_path, "raw/1.csv", "item,click\n" + "a,1\n" * 45 + "a,x\n" + "a,0\n" * 30)
    with pytest.raises(DataError, match=r"1.csv: row 46, column 'click': 'x' is not a number"):
        build_dataset(section(train_data="raw"), root=tmp_path)


def test_valid_must_have_the_columns_and_labels(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path, "valid.csv", "item\na\n")
    with pytest.raises(DataError, match=r"valid.csv: column 'click' is missing"):
        build_dataset(section(valid_data="valid.csv"), root=tmp_path)
    write(tmp_path, "valid.csv", "thing,click\na,1\n")
    with pytest.raises(DataError, match=r"valid.csv: column 'item' is missing"):
        build_dataset(section(valid_data="valid.csv"), root=tmp_path)
    write(tmp_path, "valid.csv", "item,click\n")
    with pytest.raises(DataError, match=r"valid.csv: no rows"):
        build_dataset(section(valid_data="valid.csv"), root=tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(DataError, match=r"train_data: .*trian.csv does not exist \(did you mean 'train.csv'\?\)"):
        build_dataset(section(train_data="trian.csv"), root=tmp_path)
    with pytest.raises(DataError, match=r"train_data: no file matches .*\*.tsv"):
        build_dataset(section(train_data="*.tsv"), root=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"the folder .*empty holds no \*.csv file"):
        build_dataset(section(train_data="empty"), root=tmp_path)
    with pytest.raises(DataError, match=r"train.csv: cannot be read: .*check data_format"):
        build_dataset(section(data_format="parquet"), root=tmp_path)


@pytest.mark.parametrize(
    "text", ["item,click,x,x\na,1,b,c\n", "item,click,,\na,1,b,c\n", "item,click,x_duplicated_0\na,1,b\n"]
)
def test_names_that_nothing_reads_may_be_repeated(tmp_path: Path, text: str) -> None:
    write(tmp_path, text=text)
    assert build_dataset(section(), root=tmp_path).num_rows == {"train": 1}


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("categorical", pl.Series([b"a", b"\xff"])),
        ("numeric", pl.Series([b"a", b"b"])),
        ("categorical", pl.Series([1, 2], dtype=pl.Duration)),
        ("meta", pl.Series([{"a": 1}, {"a": 2}])),
        ("sequence", pl.Series([[["a"]], [["b"]]])),
        ("sequence", pl.Series([[b"a"], [b"\xff"]])),
        ("embedding", pl.Series([[[1.0]], [[2.0]]], dtype=pl.Array(pl.Float32, (1, 1)))),
    ],
    ids=["bytes", "bytes as numbers", "durations", "records", "nested lists", "lists of bytes", "matrices"],
)
def test_parquet_types_that_no_column_takes(tmp_path: Path, kind: str, values: pl.Series) -> None:
    pl.DataFrame({"item": values, "click": [1, 0]}).write_parquet(tmp_path / "train.parquet")
    columns = [column("item", kind, "float" if kind in ("numeric", "embedding") else "str")]
    dataset = section(data_format="parquet", train_data="train.parquet", feature_cols=columns)
    with pytest.raises(
        DataError, match=r"train.parquet: column 'item' holds \w+.*: it must hold text, numbers, dates"
    ) as e:
        build_dataset(dataset, root=tmp_path)
    assert "\n" not in str(e.value)


def test_what_polars_says_of_a_block_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise pl.exceptions.ComputeError("first line\nsecond line")

    write(tmp_path)
    monkeypatch.setattr(ctrbench.rawdata, "_typed", fail)
    with pytest.raises(DataError, match=r"train.csv: cannot be read: first line: check data_format, sep and the file"):
        build_dataset(section(), root=tmp_path)


def test_a_decimal_with_a_fraction_is_no_integer(tmp_path: Path) -> None:
    frame = pl.DataFrame({"item": ["3", "1.5"], "click": [1, 0]}).with_columns(pl.col("item").cast(pl.Decimal(10, 1)))
    frame.write_parquet(tmp_path / "train.parquet")
    dataset = section(data_format="parquet", train_data="train.parquet", feature_cols=[column("item", dtype="int")])
    with pytest.raises(DataError, match=r"row 2, column 'item': Decimal\('1.5'\) is not an integer"):
        build_dataset(dataset, root=tmp_path)


def test_lists_need_type_sequence(tmp_path: Path) -> None:
    pl.DataFrame({"item": [["a"], ["b"]], "click": [1, 0]}).write_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match="column 'item' holds lists, but its type is categorical"):
        build_dataset(section(data_format="parquet", train_data="train.parquet"), root=tmp_path)


@pytest.mark.parametrize(
    ("arrays", "changes", "message"),
    [
        ({"key": ["a"], "value": np.zeros((2, 4))}, {}, r"1 keys do not fit values of shape \(2, 4\)"),
        ({"key": ["a"], "value": np.zeros((1, 4))}, {"pretrain_dim": 8}, "values are 4 wide, pretrain_dim is 8"),
        ({"keys": ["a"]}, {}, "is not a readable .h5, .npz or .parquet file with 'key' and 'value'"),
        ({"key": ["x"], "value": np.zeros((1, 4))}, {"dtype": "int"}, "key 'x' is not Int64"),
    ],
)
def test_pretrained_problems(tmp_path: Path, arrays: dict, changes: dict, message: str) -> None:
    write(tmp_path, text="item,click\n1,1\n")
    np.savez(tmp_path / "emb.npz", **arrays)
    with pytest.raises(DataError, match=message):
        build_dataset(section(feature_cols=[{**ITEM, "pretrained_emb": "emb.npz", **changes}]), root=tmp_path)


@pytest.mark.parametrize("kind", ["h5", "parquet"])
def test_pretrained_formats(tmp_path: Path, kind: str) -> None:
    write(tmp_path)
    if kind == "h5":
        with h5py.File(tmp_path / "emb.h5", "w") as file:
            file["key"], file["value"] = ["a", "new"], np.zeros((2, 4))
    else:
        pl.DataFrame({"key": ["a", "new"], "value": [[0.0, 1.0], [2.0, 3.0]]}).write_parquet(tmp_path / "emb.parquet")
    build_dataset(section(feature_cols=[{**ITEM, "pretrained_emb": f"emb.{kind}"}]), root=tmp_path)
    assert vocabulary(tmp_path)["item"] == {"__PAD__": 0, "a": 1, "b": 2, "__OOV__": 3, "new": 4}
    assert feature_map(tmp_path)["features"][0]["item"]["oov_idx"] == 3


def test_pretrained_file_missing(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(DataError, match=r"feature_cols.item.pretrained_emb: .*emb.npz does not exist"):
        build_dataset(section(feature_cols=[{**ITEM, "pretrained_emb": "emb.npz"}]), root=tmp_path)


CONFIG_PROBLEMS = [
    ({"train_data": None}, "train_data: missing"),
    ({"valid_size": 0.1, "valid_data": "v.csv"}, "valid_size: valid_data is given too"),
    ({"test_size": 5, "test_data": "t.csv"}, "test_size: test_data is given too"),
    ({"valid_size": 1.5}, "a fraction below 1 or a number of rows, got 1.5"),
    ({"valid_size": 0.6, "test_size": 0.5}, r"valid_size: valid_size \+ test_size must be below 1, got 1.1"),
    ({"feature_cols": []}, "feature_cols: missing, this key is required for data_format csv"),
    ({"feature_cols": [{**ITEM, "active": False}]}, "feature_cols: no active column"),
    ({"label_col": []}, "label_col: missing"),
    ({"feature_cols": [ITEM, ITEM]}, "column 'item' is listed more than once"),
    (
        {"label_col": {"name": "click", "preprocess": "copy"}},
        r"label_col\['click'\].preprocess: unknown function 'copy'",
    ),
    ({"label_col": {"name": "click", "fill_na": "x"}}, r"label_col\['click'\].fill_na: must be a number"),
    (
        {"feature_cols": [{**ITEM, "preprocess": "convert_to_buckt"}]},
        r"unknown function 'convert_to_buckt' \(did you mean 'convert_to_bucket'\?\)",
    ),
    ({"feature_cols": [{**ITEM, "preprocess": "os.system('ls')"}]}, "is not a function name or name"),
    ({"feature_cols": [{**ITEM, "preprocess": "copy_from"}]}, "copy_from needs the column to copy"),
    ({"feature_cols": [{**ITEM, "feature_encoder": "print('x')"}]}, "feature_encoder: .* is not allowed"),
    ({"feature_cols": [column("item", dtype="int", fill_na="x")]}, "fill_na: must be a number, as dtype is int"),
    ({"feature_cols": [column("item", "numeric", fill_na="x")]}, "fill_na: must be a number, as type is numeric"),
    ({"feature_cols": [{**ITEM, "normalizer": "MinMaxScaler"}]}, "normalizer: only a numeric column"),
    ({"feature_cols": [column("item", "sequence", splitter="")]}, "splitter: must not be empty"),
    (
        {"feature_cols": [column("item", "numeric", "float", pretrained_emb="e.npz")]},
        "pretrained_emb: only categorical",
    ),
    ({"feature_cols": [{**ITEM, "share_embedding": "itm"}]}, "'itm' is not an active column"),
    ({"feature_cols": [{**ITEM, "share_embedding": "b"}, column("b")]}, "'b' comes later in feature_cols"),
    ({"feature_cols": [ITEM, column("n", "numeric", share_embedding="item")]}, "both must be categorical or sequence"),
    ({"feature_cols": [column("i", dtype="int"), column("s", "sequence", share_embedding="i")]}, "so none would match"),
    ({"feature_cols": [ITEM], "rebuild_dataset": False}, "vocab_size: needed when rebuild_dataset is false"),
    ({"feature_cols": [column("s", "sequence", vocab_size=3)], "rebuild_dataset": False}, "max_len: needed when"),
    (
        {"feature_cols": [column("n", "numeric", normalizer="MinMaxScaler")], "rebuild_dataset": False},
        "normalizer: needs",
    ),
]


@pytest.mark.parametrize(("changes", "message"), CONFIG_PROBLEMS)
def test_config_problems(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_dataset(section(**changes), root=tmp_path)
    assert all(line.startswith("dataset_config: tiny.") for line in caught.value.problems)


def test_config_problems_come_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        build_dataset(section(train_data=None, label_col=[], feature_cols=[]), root=tmp_path)
    assert len(caught.value.problems) == 3


def test_foreign_folder_is_not_overwritten_when_rebuilding_is_off(tmp_path: Path) -> None:
    write(tmp_path, text="item,click\n1,1\n")
    write(tmp_path, "data/tiny/feature_map.json", "{}")
    with pytest.raises(DataError, match=r"feature_map.json without manifest.json"):
        build_dataset(section(feature_cols=[{**ITEM, "vocab_size": 5}], rebuild_dataset=False), root=tmp_path)
