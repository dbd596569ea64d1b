# SPDX-License-Identifier: Apache-2.0
"""MicroLens_1M_x1 (MMCTR challenge, WWW 2025): check the published files and lay them out in one form.

    ctrbench prepare MicroLens_1M_x1 --raw FOLDER | ARCHIVE.zip
    python data/prepare/microlens_1m.py --raw FOLDER [--output data/raw/MicroLens_1M_x1] [--rebuild-embeddings]

FOLDER holds the challenge's files, at its top or in MicroLens_1M_x1/ below it (the terms are the publisher's):

| file | columns |
|---|---|
| train, valid, test.parquet | user_id, item_id, item_seq, likes_level and views_level (0 to 10), label (0 or 1) |
| item_info.parquet | item_id (0 = padding), item_tags (5, zeros on the left), item_emb_d128 (128 numbers) |
| item_feature.parquet | with --rebuild-embeddings: item_id, 768 numbers (BERT, title) and 1024 (CLIP, image) |

item_seq holds 100 item ids, zeros on the left and the newest last. Written are these columns in this order, as Int32,
Float32 and lists of them. The rows keep their order, which for test is that of a submission; items are sorted by id.
Nothing is written before every file has passed. The splits are read in blocks: memory depends on the size of their row
groups, not on their length. Sizes other than the published ones, as those of a rehearsal, give a warning.

What is not known of the published files, and what is done here:
- test may come without labels, with empty ones (left out) or with real ones (kept); labels that are all alike are taken
  for a placeholder and left out;
- the row of item 0 stands for an empty slot: should it hold more than zeros, zeros are written, with a warning;
- item_emb_d128 is a PCA of BERT and CLIP vectors, but whether these were scaled first and whether item 0 took part is
  not published; --rebuild-embeddings does neither (microlens_1m_pca.py), so its vectors may differ from the published.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from ctrbench.datasets.archives import copy_members, find
from ctrbench.datasets.description import Dataset, Job, Outcome, Published
from ctrbench.datasets.writing import compare_rows
from ctrbench.errors import CtrbenchError, DataError
from ctrbench.files import atomic_path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also for whoever loads this file by its path
import microlens_1m_pca
from rawfile import RawFile

OUTPUT = Path(__file__).resolve().parents[1] / "raw" / "MicroLens_1M_x1"
SOURCE = "https://huggingface.co/datasets/reczoo/MicroLens_1M_x1"
HISTORY, NUM_TAGS, NUM_LEVELS, EMBEDDING_DIM, BLOCK_ROWS = 100, 5, 11, 128, 50_000
TYPES = {
    "user_id": pl.Int32,
    "item_id": pl.Int32,
    "item_seq": pl.List(pl.Int32),
    "likes_level": pl.Int32,
    "views_level": pl.Int32,
    "label": pl.Int32,
}
KINDS = {name: "integers" if dtype == pl.List else "integer" for name, dtype in TYPES.items()} | {"label": "label"}
ITEM_TYPES = {"item_id": pl.Int32, "item_tags": pl.List(pl.Int32), "item_emb_d128": pl.List(pl.Float32)}


@dataclass(frozen=True)
class Challenge:
    """The published sizes: rows of each split; items, tags and users with the id 0; positive labels in train."""

    train: int
    valid: int
    test: int
    items: int
    tags: int
    users: int
    positives: float


MMCTR = Challenge(3_600_000, 10_000, 379_142, items=91_718, tags=11_740, users=1_000_001, positives=0.25)


@dataclass
class Summary:
    """What the files hold: rows of each split, items with item 0, positive labels in train, and what is unusual."""

    rows: dict[str, int] = field(default_factory=dict)
    items: int = 0
    positives: float = 0.0
    is_test_labelled: bool = False
    pca: microlens_1m_pca.Pca | None = None
    warnings: list[str] = field(default_factory=list)


def prepare(raw: Path, output: Path, rebuild_embeddings: bool = False, expected: Challenge = MMCTR) -> Summary:
    """Check all files, then write item_info, train, valid and test.parquet into `output`, each complete or not at all.

    Args:
        raw: the folder of the challenge's files.
        output: the folder, created when it is missing.
        rebuild_embeddings: compute item_emb_d128 from item_feature.parquet.
        expected: the sizes to compare with; a tag beyond them is an error, all else a warning.

    Raises:
        DataError: a file is missing, unreadable or not of the known form.
    """
    names = ["train", "valid", "test", "item_info"] + ["item_feature"] * rebuild_embeddings
    files = {name: _find(raw, f"{name}.parquet") for name in names}
    if output.resolve() in {file.path.parent.resolve() for file in files.values()}:
        raise DataError(f"{output}: --output is the folder of the raw files and would replace them: name another one")
    summary = Summary()
    items = _read_items(files["item_info"], rebuild_embeddings, expected, summary)
    for split in ("train", "valid", "test"):
        _check_split(files[split], split, summary, expected)
    if rebuild_embeddings:
        summary.pca = microlens_1m_pca.rebuild(files["item_feature"], summary.items)
        items = items.with_columns(pl.Series("item_emb_d128", summary.pca.embeddings).cast(pl.List(pl.Float32)))
    _compare(summary, expected)
    with atomic_path(output / "item_info.parquet") as partial:
        items.write_parquet(partial)
    for split in summary.rows:
        columns = {k: v for k, v in TYPES.items() if k != "label" or split != "test" or summary.is_test_labelled}
        rows = pl.scan_parquet(files[split].path).select(*columns).cast(columns)
        with atomic_path(output / f"{split}.parquet") as partial:
            rows.sink_parquet(partial, row_group_size=BLOCK_ROWS)
    return summary


def _read_items(file: RawFile, rebuild_embeddings: bool, expected: Challenge, summary: Summary) -> pl.DataFrame:
    """The checked item table, in the order of the ids."""
    kinds = {"item_id": "integer", "item_tags": "integers", "item_emb_d128": "numbers"}
    if rebuild_embeddings:
        del kinds["item_emb_d128"]
    _check_columns(file, kinds, summary)
    block = file.read(list(kinds))
    ids = block.integers("item_id", 0)
    is_repeated = ~block.frame["item_id"].is_first_distinct().to_numpy()
    block.refuse("item_id", is_repeated, "an id that no earlier row has", ids)
    if (gap := int(np.flatnonzero(np.append(np.sort(ids), -1) != np.arange(len(ids) + 1))[0])) < max(len(ids), 1):
        name = f"item {gap}" if gap else "item 0, the padding item,"
        raise DataError(f"{file.path}: {name} is missing: the ids must be 0, 1, 2, ... without a gap: {file.again}")
    table = {"item_tags": block.padded("item_tags", NUM_TAGS, expected.tags - 1)}
    if not rebuild_embeddings:
        table["item_emb_d128"] = block.numbers("item_emb_d128", EMBEDDING_DIM)
    table = {name: values[np.argsort(ids)] for name, values in table.items()}
    if any(values[0].any() for values in table.values()):
        summary.warnings.append(f"{file.path}: item 0, the padding item, is not all zeros: written as zeros")
        for values in table.values():
            values[0] = 0
    summary.items = len(ids)
    return pl.DataFrame({"item_id": np.arange(len(ids)), **table}).cast({name: ITEM_TYPES[name] for name in kinds})


def _check_split(file: RawFile, split: str, summary: Summary, expected: Challenge) -> None:
    """Check every value of one split; count rows and labels."""
    kinds = dict(KINDS)
    if split == "test" and file.schema().get("label", pl.Null) == pl.Null:
        del kinds["label"]
    _check_columns(file, kinds, summary)
    rows = unlabelled = positives = last_user = 0
    for block in file.blocks(list(kinds), BLOCK_ROWS):
        last_user = max(last_user, block.integers("user_id", 0).max())
        block.integers("item_id", 1, summary.items - 1)
        block.padded("item_seq", HISTORY, summary.items - 1)
        for name in ("likes_level", "views_level"):
            block.integers(name, 0, NUM_LEVELS - 1)
        rows += block.frame.height
        if "label" in kinds:
            label = block.frame["label"].cast(pl.Float64).fill_nan(None)
            unlabelled += label.null_count()
            is_right = ((label == 0) | (label == 1)).fill_null(split == "test")
            block.refuse("label", ~is_right.to_numpy(), "0 or 1", block.frame["label"])
            positives += label.sum()
    if rows == 0:
        raise DataError(f"{file.path}: no rows: {file.again}")
    if 0 < unlabelled < rows:
        found = f"{unlabelled:,} of {rows:,} rows have none"
        raise DataError(f"{file.path}: column 'label': expected labels in all rows or in none, {found}: {file.again}")
    summary.rows[split] = rows
    if last_user >= expected.users:
        summary.warnings.append(f"{file.path}: user_id goes up to {last_user:,} (published: {expected.users - 1:,})")
    if split == "train":
        summary.positives = positives / rows
    if split == "test" and "label" in kinds and not unlabelled:
        summary.is_test_labelled = 0 < positives < rows
        if not summary.is_test_labelled:
            summary.warnings.append(f"{file.path}: the labels are all alike: taken for a placeholder and left out")


def _check_columns(file: RawFile, kinds: dict[str, str], summary: Summary) -> None:
    others = [name for name in file.check_columns(kinds) if name not in ("label", "item_emb_d128")]
    if others:
        summary.warnings.append(f"{file.path}: columns left out: {', '.join(others)}")


def _compare(summary: Summary, expected: Challenge) -> None:
    """Warn of sizes that are not the published ones."""
    sizes = {f"{split} rows": (rows, getattr(expected, split)) for split, rows in summary.rows.items()}
    sizes["items"] = (summary.items, expected.items)
    if differing := [f"{name} {got:,} ({known:,})" for name, (got, known) in sizes.items() if got != known]:
        summary.warnings.append(f"not the published sizes (these in brackets): {', '.join(differing)}")
    if abs(summary.positives - expected.positives) > 0.01:
        shares = f"{summary.positives:.1%} of the train labels are positive (published: {expected.positives:.0%})"
        summary.warnings.append(shares)


def _find(raw: Path, name: str) -> RawFile:
    for path in (raw / name, raw / "MicroLens_1M_x1" / name):
        if path.is_file():
            return RawFile(path, f"download the file again from {SOURCE}")
    raise DataError(f"{raw / name}: no such file: download it from {SOURCE} and pass its folder as --raw")


def _prepare_job(job: Job) -> Outcome:
    """All of it for `ctrbench prepare`; out of a zip archive the four files are copied first."""
    names = [f"{name}.parquet" for name in ("train", "valid", "test", "item_info")]
    wanted = {name: (name,) for name in names}
    archives = ["MicroLens_1M_x1.zip", "MicroLens_1M_MMCTR.zip"]
    members = find(job.raw, wanted, f"download it from {SOURCE} and pass its folder as --raw", archives)
    copies = job.folder / "raw"
    paths = copy_members(members, copies)
    summary = prepare(paths["train.parquet"].parent, job.folder)
    shutil.rmtree(copies, ignore_errors=True)
    outcome = Outcome({split: f"{split}.parquet" for split in summary.rows}, dict(summary.rows))
    outcome.files["item_info"], outcome.rows["item_info"] = "item_info.parquet", summary.items
    compare_rows(job, outcome)
    outcome.warnings += [w for w in summary.warnings if not w.startswith("not the published sizes")]
    outcome.notes.append(f"positive labels in train: {summary.positives:.2%} (published: {MMCTR.positives:.0%})")
    return outcome


DATASET = Dataset(
    dataset_id="MicroLens_1M_x1",
    prepare=_prepare_job,
    raw="the challenge's folder with train, valid, test and item_info.parquet, or a zip archive of it",
    source=SOURCE,
    terms="the publisher's, see the source",
    published=Published(
        {"train": MMCTR.train, "valid": MMCTR.valid, "test": MMCTR.test, "item_info": MMCTR.items},
    ),
    split="the challenge's own, published ready-made",
    account=f"download train, valid, test and item_info.parquet from {SOURCE}",
    formats=("parquet",),
)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Prepare MicroLens_1M_x1, the data of the MMCTR challenge.")
    parser.add_argument("--raw", type=Path, required=True, help=f"folder of the files from {SOURCE}")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the four files")
    parser.add_argument(
        "--rebuild-embeddings", action="store_true", help="compute item_emb_d128 from item_feature.parquet"
    )
    options = parser.parse_args(arguments)
    try:
        summary = prepare(options.raw, options.output, options.rebuild_embeddings)
    except CtrbenchError as error:
        print(error, file=sys.stderr)
        return 2
    for split, count in summary.rows.items():
        print(f"{options.output / split}.parquet: {count:,} rows (published: {getattr(MMCTR, split):,})")
    print(f"{options.output / 'item_info'}.parquet: {summary.items:,} items (published: {MMCTR.items:,})")
    print(f"positive labels in train: {summary.positives:.2%} (published: {MMCTR.positives:.0%})")
    if summary.pca is not None:
        share, sources = summary.pca.explained_variance, " and ".join(summary.pca.columns)
        print(f"item_emb_d128: PCA of {sources}, {share:.2%} of the variance explained")
    for warning in summary.warnings:
        print(f"warning: {warning}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
