# SPDX-License-Identifier: Apache-2.0
"""Shuffled epochs of batches from disk, against batches that lie in memory: rows per second and memory.

    python benchmarks/speed/streaming.py --output benchmarks/speed/results/streaming.json

An H5 split of Criteo's shape (39 columns of ids, a label), B = 4096, batches alone. The file is in the system's cache after
it was written, so that this is what the program costs, not the disk. Memory is that of the process beyond what Python, torch
and the opened file take; the buffers are two windows of `shuffle_buffer` rows.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import ROOT, describe, environment, markdown, run_worker, spread, use_cores, work, write_report

BATCH_SIZE = 4096
NUM_FIELDS = 39
VOCAB_SIZE = 50_000
BLOCK_ROWS = 1 << 17


def main() -> None:
    """Write the split, measure every side in turns, print a Markdown table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--buffers", type=int, nargs="+", default=[1 << 20, 1 << 17], help="rows of shuffle_buffer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, measure)
        return
    use_cores(options.threads)
    sides = [{"side": "resident", "buffer_rows": 0}]
    sides += [{"side": "streamed", "buffer_rows": rows} for rows in options.buffers]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "train.h5"
        write_split(path, options.rows)
        found: list[list[dict[str, Any]]] = [[] for _ in sides]
        for _ in range(options.repeats):
            for measured, side in zip(found, sides, strict=True):
                measured.append(run_worker(Path(__file__), {**side, "path": str(path)}, options.threads))
    results = []
    for side, measured in zip(sides, found, strict=True):
        beyond = [one["peak_mib"] - one["before_mib"] - one["buffers_mib"] for one in measured]
        rates = spread(options.rows / one["seconds"] for one in measured)
        results.append(
            {**side, "rows_per_second": rates, "buffers_mib": measured[0]["buffers_mib"], "beyond_mib": spread(beyond)}
        )
    report = {"rows": options.rows, "threads": options.threads, "repeats": options.repeats, "results": results}
    report["machine"] = environment(["torch", "h5py", "numpy"])
    write_report(options.output, report)
    print(to_markdown(report))


def make_feature_map() -> Any:
    """39 categorical fields and a label."""
    from fuxictr.features import FeatureMap

    feature_map = FeatureMap("criteo_shaped", "unused")
    for i in range(NUM_FIELDS):
        spec = {"source": "", "type": "categorical", "padding_idx": 0, "vocab_size": VOCAB_SIZE}
        feature_map.features[f"C{i + 1}"] = spec
    feature_map.labels = ["label"]
    return feature_map


def write_split(path: Path, rows: int) -> None:
    """Random ids and labels."""
    sys.path.insert(0, str(ROOT))
    from ctrbench.features import FeatureMap
    from ctrbench.storage import SplitWriter, column_specs

    feature_map = FeatureMap("criteo_shaped", "unused")
    feature_map.features.update(make_feature_map().features)
    feature_map.labels = ["label"]
    random = np.random.default_rng(0)
    with SplitWriter(path, column_specs(feature_map), feature_map_hash=feature_map.content_hash()) as writer:
        for first in range(0, rows, BLOCK_ROWS):
            count = min(BLOCK_ROWS, rows - first)
            columns = {name: random.integers(1, VOCAB_SIZE, count) for name in feature_map.features}
            writer.append({**columns, "label": random.integers(0, 2, count).astype(np.float32)})


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """The worker: the second of two shuffled epochs, and the memory that lies beyond it."""
    from measure import tree_mib

    sys.path.insert(0, str(ROOT))
    import os

    import torch

    from ctrbench.batches import Batches
    from ctrbench.features import FeatureMap
    from ctrbench.streaming import StreamedBatches

    feature_map = FeatureMap("criteo_shaped", "unused")
    feature_map.features.update(make_feature_map().features)
    feature_map.labels = ["label"]
    path, buffer_rows = Path(settings["path"]), settings["buffer_rows"]
    torch.empty(1)
    before = tree_mib(os.getpid())
    batches: Batches
    if settings["side"] == "resident":
        batches = Batches.from_file(path, feature_map, BATCH_SIZE, shuffle=True)
        buffers = 0.0
    else:
        batches = StreamedBatches(path, feature_map, BATCH_SIZE, shuffle=True, buffer_rows=buffer_rows)
        buffers = 2 * min(buffer_rows, batches.num_rows) * 4 * (NUM_FIELDS + 1) / 2**20
    for _ in range(2):
        started = time.perf_counter()
        num_rows = sum(len(batch["label"]) for batch in batches)
        seconds = time.perf_counter() - started
    assert num_rows == batches.num_rows
    return {"seconds": seconds, "before_mib": before, "buffers_mib": buffers}


def to_markdown(report: dict[str, Any]) -> str:
    """The table of README.md."""
    rows = []
    for result in report["results"]:
        is_streamed = result["side"] == "streamed"
        rate = result["rows_per_second"]
        rows.append(
            (
                f"streamed, shuffle_buffer {result['buffer_rows']:,}" if is_streamed else "resident",
                f"{rate['median']:,.0f}",
                f"{rate['min']:,.0f} to {rate['max']:,.0f}",
                f"{result['buffers_mib']:,.0f}" if is_streamed else "",
                f"{result['beyond_mib']['median']:,.0f}",
            )
        )
    header = ("", "rows/s", "lowest to highest", "buffers MiB", "further MiB")
    head = f"{report['rows']:,} rows, {NUM_FIELDS} columns, {report['threads']} threads, medians of {report['repeats']}"
    return f"{head}; {describe(report['machine'])}.\n\n{markdown(header, rows)}"


if __name__ == "__main__":
    main()
