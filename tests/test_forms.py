# SPDX-License-Identifier: Apache-2.0
"""Batches in the forms that models take."""

from __future__ import annotations

import torch

from ctrbench.batches import Batches
from ctrbench.forms import Columns, HistoryTuple, OnHost

TABLE = {
    "item": torch.arange(5, dtype=torch.int32),
    "tags": torch.tensor([[0, 0], [1, 2], [3, 4], [5, 6], [7, 8]], dtype=torch.int32),
    "vector": torch.arange(5.0).unsqueeze(1),
}
SPLIT = {
    "user": torch.tensor([7, 8]),
    "item": torch.tensor([4, 1]),
    "seen": torch.tensor([[0, 3, 2], [0, 0, 0]]),
    "label": torch.tensor([1.0, 0.0]),
}


def test_columns() -> None:
    (batch,) = Batches(SPLIT, 8, form=Columns(TABLE))
    assert batch.keys() == {*SPLIT, "tags", "vector"} and batch["tags"].tolist() == [[7, 8], [1, 2]]
    assert batch["user"].dtype == torch.int32
    (wide,) = Batches(SPLIT, 8, form=Columns(TABLE, is_wide=True))
    assert wide["user"].dtype == wide["tags"].dtype == torch.int64 and wide["label"].dtype == torch.float32


def test_history_tuple() -> None:
    (batch,) = Batches(SPLIT, 8, form=HistoryTuple(TABLE, "seen", max_len=2))
    context, items, mask = batch
    assert context.keys() == {"user", "label"} and items.keys() == TABLE.keys()
    assert items["item"].tolist() == [3, 2, 4, 0, 0, 1] and items["item"].dtype == torch.int64
    assert items["tags"].view(2, 3, 2)[0].tolist() == [[5, 6], [3, 4], [7, 8]]
    assert mask.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    (whole,) = Batches(SPLIT, 8, form=HistoryTuple(TABLE, "seen"))
    assert whole[2].shape == (2, 3)


def test_on_host() -> None:
    form = OnHost(HistoryTuple(TABLE, "seen"))
    for part, expected in zip(form(SPLIT), HistoryTuple(TABLE, "seen")(SPLIT), strict=True):
        pairs = zip(part.values(), expected.values(), strict=True) if isinstance(part, dict) else [(part, expected)]
        assert all(torch.equal(x, y) and x.device.type == "cpu" for x, y in pairs)
    assert OnHost(Columns())(SPLIT).keys() == SPLIT.keys()


def test_a_batch_may_be_written_to() -> None:
    for shuffle in (False, True):
        batches = Batches(SPLIT, 1, shuffle=shuffle)
        for batch in batches:
            batch["user"].zero_()
            batch["label"].fill_(5)
        assert batches.column("user").tolist() == [7, 8] and batches.column("label").tolist() == [1, 0]
    (batch,) = Batches(SPLIT, 8).ordered(8, False, 0)
    assert batch["user"].tolist() == [7, 8]


def test_what_fuxictrs_loaders_say_of_themselves() -> None:
    batches = Batches(SPLIT, 1)
    assert (batches.num_samples, batches.num_batches, batches.num_blocks, len(batches)) == (2, 2, 1, 2)
