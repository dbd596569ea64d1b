# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import sys
import time

import numpy as np
import polars as pl
import pytest
from conftest import ROOT, load_script
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

from ctrbench.errors import DataError

load_script(ROOT / "data" / "make_tiny.py")
make_tiny_mm = sys.modules["make_tiny_mm"]
microlens_1m = load_script(ROOT / "data" / "prepare" / "microlens_1m.py")
FILES = ["item_info.parquet", "test.parquet", "test_labels.parquet", "train.parquet", "valid.parquet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny_mm")
    start = time.perf_counter()
    assert make_tiny_mm.make_tiny_mm(folder) == {"train": 24_000, "valid": 4_000, "test": 4_000}
    assert time.perf_counter() - start < 5
    return folder


@pytest.fixture(scope="module")
def train(folder):
    return pl.read_parquet(folder / "train.parquet")


@pytest.fixture(scope="module")
def items(folder):
    return pl.read_parquet(folder / "item_info.parquet")


def matrix(lists, width):
    return lists.cast(pl.Array(lists.dtype.inner, width)).to_numpy()


def length(history):
    return pl.Series((matrix(history, 100) > 0).sum(1))


def test_files_columns_and_types(folder, train, items):
    assert sorted(path.name for path in folder.iterdir()) == FILES
    types = {"user_id": pl.Int32, "item_id": pl.Int32, "item_seq": pl.List(pl.Int32), "likes_level": pl.Int32}
    types |= {"views_level": pl.Int32, "label": pl.Int32}
    assert train.schema == types == pl.read_parquet_schema(folder / "valid.parquet")
    del types["label"]
    assert pl.read_parquet_schema(folder / "test.parquet") == types
    assert pl.read_parquet(folder / "test_labels.parquet").schema == {"label": pl.Int32}
    assert items.schema == {
        "item_id": pl.Int32,
        "item_tags": pl.List(pl.Int32),
        "item_emb_d128": pl.List(pl.Float32),
    }


def test_ids_and_levels(train, items):
    assert items["item_id"].to_list() == list(range(601))
    assert train["item_id"].min() >= 1 and train["item_id"].max() <= 600
    assert train["user_id"].min() >= 1 and train["user_id"].max() <= 8_000
    for name in ("likes_level", "views_level"):
        assert train[name].unique().sort().to_list() == list(range(11))


def test_item_table(items):
    tags, embedding = matrix(items["item_tags"], 5), matrix(items["item_emb_d128"], 128)
    assert not tags[0].any() and not embedding[0].any()
    assert tags[1:, -1].min() >= 1 and tags.max() == 60
    assert not ((tags[:, 1:] == 0) & (tags[:, :-1] > 0)).any()
    assert set((tags[1:] > 0).sum(1)) == {1, 2, 3, 4, 5}
    assert np.isfinite(embedding).all() and 0.5 < embedding[1:].std() < 2


def test_tags_and_embedding_tell_the_cluster(items):
    cluster = make_tiny_mm.make_world(600, 32_000, 2024).cluster[1:]
    tags, embedding = matrix(items["item_tags"], 5)[1:], matrix(items["item_emb_d128"], 128)[1:]
    is_own = (tags - 1) // 3 == cluster[:, None]
    assert is_own[tags > 0].mean() == pytest.approx(0.7 + 0.3 / 20, abs=0.03)
    unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    nearest = (unit @ unit.T - 2 * np.eye(600)).argmax(1)
    assert (cluster[nearest] == cluster).mean() > 0.9


def test_histories_have_the_challenge_s_profile(train):
    history = matrix(train["item_seq"], 100)
    assert history.max() <= 600 and not ((history[:, 1:] == 0) & (history[:, :-1] > 0)).any()
    lengths = length(train["item_seq"])
    assert lengths.median() == 6 and 7.5 < lengths.mean() < 8.5 and lengths.quantile(0.75) == 9
    assert lengths.max() == 100 and (lengths == 0).mean() == pytest.approx(0.02, abs=0.005)


def test_labels(folder, train):
    labels = [
        train["label"],
        *(pl.read_parquet(folder / f"{name}.parquet")["label"] for name in ("valid", "test_labels")),
    ]
    assert [len(label) for label in labels] == [24_000, 4_000, 4_000]
    assert all(label.is_in([0, 1]).all() and label.mean() == pytest.approx(0.25, abs=0.02) for label in labels)


def test_some_users_have_several_rows_in_a_split(folder):
    rows = pl.read_parquet(folder / "valid.parquet")["user_id"].value_counts()["count"]
    assert (rows >= 4).sum() > 50


def test_bayes_auc_of_the_docstring(folder):
    world = make_tiny_mm.make_world(600, 32_000, 2024)
    frame, probability = make_tiny_mm.generate(world, 100_000, np.random.default_rng(1))
    assert np.isfinite(probability).all()
    assert roc_auc_score(frame["label"], probability) == pytest.approx(0.932, abs=3e-3)
    label = pl.read_parquet(folder / "test_labels.parquet")["label"]
    probability = np.concatenate([p for _, p in make_tiny_mm.blocks(world, "test", 4_000, 2024)])
    assert roc_auc_score(label, probability) == pytest.approx(0.936, abs=1e-3)


def test_the_number_of_matching_items_counts_not_their_share():
    """A model that knows every other term of the logit still needs the number: shares and presence fall behind."""
    world = make_tiny_mm.make_world(600, 32_000, 2024)
    frame, probability = make_tiny_mm.generate(world, 40_000, np.random.default_rng(2))
    history = matrix(frame["item_seq"], 100)
    match = (world.cluster[history] == world.cluster[frame["item_id"]][:, None]) & (history > 0)
    count = match.sum(1)
    others = np.log(probability / (1 - probability)) - 2.2 * count / (1 + count / 6)

    def auc(feature):
        columns, label = np.stack([others, feature], axis=1), frame["label"].to_numpy()
        model = HistGradientBoostingClassifier(max_iter=60).fit(columns[:30_000], label[:30_000])
        return roc_auc_score(label[30_000:], model.predict_proba(columns[30_000:])[:, 1])

    knows_count, knows_share, knows_presence = (
        auc(count),
        auc(count / np.maximum((history > 0).sum(1), 1)),
        auc(count > 0),
    )
    assert knows_count > 0.92
    assert knows_share < knows_count - 0.02 and knows_presence < knows_count - 0.05


def test_interactions_have_no_main_effects():
    world = make_tiny_mm.make_world(600, 32_000, 2024)
    for table in (world.levels, world.cluster_level):
        assert np.abs(table.mean(0)).max() < 1e-12 and np.abs(table.mean(1)).max() < 1e-12
        assert table.std() == pytest.approx(1) and np.linalg.matrix_rank(table) == 1


def test_effects_do_not_depend_on_sizes():
    small, large = make_tiny_mm.make_world(600, 800, 7), make_tiny_mm.make_world(900, 80_000, 7)
    assert np.array_equal(small.levels, large.levels) and np.array_equal(small.cluster_level, large.cluster_level)
    assert small.bias == pytest.approx(large.bias, abs=0.2)


def test_same_seed_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(make_tiny_mm, "BLOCK_ROWS", 300)  # several blocks
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_tiny_mm.make_tiny_mm(tmp_path / name, rows=1_600, items=100, seed=seed)
    for file in FILES:
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b != c


def test_blocks_differ_and_make_up_the_split(tmp_path, monkeypatch):
    monkeypatch.setattr(make_tiny_mm, "BLOCK_ROWS", 300)
    make_tiny_mm.make_tiny_mm(tmp_path, rows=1_600)
    world = make_tiny_mm.make_world(600, 1_600, 2024)
    frames = [frame for frame, _ in make_tiny_mm.blocks(world, "train", 1_200, 2024)]
    assert [frame.height for frame in frames] == [300] * 4 and not frames[0].equals(frames[1])
    assert pl.read_parquet(tmp_path / "train.parquet").equals(pl.concat(frames))


def test_test_labels_are_in_row_order(tmp_path):
    make_tiny_mm.make_tiny_mm(tmp_path, rows=1_600)
    frame, _ = next(make_tiny_mm.blocks(make_tiny_mm.make_world(600, 1_600, 2024), "test", 200, 2024))
    labels = pl.read_parquet(tmp_path / "test_labels.parquet")
    assert pl.read_parquet(tmp_path / "test.parquet").with_columns(labels["label"]).equals(frame)


def test_split_sizes():
    assert make_tiny_mm.split_rows(81) == {"train": 61, "valid": 10, "test": 10}
    assert make_tiny_mm.split_rows(3_989_142) == {"train": 3_600_000, "valid": 10_000, "test": 379_142}


def test_the_preparer_accepts_it_as_it_is(folder, tmp_path):
    sizes = {"train": 24_000, "valid": 4_000, "test": 4_000, "items": 601, "tags": 61, "users": 8_001}
    expected = dataclasses.replace(microlens_1m.MMCTR, **sizes)
    summary = microlens_1m.prepare(folder, tmp_path / "out", expected=expected)
    assert summary.warnings == [] and not summary.is_test_labelled
    for file in set(FILES) - {"test_labels.parquet"}:
        assert pl.read_parquet(tmp_path / "out" / file).equals(pl.read_parquet(folder / file))


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"rows": 79}, "--rows: 80 are the fewest that make three useful files, got 79"),
        ({"items": 39}, "--items: 40 are the fewest that give each of 20 clusters two, got 39"),
        ({"tags": 19}, "--tags: 20 are the fewest that give each of 20 clusters one, got 19"),
    ],
)
def test_too_small(tmp_path, sizes, message):
    with pytest.raises(DataError, match=message):
        make_tiny_mm.make_tiny_mm(tmp_path / "out", **sizes)
    assert not (tmp_path / "out").exists()


def test_the_smallest_sizes(tmp_path):
    assert make_tiny_mm.make_tiny_mm(tmp_path, rows=80, items=40, tags=20) == {"train": 60, "valid": 10, "test": 10}
