# SPDX-License-Identifier: Apache-2.0
"""DIN: Deep Interest Network (arXiv 1706.06978) over an item table, the baseline of the MMCTR challenge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import DIN_Attention, FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel
from torch import Tensor


class DIN(BaseModel):
    """y = sigmoid(MLP([context | t | sum over the history of a_l h_l])), a_l = MLP([t, h_l, t - h_l, t * h_l]).

    Items are looked up in `feature_map.item_table`, one row per id.

    Args:
        feature_map: the fields; those of `source: item` make up an item, all others the context.
        embedding_dim: D, the width of a field's embedding unless the field has its own.
        max_len: L, the newest slots of the history that count.
        dnn_hidden_units: widths of the network.
        dnn_activations: its activations.
        attention_hidden_units: widths of the attention unit.
        attention_hidden_activations: its activations.
        attention_output_activation: of its output.
        attention_dropout: dropout inside the attention unit.
        din_use_softmax: normalise the weights of a history.
        net_dropout: dropout of the network.
        batch_norm: batch normalisation in the network.
        target_field: the candidate item's id.
        history_field: the ids of the items that the user has seen, padded with 0 on the left.

    Raises:
        ValueError: `max_len` beyond the stored history.
    """

    reads_item_table = True

    def __init__(
        self,
        feature_map: FeatureMap,
        model_id: str = "DIN",
        gpu: int = -1,
        learning_rate: float = 1e-3,
        embedding_dim: int = 64,
        max_len: int = 64,
        dnn_hidden_units: Sequence[int] = (1024, 512, 256),
        dnn_activations: str = "ReLU",
        attention_hidden_units: Sequence[int] = (512, 256),
        attention_hidden_activations: str = "ReLU",
        attention_output_activation: str | None = None,
        attention_dropout: float = 0.1,
        din_use_softmax: bool = False,
        net_dropout: float = 0.1,
        batch_norm: bool = True,
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
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.attention = DIN_Attention(
            item_dim,
            list(attention_hidden_units),
            attention_hidden_activations,
            attention_output_activation,
            attention_dropout,
            use_softmax=din_use_softmax,
        )
        self.dnn = MLP_Block(
            sum(widths.values()) + item_dim,
            list(dnn_hidden_units),
            dnn_activations,
            output_dim=1,
            dropout_rates=net_dropout,
            batch_norm=batch_norm,
        )
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        fields = self.get_inputs(inputs)
        history = inputs[self.history_field][:, -self.max_len :].to(fields[self.target_field])  # (B, L)
        shown = torch.cat([history, fields[self.target_field].unsqueeze(1)], dim=1)  # (B, L + 1)
        ids, positions = shown.unique(return_inverse=True)
        items = self.encode(ids)[positions]  # (B, L + 1, d)
        target, slots = items[:, -1], items[:, :-1]
        attended = self.attention(target, slots, history > 0)  # (B, d)
        context = {name: x for name, x in fields.items() if name not in self.item_fields}
        parts = [self.embedding_layer(context, flatten_emb=True)] if context else []
        return {"y_pred": self.output_activation(self.dnn(torch.cat([*parts, target, attended], dim=-1)))}

    def encode(self, ids: Tensor) -> Tensor:
        """The embeddings (M, d) of items (M,): their fields side by side, in the feature map's order."""
        table = self.feature_map.item_table
        return self.embedding_layer({n: table[n].index_select(0, ids) for n in self.item_fields}, flatten_emb=True)
