# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from conftest import ROOT, load_script
from sklearn.decomposition import PCA

from ctrbench.errors import DataError

microlens_1m = load_script(ROOT / "data" / "prepare" / "microlens_1m.py")
EXPECTED = microlens_1m.Challenge(train=4, valid=2, test=3, items=5, tags=9, users=10, positives=0.25)
ROWS = {"train": 4, "valid": 2, "test": 3}


def history(*ids):
    return [0] * (100 - len(ids)) + list(ids)


def split(rows, **replaced):
    columns = {
        "user_id": [1, 2, 3, 9][:rows],
        "item_seq": [history(), history(1, 2, 3), history(4), history(*[2] * 100)][:rows],
        "item_id": [1, 2, 3, 4][:rows],
        "likes_level": [0, 5, 10, 3][:rows],
        "views_level": [10, 0, 1, 2][:rows],
        "label": [0, 1, 0, 0][:rows],
    }
    return pl.DataFrame({k: v for k, v in {**columns, **replaced}.items() if v is not None})


def item_info(**replaced):
    columns = {
        "item_id": [0, 1, 2, 3, 4],
        "item_tags": [[0] * 5, [0, 0, 0, 1, 2], [1, 2, 3, 4, 5], [0, 0, 0, 0, 8], [0] * 5],
        "item_emb_d128": [[0.0] * 128, *([i / 8] * 128 for i in range(1, 5))],
    }
    return pl.DataFrame({k: v for k, v in {**columns, **replaced}.items() if v is not None})


def same(got, expected):
    return got.columns == expected.columns and got.equals(expected.cast(dict(got.schema)))


def changed(values, index, value):
    return [*values[:index], value, *values[index + 1 :]]


@pytest.fixture
def raw(tmp_path):
    """Writes the four files, some of them replaced, and gives their folder."""

    def write(**frames):
        folder = tmp_path / "raw"
        folder.mkdir(exist_ok=True)
        usual = {"train": split(4), "valid": split(2), "test": split(3, label=None), "item_info": item_info()}
        for name, frame in {**usual, **frames}.items():
            frame.write_parquet(folder / f"{name}.parquet")
        return folder

    return write


def refused(folder, tmp_path, message, **options):
    """The one line of the error; nothing was written."""
    with pytest.raises(DataError, match=message) as error:
        microlens_1m.prepare(folder, tmp_path / "out", expected=EXPECTED, **options)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    return str(error.value)


def test_the_canonical_form(raw, tmp_path):
    summary = microlens_1m.prepare(raw(), tmp_path / "out", expected=EXPECTED)
    assert summary.rows == ROWS and summary.items == 5 and summary.positives == 0.25 and summary.warnings == []
    names = ["item_info.parquet", "test.parquet", "train.parquet", "valid.parquet"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    train, test, items = (
        pl.read_parquet(tmp_path / "out" / f"{name}.parquet") for name in ("train", "test", "item_info")
    )
    order = ["user_id", "item_id", "item_seq", "likes_level", "views_level", "label"]
    assert train.columns == order and test.columns == order[:-1]
    assert {train.schema[name] for name in order} == {pl.Int32, pl.List(pl.Int32)}
    assert items.schema == {"item_id": pl.Int32, "item_tags": pl.List(pl.Int32), "item_emb_d128": pl.List(pl.Float32)}
    assert same(train, split(4).select(order)) and same(test, split(3).select(order[:-1]))
    assert same(items, item_info())


def test_other_types_of_the_same_values(raw, tmp_path):
    train = split(4).with_columns(
        pl.col("user_id").cast(pl.UInt64),
        pl.col("item_seq").cast(pl.Array(pl.Int16, 100)),
        pl.col("likes_level").cast(pl.Int8),
        pl.col("label").cast(pl.Boolean),
    )
    items = item_info().cast({"item_emb_d128": pl.Array(pl.Float32, 128), "item_tags": pl.Array(pl.Int64, 5)})
    valid = split(2).with_columns(pl.col("label").cast(pl.Float32))
    microlens_1m.prepare(raw(train=train, item_info=items, valid=valid), tmp_path / "out", expected=EXPECTED)
    written = {name: pl.read_parquet(tmp_path / "out" / f"{name}.parquet") for name in ("train", "valid", "item_info")}
    columns = written["train"].columns
    assert same(written["train"], split(4).select(columns)) and same(written["valid"], split(2).select(columns))
    assert same(written["item_info"], item_info())


def test_items_come_out_in_the_order_of_ids(raw, tmp_path):
    microlens_1m.prepare(raw(item_info=item_info()[[3, 0, 4, 2, 1]]), tmp_path / "out", expected=EXPECTED)
    assert same(pl.read_parquet(tmp_path / "out" / "item_info.parquet"), item_info())


def test_several_blocks_keep_their_order_and_row_numbers(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(microlens_1m, "BLOCK_ROWS", 300)
    train = pl.concat([split(4)] * 500).with_columns(user_id=pl.int_range(2000) % 7)
    folder = raw(train=train)
    microlens_1m.prepare(folder, tmp_path / "out", expected=EXPECTED)
    assert same(pl.read_parquet(tmp_path / "out" / "train.parquet"), train.select(*microlens_1m.TYPES))
    train = train.with_columns(views_level=pl.when(pl.int_range(2000) == 1500).then(11).otherwise("views_level"))
    with pytest.raises(DataError, match=r"row 1,501, column 'views_level'.*got 11"):
        microlens_1m.prepare(raw(train=train), tmp_path / "again", expected=EXPECTED)


def test_files_one_folder_below(raw, tmp_path):
    folder = raw()
    below = tmp_path / "MicroLens_1M_x1"
    folder.rename(below)
    assert microlens_1m.prepare(tmp_path, tmp_path / "out", expected=EXPECTED).rows == ROWS


@pytest.mark.parametrize(
    "label, is_labelled, warnings",
    [
        ([None] * 3, False, []),
        (pl.Series([None] * 3, dtype=pl.Float64), False, []),
        (pl.Series([float("nan")] * 3), False, []),
        ([0, 1, 0], True, []),
        ([0, 0, 0], False, ["the labels are all alike: taken for a placeholder and left out"]),
    ],
)
def test_labels_of_test(raw, tmp_path, label, is_labelled, warnings):
    summary = microlens_1m.prepare(raw(test=split(3, label=label)), tmp_path / "out", expected=EXPECTED)
    assert summary.is_test_labelled is is_labelled
    assert [text.partition("test.parquet: ")[2] for text in summary.warnings] == warnings
    assert ("label" in pl.read_parquet_schema(tmp_path / "out" / "test.parquet")) is is_labelled


def test_warnings(raw, tmp_path):
    expected = dataclasses.replace(EXPECTED, train=3_600_000, items=91_718, users=9, positives=0.5)
    emb = changed(item_info()["item_emb_d128"].to_list(), 0, [1.0] * 128)
    folder = raw(train=split(4, ID=[0, 1, 2, 3]), item_info=item_info(item_emb_d128=emb))
    summary = microlens_1m.prepare(folder, tmp_path / "out", expected=expected)
    assert summary.warnings == [
        f"{folder}/item_info.parquet: item 0, the padding item, is not all zeros: written as zeros",
        f"{folder}/train.parquet: columns left out: ID",
        f"{folder}/train.parquet: user_id goes up to 9 (published: 8)",
        "not the published sizes (these in brackets): train rows 4 (3,600,000), items 5 (91,718)",
        "25.0% of the train labels are positive (published: 50%)",
    ]
    assert same(pl.read_parquet(tmp_path / "out" / "item_info.parquet"), item_info())


def test_missing_file(raw, tmp_path):
    folder = raw()
    (folder / "valid.parquet").unlink()
    refused(folder, tmp_path, r"raw/valid\.parquet: no such file: download it from https://huggingface.* as --raw")


@pytest.mark.parametrize("is_below", [False, True])
def test_output_over_the_raw_files(raw, tmp_path, is_below):
    folder = raw()
    if is_below:
        folder = folder.rename(tmp_path / "MicroLens_1M_x1")
    before = (folder / "train.parquet").read_bytes()
    with pytest.raises(DataError, match="--output is the folder of the raw files and would replace them: name another"):
        microlens_1m.prepare(tmp_path if is_below else folder, folder, expected=EXPECTED)
    assert (folder / "train.parquet").read_bytes() == before


def test_not_parquet(raw, tmp_path):
    folder = raw()
    (folder / "train.parquet").write_text("<html>")
    refused(folder, tmp_path, r"train\.parquet: not a readable Parquet file \(.*\): download the file again from")


def test_truncated_parquet(raw, tmp_path):
    folder = raw()
    content = (folder / "train.parquet").read_bytes()
    (folder / "train.parquet").write_bytes(content[: len(content) // 2])
    refused(folder, tmp_path, r"train\.parquet: not a readable Parquet file")


def test_damaged_parquet(raw, tmp_path):
    """The footer is whole, the values are not."""
    folder = raw()
    content = bytearray((folder / "train.parquet").read_bytes())
    content[4:200] = bytes(196)
    (folder / "train.parquet").write_bytes(content)
    refused(folder, tmp_path, r"train\.parquet: not a readable Parquet file")


SEQ = split(4)["item_seq"].to_list()
PLACE = "train.parquet: row 3, column "


@pytest.mark.parametrize(
    "replaced, message",
    [
        (
            {"likes_level": None},
            "column 'likes_level' is missing: expected user_id, item_id, .*got user_id, item_seq, ",
        ),
        ({"label": None}, "column 'label' is missing"),
        ({"likes_level": None, "like_level": [0] * 4}, r"'likes_level' is missing \(did you mean 'like_level'\?\)"),
        ({"user_id": ["a", "b", "c", "d"]}, "column 'user_id': expected integers, got the type String: download"),
        ({"views_level": [0.5] * 4}, "column 'views_level': expected integers, got the type Float64"),
        ({"item_seq": [1, 2, 3, 4]}, "column 'item_seq': expected lists of integers, got the type Int64"),
        ({"item_seq": [[0.0] * 100] * 4}, r"'item_seq': expected lists of integers, got the type List\(Float64\)"),
        ({"item_id": [[1]] * 4}, r"column 'item_id': expected integers, got the type List\(Int64\)"),
        ({"label": ["0", "1", "0", "0"]}, "column 'label': expected 0 and 1, got the type String"),
        ({"user_id": [1, 2, -3, 4]}, PLACE + "'user_id': expected an integer from 0 to 2,147,483,647, got -3: down"),
        ({"user_id": [1, 2, 2**31, 4]}, PLACE + "'user_id': .*got 2147483648"),
        (
            {"user_id": pl.Series([1, 2, 2**64 - 1, 4], dtype=pl.UInt64)},
            PLACE + "'user_id': .*got 18446744073709551615",
        ),
        ({"user_id": [1, 2, None, 4]}, PLACE + "'user_id': expected an integer from 0 to 2,147,483,647, got None"),
        ({"item_id": [1, 2, 0, 4]}, PLACE + "'item_id': expected an integer from 1 to 4, got 0"),
        ({"item_id": [1, 2, 5, 4]}, PLACE + "'item_id': expected an integer from 1 to 4, got 5"),
        ({"likes_level": [0, 1, 11, 2]}, PLACE + "'likes_level': expected an integer from 0 to 10, got 11"),
        ({"views_level": [0, 1, -1, 2]}, PLACE + "'views_level': expected an integer from 0 to 10, got -1"),
        ({"label": [0, 1, 2, 0]}, PLACE + "'label': expected 0 or 1, got 2: download"),
        ({"label": [0, 1, None, 0]}, PLACE + "'label': expected 0 or 1, got None"),
        ({"label": [0.0, 1.0, 0.5, 0.0]}, PLACE + r"'label': expected 0 or 1, got 0\.5"),
        (
            {"item_seq": changed(SEQ, 2, [1] * 99)},
            PLACE + "'item_seq': expected a list of 100, got one of 99: download",
        ),
        ({"item_seq": changed(SEQ, 2, [])}, PLACE + "'item_seq': expected a list of 100, got one of 0"),
        ({"item_seq": changed(SEQ, 2, None)}, PLACE + "'item_seq': expected a list of 100, got none"),
        (
            {"item_seq": changed(SEQ, 2, history(3, 5))},
            PLACE + "'item_seq': expected ids from 0 to 4, got 5 at place 100",
        ),
        ({"item_seq": changed(SEQ, 2, history(-1, 2))}, PLACE + "'item_seq': .* got -1 at place 99"),
        ({"item_seq": changed(SEQ, 2, history(None, 2))}, PLACE + "'item_seq': .* got None at place 99"),
        (
            {"item_seq": changed(SEQ, 2, history(4, 0, 2))},
            PLACE + "'item_seq': expected zeros on the left only, got 4 at place 98 and 0 at place 99: download",
        ),
        ({"item_seq": changed(SEQ, 2, [3, *[0] * 99])}, PLACE + "'item_seq': .*got 3 at place 1 and 0 at place 2"),
    ],
)
def test_a_split_of_another_form(raw, tmp_path, replaced, message):
    refused(raw(train=split(4, **replaced)), tmp_path, message)


def test_a_split_without_rows(raw, tmp_path):
    refused(raw(valid=split(2).clear()), tmp_path, r"valid\.parquet: no rows: download the file again from")


@pytest.mark.parametrize("label, number", [([None, 1, 0], 1), ([1, None, None], 2)])
def test_some_labels_of_test_missing(raw, tmp_path, label, number):
    message = rf"test\.parquet: column 'label': expected labels in all rows or in none, {number} of 3 rows have none"
    refused(raw(test=split(3, label=label)), tmp_path, message)


TAGS, EMB = item_info()["item_tags"].to_list(), item_info()["item_emb_d128"].to_list()
ITEM = r"item_info\.parquet: row 4, column "


@pytest.mark.parametrize(
    "replaced, message",
    [
        ({"item_emb_d128": None}, "column 'item_emb_d128' is missing: expected item_id, item_tags, item_emb_d128, got"),
        ({"item_id": ["0", "1", "2", "3", "4"]}, "column 'item_id': expected integers, got the type String"),
        ({"item_emb_d128": [0.0] * 5}, "'item_emb_d128': expected lists of numbers, got the type Float64"),
        ({"item_id": [0, 1, 2, 2, 4]}, ITEM + "'item_id': expected an id that no earlier row has, got 2: download"),
        ({"item_id": [0, 1, 2, -1, 3]}, ITEM + "'item_id': expected an integer from 0 to .*, got -1"),
        ({"item_id": [0, 1, 2, 5, 4]}, "item 3 is missing: the ids must be 0, 1, 2, ... without a gap: download"),
        ({"item_id": [1, 2, 3, 4, 5]}, "item 0, the padding item, is missing: the ids must be 0, 1, 2"),
        (
            {"item_tags": changed(TAGS, 3, [0, 0, 0, 0, 9])},
            ITEM + "'item_tags': expected ids from 0 to 8, got 9 at place 5",
        ),
        (
            {"item_tags": changed(TAGS, 3, [1, 0, 0, 0, 0])},
            ITEM + "'item_tags': expected zeros on the left only, got 1 at",
        ),
        ({"item_tags": changed(TAGS, 3, [1])}, ITEM + "'item_tags': expected a list of 5, got one of 1"),
        (
            {"item_emb_d128": changed(EMB, 3, [0.0] * 64)},
            ITEM + "'item_emb_d128': expected a list of 128, got one of 64",
        ),
        (
            {"item_emb_d128": changed(EMB, 3, [*[0.0] * 126, float("inf"), 0.0])},
            ITEM + "'item_emb_d128': expected finite numbers, got inf at place 127: download",
        ),
        ({"item_emb_d128": changed(EMB, 3, [None] * 128)}, ITEM + "'item_emb_d128': .*got None at place 1"),
    ],
)
def test_item_info_of_another_form(raw, tmp_path, replaced, message):
    refused(raw(item_info=item_info(**replaced)), tmp_path, message)


def test_item_info_without_rows(raw, tmp_path):
    refused(raw(item_info=item_info().clear()), tmp_path, "item 0, the padding item, is missing")


NUM_ITEMS = 301


def item_feature(ids=range(1, NUM_ITEMS), **replaced):
    ids = np.array(ids)
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((NUM_ITEMS, 200))
    vectors = latent @ rng.standard_normal((200, 1792)) + rng.standard_normal((NUM_ITEMS, 1792)) + 3
    columns = {
        "item_id": ids,
        "item_title": ["title"] * len(ids),
        "image": pl.Series(vectors[ids, 768:]).cast(pl.List(pl.Float64)),
        "text": pl.Series(vectors[ids, :768]).cast(pl.List(pl.Float32)),
    }
    return pl.DataFrame({k: v for k, v in {**columns, **replaced}.items() if v is not None})


@pytest.fixture
def raw_with_features(raw):
    def write(features):
        items = pl.DataFrame({"item_id": range(NUM_ITEMS), "item_tags": [[0] * 5] * NUM_ITEMS})
        return raw(item_info=items, item_feature=features)

    return write


def test_rebuilt_embeddings(raw_with_features, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["microlens_1m_pca"], "BLOCK_ROWS", 77)
    features = item_feature(np.random.default_rng(1).permutation(np.arange(1, NUM_ITEMS)))
    folder = raw_with_features(features)
    summary = microlens_1m.prepare(folder, tmp_path / "out", rebuild_embeddings=True, expected=EXPECTED)
    items = pl.read_parquet(tmp_path / "out" / "item_info.parquet")
    assert items.schema["item_emb_d128"] == pl.List(pl.Float32)
    got = items["item_emb_d128"].cast(pl.Array(pl.Float32, 128)).to_numpy()
    assert not got[0].any()

    features = features.sort("item_id")
    vectors = np.hstack([np.array(features[name].to_list()) for name in ("text", "image")])
    oracle = PCA(128, svd_solver="full").fit(vectors)
    components = oracle.components_
    components = components * np.sign(components[np.arange(128), np.abs(components).argmax(1)])[:, None]
    np.testing.assert_allclose(got[1:], (vectors - vectors.mean(0)) @ components.T, rtol=1e-4, atol=1e-3)
    assert summary.pca.explained_variance == pytest.approx(oracle.explained_variance_ratio_.sum(), abs=1e-6)
    assert summary.pca.columns == ["text", "image"]


@pytest.fixture
def narrow(monkeypatch):
    """Cuts the raw vectors, for speed."""
    monkeypatch.setattr(sys.modules["microlens_1m_pca"], "SOURCES", {"BERT": 80, "CLIP": 120})
    return lambda features: features.with_columns(pl.col("text").list.head(80), pl.col("image").list.head(120))


def test_features_of_item_0_are_ignored(raw_with_features, tmp_path, narrow):
    written = []
    for first in (0, 1):
        folder = raw_with_features(narrow(item_feature(range(first, NUM_ITEMS))))
        microlens_1m.prepare(folder, tmp_path / "out", rebuild_embeddings=True, expected=EXPECTED)
        written.append((tmp_path / "out" / "item_info.parquet").read_bytes())
    assert written[0] == written[1]


def test_item_feature_is_asked_for_only_to_rebuild(raw, tmp_path):
    refused(raw(), tmp_path, r"item_feature\.parquet: no such file", rebuild_embeddings=True)


FEATURES = item_feature()


@pytest.mark.parametrize(
    "features, message",
    [
        (FEATURES.drop("item_id"), "column 'item_id' is missing"),
        (
            FEATURES.drop("text"),
            r"expected one column with lists of 768 numbers \(BERT\), got 0; .*: image \(1024\): down",
        ),
        (
            FEATURES.drop("text", "image"),
            r"lists of 768 numbers \(BERT\), got 0; the columns with lists of numbers: none",
        ),
        (
            FEATURES.with_columns(other="image"),
            r"lists of 1024 numbers \(CLIP\), got 2; .*: image \(1024\), text \(768\), other \(1024\)",
        ),
        (FEATURES[:299], r"item_feature\.parquet: item 300 is missing \(1 items in all\): download"),
        (
            pl.concat([FEATURES, FEATURES[[5]]]),
            "row 301, column 'item_id': expected an id that no earlier row has, got 6",
        ),
        (
            item_feature(item_id=range(2, NUM_ITEMS + 1)),
            "row 300, column 'item_id': expected an integer from 0 to 300, got",
        ),
        (
            item_feature(text=changed(FEATURES["text"].to_list(), 7, [float("nan")] * 768)),
            "row 8, column 'text': expected finite numbers, got nan at place 1",
        ),
        (
            item_feature(image=changed(FEATURES["image"].to_list(), 7, [0.0])),
            "row 8, column 'image': expected a list of 1024, got one of 1",
        ),
    ],
)
def test_item_feature_of_another_form(raw_with_features, tmp_path, features, message):
    refused(raw_with_features(features), tmp_path, message, rebuild_embeddings=True)


def test_too_few_items_for_a_pca(raw, tmp_path):
    features = item_feature(range(1, 5))
    message = "128 components need more than 128 items, got 4: leave out --rebuild-embeddings"
    refused(raw(item_feature=features), tmp_path, message, rebuild_embeddings=True)


def test_main_prints_counts_against_the_published_ones(raw_with_features, tmp_path, capsys, narrow):
    folder = raw_with_features(narrow(FEATURES))
    arguments = ["--raw", str(folder), "--output", str(tmp_path / "out"), "--rebuild-embeddings"]
    assert microlens_1m.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        f"{tmp_path}/out/train.parquet: 4 rows (published: 3,600,000)",
        f"{tmp_path}/out/valid.parquet: 2 rows (published: 10,000)",
        f"{tmp_path}/out/test.parquet: 3 rows (published: 379,142)",
    ]
    assert lines[3] == f"{tmp_path}/out/item_info.parquet: 301 items (published: 91,718)"
    assert lines[4] == "positive labels in train: 25.00% (published: 25%)"
    assert re.fullmatch(r"item_emb_d128: PCA of text and image, \d\d\.\d\d% of the variance explained", lines[5])
    assert lines[6].startswith("warning: not the published sizes (these in brackets): train rows 4 (3,600,000), ")


def test_command_line(tmp_path):
    command = [sys.executable, ROOT / "data" / "prepare" / "microlens_1m.py", "--raw", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2 and "no such file" in done.stderr and "Traceback" not in done.stderr
