# SPDX-License-Identifier: Apache-2.0
"""ML_1M_AutoInt: the GroupLens archive -> the split of AutoInt's MovieLens-1M, which is reproducible to the row.

    ctrbench prepare ML_1M_AutoInt --raw PATH/ml-1m.zip

Labels as in ML_1M (ratings of 3 dropped: 739,012 rows, 575,281 positive), rows in the order of ratings.dat. Seven fields and
no ids: Gender, Age, Occupation, Zipcode, Release (1919-1929, the four decades from 1930 to 1969, then single years),
Timestamp (scaled to 0..1 over all rows) and Genres (up to 6, separated by '^').

Split: Python's random.seed(2019) and random.shuffle of the row numbers, cuts at int(0.8 n) and int(0.9 n). Source: the
preprocessing that the authors of AutoInt (CIKM 2019) released for this set.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import polars as pl

from ctrbench.datasets.description import Dataset, Job, Outcome, Published
from ctrbench.datasets.folds import eighty_ten_ten

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also for whoever loads this file by its path
import ml_1m

FIELDS = ("Gender", "Age", "Occupation", "Zipcode", "Release", "Timestamp", "Genres")
SPLITS = ("train", "valid", "test")
SEED = 2019


def read_rows(raw: Path, expected: ml_1m.Archive = ml_1m.ML_1M) -> pl.DataFrame:
    """`label` (Int8) and the seven fields (String; Timestamp Float64) of all rows in the order of ratings.dat."""
    rows = ml_1m.read_joined(raw, expected)
    year = rows["Year"]
    release = pl.select(
        pl.when(year >= 1970).then(year.cast(pl.String)).otherwise(ml_1m.release(year)).alias("Release")
    ).to_series()
    time = rows["Timestamp"].cast(pl.Float64)
    scaled = (time - time.min()) / ((time.max() - time.min()) or 1.0)
    return rows.with_columns(release, scaled.alias("Timestamp"), pl.col("Zip").alias("Zipcode")).select(
        "label", *FIELDS
    )


def shuffled(num_rows: int) -> list[int]:
    """The row numbers in the order that AutoInt's script cuts."""
    order = list(range(num_rows))
    random.Random(SEED).shuffle(order)
    return order


def prepare(job: Job, expected: ml_1m.Archive = ml_1m.ML_1M) -> Outcome:
    """Write the three splits."""
    rows = read_rows(ml_1m.find_archive(job.raw), expected)
    outcome = Outcome(positives=int(rows["label"].sum()))
    order, cuts = shuffled(rows.height), eighty_ten_ten(rows.height)
    for split, start, end in zip(SPLITS, cuts, cuts[1:], strict=False):
        part = rows[order[start:end]]
        name = outcome.files[split] = f"{split}.{job.file_format}"
        outcome.rows[split] = part.height
        path = job.folder / name
        part.write_csv(path) if job.file_format == "csv" else part.write_parquet(path)
    return outcome


DATASET = Dataset(
    dataset_id="ML_1M_AutoInt",
    prepare=prepare,
    raw="ml-1m.zip",
    source=ml_1m.SOURCE,
    terms=ml_1m.DATASET.terms,
    published=Published(ml_1m.PUBLISHED_ROWS, positives=ml_1m.ML_1M.positives),
    split="random 8:1:1, Python's random.seed(2019), reproducible to the row",
    size=ml_1m.DATASET.size,
    remotes=ml_1m.DATASET.remotes,
)
