# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ctrbench.errors import ConfigError, CtrbenchError, DataError
from ctrbench.feature_encoders import feature_encoder_problem
from ctrbench.features import FeatureMap, load_feature_map

ITEM = {"source": "item", "type": "categorical", "padding_idx": 0, "vocab_size": 10}
HISTORY = {
    "source": "user",
    "type": "sequence",
    "feature_encoder": "layers.MaskedAveragePooling()",
    "share_embedding": "item",
    "padding_idx": 0,
    "max_len": 3,
    "vocab_size": 10,
}
FEATURES = {
    "user": {"type": "meta"},
    "item": ITEM,
    "history": HISTORY,
    "price": {"source": "item", "type": "numeric"},
    "image": {"source": "item", "type": "embedding", "embedding_dim": 8},
}


def stored(features: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "dataset_id": "tiny",
        "num_fields": 4,
        "total_features": 11,
        "input_length": 15,
        "labels": ["click"],
        "features": [{name: spec} for name, spec in (FEATURES if features is None else features).items()],
        **changes,
    }


def write(tmp_path: Path, features: dict[str, Any] | None = None, **changes: Any) -> Path:
    path = tmp_path / "feature_map.json"
    path.write_text(json.dumps(stored(features, **changes)))
    return path


def load(tmp_path: Path, **params: Any) -> FeatureMap:
    return load_feature_map(write(tmp_path), "tiny", params)


def test_load(tmp_path: Path) -> None:
    feature_map = load(tmp_path, embedding_dim=16, group_id="user")
    assert feature_map.num_fields == 4
    assert feature_map.total_features == 11  # ten shared tokens and one number
    assert feature_map.input_length == 1 + 1 + 3 + 1 + 8
    assert feature_map.labels == ["click"]
    assert feature_map.group_id == "user"
    assert feature_map.data_dir == str(tmp_path)
    assert feature_map.get_column_index("history") == [2, 3, 4]
    assert feature_map.sum_emb_out_dim() == 16 * 3 + 8
    assert feature_map.features["image"]["pretrain_dim"] == 8


def test_equals_fuxictr_where_that_is_right(tmp_path: Path) -> None:
    import fuxictr.features

    path = write(tmp_path, {name: spec for name, spec in FEATURES.items() if name != "image"})
    theirs = fuxictr.features.FeatureMap("tiny", str(tmp_path))
    params = {"embedding_dim": 16, "feature_specs": [{"name": ["item", "history"], "embedding_dim": 4}]}
    theirs.load(str(path), params)
    ours = load_feature_map(path, "tiny", params)
    for name in (
        "features",
        "labels",
        "num_fields",
        "input_length",
        "column_index",
        "default_emb_dim",
        "total_features",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.sum_emb_out_dim() == theirs.sum_emb_out_dim()


def test_counts_follow_use_features(tmp_path: Path) -> None:
    feature_map = load(tmp_path, use_features=["price", "item"], group_id="user", embedding_dim=4)
    assert list(feature_map.features) == ["price", "item", "user"]  # group_id stays, as metrics need it
    assert feature_map.num_fields == 2
    assert feature_map.total_features == 11
    assert feature_map.input_length == 3


def test_shared_tables_survive_use_features(tmp_path: Path) -> None:
    path = write(tmp_path, {"item": ITEM, "history": HISTORY, "clicks": {**HISTORY, "share_embedding": "history"}})
    kept = load_feature_map(path, "tiny", {"use_features": ["clicks", "history"]})
    assert [spec.get("share_embedding") for spec in kept.features.values()] == [None, "clicks"]
    assert kept.total_features == 10
    turned = load_feature_map(path, "tiny", {"use_features": ["history", "item"]})
    assert [spec.get("share_embedding") for spec in turned.features.values()] == [None, "history"]


def test_feature_specs(tmp_path: Path) -> None:
    specs = [{"name": ["item", "price"], "embedding_dim": 5}, {"name": "history", "feature_encoder": "null"}]
    features = load(tmp_path, feature_specs=specs).features
    assert features["item"]["embedding_dim"] == features["price"]["embedding_dim"] == 5
    assert features["history"]["feature_encoder"] is None


def test_width_of_embedding_columns(tmp_path: Path) -> None:
    path = write(tmp_path, {"image": {"type": "embedding"}})
    assert load_feature_map(path, None, {"embedding_dim": 32}).features["image"]["pretrain_dim"] == 32
    specs = [{"name": "image", "pretrain_dim": 128}]
    assert load_feature_map(path, None, {"feature_specs": specs}).features["image"]["pretrain_dim"] == 128
    with pytest.raises(DataError, match=r"feature 'image' of type embedding has no pretrain_dim"):
        load_feature_map(path, None, {})


def test_save_and_hash(tmp_path: Path) -> None:
    feature_map = load(tmp_path)
    plain = feature_map.content_hash()
    assert load(tmp_path, use_features=["item"], embedding_dim=3).content_hash() == plain
    copy = tmp_path / "copy" / "feature_map.json"
    feature_map.save(copy)
    assert set(json.loads(copy.read_text())) == set(stored())
    again = load_feature_map(copy, "tiny", {})
    assert again.content_hash() == feature_map.content_hash() != plain  # pretrain_dim was filled in
    assert [path.name for path in copy.parent.iterdir()] == ["feature_map.json"]
    again.features["item"]["vocab_size"] = 11
    assert again.content_hash() == feature_map.content_hash()
    fresh = FeatureMap("tiny", str(tmp_path))
    assert fresh.content_hash() != plain


def test_load_method_of_fuxictr(tmp_path: Path) -> None:
    feature_map = FeatureMap("tiny", "elsewhere")
    feature_map.load(str(write(tmp_path)), {"use_features": ["item"]})
    assert feature_map.num_fields == 1 and feature_map.data_dir == str(tmp_path)


def test_fuxictr_2_0_file(tmp_path: Path) -> None:
    features = {"user": {"type": "meta"}, "item": {**ITEM, "oov_idx": 9}}
    path = write(tmp_path, features, group_id="user", default_emb_dim=10)
    assert load_feature_map(path, "tiny", {}).group_id == "user"
    path = write(tmp_path, features, group_id="gone")
    assert load_feature_map(path, "tiny", {}).group_id is None


def test_import_is_light() -> None:
    command = "import sys, ctrbench.features; sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'sklearn')))"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0


@pytest.mark.parametrize(
    "encoder",
    [
        "layers.MaskedAveragePooling()",
        "layers.MaskedSumPooling()",
        "layers.KMaxPooling(2, 1)",
        "nn.Linear(8, 4)",
        "nn.Linear(8, 4, bias=False)",
        "nn.Dropout(0.1)",
        "nn.Dropout()",
        ["nn.Linear(8,4)", "nn.ReLU()", "nn.Sigmoid()", "nn.Tanh()", "nn.Identity()"],
    ],
)
def test_allowed_encoders(encoder: str | list[str]) -> None:
    assert feature_encoder_problem(encoder) is None


@pytest.mark.parametrize(
    "encoder",
    [
        "__import__('os').system('true')",
        "print('x')",
        "nn.Linear(print('x'), 4)",
        "nn.Linear(8)",
        "nn.Linear(8, 4, bias=0)",
        "nn.Linear(8, 4, device='cpu')",
        "nn.Linear(*[8, 4])",
        "nn.Linear(-8, 4)",
        "nn.Linear(8, 4).bias",
        "nn.Dropout(2)",
        "nn.Dropout('a')",
        "layers.MaskedAveragePooling(1)",
        "layers.MaskedAveragePooling",
        "nn.functional.relu()",
        "nn.ReLU(",
        "nn.ReLU() or 1",
        "",
        7,
        ["nn.ReLU()", "open('x')"],
    ],
)
def test_refused_encoders(tmp_path: Path, encoder: Any) -> None:
    assert "is not allowed" in str(feature_encoder_problem(encoder))
    path = write(tmp_path, {"history": {**HISTORY, "feature_encoder": encoder}})
    with pytest.raises(DataError, match=r"feature_map.json: feature 'history': feature_encoder .* is not allowed"):
        load_feature_map(path, "tiny", {})
    with pytest.raises(ConfigError, match=r"feature_specs: history: feature_encoder .* is not allowed"):
        load(tmp_path, feature_specs=[{"name": "history", "feature_encoder": encoder}])


def test_a_shared_table_must_have_the_same_ids(tmp_path: Path) -> None:
    path = write(tmp_path, {"item": ITEM, "other": {**ITEM, "vocab_size": 11}})
    specs = [{"name": "other", "share_embedding": "item"}]
    with pytest.raises(
        ConfigError, match=r"share_embedding names 'item', which has 10 ids and not 11: share it in feat"
    ):
        load_feature_map(path, "tiny", {"feature_specs": specs})


def test_encoder_hint() -> None:
    assert "did you mean 'layers.MaskedSumPooling'?" in str(feature_encoder_problem("layers.MaskedSumPoling()"))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"use_features": ["item", "prise"]}, r"use_features: no such column, got 'prise' \(did you mean 'price'\?\)"),
        ({"use_features": ["item", "item"]}, "use_features: 'item' is named twice"),
        ({"group_id": "usr"}, r"group_id: 'usr' is not a column of the dataset \(did you mean 'user'\?\)"),
        ({"group_id": "price"}, "group_id: 'price' is of type numeric, it must be meta or categorical"),
        (
            {"feature_specs": [{"name": "itm", "embedding_dim": 4}]},
            r"feature_specs: no such column, got 'itm' \(did you mean 'item'\?\)",
        ),
        ({"feature_specs": [{"embedding_dim": 4}]}, "feature_specs: each entry needs a 'name'"),
        ({"feature_specs": [{"name": "item", "embeding_dim": 4}]}, "unknown key 'embeding_dim'.*did you mean"),
        (
            {"feature_specs": [{"name": "item", "embedding_dim": "4"}]},
            "embedding_dim must be a positive integer, got '4'",
        ),
        ({"feature_specs": [{"name": "item", "vocab_size": 4}]}, "'vocab_size' is fixed by the stored data"),
        ({"feature_specs": [{"name": "item", "share_embedding": "x"}]}, "share_embedding names 'x', which is not"),
        ({"feature_specs": [{"name": [["item"], {"a": 1}]}]}, r"no such column, got \['item'\]"),
        ({"feature_specs": [{"name": "item", "share_embedding": "item"}]}, "'item', which comes later"),
        ({"feature_specs": [{"name": "item", "share_embedding": "history"}]}, "'history', which comes later"),
        (
            {"feature_specs": [{"name": "item", "feature_encoder": {"a": 1}}]},
            r"feature_encoder {'a': 1} is not allowed",
        ),
    ],
)
def test_wrong_parameters(tmp_path: Path, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **params)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"dataset_id": "tiny", "labels": [', r"damaged or truncated JSON .* delete the folder"),
        ("[]", "not a feature map"),
        ('{"dataset_id": "tiny", "labels": []}', "incomplete feature map, 'features' is missing"),
        ('{"dataset_id": "tiny", "labels": [], "features": {}}', "'features' is not a list of"),
        ('{"dataset_id": "tiny", "labels": [], "features": [{"a": 1}]}', "'features' is not a list of"),
        (json.dumps(stored({"a": {"type": "text"}})), "feature 'a': type 'text' is not one of"),
        (json.dumps(stored({"a": {"type": "categorical"}})), "vocab_size must be a positive integer, got None"),
        (json.dumps(stored({"a": {**HISTORY, "max_len": 0}})), "max_len must be a positive integer, got 0"),
        (json.dumps(stored(labels=None)), "'labels' must name the label columns, got None: delete the folder"),
        (json.dumps(stored(labels=[3])), r"'labels' must name the label columns, got \[3\]"),
        (json.dumps(stored(labels=[])), r"'labels' must name the label columns, got \[\]"),
        (json.dumps(stored({"a": {**ITEM, "embedding_dim": 0}})), "embedding_dim must be a positive integer, got 0"),
        (
            json.dumps(stored({"a": {**ITEM, "embedding_dim": 4.5}})),
            "embedding_dim must be a positive integer, got 4.5",
        ),
        (json.dumps(stored({"a": {**ITEM, "pretrain_dim": "8"}})), "pretrain_dim must be a positive integer, got '8'"),
        (json.dumps(stored({"a": {**ITEM, "share_embedding": ["b"]}})), "must name an earlier feature, got \\['b'\\]"),
        (
            json.dumps(stored({"a": {**ITEM, "share_embedding": "b"}, "b": ITEM})),
            "must name an earlier feature, got 'b'",
        ),
        (json.dumps(stored({"a": {**ITEM, "share_embedding": "a"}})), "must name an earlier feature, got 'a'"),
        (json.dumps(stored(item_key=["a"])), "dataset_id, item_key and group_id must be names"),
        ("[" * 100_000, "damaged or truncated JSON"),
        (json.dumps(stored(dataset_id="other")), "it belongs to dataset_id 'other', not 'tiny'"),
    ],
)
def test_damaged_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "feature_map.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        load_feature_map(path, "tiny", {})
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such feature map"):
        load_feature_map(tmp_path / "feature_map.json", "tiny", {})
    with pytest.raises(DataError, match="cannot be read"):
        load_feature_map(tmp_path, "tiny", {})


def test_save_onto_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(CtrbenchError, match="folder: cannot be written"):
        load(tmp_path).save(tmp_path / "folder")
