# SPDX-License-Identifier: Apache-2.0
"""`ctrbench prepare <dataset>`: from the raw public download to the published split."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ctrbench.datasets.description import Dataset, Outcome


def add(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    """Declare the command."""
    parser = commands.add_parser("prepare", help="check a public dataset's raw files and write its published split")
    parser.add_argument("dataset", help="a name that `ctrbench datasets` lists")
    parser.add_argument("--raw", type=Path, help="the raw file, archive or folder; with --download: where to keep it")
    parser.add_argument("--download", action="store_true", help="fetch what is missing from the publisher first")
    parser.add_argument("--csv", action="store_true", help="write CSV instead of Parquet")
    parser.add_argument("--output", type=Path, help="folder of the split files; default: data/raw/<dataset_id>")
    parser.add_argument(
        "--sample", action="store_true", help="accept other sizes and checksums than the published ones, with a warning"
    )
    parser.set_defaults(action=run)


def run(arguments: argparse.Namespace) -> int:
    """Prepare one dataset and compare it with the published figures; returns the exit status."""
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted: nothing of the split was kept; the same command resumes a download", file=sys.stderr)
        return 130


def _run(arguments: argparse.Namespace) -> int:
    from ctrbench.datasets.catalog import find_dataset, find_root
    from ctrbench.datasets.preparation import prepare
    from ctrbench.errors import ConfigError
    from ctrbench.files import shown_path

    root = find_root()
    dataset = find_dataset(arguments.dataset, root)
    raw = arguments.raw
    if arguments.download:
        raw = raw or root / "data" / "downloads" / dataset.dataset_id
        _download(dataset, raw)
    if raw is None:
        from ctrbench.datasets.download import instructions

        raise ConfigError(f"--raw is needed: {dataset.raw}. {instructions(dataset)}")
    output = arguments.output or root / "data" / "raw" / dataset.dataset_id
    file_format = "csv" if arguments.csv else None
    outcome = prepare(dataset, raw, output, file_format=file_format, is_sample=arguments.sample, report=_show)
    print("\n".join(summary(dataset, outcome, shown_path(output))))
    return 0


def summary(dataset: Dataset, outcome: Outcome, folder: str) -> list[str]:
    """What was written, beside the published figures, as lines of an aligned table."""
    published = dataset.published
    table = [("file", "rows", "published", "MD5 of the CSV")]
    for split, name in outcome.files.items():
        rows = published.rows.get(split)
        md5, known = outcome.md5.get(split), published.md5.get(split)
        if md5 is not None and known is not None:
            md5 = f"{md5} {'as published' if md5 == known else f'(published: {known})'}"
        table.append((name, f"{outcome.rows[split]:,}", "-" if rows is None else f"{rows:,}", md5 or "-"))
    widths = [max(len(row[i]) for row in table) for i in range(3)]
    lines = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}" for row in table]
    if outcome.positives is not None:
        share = outcome.positives / sum(outcome.rows[split] for split in published.rows)
        beside = "" if published.positives is None else f" (published: {published.positives:,})"
        lines.append(f"positive labels: {outcome.positives:,}{beside}, {share:.2%}")
    lines.append(f"split: {dataset.split}")
    lines += outcome.notes
    lines += [f"warning: {warning}" for warning in outcome.warnings]
    return [*lines, f"written to {folder}"]


def _download(dataset: Dataset, folder: Path) -> None:
    from ctrbench.datasets.download import fetch

    fetch(dataset, folder, report=_show)


def _show(line: str) -> None:
    print(line, flush=True)
