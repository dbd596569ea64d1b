# SPDX-License-Identifier: Apache-2.0
"""The merged table against FuxiCTR's stock FeatureEmbedding: outputs, gradients, state_dict."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import FeatureEmbedding, FeatureEmbeddingDict, LogisticRegression
from torch import nn

from ctrbench.embedding import MergedEmbeddingDict, embedding_parameters, merge_embeddings

AVERAGE = "layers.MaskedAveragePooling()"
FEATURES: dict[str, dict[str, Any]] = {
    "price": {"source": "", "type": "numeric"},
    "user": {"source": "user", "type": "categorical", "padding_idx": 0, "vocab_size": 11},
    "item": {"source": "item", "type": "categorical", "padding_idx": 0, "vocab_size": 7},
    "history": {
        "source": "user",
        "type": "sequence",
        "padding_idx": 0,
        "vocab_size": 7,
        "max_len": 4,
        "share_embedding": "item",
        "feature_encoder": AVERAGE,
    },
    "tags": {
        "source": "item",
        "type": "sequence",
        "padding_idx": 0,
        "vocab_size": 5,
        "max_len": 3,
        "feature_encoder": AVERAGE,
    },
    "image": {"source": "item", "type": "embedding", "pretrain_dim": 6},
    "session": {"type": "meta"},
}


def make_batch(rows: int = 32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    history = torch.randint(0, 7, (rows, 4), generator=generator, dtype=torch.int32)
    return {
        "price": torch.randn(rows, generator=generator),
        "user": torch.randint(0, 11, (rows,), generator=generator, dtype=torch.int32),
        "item": torch.randint(1, 7, (rows,), generator=generator, dtype=torch.int32),
        "history": history,
        "tags": torch.randint(0, 5, (rows, 3), generator=generator, dtype=torch.int32),
        "image": torch.randn(rows, 6, generator=generator),
    }


def make_pair(
    cls: type[nn.Module] = FeatureEmbedding, without: tuple[str, ...] = (), **options: Any
) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    feature_map = FeatureMap("test", "unused")
    feature_map.features.update(copy.deepcopy({n: spec for n, spec in FEATURES.items() if n not in without}))
    holder = nn.Sequential(cls(feature_map, **options))
    for parameter in holder.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    for name, parameter in holder.named_parameters():
        if name.endswith(("user.weight", "item.weight", "tags.weight", "history.weight")):
            parameter.data[0] = 0.0
    return holder, merge_embeddings(copy.deepcopy(holder))


@pytest.mark.parametrize(
    "options", [{}, {"flatten_emb": True}, {"feature_source": ["item"]}, {"feature_type": "sequence"}]
)
def test_equals_stock_forward_and_backward(options: dict[str, Any]) -> None:
    stock, merged = make_pair(embedding_dim=8)
    assert isinstance(merged[0].embedding_layer, MergedEmbeddingDict)
    batch = make_batch()
    expected, got = stock[0](batch, **options), merged[0](batch, **options)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)  # the order of a sum differs
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    with torch.no_grad():
        for module in (stock, merged):
            for parameter in module.parameters():
                parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    gradients, expected_gradients = merged.state_dict(), stock.state_dict()
    assert gradients.keys() == expected_gradients.keys()
    for name in gradients:
        torch.testing.assert_close(gradients[name], expected_gradients[name], rtol=1e-5, atol=1e-6, msg=name)


def test_state_dicts_are_interchangeable() -> None:
    stock, merged = make_pair(embedding_dim=8)
    state = stock.state_dict()
    assert {k: tuple(v.shape) for k, v in merged.state_dict().items()} == {k: tuple(v.shape) for k, v in state.items()}
    other_stock, other_merged = make_pair(embedding_dim=8)
    for parameter in [*other_stock.parameters(), *other_merged.parameters()]:
        parameter.data.zero_()
    other_merged.load_state_dict(state, strict=True)
    other_stock.load_state_dict(merged.state_dict(), strict=True)
    torch.testing.assert_close(other_merged[0](make_batch()), other_stock[0](make_batch()), rtol=1e-5, atol=1e-7)


def test_a_state_dict_of_another_vocabulary_is_refused() -> None:
    stock, merged = make_pair(embedding_dim=8)
    state = stock.state_dict()
    name = next(name for name in state if name.endswith("user.weight"))
    state[name] = torch.zeros(12, 8)
    with pytest.raises(RuntimeError, match=r"user\.weight"):
        merged.load_state_dict(state, strict=True)


def test_logistic_regression_merges_its_one_wide_tables() -> None:
    stock, merged = make_pair(LogisticRegression, without=("image",))
    batch = {name: value for name, value in make_batch().items() if name != "image"}
    torch.testing.assert_close(merged[0](batch), stock[0](batch), rtol=1e-6, atol=1e-7)


def test_embedding_parameters_are_counted_once() -> None:
    stock, merged = make_pair(embedding_dim=8)
    count = sum(p.numel() for p in embedding_parameters(stock))
    assert count == sum(p.numel() for p in embedding_parameters(merged)) == sum(p.numel() for p in stock.parameters())


def make_stock(*names: str) -> FeatureEmbedding:
    torch.manual_seed(0)
    feature_map = FeatureMap("test", "unused")
    feature_map.features.update(copy.deepcopy({name: FEATURES[name] for name in names}))
    return FeatureEmbedding(feature_map, 8)


def test_a_merged_table_is_found_by_its_fields_name() -> None:
    stock = nn.Sequential(make_stock("user", "item", "tags"))
    merged = merge_embeddings(copy.deepcopy(stock))
    ids = torch.tensor([[3, 0], [1, 2]])
    layers, own = merged[0].embedding_layer.embedding_layers, stock[0].embedding_layer.embedding_layers
    for name in ("user", "item", "tags"):
        torch.testing.assert_close(layers[name](ids), own[name](ids))
        torch.testing.assert_close(layers[name].weight, own[name].weight)
        for module in (layers, own):
            module[name](ids).pow(2).sum().backward()
    gradient = merged[0].embedding_layer.table.grad
    torch.testing.assert_close(gradient, torch.cat([own[name].weight.grad for name in ("user", "item", "tags")]))
    assert not list(layers.parameters()) and merged.state_dict().keys() == stock.state_dict().keys()


def test_a_table_that_the_model_holds_elsewhere_stays() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = make_stock("user", "item", "tags")
            layers = self.embedding.embedding_layer.embedding_layers
            self.users = layers["user"]  # once more, as a part of its own
            self.output = nn.Linear(8, layers["item"].num_embeddings, bias=False)
            self.output.weight = layers["item"].weight  # tied

    model = Model()
    names = model.state_dict().keys()
    merge_embeddings(model)
    layers = model.embedding.embedding_layer.embedding_layers
    assert model.users is layers["user"] and model.output.weight is layers["item"].weight
    assert model.state_dict().keys() == names


def test_an_embedding_that_two_parts_share_is_merged_once() -> None:
    shared = make_stock("user", "item", "tags").embedding_layer
    model = nn.ModuleDict({"left": nn.Sequential(shared), "right": nn.Sequential(shared)})
    model.own = shared
    merge_embeddings(model)
    assert model["left"][0] is model["right"][0] is model.own and isinstance(model.own, MergedEmbeddingDict)


def test_a_field_of_its_own_width_keeps_its_table() -> None:
    torch.manual_seed(0)
    features = copy.deepcopy({name: FEATURES[name] for name in ("user", "item", "tags")})
    features["tags"]["embedding_dim"] = 3
    feature_map = FeatureMap("test", "unused")
    feature_map.features.update(features)
    stock = nn.Sequential(FeatureEmbedding(feature_map, 8))
    merged = merge_embeddings(copy.deepcopy(stock))
    batch = {name: value for name, value in make_batch().items() if name in features}
    layers = merged[0].embedding_layer.embedding_layers
    assert [name for name, layer in layers.items() if type(layer) is nn.Embedding] == ["tags"]
    torch.testing.assert_close(merged[0](batch, flatten_emb=True), stock[0](batch, flatten_emb=True), rtol=0, atol=0)


@pytest.mark.parametrize("flatten_emb", [False, True])
@pytest.mark.parametrize("fields", [("price", "user", "item", "tags"), ("user", "item"), ("user", "tags", "item")])
def test_fields_looked_up_together_are_not_copied_apart(fields: tuple[str, ...], flatten_emb: bool) -> None:
    stock = nn.Sequential(make_stock(*fields))
    merged = merge_embeddings(copy.deepcopy(stock))
    batch = {name: value for name, value in make_batch().items() if name in fields}
    layer = merged[0].embedding_layer
    parts = layer(batch).parts(list(fields))
    assert (parts is None) is (fields == ("user", "tags", "item"))  # another one lies between them
    if parts is not None:
        assert [part.shape[1] for part in parts if part.shape[1] > 1] == [2]
    expected, got = (module[0](batch, flatten_emb=flatten_emb) for module in (stock, merged))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    replaced = layer(batch)
    replaced["item"] = replaced["item"] * 2
    written = FeatureEmbeddingDict.dict2tensor(layer, replaced, flatten_emb)
    assert torch.equal(layer.dict2tensor(replaced, flatten_emb), written)
    assert torch.equal(layer.dict2tensor(layer(batch), feature_list=["item"]), layer(batch)["item"].unsqueeze(1))
    copied = layer(batch).copy()
    torch.testing.assert_close(layer.dict2tensor(copied, flatten_emb), expected, rtol=1e-5, atol=1e-7)
