# SPDX-License-Identifier: Apache-2.0
"""KDD12: track 2 of KDD Cup 2012 -> a random 8:1:1 split; the published one is not available.

    ctrbench prepare KDD12 --raw track2.zip | FOLDER

Of the archive two files are read. training.txt has 149,639,105 lines of 12 numbers between tabs: clicks, impressions,
DisplayURL, AdID, AdvertiserID, Depth, Position, QueryID, KeywordID, TitleID, DescriptionID, UserID (0: not identified).
userid_profile.txt has a line for each user: UserID, Gender (0, 1, 2), Age (1 to 6).

Written are Click (1 for one click or more) and 13 fields; Gender and Age are joined by UserID. A row of a user without
profile is left out: the published splits have 141,371,038 rows together, 8,268,067 fewer than training.txt, which is how
this rule was inferred; `prepare` says whether the counts agree. Rows are assigned to the splits by seed 2018, cuts at
int(0.8 n) and int(0.9 n), and keep their order.

It takes two passes over training.txt. Memory: one byte per row, two bytes per user, and a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl

from ctrbench.datasets.archives import RawMember, find
from ctrbench.datasets.description import Dataset, Job, Outcome, Published
from ctrbench.datasets.folds import random_cuts
from ctrbench.datasets.lines import LineBlock, TextForm, read_lines
from ctrbench.datasets.writing import SplitText
from ctrbench.errors import DataError

SOURCE = "https://www.kaggle.com/c/kddcup2012-track2/data"
AGAIN = f"download track2.zip again from {SOURCE}"
RAW_COLUMNS = (
    "Click", "Impression", "DisplayURL", "AdID", "AdvertiserID", "Depth", "Position", "QueryID", "KeywordID", "TitleID",
    "DescriptionID", "UserID",
)  # fmt: skip
COLUMNS = (
    "Click", "Depth", "Position", "Impression", "DisplayURL", "AdID", "AdvertiserID", "QueryID", "KeywordID", "TitleID",
    "DescriptionID", "UserID", "Gender", "Age",
)  # fmt: skip
SPLITS = ("train", "valid", "test")
SEED = 2018
RAW_ROWS = 149_639_105
LARGEST_USER, MOST_CLICKS = 10**9, 10**9
_NONE = 255
_DIGITS = b"0123456789"


def prepare(job: Job) -> Outcome:
    """Join, split and write."""
    wanted = {name: (f"{name}.txt", f"{name}.txt.gz") for name in ("training", "userid_profile")}
    members = find(job.raw, wanted, AGAIN, ["track2.zip"])
    job.report(f"reading {members['userid_profile'].name}")
    profiles = read_profiles(members["userid_profile"])
    job.report(f"reading {members['training'].name}: the users")
    training = members["training"]
    is_known = np.concatenate([profiles[0][users] != _NONE for users in _users(training, len(profiles[0]), job)])
    if len(is_known) != RAW_ROWS and not job.is_sample:
        raise DataError(
            f"{training.name}: {len(is_known):,} lines, the complete file has {RAW_ROWS:,}: {AGAIN}, or pass --sample"
        )
    num_rows = int(is_known.sum())
    job.report(f"reading {training.name}: {num_rows:,} of {len(is_known):,} rows have a user with a profile")
    cuts = random_cuts(num_rows, SEED)
    first = kept = 0
    with SplitText(job, COLUMNS, {split: (split,) for split in SPLITS}) as splits:
        for block in _blocks(training, job):
            chosen = np.flatnonzero(is_known[first : first + block.num_lines])
            frame = _frame(block, RAW_COLUMNS)[chosen]
            users = frame["UserID"].cast(pl.Int64, strict=False).fill_null(LARGEST_USER).to_numpy()
            if first + block.num_lines > len(is_known) or (len(users) and users.max() >= len(profiles[0])):
                raise _changed(training)
            rows = _joined(frame, users, profiles)
            which = cuts[kept : kept + len(chosen)]
            for number, split in enumerate(SPLITS):
                part = rows.filter(which == number)
                splits.add(split, part.write_csv(include_header=False).encode(), part.height, int(part["Click"].sum()))
            first, kept = first + block.num_lines, kept + len(chosen)
        if first != len(is_known):
            raise _changed(training)
        outcome = splits.finish()
    outcome.notes.append(
        f"{len(is_known) - num_rows:,} of {len(is_known):,} raw rows left out: users without a profile"
    )
    return outcome


def read_profiles(member: RawMember) -> tuple[np.ndarray, np.ndarray]:
    """Gender and age by UserID, (largest id + 1,) uint8 each; 255 where there is no profile.

    Raises:
        DataError: a user is there twice, or a value is out of range.
    """
    gender, age = np.full(1, _NONE, np.uint8), np.full(1, _NONE, np.uint8)
    form = TextForm(("UserID", "Gender", "Age"), b"\t", has_header=False, alphabet=_DIGITS)
    for block in read_lines(member, form):
        frame = _frame(block, form.columns)
        users = _integers(member, block, frame, "UserID", LARGEST_USER)
        values = [_integers(member, block, frame, name, 99) for name in ("Gender", "Age")]
        if (missing := int(users.max()) + 1 - len(gender)) > 0:
            gender, age = (np.concatenate((old, np.full(missing, _NONE, np.uint8))) for old in (gender, age))
        is_repeated = (gender[users] != _NONE) | ~frame["UserID"].is_first_distinct().to_numpy()
        if is_repeated.any():
            row = int(is_repeated.argmax())
            raise DataError(
                f"{member.name}: line {block.first_line + row:,}: user {users[row]} is there twice: {AGAIN}"
            )
        gender[users], age[users] = values
    return gender, age


def _blocks(member: RawMember, job: Job) -> Iterator[LineBlock]:
    return read_lines(member, TextForm(RAW_COLUMNS, b"\t", has_header=False, alphabet=_DIGITS), job.report)


def _users(member: RawMember, num_users: int, job: Job) -> Iterator[np.ndarray]:
    """UserID of all rows, block by block; one beyond the profiles becomes 0, the user that is not identified."""
    for block in _blocks(member, job):
        frame = _frame(block, RAW_COLUMNS, [RAW_COLUMNS.index("Click"), RAW_COLUMNS.index("UserID")])
        _integers(member, block, frame, "Click", MOST_CLICKS)
        users = _integers(member, block, frame, "UserID", LARGEST_USER)
        yield np.where(users < num_users, users, 0)


def _frame(block: LineBlock, columns: tuple[str, ...], wanted: list[int] | None = None) -> pl.DataFrame:
    """The cells of a block as text."""
    schema = dict.fromkeys(columns, pl.String)
    return pl.read_csv(block.text, has_header=False, separator="\t", schema=schema, columns=wanted, quote_char=None)


def _integers(member: RawMember, block: LineBlock, frame: pl.DataFrame, column: str, most: int) -> np.ndarray:
    values = frame[column].cast(pl.Int64, strict=False)
    is_wrong = ~values.is_between(0, most).fill_null(False)
    if is_wrong.any():
        row = int(is_wrong.arg_max())
        got = frame[column][row] or ""
        raise DataError(
            f"{member.name}: line {block.first_line + row:,}, column '{column}': expected an integer from 0 to {most:,}, "
            f"got '{got}': {AGAIN}"
        )
    return values.to_numpy()


def _joined(frame: pl.DataFrame, users: np.ndarray, profiles: tuple[np.ndarray, np.ndarray]) -> pl.DataFrame:
    clicks = (frame["Click"].cast(pl.Int64) > 0).cast(pl.Int8)
    gender, age = (pl.Series(name, by_user[users]) for name, by_user in zip(("Gender", "Age"), profiles, strict=True))
    return frame.with_columns(clicks, gender, age).select(COLUMNS)


def _changed(training: RawMember) -> DataError:
    return DataError(f"{training.name}: it changed while it was read: run again when it is complete")


DATASET = Dataset(
    dataset_id="KDD12",
    prepare=prepare,
    raw="track2.zip of the KDD Cup, or a folder with its training.txt and userid_profile.txt",
    source=SOURCE,
    terms="Kaggle's competition rules",
    published=Published({"train": 113_096_830, "valid": 14_137_104, "test": 14_137_104}, is_exact=False),
    split="random 8:1:1, seed 2018 of our own; the published split and its seed are not available",
    size=10_600_000_000,
    account=f"sign in at {SOURCE}, accept the rules of the competition and download track2.zip",
)
