# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ctrbench.batches import Batches
from ctrbench.errors import DataError
from ctrbench.features import FeatureMap
from ctrbench.storage import ColumnSpec, SplitWriter, column_specs


def make_columns(rows: int = 103) -> dict[str, torch.Tensor]:
    number = torch.arange(rows)
    return {
        "id": number.to(torch.uint8),
        "real": number.float() / 2,
        "sequence": torch.stack([number, number + 1, number + 2], dim=1).int(),
        "vector": torch.stack([number, -number], dim=1).float(),
        "label": (number % 2).float(),
    }


def test_ordered_batches_hold_every_row_once_in_order() -> None:
    columns = make_columns()
    batches = Batches(columns, batch_size=10)
    got = list(batches)
    assert len(got) == len(batches) == 11 and len(got[-1]["id"]) == 3
    for name, column in columns.items():
        joined = torch.cat([batch[name] for batch in got])
        assert joined.shape == column.shape and torch.equal(joined.double(), column.double())
        assert torch.equal(batches.column(name).double(), column.double())


def test_shuffled_batches_keep_rows_together() -> None:
    batches = Batches(make_columns(), batch_size=10, shuffle=True, seed=1)
    got = {name: torch.cat([batch[name] for batch in batches.at(0)]) for name in batches.names}
    rows = got["id"].long()
    assert sorted(rows.tolist()) == list(range(103)) and rows.tolist() != list(range(103))
    assert torch.equal(got["real"], rows.float() / 2)
    assert torch.equal(got["sequence"].long(), torch.stack([rows, rows + 1, rows + 2], dim=1))
    assert torch.equal(got["vector"], torch.stack([rows, -rows], dim=1).float())


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        batches = Batches(make_columns(), 10, shuffle=True, seed=seed)
        return torch.cat([batch["id"] for batch in batches.at(epoch)]).tolist()

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_epochs_advance_and_can_start_at_any_batch() -> None:
    batches = Batches(make_columns(), 10, shuffle=True, seed=1)
    first, second = ([batch["id"].tolist() for batch in batches] for _ in range(2))
    assert first != second
    assert [batch["id"].tolist() for batch in batches.at(1, first_batch=4)] == second[4:]


def test_types() -> None:
    batch = next(iter(Batches(make_columns(), 10)))
    assert batch["id"].dtype == batch["sequence"].dtype == torch.int32
    assert batch["real"].dtype == batch["label"].dtype == torch.float32
    wide = next(iter(Batches({"id": torch.tensor([2**40, 1])}, 10)))
    assert wide["id"].dtype == torch.int64 and wide["id"].tolist() == [2**40, 1]


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(DataError, match="without columns"):
        Batches({}, 10)


def make_feature_map() -> FeatureMap:
    feature_map = FeatureMap("test", "unused")
    feature_map.features["id"] = {"source": "", "type": "categorical", "padding_idx": 0, "vocab_size": 70000}
    feature_map.features["sequence"] = {
        "source": "",
        "type": "sequence",
        "padding_idx": 0,
        "vocab_size": 300,
        "max_len": 3,
    }
    feature_map.features["real"] = {"source": "", "type": "numeric"}
    feature_map.labels = ["label"]
    return feature_map


def test_from_file(tmp_path: Path) -> None:
    feature_map = make_feature_map()
    specs: list[ColumnSpec] = column_specs(feature_map)
    columns = {
        "id": np.array([1, 69999, 5]),
        "sequence": np.array([[1, 0, 0], [299, 2, 3], [4, 5, 6]]),
        "real": np.array([0.5, 1.5, -1.0], dtype=np.float32),
        "label": np.array([0, 1, 1], dtype=np.float32),
    }
    with SplitWriter(tmp_path / "test.h5", specs) as writer:
        writer.append(columns)
    batch = next(iter(Batches.from_file(tmp_path / "test.h5", feature_map, 8)))
    for name, values in columns.items():
        assert batch[name].tolist() == values.tolist()


def test_a_split_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test_from_file(tmp_path)
    monkeypatch.setattr("ctrbench.batches.free_memory", lambda device: 10)
    with pytest.raises(
        DataError, match=r"test\.h5: its 3 rows need .* GiB on cpu, which has .*: set device_cache: stream"
    ):
        Batches.from_file(tmp_path / "test.h5", make_feature_map(), 8)
