# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from conftest import ROOT, load_script

from ctrbench.errors import DataError

script = load_script(ROOT / "data" / "prepare" / "microlens_1m_levels.py")


def write(folder: Path, **levels: list[int]) -> None:
    rows = pl.DataFrame({"item_id": [1, 3, 1], "likes_level": [4, 0, 4], "views_level": [9, 2, 9], **levels})
    for split in ("train", "valid", "test"):
        rows.write_parquet(folder / f"{split}.parquet")
    pl.DataFrame({"item_id": [0, 1, 2, 3], "item_tags": [[0], [1], [2], [3]]}).write_parquet(
        folder / "item_info.parquet"
    )


def test_levels_become_columns_of_the_items(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path)
    assert script.main(["--prepared", str(tmp_path)]) == 0
    assert "4 items, 2 of them with levels" in capsys.readouterr().out
    frame = pl.read_parquet(tmp_path / "item_info_levels.parquet")
    assert frame.columns == ["item_id", "item_tags", "likes_level", "views_level"]
    assert frame["likes_level"].to_list() == [0, 4, 0, 0] and frame["views_level"].to_list() == [0, 9, 0, 2]


def test_levels_of_the_row_are_refused(tmp_path: Path) -> None:
    write(tmp_path, likes_level=[4, 0, 5])
    with pytest.raises(DataError, match=r"item 1 has the levels \([45], 9\) in one row and \([45], 9\) in another"):
        script.add_levels(tmp_path)
    assert not (tmp_path / "item_info_levels.parquet").exists()


def test_files_must_be_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--prepared", str(tmp_path)]) == 2
    assert "train.parquet: no such file: run data/prepare/microlens_1m.py first" in capsys.readouterr().err
