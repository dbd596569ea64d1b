# SPDX-License-Identifier: Apache-2.0
"""QIN in the plain form of its equations, and the loader that goes with it: what the installed FuxiCTR would run.

The wheel has neither. Every slot of every history is encoded, all keys and values are formed, and the R rows of a quadratic
layer are kept apart. The loader fetches row by row and looks the items of a batch up in a DataFrame.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from shapes import MAX_LEN, Shape, make_items


def plain_attend(model: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    """Target and attention output, every slot encoded, keys and values formed."""
    import torch

    history, target_id = (batch[name].to(model.device) for name in ("item_seq", "item_id"))
    history = history[:, -MAX_LEN:]
    shown = torch.cat([history, target_id.unsqueeze(1)], dim=1)  # (B, L + 1)
    table = model.feature_map.item_table
    rows = {name: column[shown.flatten().long()] for name, column in table.items()}
    items = model.embedding_layer(rows, flatten_emb=True).view(*shown.shape, -1)  # (B, L + 1, d)
    target, slots, attention = items[:, -1], items[:, :-1], model.attention_layers
    q, k, v = attention.W_q(target), attention.W_k(slots), attention.W_v(slots)  # (B, d_a), (B, L, d_a) twice
    s = (q.unsqueeze(1) @ k.transpose(1, 2) / math.sqrt(k.shape[-1])).squeeze(1)  # (B, L)
    a = torch.relu(s * (history > 0))
    return target, attention.W_o((a.unsqueeze(1) @ v).squeeze(1)) + target


def plain_forward(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The model's equations as they stand."""
    import torch

    target, attended = plain_attend(model, batch)
    levels = {name: batch[name].to(model.device) for name in ("likes_level", "views_level")}
    x = torch.cat([model.embedding_layer(levels, flatten_emb=True), target, attended], dim=-1)
    for i, layer in enumerate(model.qnn.layer):
        rows = layer.linear(x).view(len(x), layer.num_row, -1)  # (B, R, N)
        product = model.qnn.norm[i](x * rows.sum(1))
        x = x + model.qnn.dropout(model.qnn.activation[i](product))
    return {"y_pred": torch.sigmoid(model.qnn.fc(x))}


def attend(model: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    """What `plain_attend` gives, by the model folder's own parts."""
    written = next(c for c in type(model).__mro__ if c.__module__.endswith(".QIN"))
    ragged = sys.modules[written.__module__.rpartition(".")[0] + ".ragged"]
    ids, targets, pairs = ragged.distinct_items(batch["item_id"], batch["item_seq"][:, -MAX_LEN:])
    items = model.encode(ids)
    target = items.index_select(0, targets)
    return target, model.attention_layers(target, items, pairs)


class RowLoader:
    """Batches of rows that are fetched one by one, their items looked up in a DataFrame.

    Args:
        shape: MicroLens_1M.
        columns: name -> (rows,) or (rows, width).
        batch_size: B.
        shuffle: in random order.
    """

    def __init__(self, shape: Shape, columns: dict[str, Any], batch_size: int, shuffle: bool):
        import pandas as pd

        self._table = pd.DataFrame({name: list(x) for name, x in make_items(shape).items()})
        self._frame = pd.DataFrame({name: list(np.asarray(x)) for name, x in columns.items()})
        self._batch_size, self._shuffle = batch_size, shuffle

    def __len__(self) -> int:
        return math.ceil(len(self._frame) / self._batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        import torch

        rows = len(self._frame)
        order = np.random.default_rng(0).permutation(rows) if self._shuffle else np.arange(rows)
        for first in range(0, rows, self._batch_size):
            samples = [self._frame.iloc[i].to_dict() for i in order[first : first + self._batch_size]]
            batch = {n: torch.as_tensor(np.array([sample[n] for sample in samples])) for n in self._frame.columns}
            shown = torch.cat([batch["item_seq"][:, -MAX_LEN:], batch["item_id"].unsqueeze(1)], dim=1)
            looked_up = self._table.iloc[shown.flatten().numpy()]
            for name in self._table.columns:
                torch.as_tensor(np.array(looked_up[name].tolist()))  # the plain form looks them up again, on its device
            yield batch
