# SPDX-License-Identifier: Apache-2.0
"""QIN's economical form against the plain one: outputs and gradients in float64, memory, folding."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from conftest import ROOT
from fuxictr.features import FeatureMap
from torch import Tensor, nn

from ctrbench.embedding import merge_embeddings
from ctrbench.zoo import build_model, load_model_class

NUM_ITEMS, NUM_TAGS, WIDTH = 60, 17, 12
SETTINGS = {"optimizer": "adam", "loss": "bce", "metrics": ["AUC"], "verbose": 0, "model_root": "unused"}
CLASS = load_model_class(ROOT / "model_zoo" / "QIN", "QIN")


def make_model(**params: Any) -> nn.Module:
    torch.manual_seed(0)
    feature_map = FeatureMap("test", "unused")
    categorical = {"type": "categorical", "padding_idx": 0}
    feature_map.features.update(
        {
            "user_id": {"type": "meta"},
            "item_seq": {"type": "meta", "max_len": 10},
            "likes_level": {**categorical, "source": "", "vocab_size": 11},
            "item_id": {**categorical, "source": "item", "vocab_size": NUM_ITEMS},
            "item_tags": {
                "source": "item",
                "type": "sequence",
                "padding_idx": 0,
                "vocab_size": NUM_TAGS,
                "max_len": 3,
                "feature_encoder": "layers.MaskedAveragePooling()",
            },
            "item_emb": {"source": "item", "type": "embedding", "pretrain_dim": WIDTH},
        }
    )
    feature_map.labels = ["label"]
    tags = torch.randint(0, NUM_TAGS, (NUM_ITEMS, 3))
    vectors = torch.randn(NUM_ITEMS, WIDTH).double()
    feature_map.item_table = {"item_id": torch.arange(NUM_ITEMS), "item_tags": tags, "item_emb": vectors}
    settings = {**SETTINGS, "embedding_dim": 4, "max_len": 10, "net_dropout": 0.0, "num_row": 3, "num_layers": 2}
    model = build_model(CLASS, feature_map, {**settings, **params}, "test").double()
    for parameter in model.parameters():  # away from the tiny initial embeddings
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    for table in (m for m in model.modules() if isinstance(m, nn.Embedding)):
        table.weight.data[0] = 0.0
    # FuxiCTR casts vectors to float32, which loses nothing of these; here everything is float64.
    encoder = model.embedding_layer.embedding_layer.feature_encoders["item_emb"]
    encoder.register_forward_pre_hook(lambda _, vectors: (vectors[0].double(),))
    return model


def make_batch(rows: int = 33) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    history = torch.randint(1, NUM_ITEMS, (rows, 10), generator=generator)
    history[torch.arange(10) < 10 - torch.randint(0, 11, (rows, 1), generator=generator)] = 0
    history[0], history[1, :-1] = 0, 0  # a user without a history, one with a single item
    return {
        "item_seq": history,
        "likes_level": torch.randint(0, 11, (rows,), generator=generator),
        "item_id": torch.randint(1, NUM_ITEMS, (rows,), generator=generator),
        "label": (torch.rand(rows, generator=generator) < 0.4).double(),
    }


def plain_encode(model: nn.Module, ids: Tensor) -> Tensor:
    """Every slot on its own: (..., 3D)."""
    tables, encoders = (
        model.embedding_layer.embedding_layer.embedding_layers,
        model.embedding_layer.embedding_layer.feature_encoders,
    )
    table = model.feature_map.item_table
    tags = tables["item_tags"](table["item_tags"][ids])  # (..., 3, D)
    count = (table["item_tags"][ids] > 0).sum(-1, keepdim=True)
    average = tags.sum(-2) / (count + 1e-12)
    return torch.cat([tables["item_id"](ids), average, encoders["item_emb"](table["item_emb"][ids])], dim=-1)


def plain_forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """papers.md as it stands: keys and values of every slot, all rows of the quadratic layers."""
    attention, qnn = model.attention_layers, model.qnn
    history = batch["item_seq"][:, -model.max_len :]
    target, slots = plain_encode(model, batch["item_id"]), plain_encode(model, history)  # (B, d), (B, L, d)
    mask = (history > 0).double()
    v = attention.W_v(slots)
    if attention.weighting == "mean":
        a = mask / mask.sum(1, keepdim=True).clamp(min=1)
    else:
        q, k = attention.W_q(target), attention.W_k(slots)
        s = (q.unsqueeze(1) * k).sum(-1) / math.sqrt(k.shape[-1])
        a = torch.relu(s * mask) if attention.weighting == "relu" else softmax(s, mask)
    o = attention.W_o((a.unsqueeze(-1) * v).sum(1)) + target
    levels = model.embedding_layer.embedding_layer.embedding_layers["likes_level"](batch["likes_level"])
    x = torch.cat([levels, target, o], dim=-1)
    for i, layer in enumerate(qnn.layer):
        g = layer.linear(x).view(len(x), layer.num_row, -1)
        product = x * g.sum(1)
        if qnn.norm:
            product = qnn.norm[i](product)
        x = qnn.dropout(qnn.activation[i](product)) + x
    return torch.sigmoid(qnn.fc(x))


def softmax(s: Tensor, mask: Tensor) -> Tensor:
    weights = s.masked_fill(mask == 0, -1e300).softmax(-1)
    return weights * mask


def loss_and_gradients(model: nn.Module, forward: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    y = forward(batch)
    nn.functional.binary_cross_entropy(y.view(-1), batch["label"]).backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("params", [{}, {"batch_norm": False}, {"max_len": 4}, {"attention_bias": True}], ids=str)
@pytest.mark.parametrize("attention", ["relu", "softmax", "mean"])
def test_equals_the_plain_form(attention: str, params: dict[str, Any]) -> None:
    model, batch = make_model(attention=attention, **params), make_batch()
    model.train()
    expected, expected_gradients = loss_and_gradients(model, lambda b: plain_forward(model, b), batch)
    got, gradients = loss_and_gradients(model, lambda b: model(b)["y_pred"], batch)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert gradients.keys() == expected_gradients.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-9, atol=1e-11, msg=name)


def test_the_merged_table_changes_nothing() -> None:
    model, batch = make_model(), make_batch()
    merged = merge_embeddings(copy.deepcopy(model))
    assert any(name.endswith("table") for name, _ in merged.named_parameters())
    torch.testing.assert_close(merged(batch)["y_pred"], model(batch)["y_pred"], rtol=1e-9, atol=1e-12)


def test_a_batch_without_any_history() -> None:
    model, batch = make_model(), make_batch()
    batch["item_seq"] = torch.zeros_like(batch["item_seq"])
    expected, gradients = loss_and_gradients(model, lambda b: plain_forward(model, b), batch)
    got, ours = loss_and_gradients(model, lambda b: model(b)["y_pred"], batch)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours["qnn.fc.weight"], gradients["qnn.fc.weight"], rtol=1e-9, atol=1e-11)


def test_padding_costs_nothing() -> None:
    """Every row of the item encoder and of the products belongs to a real item."""
    model, batch = make_model(), make_batch()
    module = __import__(CLASS.__module__.rpartition(".")[0] + ".ragged", fromlist=["distinct_items"])
    ids, targets, pairs = module.distinct_items(batch["item_id"], batch["item_seq"])
    shown = torch.cat([batch["item_id"], batch["item_seq"][batch["item_seq"] > 0]])
    assert ids.tolist() == sorted(set(shown.tolist())) and 0 not in ids
    assert torch.equal(ids[targets], batch["item_id"])
    assert len(pairs.rows) == int((batch["item_seq"] > 0).sum())
    assert torch.equal(ids[pairs.items], batch["item_seq"][batch["item_seq"] > 0])
    assert torch.equal(pairs.items[pairs.by_item], pairs.items.sort().values)
    encoded: list[int] = []
    model.embedding_layer.register_forward_pre_hook(lambda _, arguments: encoded.append(len(arguments[0]["item_id"])))
    model.encode(ids)
    assert encoded == [len(ids)]


def test_rows_fold_into_one_matrix() -> None:
    """Evaluation, and training without dropout, use sum_r W_r; a model of one row with it gives the same outputs."""
    model, batch = make_model(num_row=4), make_batch()
    folded = make_model(num_row=1)
    folded.load_state_dict(model.folded_state_dict(), strict=True)
    model.eval(), folded.eval()
    torch.testing.assert_close(folded(batch)["y_pred"], model(batch)["y_pred"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model(batch)["y_pred"], plain_forward(model, batch), rtol=1e-9, atol=1e-12)


def test_dropout_is_drawn_for_every_row() -> None:
    """A dropped row takes its share only: the expectation over masks is the output without dropout."""
    model = make_model(num_row=2)
    layer = model.qnn.layer[0]
    layer.linear[1].p = 0.5
    x = torch.randn(1, layer.linear[0].in_features, dtype=torch.float64)
    with torch.no_grad():
        layer.train()
        draws = torch.stack([layer(x) for _ in range(4000)]) / x  # each entry: a sum of two masked terms
        assert len(draws[:, 0, 0].unique()) == 4
        layer.eval()
        torch.testing.assert_close(draws.mean(0), layer(x) / x, rtol=0.2, atol=0.2)


def test_parameters_that_a_switch_removes_are_not_there() -> None:
    names = {name for name, _ in make_model(attention="mean", hidden_units=[8]).named_parameters()}
    assert not any("W_q" in name or "W_k" in name or name.startswith("qnn") for name in names)
    assert any(name.startswith("mlp") for name in names)
    assert make_model(hidden_units=[8])(make_batch())["y_pred"].shape == (33, 1)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"attention": "sum"}, "attention must be relu, softmax or mean, got 'sum'"),
        ({"activation": "GELU"}, "activation must be PReLU or ReLU, got 'GELU'"),
        ({"max_len": 11}, "max_len = 11, but 'item_seq' holds 10 slots: lower max_len"),
    ],
)
def test_bad_switches(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**params)
