# SPDX-License-Identifier: Apache-2.0
"""Build Criteo-shaped datasets of growing size: is time linear in the rows, and memory flat?

    python benchmarks/speed/build_scale.py --rows 1000000 5000000 45800000 --folder /a/roomy/disk \\
        --output benchmarks/speed/results/build_scale.json

45,800,000 rows are all of Criteo_x4. The generated CSV takes 263 bytes a row, the build's scratch files and the result
about 170 more; each size goes before the next comes. Every build has a process of its own. Memory is the peak over the
process tree of the proportional set size; time is that of the building call. On a shared machine only the processor
time tells whether the work grows linearly.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from build_dataset import DATASET_ID, TRAIN_SETTINGS, section, timed, write_criteo_shaped
from measure import ROOT, describe, environment, markdown, run_worker, use_cores, work, write_report

TIMEOUT = 4 * 3600


def main() -> None:
    """Generate each size, build it, print a Markdown table and write the JSON after every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 5_000_000, 45_800_000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the generated files go; a temporary folder if not given")
    parser.add_argument("--output", type=Path, help="JSON file to write; sizes that it holds already are kept")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, build)
        return
    use_cores(options.threads)
    report = {
        "threads": options.threads,
        "settings": TRAIN_SETTINGS,
        "machine": environment(["polars", "h5py", "numpy"]),
        "sizes": _sizes_so_far(options.output, options.threads),
    }
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            measured = _measure(Path(name), rows, options.threads)
        others = [size for size in report["sizes"] if size["rows"] != rows]
        report["sizes"] = sorted([*others, measured], key=lambda size: size["rows"])
        write_report(options.output, report)
    print(to_markdown(report))


def build(settings: dict[str, Any]) -> dict[str, Any]:
    """The worker: build one dataset; seconds, processor seconds and the number of ids."""
    sys.path.insert(0, str(ROOT))
    import torch  # noqa: F401 (an import as any other, which a check of names makes on first use)

    from ctrbench.preprocess import build_dataset
    from ctrbench.schema import DatasetConfig

    folder = Path(settings["folder"])
    dataset = DatasetConfig.model_validate(section(folder, "ctrbench"))
    measured = timed(lambda: build_dataset(dataset, root=ROOT, fresh=True))
    built = dataset.folder(ROOT)
    return {
        **measured,
        "num_ids": json.loads((built / "feature_map.json").read_text())["total_features"],
        "result_bytes": sum(path.stat().st_size for path in built.iterdir()),
    }


def _measure(folder: Path, rows: int, threads: int) -> dict[str, Any]:
    start = time.perf_counter()
    csv_bytes = write_criteo_shaped(folder, rows)
    print(f"{rows:,} rows: {csv_bytes / 2**30:.2f} GiB of CSV in {time.perf_counter() - start:.0f} s", flush=True)
    measured = run_worker(Path(__file__).resolve(), {"folder": str(folder)}, threads, timeout=TIMEOUT)
    shutil.rmtree(folder / "ctrbench" / DATASET_ID)
    print(f"{rows:,} rows: built in {measured['seconds']:.0f} s, {measured['peak_mib']:,.0f} MiB", flush=True)
    return {"rows": rows, "csv_bytes": csv_bytes, **measured, "rows_per_second": rows / measured["seconds"]}


def _sizes_so_far(output: Path | None, threads: int) -> list[dict[str, Any]]:
    if output is None or not output.is_file():
        return []
    report = json.loads(output.read_text())
    return list(report["sizes"]) if report["threads"] == threads else []


def to_markdown(report: dict[str, Any]) -> str:
    sizes = report["sizes"]
    rows = [
        [
            f"{size['rows']:,}",
            f"{size['csv_bytes'] / 2**30:.2f}",
            f"{size['num_ids']:,}",
            f"{size['seconds']:.1f}",
            f"{size['rows_per_second']:,.0f}",
            f"{size['processor_seconds'] / size['rows'] * 1e6:.1f}",
            f"{size['peak_mib']:,.0f}",
        ]
        for size in sizes
    ]
    header = ["rows", "GiB of CSV", "ids", "seconds", "rows/s", "processor s per million rows", "peak MiB"]
    return "\n".join(
        [f"{report['threads']} threads; {describe(report['machine'])}.", "", markdown(header, rows, num_texts=0)]
    )


if __name__ == "__main__":
    main()
