# SPDX-License-Identifier: Apache-2.0
"""MicroLens_1M_x1_levels: the prepared MicroLens_1M_x1 with likes_level and views_level as features of the items.

    python data/prepare/microlens_1m_levels.py [--prepared data/raw/MicroLens_1M_x1]

The authors of QIN report a stronger variant in which the items of a history carry these levels too. In the challenge's
splits they stand beside the target item and belong to it. This reads them off all splits (they are known of an item
whatever its label) and writes `item_info_levels.parquet`: item_info with two more columns. An item that is never a
target has level 0, the padding.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import polars as pl

from ctrbench.errors import CtrbenchError, DataError
from ctrbench.files import atomic_path

PREPARED = Path(__file__).resolve().parents[1] / "raw" / "MicroLens_1M_x1"
LEVELS = ("likes_level", "views_level")
OUTPUT = "item_info_levels.parquet"


def add_levels(prepared: Path) -> tuple[int, int]:
    """Write item_info_levels.parquet beside the prepared files.

    Returns:
        The number of items, padding included, and how many of them have levels.

    Raises:
        DataError: a file is missing, or an item has different levels in different rows.
    """
    paths = [prepared / f"{split}.parquet" for split in ("train", "valid", "test")]
    for path in (*paths, prepared / "item_info.parquet"):
        if not path.is_file():
            raise DataError(f"{path}: no such file: run data/prepare/microlens_1m.py first")
    rows = pl.concat([pl.scan_parquet(path).select("item_id", *LEVELS) for path in paths])
    known = rows.unique().sort("item_id").collect(engine="streaming")
    twice = known.filter(known["item_id"].is_duplicated())
    if twice.height:
        first = twice.head(2).rows()
        raise DataError(
            f"{prepared}: item {first[0][0]} has the levels {first[0][1:]} in one row and {first[1][1:]} in another: "
            "here they belong to the row, so they cannot be features of the item"
        )
    items = pl.read_parquet(prepared / "item_info.parquet")
    joined = items.join(known, on="item_id", how="left", maintain_order="left").with_columns(
        pl.col(name).fill_null(0) for name in LEVELS
    )
    with atomic_path(prepared / OUTPUT) as partial:
        joined.write_parquet(partial)
    return items.height, known.height


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Make the levels features of the items.")
    parser.add_argument("--prepared", type=Path, default=PREPARED, help="folder that microlens_1m.py wrote")
    options = parser.parse_args(arguments)
    try:
        items, known = add_levels(options.prepared)
    except CtrbenchError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.prepared / OUTPUT}: {items:,} items, {known:,} of them with levels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
