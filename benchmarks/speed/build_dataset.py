# SPDX-License-Identifier: Apache-2.0
"""Time the building of a Criteo-shaped dataset by ctrbench and by the installed FuxiCTR, on the same CSV in one run.

    python benchmarks/speed/build_dataset.py --rows 1000000 --threads 2 \\
        --output benchmarks/speed/results/build_dataset.json

Each side runs in its own process. Time is that of the building call (imports excluded, FuxiCTR's start of Ray included,
as every build pays it); memory is the peak over the process tree of the proportional set size, which counts a page
that several processes share once. Processor seconds are those of the call over the process tree (of Ray's processes,
those that still live at its end), which other work on the machine disturbs far less than time. The encoded ids of both
sides are compared afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from measure import ROOT, describe, environment, markdown, run_worker, use_cores, work, write_report

DATASET_ID = "criteo_shaped"
NUMERIC = [f"I{i}" for i in range(1, 14)]
CATEGORICAL = [f"C{i}" for i in range(1, 27)]
# Token counts of the Criteo display advertising data, to two digits (C1..C26); draws from them are heavy-tailed.
VOCABULARIES = (1500, 580, 10_000_000, 2_200_000, 310, 24, 13_000, 630, 3, 93_000, 5700, 8_400_000, 3200, 27, 15_000)
VOCABULARIES += (5_500_000, 10, 5700, 2200, 4, 7_000_000, 18, 16, 290_000, 110, 140_000)
HEX = pl.Series([f"{i:04x}" for i in range(1 << 16)])
SPLITS = {"train": 0.8, "valid": 0.1, "test": 0.1}
TRAIN_SETTINGS = {"min_categr_count": 2}


def main() -> None:
    """Generate the data, time both sides, compare their ids, print a Markdown table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of all three splits together")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1, help="builds per side; the fastest counts")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, lambda settings: BUILDERS[settings["side"]](Path(settings["folder"])))
        return
    use_cores(options.threads)
    with tempfile.TemporaryDirectory() as name:
        report = _compare(Path(name), options.rows, options.threads, options.repeats)
    write_report(options.output, report)
    print(to_markdown(report))


def write_criteo_shaped(folder: Path, rows: int, seed: int = 2024) -> int:
    """Write train.csv, valid.csv and test.csv (13 counts, 26 hashed tokens, missing values); returns their bytes."""
    total = 0
    for split, share in SPLITS.items():
        path = folder / f"{split}.csv"
        generator = np.random.default_rng([seed, len(split)])
        remaining, header = round(rows * share), True
        with path.open("wb") as stream:
            while remaining > 0:
                block = _block(generator, min(remaining, 200_000))
                stream.write(block.write_csv(include_header=header).encode())
                remaining, header = remaining - block.height, False
        total += path.stat().st_size
    return total


def _block(generator: np.random.Generator, rows: int) -> pl.DataFrame:
    columns: dict[str, pl.Series] = {"label": pl.Series((generator.random(rows) < 0.256).astype(np.int64))}
    for i, name in enumerate(NUMERIC):
        counts = np.floor(np.exp(generator.normal(1 + i / 3, 1.7, rows))).astype(np.int64) - 1
        columns[name] = _with_missing(pl.Series(counts), generator, 0.1 * (i % 4))
    for i, (name, size) in enumerate(zip(CATEGORICAL, VOCABULARIES, strict=True)):
        rank = (size * generator.random(rows) ** 5).astype(np.int64)
        # An odd multiplier is a bijection modulo 2^32: distinct ranks stay distinct eight-digit tokens.
        token = (rank * 2_654_435_761 + i * 97_531) % 2**32
        digits = HEX.gather(token >> 16) + HEX.gather(token & 0xFFFF)
        columns[name] = _with_missing(digits, generator, 0.04 * (i % 3))
    return pl.DataFrame(columns)


def _with_missing(values: pl.Series, generator: np.random.Generator, share: float) -> pl.Series:
    present = pl.Series(generator.random(len(values)) >= share)
    return pl.select(pl.when(present).then(values)).to_series()


def section(folder: Path, side: str) -> dict[str, Any]:
    """The dataset section of the files in `folder`; the dataset goes to its subfolder `side`."""
    numeric = {"name": NUMERIC, "active": True, "dtype": "float", "type": "categorical", "fill_na": 0}
    return {
        "dataset_id": DATASET_ID,
        "data_root": str(folder / side),
        "data_format": "csv",
        **{f"{split}_data": str(folder / f"{split}.csv") for split in SPLITS},
        "feature_cols": [
            {**numeric, "preprocess": "convert_to_bucket"},
            {"name": CATEGORICAL, "active": True, "dtype": "str", "type": "categorical"},
        ],
        "label_col": {"name": "label", "dtype": "float"},
        **TRAIN_SETTINGS,
    }


def timed(build: Callable[[], Any]) -> dict[str, float]:
    """Seconds and processor seconds of a call."""
    before, start = _processor_seconds(), time.perf_counter()
    build()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "processor_seconds": _processor_seconds() - before}


def _processor_seconds() -> float:
    """What this process and its descendants have used, those that ended only where their parent has waited for them."""
    parents, ticks = {}, {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended between the listing and the reading
        pid = int(entry.parent.name)
        parents[pid], ticks[pid] = int(fields[1]), sum(int(field) for field in fields[11:15])
    tree, grown = {os.getpid()}, True
    while grown:
        children = {pid for pid, parent in parents.items() if parent in tree} - tree
        tree, grown = tree | children, bool(children)
    return sum(ticks.get(pid, 0) for pid in tree) / os.sysconf("SC_CLK_TCK")


def _build_ctrbench(folder: Path) -> dict[str, float]:
    sys.path.insert(0, str(ROOT))
    import torch  # noqa: F401 (an import as any other, which a check of names makes on first use)

    from ctrbench.preprocess import build_dataset
    from ctrbench.schema import DatasetConfig

    dataset = DatasetConfig.model_validate(section(folder, "ctrbench"))
    return timed(lambda: build_dataset(dataset, root=ROOT, fresh=True))


def _build_fuxictr(folder: Path) -> dict[str, float]:
    from fuxictr.datasets.criteo import CustomizedFeatureProcessor
    from fuxictr.preprocess.build_dataset import build_dataset

    # The stock method passes scan_csv a keyword that polars 2 no longer has. (A local subclass would not do: FuxiCTR
    # pickles its processor.)
    CustomizedFeatureProcessor.read_data = _scan_csv
    settings = section(folder, "fuxictr")
    return timed(lambda: build_dataset(CustomizedFeatureProcessor(**settings), **settings))


def _scan_csv(processor: Any, data_path: str, sep: str = ",", n_rows: int | None = None, **_: Any) -> pl.LazyFrame:
    types = {name: {str: pl.String, int: pl.Int64, float: pl.Float64}[t] for name, t in processor.dtype_dict.items()}
    return pl.scan_csv(data_path, separator=sep, schema_overrides=types, low_memory=False, n_rows=n_rows)


BUILDERS = {"ctrbench": _build_ctrbench, "fuxictr": _build_fuxictr}


def _compare(folder: Path, rows: int, threads: int, repeats: int) -> dict[str, Any]:
    csv_bytes = write_criteo_shaped(folder, rows)
    taken: dict[str, list[dict[str, Any]]] = {side: [] for side in BUILDERS}
    for _ in range(repeats):
        for side in BUILDERS:
            shutil.rmtree(folder / side, ignore_errors=True)
            settings = {"side": side, "folder": str(folder)}
            taken[side].append(run_worker(Path(__file__).resolve(), settings, threads, timeout=3600))
    sides = {}
    for side, runs in taken.items():
        best = min(runs, key=lambda run: run["seconds"])
        sides[side] = {**best, "rows_per_second": rows / best["seconds"], "runs": runs}
    ours, theirs = sides["ctrbench"], sides["fuxictr"]
    return {
        "rows": rows,
        "csv_bytes": csv_bytes,
        "threads": threads,
        "settings": TRAIN_SETTINGS,
        "machine": environment(["fuxictr", "polars", "ray", "h5py", "numpy"]),
        "sides": sides,
        "speedup": ours["rows_per_second"] / theirs["rows_per_second"],
        "processor_ratio": theirs["processor_seconds"] / ours["processor_seconds"],
        "memory_ratio": ours["peak_mib"] / theirs["peak_mib"],
        "equal_ids": _count_equal(folder),
    }


def _count_equal(folder: Path) -> dict[str, Any]:
    """How many cells of the encoded features agree, over all splits."""
    import h5py

    cells = equal = 0
    for split in SPLITS:
        theirs = pl.read_parquet(folder / "fuxictr" / DATASET_ID / f"{split}.parquet")
        with h5py.File(folder / "ctrbench" / DATASET_ID / f"{split}.h5") as stored:
            for name in NUMERIC + CATEGORICAL:
                same = np.asarray(stored[name]) == theirs[name].to_numpy()
                cells, equal = cells + same.size, equal + int(same.sum())
    maps = [json.loads((folder / side / DATASET_ID / "feature_map.json").read_text()) for side in BUILDERS]
    return {"cells": cells, "equal": equal, "all_equal": cells == equal, "same_feature_map": maps[0] == maps[1]}


def to_markdown(report: dict[str, Any]) -> str:
    ids = report["equal_ids"]
    rows = [
        [
            side,
            f"{run['seconds']:.2f}",
            f"{run['rows_per_second']:,.0f}",
            f"{run['processor_seconds']:.1f}",
            f"{run['peak_mib']:,.0f}",
        ]
        for side, run in report["sides"].items()
    ]
    ratios = [f"{report['speedup']:.1f}x", f"{report['processor_ratio']:.1f}x", f"{report['memory_ratio']:.2f}x"]
    rows.append(["ratio", "", *ratios])
    return "\n".join(
        [
            f"{report['rows']:,} rows ({report['csv_bytes'] / 2**20:.0f} MiB of CSV), {report['threads']} threads; "
            f"{describe(report['machine'])}.",
            "",
            markdown(["", "seconds", "rows/s", "processor seconds", "peak MiB of the process tree"], rows),
            "",
            f"Equal ids: {ids['equal']:,} of {ids['cells']:,}; same feature map: {ids['same_feature_map']}.",
        ]
    )


if __name__ == "__main__":
    main()
