# SPDX-License-Identifier: Apache-2.0
"""MovieLens-1M: the GroupLens archive -> train, valid and test files with the seven fields of the published runs.

    ctrbench prepare ML_1M --raw PATH/ml-1m.zip
    python data/prepare/ml_1m.py --raw PATH/ml-1m.zip [--output data/raw/ML_1M] [--seed 2018] [--format csv]

The files are CSV: the leaderboard names the hash of these. The archive comes from
https://grouplens.org/datasets/movielens/1m/ (research use with citation; no redistribution without permission, no commercial
use). It is read in memory and never unpacked.

label is 1 for a rating above 3 and 0 below 3; ratings of 3 are dropped: 739,012 rows, 575,281 positive. The rows are
shuffled and cut at int(0.8 n) and int(0.9 n), which gives the published 591,209 / 73,901 / 73,902. **The seed of the
published split is unknown**: test AUC moves by about 0.001 from split to split, so compare models on one split.

Fields: UserID, Gender, Age, Occupation as in users.dat; MovieID; Release, the year in brackets after the title as one
of 8 periods; Genres, separated by '^' (up to 6 of 18; the configuration keeps the first 5).
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from ctrbench.datasets.description import Dataset, Job, Outcome, Published, Remote
from ctrbench.errors import CtrbenchError, DataError
from ctrbench.files import atomic_path

OUTPUT = Path(__file__).resolve().parents[1] / "raw" / "ML_1M"
SOURCE = "https://grouplens.org/datasets/movielens/1m/"
FIELDS = ("UserID", "Gender", "Age", "Occupation", "MovieID", "Release", "Genres")
PUBLISHED_ROWS = {"train": 591_209, "valid": 73_901, "test": 73_902}


@dataclass(frozen=True)
class Archive:
    """What the archive must be: its MD5 and what is left of it without the ratings of 3."""

    md5: str
    rows: int
    positives: int


ML_1M = Archive("c4d9eecfca2ab87c1945afe126590906", rows=739_012, positives=575_281)


def prepare(
    raw: Path, output: Path, seed: int = 2018, file_format: str = "csv", expected: Archive = ML_1M
) -> dict[str, int]:
    """Write train, valid and test into `output`, each complete or not at all.

    Args:
        raw: ml-1m.zip.
        output: the folder, created when it is missing.
        seed: of numpy's RandomState, which shuffles the rows.
        file_format: csv or parquet.
        expected: checks on the archive.

    Returns:
        The rows of each file.

    Raises:
        DataError: the archive is missing, another one, or not of the known form.
    """
    if file_format not in ("csv", "parquet"):
        raise DataError(f"{output}: --format must be csv or parquet, got '{file_format}'")
    rows = read_archive(raw, expected)
    order = np.random.RandomState(seed).permutation(rows.height)
    cuts = [0, int(0.8 * rows.height), int(0.9 * rows.height), rows.height]
    counts = {}
    for split, start, end in zip(PUBLISHED_ROWS, cuts, cuts[1:], strict=False):
        part = rows[order[start:end]]
        with atomic_path(output / f"{split}.{file_format}") as partial:
            part.write_csv(partial) if file_format == "csv" else part.write_parquet(partial)
        counts[split] = part.height
    return counts


def read_archive(raw: Path, expected: Archive = ML_1M) -> pl.DataFrame:
    """The labelled rows in the order of ratings.dat: `label` (Int8) and the seven fields (String)."""
    return read_joined(raw, expected).select("label", *FIELDS)


def read_joined(raw: Path, expected: Archive = ML_1M) -> pl.DataFrame:
    """The same rows with all columns of the archive: also Zip, Timestamp (String) and Year (Int32)."""
    if not raw.is_file():
        raise DataError(f"{raw}: no such file: download ml-1m.zip from {SOURCE} and pass its path as --raw")
    got = hashlib.md5(raw.read_bytes(), usedforsecurity=False).hexdigest()
    if got != expected.md5:
        raise DataError(
            f"{raw}: not the MovieLens-1M archive: its MD5 is {got}, expected {expected.md5}: "
            f"download ml-1m.zip again from {SOURCE}"
        )
    users = _read_table(raw, "users.dat", ["UserID", "Gender", "Age", "Occupation", "Zip"])
    movies = _read_table(raw, "movies.dat", ["MovieID", "Title", "Genres"])
    ratings = _read_table(raw, "ratings.dat", ["UserID", "MovieID", "Rating", "Timestamp"])
    year = _year(raw, movies)
    movies = movies.with_columns(
        release(year).alias("Release"), year.alias("Year"), pl.col("Genres").str.replace_all("|", "^", literal=True)
    )
    rows = (
        ratings.filter(pl.col("Rating") != "3")
        .with_columns(label=(pl.col("Rating").cast(pl.Int8) > 3).cast(pl.Int8))
        .join(users, on="UserID", how="left", maintain_order="left")
        .join(movies, on="MovieID", how="left", maintain_order="left")
    )
    _check_rows(raw, rows, expected)
    return rows


def _read_table(raw: Path, member: str, columns: list[str]) -> pl.DataFrame:
    """One '::'-separated file of the archive; every cell stays text."""
    try:
        with zipfile.ZipFile(raw) as archive:
            text = archive.read(f"ml-1m/{member}").decode("latin-1")
    except zipfile.BadZipFile as error:
        raise DataError(f"{raw}: not a readable zip archive ({error}): download it again from {SOURCE}") from error
    except KeyError as error:
        raise DataError(f"{raw}: ml-1m/{member} is missing in the archive: download it again from {SOURCE}") from error
    line = pl.Series("line", text.removesuffix("\n").split("\n")).str.strip_suffix("\r")
    wrong = (line.str.count_matches("::", literal=True) != len(columns) - 1).arg_max()
    if wrong is not None and line[wrong].count("::") != len(columns) - 1:
        raise DataError(
            f"{raw}: ml-1m/{member}: line {wrong + 1}: expected {len(columns)} values separated by '::' "
            f"({', '.join(columns)}), got '{line[wrong][:80]}'"
        )
    return line.str.split_exact("::", len(columns) - 1).struct.rename_fields(columns).struct.unnest()


def _year(raw: Path, movies: pl.DataFrame) -> pl.Series:
    """The year in brackets after the title."""
    year = movies["Title"].str.extract(r"\((\d{4})\)\s*$").cast(pl.Int32)
    if year.null_count():
        title = movies["Title"].filter(year.is_null())[0]
        raise DataError(f"{raw}: ml-1m/movies.dat: Title: expected a year in brackets at the end, got '{title}'")
    return year


def release(year: pl.Series) -> pl.Series:
    """The period of release: 1919-1929, then decades, the last one with the year 2000."""
    decade = (year // 10 * 10).clip(1920, 1990)
    return decade.replace_strict({1920: "1919-1929", 1990: "1990-2000"}, default=decade.cast(pl.String) + "s")


def _check_rows(raw: Path, rows: pl.DataFrame, expected: Archive) -> None:
    for field in FIELDS:
        if missing := rows[field].null_count():
            raise DataError(f"{raw}: {field}: {missing:,} ratings name a user or movie that the archive does not list")
    got, known = (rows.height, int(rows["label"].sum())), (expected.rows, expected.positives)
    if got != known:
        raise DataError(
            f"{raw}: expected {known[0]:,} rows with {known[1]:,} positive labels, got {got[0]:,} with {got[1]:,}: "
            f"download ml-1m.zip again from {SOURCE}"
        )


def find_archive(raw: Path) -> Path:
    """ml-1m.zip itself, or in the folder that --download filled."""
    return raw / "ml-1m.zip" if raw.is_dir() else raw


def _prepare_job(job: Job) -> Outcome:
    """Both steps for `ctrbench prepare`."""
    counts = prepare(find_archive(job.raw), job.folder, file_format=job.file_format)
    files = {split: f"{split}.{job.file_format}" for split in counts}
    return Outcome(files, counts, positives=ML_1M.positives)


DATASET = Dataset(
    dataset_id="ML_1M",
    prepare=_prepare_job,
    raw="ml-1m.zip",
    source=SOURCE,
    terms="research use with citation, no redistribution, no commercial use",
    published=Published(PUBLISHED_ROWS, positives=ML_1M.positives),
    split="random 8:1:1, seed 2018 of our own; the published seed is unknown",
    size=5_917_549,
    remotes=(Remote("https://files.grouplens.org/datasets/movielens/ml-1m.zip", "ml-1m.zip", 5_917_549, ML_1M.md5),),
    default_format="csv",
    formats=("csv",),
)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Prepare MovieLens-1M.")
    parser.add_argument("--raw", type=Path, required=True, help=f"ml-1m.zip, from {SOURCE}")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the three files")
    parser.add_argument("--seed", type=int, default=2018, help="of the random split (the published one is unknown)")
    parser.add_argument("--format", choices=["csv", "parquet"], default="csv", dest="file_format")
    options = parser.parse_args(arguments)
    try:
        counts = prepare(options.raw, options.output, options.seed, options.file_format)
    except CtrbenchError as error:
        print(error, file=sys.stderr)
        return 2
    for split, count in counts.items():
        print(f"{options.output / split}.{options.file_format}: {count:,} rows (published: {PUBLISHED_ROWS[split]:,})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
