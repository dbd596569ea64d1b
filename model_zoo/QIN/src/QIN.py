# SPDX-License-Identifier: Apache-2.0
"""QIN: Quadratic Interest Network for multimodal click prediction (arXiv 2504.17699)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel
from torch import Tensor

from .layers import QuadraticNetwork, TargetAttention
from .ragged import distinct_items


class QIN(BaseModel):
    """y = sigmoid(network([context | t | o])), o the attention of the candidate item t over the history.

    Items are looked up in `feature_map.item_table`, one row per id; each distinct item of a batch is encoded once.

    Args:
        feature_map: the fields; those of `source: item` make up an item, all others the context.
        embedding_dim: D, the width of a field's embedding unless the field has its own.
        max_len: L, the newest slots of the history that count.
        num_layers: quadratic layers.
        num_row: R, the rows of a quadratic layer.
        net_dropout: dropout of the network.
        batch_norm: batch normalisation in the network.
        attention: how history items are weighted: relu, softmax or mean.
        attention_dropout: dropout of these weights.
        attention_bias: whether the attention's output has a bias.
        activation: PReLU or ReLU.
        hidden_units: an MLP of these widths instead of the quadratic network.
        target_field: the candidate item's id.
        history_field: the ids of the items that the user has seen, padded with 0 on the left.

    Raises:
        ValueError: a switch that does not exist, or `max_len` beyond the stored history.
    """

    reads_item_table = True

    def __init__(
        self,
        feature_map: FeatureMap,
        model_id: str = "QIN",
        gpu: int = -1,
        learning_rate: float = 2e-3,
        embedding_dim: int = 128,
        max_len: int = 64,
        num_layers: int = 4,
        num_row: int = 4,
        net_dropout: float = 0.1,
        batch_norm: bool = True,
        attention: str = "relu",
        attention_dropout: float = 0.0,
        attention_bias: bool = False,
        activation: str = "PReLU",
        hidden_units: Sequence[int] | None = None,
        target_field: str = "item_id",
        history_field: str = "item_seq",
        **kwargs: Any,
    ):
        super().__init__(feature_map, model_id=model_id, gpu=gpu, **kwargs)
        stored = feature_map.features[history_field].get("max_len", max_len)
        if max_len > stored:
            raise ValueError(f"max_len = {max_len}, but '{history_field}' holds {stored} slots: lower max_len")
        self.max_len, self.target_field, self.history_field = max_len, target_field, history_field
        widths = {
            n: s.get("embedding_dim", embedding_dim) for n, s in feature_map.features.items() if s["type"] != "meta"
        }
        self.item_fields = [name for name in widths if feature_map.features[name].get("source") == "item"]
        item_dim = sum(widths[name] for name in self.item_fields)
        input_dim = sum(widths.values()) + item_dim
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.attention_layers = TargetAttention(item_dim, 2 * item_dim, attention, attention_dropout, attention_bias)
        if hidden_units is None:
            self.qnn = QuadraticNetwork(input_dim, num_layers, num_row, net_dropout, batch_norm, activation)
        else:
            self.mlp = MLP_Block(
                input_dim, hidden_units, activation, 1, dropout_rates=net_dropout, batch_norm=batch_norm
            )
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        fields = self.get_inputs(inputs)
        history = inputs[self.history_field][:, -self.max_len :].to(fields[self.target_field])  # (B, L)
        ids, targets, pairs = distinct_items(fields[self.target_field], history)
        items = self.encode(ids)  # (M, d)
        target = items.index_select(0, targets)  # (B, d)
        attended = self.attention_layers(target, items, pairs)  # (B, d)
        context = {name: x for name, x in fields.items() if name not in self.item_fields}
        parts = [self.embedding_layer(context, flatten_emb=True)] if context else []
        x = torch.cat([*parts, target, attended], dim=-1)  # (B, N)
        logit = self.qnn(x) if hasattr(self, "qnn") else self.mlp(x)
        return {"y_pred": self.output_activation(logit)}

    def encode(self, ids: Tensor) -> Tensor:
        """The embeddings (M, d) of items (M,): their fields side by side, in the feature map's order."""
        table = self.feature_map.item_table
        rows = {name: table[name].index_select(0, ids) for name in self.item_fields}
        return self.embedding_layer(rows, flatten_emb=True)

    def folded_state_dict(self) -> dict[str, Tensor]:
        """The weights of a QIN with `num_row: 1` that gives the same outputs, R times smaller where it counts."""
        state = self.state_dict()
        for i, layer in enumerate(self.qnn.layer):
            weight, bias = layer.folded()
            state |= {f"qnn.layer.{i}.linear.0.weight": weight.detach(), f"qnn.layer.{i}.linear.0.bias": bias.detach()}
        return state
