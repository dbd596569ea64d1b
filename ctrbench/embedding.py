# SPDX-License-Identifier: Apache-2.0
"""One merged table behind FuxiCTR's `FeatureEmbedding`: one gather forward and one scatter backward for all fields.

`merge_embeddings(model)` swaps the module that looks up fields one by one for one that looks them all up at once.
Outputs, gradients, initial weights and the names and shapes of the `state_dict` stay those of the stock module.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as functional
from fuxictr.pytorch.layers import FeatureEmbeddingDict, MaskedAveragePooling
from fuxictr.utils import not_in_whitelist
from torch import Tensor, nn

from ctrbench import native

TABLE = "table"


class MergedEmbeddingDict(nn.Module):
    """Looks up every plain table of a `FeatureEmbeddingDict` in one table of all their rows, one below the other.

    Row `offset[field] + id` holds the embedding of `id`. Numeric fields, pretrained tables and tables of a width of
    their own keep their modules. Tables that fields share are stored once.

    Args:
        stock: the module to replace; its weights are taken over.
        merged_fields: the fields whose tables are merged, all of one width.
    """

    _padding_rows: Tensor
    _first_rows: Tensor

    def __init__(self, stock: FeatureEmbeddingDict, merged_fields: list[str]):
        super().__init__()
        self._feature_map = stock._feature_map
        self.required_feature_columns = stock.required_feature_columns
        self.not_required_feature_columns = stock.not_required_feature_columns
        self.feature_encoders = stock.feature_encoders
        self.embedding_layers = nn.ModuleDict(
            {field: layer for field, layer in stock.embedding_layers.items() if field not in merged_fields}
        )
        self._row_ranges: dict[str, tuple[int, int]] = {}
        weights: list[Tensor] = []
        owners: dict[int, tuple[int, int]] = {}
        padding_rows: list[int] = []
        num_rows = 0
        for field in merged_fields:
            layer = stock.embedding_layers[field]
            if id(layer) not in owners:
                owners[id(layer)] = (num_rows, num_rows + layer.num_embeddings)
                weights.append(layer.weight.detach())
                if layer.padding_idx is not None:
                    padding_rows.append(num_rows + layer.padding_idx)
                num_rows += layer.num_embeddings
            self._row_ranges[field] = owners[id(layer)]
        self.table = nn.Parameter(torch.cat(weights))  # (sum of V, D)
        for field in merged_fields:
            self.embedding_layers[field] = _Rows(self, *self._row_ranges[field], stock.embedding_layers[field])
        self._averaged = {
            field
            for field in merged_fields
            if field in self.feature_encoders
            and type(self.feature_encoders[field]) is MaskedAveragePooling
            and stock.embedding_layers[field].padding_idx == 0
        }
        # Fields of one id a sample, which batches hold in this order as a rule, and where each one's rows begin.
        self._single = [f for f in merged_fields if self._feature_map.features[f]["type"] == "categorical"]
        first_rows = [self._row_ranges[field][0] for field in self._single]
        for name, rows in (("_padding_rows", padding_rows), ("_first_rows", first_rows)):
            self.register_buffer(name, torch.tensor(rows, device=self.table.device), persistent=False)
        self.table.register_hook(self._drop_padding_gradient)
        self.register_state_dict_post_hook(_split_table)
        self.register_load_state_dict_pre_hook(_join_table)

    def forward(
        self, inputs: dict[str, Tensor], feature_source: Any = (), feature_type: Any = ()
    ) -> OrderedDict[str, Tensor]:
        """Embeddings by field, as the stock module: (B, D) each, (B, L, D) for a sequence without an encoder."""
        features = self._feature_map.features
        wanted = [
            field
            for field in inputs
            if (field in self._row_ranges or field in self.embedding_layers)
            and not (feature_source and not_in_whitelist(features[field]["source"], feature_source))
            and not (feature_type and not_in_whitelist(features[field]["type"], feature_type))
        ]
        averaged = [field for field in wanted if field in self._averaged and inputs[field].dim() == 2]
        plain = [field for field in wanted if field in self._row_ranges and field not in averaged]
        gathered, merged = self._gather({field: inputs[field] for field in plain})
        embeddings = _Embeddings()
        if gathered is not None and all(inputs[field].dim() == 1 for field in plain):
            embeddings.gathered, embeddings.pieces = gathered, merged
        for field in wanted:
            if field in averaged:
                embeddings[field] = self._average(field, inputs[field])
                continue
            if field in merged:
                embedding = merged[field]
            elif features[field]["type"] == "numeric":
                embedding = self.embedding_layers[field](inputs[field].float().view(-1, 1))
            elif features[field]["type"] == "embedding":
                embedding = self.embedding_layers[field](inputs[field].float())
            else:
                embedding = self.embedding_layers[field](inputs[field].long())
            if field in self.feature_encoders:
                embedding = self.feature_encoders[field](embedding)
            embeddings[field] = embedding
        return embeddings

    # The stock code needs nothing but `_feature_map`.
    is_required = FeatureEmbeddingDict.is_required

    def dict2tensor(
        self, embedding_dict: OrderedDict[str, Tensor], flatten_emb: bool = False, *arguments: Any, **keywords: Any
    ) -> Tensor:
        """(B, F, D), or (B, N) if `flatten_emb`; without a copy of each field that lies as it was looked up."""
        if isinstance(embedding_dict, _Embeddings) and not arguments and not any(keywords.values()):
            fields = [field for field in self._feature_map.features if field in embedding_dict]
            if (parts := embedding_dict.parts(fields)) is not None:
                parts = [part.flatten(1) for part in parts] if flatten_emb else parts
                return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        stacked: Tensor = FeatureEmbeddingDict.dict2tensor(self, embedding_dict, flatten_emb, *arguments, **keywords)
        return stacked

    def _gather(self, ids: dict[str, Tensor]) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Embeddings of these fields, (B, sum of widths, D) and by field."""
        if not ids:
            return None, {}
        columns = [x.view(len(x), -1) for x in ids.values()]
        if list(ids) == self._single and all(x.dim() == 1 for x in ids.values()):
            rows = torch.cat(columns, dim=1) + self._first_rows
        else:
            rows = torch.cat([x + self._row_ranges[field][0] for field, x in zip(ids, columns, strict=True)], dim=1)
        gathered = _gather_rows(self.table, rows)
        parts = gathered.split([x.shape[1] for x in columns], dim=1)
        return gathered, {
            field: part.squeeze(1) if x.dim() == 1 else part
            for (field, x), part in zip(ids.items(), parts, strict=True)
        }

    def _average(self, field: str, ids: Tensor) -> Tensor:
        """What MaskedAveragePooling makes of a sequence (B, L), without its (B, L, D) embeddings: (B, D)."""
        is_token = (ids > 0).to(self.table.dtype)
        weights = is_token / is_token.sum(1, keepdim=True).clamp(min=1)  # (B, L)
        rows = ids.long() + self._row_ranges[field][0]
        return _average_rows(self.table, rows, weights)

    def _drop_padding_gradient(self, gradient: Tensor) -> Tensor:
        # One lookup can leave out the gradient of one padding row only; here every field has its own.
        return gradient.index_fill_(0, self._padding_rows, 0.0)


class _Embeddings(OrderedDict[str, Tensor]):
    """Embeddings by field that remember which of them were looked up together, (B, F, D) and by field in that order."""

    gathered: Tensor | None = None
    pieces: Mapping[str, Tensor] = MappingProxyType({})

    def parts(self, fields: list[str]) -> list[Tensor] | None:
        """What makes (B, F, D) side by side, for these fields; None where they are to be taken one by one."""
        names = list(self.pieces)
        if self.gathered is None or names[0] not in fields:
            return None
        first = fields.index(names[0])
        last = first + len(names)
        if fields[first:last] != names or not all(self[name] is piece for name, piece in self.pieces.items()):
            return None  # others lie between them, or the model replaced some
        single = [self[name] for name in (*fields[:first], *fields[last:])]
        if any(x.shape != self[names[0]].shape for x in single):
            return None
        single = [x.unsqueeze(1) for x in single]
        return [*single[:first], self.gathered, *single[first:]]


class _Rows(nn.Module):
    """What a merged field's own `nn.Embedding` was, for a model that looks it up by name: its rows of the table."""

    _owner: MergedEmbeddingDict

    def __init__(self, owner: MergedEmbeddingDict, first: int, last: int, stock: nn.Embedding):
        super().__init__()
        self.__dict__["_owner"] = owner  # not as a submodule, which would be a circle
        self._first, self._last = first, last
        self.num_embeddings, self.embedding_dim = stock.num_embeddings, stock.embedding_dim
        self.padding_idx = stock.padding_idx

    @property
    def weight(self) -> Tensor:
        """The field's rows (V, D), part of the table."""
        rows: Tensor = self._owner.table[self._first : self._last]
        return rows

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings of any shape of ids."""
        table: Tensor = self._owner.table
        return _gather_rows(table, ids.long() + self._first)


class _GatherRows(torch.autograd.Function):
    """`functional.embedding` whose backward adds up by row: torch's own form visits every row of the table from every
    thread and costs two to eight times as much on a CPU.
    """

    @staticmethod
    def forward(table: Tensor, rows: Tensor) -> Tensor:  # type: ignore[override]
        return functional.embedding(rows, table)

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Any, ...], output: Any) -> None:
        table, rows = inputs
        context.save_for_backward(rows)
        context.shape = table.shape

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (rows,) = context.saved_tensors
        return _scatter(context.shape, rows, gradient.reshape(-1, context.shape[1])), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], table: Tensor, rows: Tensor) -> tuple[Tensor, int]:
        """S stacked tables (S, V, D) are looked up as one of S*V rows, see `ctrbench.stacked`: (S, ..., D)."""
        if in_dims[1] is not None:
            rows = rows.movedim(in_dims[1], 0)
        if in_dims[0] is not None:
            table = table.movedim(in_dims[0], 0)
            first = torch.arange(info.batch_size, device=rows.device).mul_(table.shape[1])
            rows = rows + first.view(-1, *[1] * (rows.dim() - (in_dims[1] is not None)))
            table = table.flatten(0, 1)
        return _GatherRows.apply(table, rows), 0


class _AverageRows(torch.autograd.Function):
    """`functional.embedding_bag` with weights, which need no gradient, and the same backward as `_GatherRows`."""

    @staticmethod
    def forward(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        return functional.embedding_bag(rows, table, mode="sum", per_sample_weights=weights)

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Any, ...], output: Any) -> None:
        table, rows, weights = inputs
        context.save_for_backward(rows, weights)
        context.shape = table.shape

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        rows, weights = context.saved_tensors
        return _scatter(context.shape, rows, gradient, weights), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], table: Tensor, rows: Tensor, weights: Tensor) -> tuple[Tensor, int]:
        """S stacked tables as for `_GatherRows`: (S, B, D)."""
        size = info.batch_size
        table, rows, weights = (
            x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip((table, rows, weights), in_dims, strict=True)
        )
        first = torch.arange(size, device=rows.device).mul_(table.shape[1]).view(-1, 1, 1)
        averaged = _AverageRows.apply(table.flatten(0, 1), (rows + first).flatten(0, 1), weights.flatten(0, 1))
        return averaged.unflatten(0, (size, -1)), 0


def _scatter(shape: torch.Size, rows: Tensor, values: Tensor, weights: Tensor | None = None) -> Tensor:
    """A gradient (V, D) of which every row is the sum of the values (B, D) that were looked up there, times their weights.

    Args:
        shape: (V, D).
        rows: integers (B, L) or, of any shape, as many as there are values.
        values: (B, D).
        weights: as rows.
    """
    scattered = values.new_zeros(shape)
    # torch's compiler cannot look into compiled functions.
    if not torch.compiler.is_compiling() and native.library() is not None and values.dtype == torch.float32:
        count, length = rows.numel(), rows.numel() // max(len(values), 1)
        held = rows.long().contiguous(), values.contiguous(), None if weights is None else weights.contiguous()
        native.call("scatter_rows", scattered, *held, count, length, shape[1], torch.get_num_threads())
        return scattered
    if weights is not None:
        values = (weights.unsqueeze(-1) * values.unsqueeze(1)).flatten(0, 1)
    return scattered.index_add_(0, rows.flatten(), values)


def _gather_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Rows (B, W) of `table` (V, D): (B, W, D)."""
    if table.device.type == "cpu":
        gathered: Tensor = _GatherRows.apply(table, rows)
        return gathered
    return functional.embedding(rows, table)


def _average_rows(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows (B, L) of `table` (V, D): (B, D)."""
    if table.device.type == "cpu":
        averaged: Tensor = _AverageRows.apply(table, rows, weights)
        return averaged
    return functional.embedding_bag(rows, table, mode="sum", per_sample_weights=weights)


def merge_embeddings(model: nn.Module) -> nn.Module:
    """Merge the tables of every `FeatureEmbedding` in `model`, in place; a module with fewer than two stays as it is.

    So does a table that the model also holds elsewhere, as a part of its own or as the weight of another layer.
    Parameters change identity, so this must come before an optimizer is made. Returns `model`.
    """
    holders = _holders(model)
    merged: dict[Any, nn.Module] = {}
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if type(child) is FeatureEmbeddingDict:
                if child not in merged:
                    stock: Any = child
                    fields = _fields_of_commonest_width(stock, holders)
                    merged[child] = MergedEmbeddingDict(stock, fields) if len(fields) > 1 else stock
                setattr(module, name, merged[child])
    return model


def _holders(model: nn.Module) -> dict[int, set[int]]:
    """For each module and parameter of a model, the modules that hold it."""
    holders: dict[int, set[int]] = {}
    for module in model.modules():
        for part in (*module._modules.values(), *module._parameters.values()):
            holders.setdefault(id(part), set()).add(id(module))
    return holders


def embedding_parameters(model: nn.Module) -> Iterable[nn.Parameter]:
    """The parameters that `embedding_regularizer` is for: all of every `FeatureEmbeddingDict`, as FuxiCTR counts."""
    seen: set[int] = set()
    for module in model.modules():
        if type(module) is FeatureEmbeddingDict or isinstance(module, MergedEmbeddingDict):
            for parameter in module.parameters():
                if parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield parameter


def _fields_of_commonest_width(stock: FeatureEmbeddingDict, holders: dict[int, set[int]]) -> list[str]:
    by_width: dict[int, list[str]] = {}
    for field, layer in stock.embedding_layers.items():
        if type(layer) is not nn.Embedding or len(holders[id(layer)]) > 1 or len(holders[id(layer.weight)]) > 1:
            continue
        if layer.weight.requires_grad:
            by_width.setdefault(layer.embedding_dim, []).append(field)
    return max(by_width.values(), key=len, default=[])


def _split_table(module: MergedEmbeddingDict, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    table = state.pop(prefix + TABLE)
    for field, (first, last) in module._row_ranges.items():
        state[f"{prefix}embedding_layers.{field}.weight"] = table[first:last]


def _join_table(module: MergedEmbeddingDict, state: dict[str, Tensor], prefix: str, *hook_arguments: Any) -> None:
    rows: dict[tuple[int, int], Tensor] = {}
    names = {field: f"{prefix}embedding_layers.{field}.weight" for field in module._row_ranges}
    if not all(name in state for name in names.values()):
        return  # load_state_dict then names the table as missing, or the rest as unexpected
    for field, row_range in module._row_ranges.items():
        weight = state[names[field]]
        if weight.shape != (row_range[1] - row_range[0], module.table.shape[1]):
            return
        rows[row_range] = weight
    for name in names.values():
        del state[name]
    state[prefix + TABLE] = torch.cat([rows[key].to(module.table.device) for key in sorted(rows)])
