# SPDX-License-Identifier: Apache-2.0
"""The first baselines against the formulas of their papers, written out entry by entry from the raw weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from fuxictr.features import FeatureMap
from torch import Tensor, nn

from ctrbench.zoo import load_model_class

ZOO = Path(__file__).resolve().parents[2] / "model_zoo"
D, ROWS = 4, 5
FIELDS: dict[str, dict[str, Any]] = {
    "user": {"source": "", "type": "categorical", "padding_idx": 0, "vocab_size": 9},
    "item": {"source": "", "type": "categorical", "padding_idx": 0, "vocab_size": 7},
    "price": {"source": "", "type": "numeric"},
    "history": {
        "source": "",
        "type": "sequence",
        "padding_idx": 0,
        "vocab_size": 8,
        "max_len": 3,
        "feature_encoder": "layers.MaskedAveragePooling()",
    },
}
SIZES: dict[str, dict[str, Any]] = {
    "LR": {"embedding_dim": 1},
    "FM": {},
    "DeepFM": {"hidden_units": [6, 5]},
    "xDeepFM": {"cin_hidden_units": [3, 2], "hidden_units": [6, 5]},
    "DCN": {"num_cross_layers": 3, "hidden_units": [6, 5]},
    "DCNv2": {"num_cross_layers": 3, "hidden_units": [6, 5]},
    "AutoIntPlus": {"num_attention_layers": 2, "attention_dim": 3, "num_heads": 2, "hidden_units": [6, 5]},
}


def build(name: str, **changes: dict[str, Any]) -> nn.Module:
    """A model whose prediction is its logit (task regression), all weights but padding rows random."""
    feature_map = FeatureMap("none", "unused")
    feature_map.features = {field: {**spec, **changes.get(field, {})} for field, spec in FIELDS.items()}
    feature_map.labels, feature_map.num_fields, feature_map.default_emb_dim = ["label"], len(FIELDS), D
    base = {"embedding_dim": D, "optimizer": "adam", "loss": "binary_crossentropy", "metrics": ["AUC"]}
    run = {"task": "regression", "model_root": "unused", "model_id": name, "verbose": 0}
    params = {**base, **run, **SIZES[name], **changes.get("params", {})}
    torch.manual_seed(0)
    model = load_model_class(ZOO / name, name)(feature_map, **params).eval()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.5)
        if isinstance(module, nn.Embedding):
            nn.init.zeros_(module.weight.data[0])
    return model


def batch() -> dict[str, Tensor]:
    return {
        "user": torch.tensor([1, 2, 3, 8, 5]),
        "item": torch.tensor([6, 5, 1, 1, 2]),
        "price": torch.tensor([0.5, -1.0, 2.0, 0.0, 1.5]),
        "history": torch.tensor([[1, 2, 3], [4, 0, 0], [0, 0, 0], [7, 7, 0], [6, 1, 0]]),
    }


def vectors(embedding: nn.Module, row: int, mean: bool = True) -> list[Tensor]:
    """The embeddings of the fields of one row, from the tables; the tokens of a sequence are averaged or added."""
    tables, x = embedding.embedding_layer.embedding_layers, {field: column[row] for field, column in batch().items()}
    tokens = [int(token) for token in x["history"] if token > 0]
    pooled = sum((tables["history"].weight[token] for token in tokens), torch.zeros(tables["history"].weight.shape[1]))
    return [
        tables["user"].weight[x["user"]],
        tables["item"].weight[x["item"]],
        tables["price"].weight[:, 0] * x["price"],
        pooled / len(tokens) if tokens and mean else pooled,
    ]


def linear(lr_layer: nn.Module, row: int) -> Tensor:
    return sum(vectors(lr_layer.embedding_layer, row, mean=False)) + (0 if lr_layer.bias is None else lr_layer.bias)


def mlp(block: nn.Module, x: Tensor, is_last_linear: bool = True) -> Tensor:
    layers = [layer for layer in block.mlp if isinstance(layer, nn.Linear)]
    for i, layer in enumerate(layers):
        x = layer.weight @ x + layer.bias
        x = x if is_last_linear and i == len(layers) - 1 else x.clamp(min=0)
    return x


def lr(model: Any, row: int) -> Tensor:
    return linear(model.lr_layer, row)


def fm(model: Any, row: int) -> Tensor:
    e = vectors(model.embedding_layer, row)
    return linear(model.fm.lr_layer, row) + sum((a * b).sum() for a, b in combinations(e, 2))


def deepfm(model: Any, row: int) -> Tensor:
    return fm(model, row) + mlp(model.mlp, torch.cat(vectors(model.embedding_layer, row)))


def xdeepfm(model: Any, row: int) -> Tensor:
    e = torch.stack(vectors(model.embedding_layer, row))  # (F, D)
    x, pooled = e, []
    for conv in model.cin.cin_layer.values():
        weight = conv.weight.view(conv.out_channels, len(e), len(x))
        x = torch.einsum("hij,id,jd->hd", weight, e, x) + conv.bias[:, None]
        pooled.append(x.sum(1))
    cin = model.cin.fc.weight @ torch.cat(pooled) + model.cin.fc.bias
    return linear(model.lr_layer, row) + cin + mlp(model.mlp, e.flatten())


def dcn(model: Any, row: int) -> Tensor:
    x0 = x = torch.cat(vectors(model.embedding_layer, row))
    for layer in model.cross_net.cross_net:
        x = torch.outer(x0, x) @ layer.weight.weight[0] + layer.bias + x
    return model.fc.weight @ torch.cat([x, mlp(model.mlp, x0, is_last_linear=False)]) + model.fc.bias


def dcnv2(model: Any, row: int) -> Tensor:
    x0 = x = torch.cat(vectors(model.embedding_layer, row))
    for layer in model.cross_net.cross_layers:
        x = torch.stack([x0[n] * (layer.weight[n] @ x + layer.bias[n]) + x[n] for n in range(len(x))])
    return model.fc.weight @ torch.cat([x, mlp(model.mlp, x0, is_last_linear=False)]) + model.fc.bias


def autoint_plus(model: Any, row: int) -> Tensor:
    e = v = vectors(model.embedding_layer, row)
    for layer in model.attention:
        projections = (layer.query, layer.key, layer.value)
        outputs = []
        for m in range(len(v)):
            heads = []
            for h in range(2):
                q, k, u = (p.weight[3 * h : 3 * h + 3] for p in projections)  # attention_dim 3
                scores = torch.stack([(q @ v[m]) @ (k @ other) for other in v]).exp()
                heads.append(sum(s / scores.sum() * (u @ other) for s, other in zip(scores, v, strict=True)))
            outputs.append((torch.cat(heads) + layer.residual.weight @ v[m]).clamp(min=0))
        v = outputs
    return model.fc.weight @ torch.cat(v) + model.fc.bias + mlp(model.mlp, torch.cat(e))


FORMULAS: dict[str, Callable[[Any, int], Tensor]] = {
    "LR": lr,
    "FM": fm,
    "DeepFM": deepfm,
    "xDeepFM": xdeepfm,
    "DCN": dcn,
    "DCNv2": dcnv2,
    "AutoIntPlus": autoint_plus,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_logit_is_the_formula_of_the_paper(name: str) -> None:
    model = build(name)
    with torch.no_grad():
        expected = torch.stack([FORMULAS[name](model, row).view(1) for row in range(ROWS)])  # (B, 1)
        torch.testing.assert_close(model(batch())["y_pred"], expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1


PRODUCTS = ("FM", "DeepFM", "xDeepFM")
REFUSED = [
    ("LR", {"params": {"embedding_dim": 4}}, "embedding_dim must be 1, a weight is a number, got 4"),
    ("LR", {"item": {"type": "embedding"}}, "field 'item' is of type embedding, it has no ids to weigh one by one"),
    *((name, {"item": {"type": "embedding"}}, "field 'item' is of type embedding, it has no ids") for name in PRODUCTS),
    *(
        case
        for name in (*PRODUCTS, "AutoIntPlus")
        for case in (
            (name, {"item": {"embedding_dim": 8}}, "field 'item' is 8 wide, every field must be embedding_dim = 4"),
            (name, {"history": {"feature_encoder": None}}, "sequence 'history' needs a feature_encoder that pools it"),
        )
    ),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_refused_fields(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **changes)


@pytest.mark.parametrize("name", ["DCN", "DCNv2"])
def test_fields_of_their_own_width(name: str) -> None:
    assert build(name, item={"embedding_dim": 8})(batch())["y_pred"].shape == (ROWS, 1)
