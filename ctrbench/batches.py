# SPDX-License-Identifier: Apache-2.0
"""A split of the data, resident on the device, as an iterable of `{name: Tensor}` batches.

Columns lie row-major side by side, ids in one integer matrix and reals in one float matrix, so that a shuffled batch is
one `index_select` each and an ordered one is a slice. The tensors of a batch are views of these.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ctrbench.errors import DataError
from ctrbench.features import FeatureMap
from ctrbench.forms import Columns, Form
from ctrbench.items import item_map
from ctrbench.memory import free_memory
from ctrbench.storage import SplitFile, open_split, stored_width

T = TypeVar("T")
Batch = dict[str, Tensor]
# Rows converted at a time while a split is read, so that reading needs little memory beyond the split itself.
BLOCK_ROWS = 1 << 18


class Batches:
    """All rows of one split on `device`.

    Args:
        columns: name -> (N,) or (N, width) tensors; integers are ids, floats are reals.
        batch_size: rows of a batch; the last one of an epoch may be smaller and is kept.
        shuffle: draw a new order every epoch.
        seed: with the number of the epoch, this fixes the order.
        device: where the rows are kept.
        form: what is made of the columns of a batch; see `ctrbench.forms`.

    Iterating yields one epoch: categorical (B,), sequence (B, L), numeric (B,), embedding (B, E), label (B,).

    Attributes:
        num_blocks: FuxiCTR's loaders have it, as `num_samples` and `num_batches`.
    """

    num_blocks = 1

    def __init__(
        self,
        columns: dict[str, Tensor],
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        form: Form = Columns(),  # noqa: B008 - frozen
    ):
        if not columns:
            raise DataError("a split without columns")
        self.num_rows = len(next(iter(columns.values())))
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.first_batch = 0
        self.form = form
        self._layout: dict[str, tuple[bool, int, int | None]] = {}
        ids = {name: x for name, x in columns.items() if not x.is_floating_point()}
        reals = {name: x for name, x in columns.items() if x.is_floating_point()}
        self._ids = self._pack(ids, _common_id_type(ids), device)
        self._reals = self._pack(reals, torch.float32, device)

    def _pack(self, columns: dict[str, Tensor], dtype: torch.dtype, device: torch.device | str) -> Tensor:
        widths = [1 if x.dim() == 1 else x.shape[1] for x in columns.values()]
        packed = torch.empty((self.num_rows, sum(widths)), dtype=dtype, device=device)
        first = 0
        for (name, x), width in zip(columns.items(), widths, strict=True):
            self._layout[name] = (x.is_floating_point(), first, None if x.dim() == 1 else width)
            for start in range(0, self.num_rows, BLOCK_ROWS):
                block = x[start : start + BLOCK_ROWS]
                packed[start : start + len(block), first : first + width] = block.view(-1, width)
            first += width
        return packed

    @classmethod
    def from_file(
        cls,
        path: Path,
        feature_map: FeatureMap,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        labels_required: bool = True,
        form: Form = Columns(),  # noqa: B008 - frozen
    ) -> Batches:
        """Read the columns of `feature_map` from an H5 split.

        Raises:
            DataError: the file is missing or damaged, lacks a column, or does not fit the device.
        """
        with open_split(path, feature_map, labels_required=labels_required) as split:
            names = [name for name in split.columns if name in feature_map.features or name in feature_map.labels]
            _check_fits(split, names, feature_map, device)
            try:
                columns = {name: torch.from_numpy(_torch_ready(split.read(name))) for name in names}
                return cls(columns, batch_size, shuffle, seed, device, form)
            except torch.cuda.OutOfMemoryError as error:
                raise DataError(f"{path}: {split.num_rows} rows do not fit the memory of {device}") from error

    def __len__(self) -> int:
        return math.ceil(self.num_rows / self.batch_size)

    @property
    def num_samples(self) -> int:
        """Rows."""
        return self.num_rows

    @property
    def num_batches(self) -> int:
        """Batches of an epoch."""
        return len(self)

    @property
    def names(self) -> list[str]:
        """The columns of a split."""
        return list(self._layout)

    def column(self, name: str) -> Tensor:
        """All rows of one column in file order, (N,) or (N, width), a view."""
        return self._view(name, self._ids, self._reals)

    def rows(self, numbers: Sequence[int]) -> Any:
        """The rows of these numbers, counted in file order, as a batch."""
        return self.form(self.plain_rows(numbers))

    def plain_rows(self, numbers: Sequence[int]) -> Batch:
        """As `rows`, always as columns by name."""
        return self._columns(self._ids[list(numbers)], self._reals[list(numbers)])

    def ordered(self, batch_size: int, shuffle: bool, seed: int) -> Batches:
        """The same rows, sharing their memory, in batches of another size and order."""
        other = copy.copy(self)
        other.batch_size, other.shuffle, other.seed, other.epoch, other.first_batch = batch_size, shuffle, seed, 0, 0
        return other

    def in_form(self, form: Form) -> Batches:
        """The same rows, sharing their memory, in batches of another form."""
        other = copy.copy(self)
        other.form = form
        return other

    def at(self, epoch: int, first_batch: int = 0) -> Batches:
        """Set the epoch that the next iteration yields, and the batch that it starts from."""
        self.epoch, self.first_batch = epoch, first_batch
        return self

    def __iter__(self) -> Iterator[Any]:
        first, self.first_batch = self.first_batch, 0
        order = self._order(self.epoch) if self.shuffle else None
        for start in range(first * self.batch_size, self.num_rows, self.batch_size):
            stop = start + self.batch_size
            if order is None:
                # Copies: a model may write to its batch.
                ids, reals = self._ids[start:stop].clone(), self._reals[start:stop].clone()
            else:
                rows = order[start:stop]
                ids, reals = self._ids.index_select(0, rows), self._reals.index_select(0, rows)
            yield self.form(self._columns(ids, reals))
        self.epoch += 1

    def _columns(self, ids: Tensor, reals: Tensor) -> Batch:
        return {name: self._view(name, ids, reals) for name in self._layout}

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(self.num_rows, generator=epoch_generator(self.seed, epoch)).to(self._ids.device)

    def _view(self, name: str, ids: Tensor, reals: Tensor) -> Tensor:
        is_real, first, width = self._layout[name]
        source = reals if is_real else ids
        return source[:, first] if width is None else source[:, first : first + width]


class ResidentData:
    """Splits and item tables that stay on their device from one run of a process to the next.

    Args:
        num_datasets: datasets that are kept; the one that was not used for longest goes first.
    """

    def __init__(self, num_datasets: int = 2):
        self._num_datasets = num_datasets
        self._kept: OrderedDict[str, dict[Hashable, Any]] = OrderedDict()

    def get(self, data_hash: str, key: Hashable, load: Callable[[], T]) -> T:
        """What `load` gave for this part of a dataset, now or earlier."""
        parts = self._kept.setdefault(data_hash, {})
        self._kept.move_to_end(data_hash)
        while len(self._kept) > self._num_datasets:
            self._kept.popitem(last=False)
        if key not in parts:
            parts[key] = load()
        value: T = parts[key]
        return value


def load_items(path: Path, feature_map: FeatureMap, device: torch.device | str) -> dict[str, Tensor]:
    """The item table on `device`: (I,) or (I, width) by feature, the key's column counting from 0.

    Raises:
        DataError: the file is missing, damaged, belongs to other data or has another number of rows than ids.
    """
    part = item_map(feature_map)
    with open_split(path, part, labels_required=False) as stored:
        size = part.features[feature_map.item_key]["vocab_size"]
        if stored.num_rows != size:
            raise DataError(
                f"{path}: holds {stored.num_rows} items, but '{feature_map.item_key}' has vocab_size {size}: "
                f"delete {path.parent} and run again to build it anew"
            )
        columns = {name: torch.from_numpy(_torch_ready(stored.read(name))) for name in stored.columns}
    # One type for all ids, as in the splits: what is added to a byte would wrap.
    id_type = _common_id_type({name: x for name, x in columns.items() if not x.is_floating_point()})
    return {name: (x if x.is_floating_point() else x.to(id_type)).to(device) for name, x in columns.items()}


def _common_id_type(columns: dict[str, Tensor]) -> torch.dtype:
    return id_type(int(x.abs().max()) for x in columns.values() if x.dtype == torch.int64 and x.numel())


def id_type(largest: Iterable[int]) -> torch.dtype:
    """The type of all ids of a split, from the largest absolute value of each column that may need 64 bits."""
    # 32 bits hold every vocabulary that fits memory; a raw meta id may need more.
    return torch.int64 if any(value >= 2**31 for value in largest) else torch.int32


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """What an epoch's order is drawn with: on the CPU, so that a seed means the same order on every device."""
    return torch.Generator().manual_seed((seed << 20) + epoch)


def _torch_ready(values: np.ndarray) -> np.ndarray:
    # torch computes with few unsigned types; 16 bits of ids become 32.
    if values.dtype in (np.uint16, np.uint32):
        return values.astype(np.int32 if values.dtype == np.uint16 else np.int64)
    return values.astype(np.float32) if values.dtype == np.float64 else values


def fits(path: Path, feature_map: FeatureMap, device: torch.device | str, labels_required: bool = True) -> bool:
    """Whether a split has room on the device, by its shape; an unreadable file is left to whoever reads it."""
    with open_split(path, feature_map, labels_required=labels_required, verify=False) as split:
        names = [name for name in split.columns if name in feature_map.features or name in feature_map.labels]
        try:
            _check_fits(split, names, feature_map, device)
        except DataError:
            return False
    return True


def _check_fits(split: SplitFile, names: list[str], feature_map: FeatureMap, device: torch.device | str) -> None:
    widths = (stored_width(feature_map.features[name]) or 1 for name in names if name in feature_map.features)
    needed = 4 * (sum(widths) + len(feature_map.labels)) * split.num_rows
    free = free_memory(device)
    if free is not None and needed > free:  # where nobody knows, the allocation decides
        raise DataError(
            f"{split.path}: its {split.num_rows} rows need {needed / 2**30:.1f} GiB on {device}, which has "
            f"{free / 2**30:.1f} GiB free: set device_cache: stream, or use fewer columns (use_features)"
        )
