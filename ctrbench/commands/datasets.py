# SPDX-License-Identifier: Apache-2.0
"""`ctrbench datasets`: what is known, what is on disk, the terms, and the command that prepares each."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ctrbench.datasets.description import Dataset


def add(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    """Declare the command."""
    parser = commands.add_parser(
        "datasets", help="list the public datasets: sizes, terms, what is on disk, how to get it"
    )
    parser.add_argument("dataset", nargs="?", help="say all of one dataset")
    parser.set_defaults(action=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table, or all of one dataset; returns the exit status."""
    from ctrbench.datasets.catalog import find_dataset, find_root, load_catalog

    root = find_root()
    if arguments.dataset:
        print("\n".join(details(find_dataset(arguments.dataset, root), root)))
        return 0
    print("\n".join(listing(list(load_catalog(root).values()), root)))
    return 0


def listing(datasets: list[Dataset], root: Path) -> list[str]:
    """One aligned line for each dataset, then its terms and command on a line each."""
    table = [("dataset", "rows", "raw files", "on disk")]
    for dataset in datasets:
        rows = sum(n for split, n in dataset.published.rows.items() if split in ("train", "valid", "test"))
        size = "-" if dataset.size is None else _megabytes(dataset.size)
        table.append((dataset.dataset_id, f"{rows:,}", size, on_disk(dataset, root)))
    widths = [max(len(row[i]) for row in table) for i in range(3)]
    lines = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}" for row in table]
    lines += ["", f"{'dataset':<{widths[0]}}  command"]
    lines += [f"{dataset.dataset_id:<{widths[0]}}  {command(dataset)}" for dataset in datasets]
    lines += ["", f"{'dataset':<{widths[0]}}  terms"]
    lines += [f"{dataset.dataset_id:<{widths[0]}}  {dataset.terms}" for dataset in datasets]
    return lines


def details(dataset: Dataset, root: Path) -> list[str]:
    """All that is known of one dataset."""
    from ctrbench.datasets.download import instructions

    pairs = {
        "rows": " / ".join(f"{split} {rows:,}" for split, rows in dataset.published.rows.items()),
        "split": dataset.split,
        "terms": dataset.terms,
        "source": dataset.source,
        "raw files": dataset.raw,
        "how": instructions(dataset),
        "command": command(dataset),
        "on disk": on_disk(dataset, root),
    }
    pairs |= {f"MD5 {split}": md5 for split, md5 in dataset.published.md5.items()}
    width = max(map(len, pairs))
    return [dataset.dataset_id, *(f"  {name:<{width}}  {value}" for name, value in pairs.items())]


def command(dataset: Dataset) -> str:
    """What prepares it."""
    return f"ctrbench prepare {dataset.dataset_id} " + ("--download" if dataset.remotes else "--raw PATH")


def on_disk(dataset: Dataset, root: Path) -> str:
    """The state of data/raw/<dataset_id>: whether it is complete, its size, and whether it is the published split."""
    from ctrbench.datasets.preparation import SCRATCH, read_record

    folder = root / "data" / "raw" / dataset.dataset_id
    files = [p for p in folder.glob("*") if p.suffix in (".csv", ".parquet")] if folder.is_dir() else []
    record = read_record(folder)
    if record is None:
        if (folder / SCRATCH).exists():
            return "unfinished: prepare it again"
        return f"{_megabytes(sum(p.stat().st_size for p in files))}, without a record" if files else "-"
    for name, entry in record["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry.get("bytes"):
            return f"{name} has been removed or changed: prepare it again"
    size = _megabytes(sum(entry["bytes"] for entry in record["files"].values()))
    if record.get("warnings"):
        return f"{size}, not the published figures"
    return f"{size}, {'MD5 as published' if record.get('is_published_split') else 'rows as published'}"


def _megabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
