# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import polars as pl
import pytest

from ctrbench.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("ml_1m", ROOT / "data" / "prepare" / "ml_1m.py")
ml_1m = importlib.util.module_from_spec(SPEC)
sys.modules["ml_1m"] = ml_1m  # dataclasses look their module up
SPEC.loader.exec_module(ml_1m)

RAW = Path(os.environ.get("CTRBENCH_RAW", ROOT.parent / "shared" / "data")) / "ml-1m" / "ml-1m.zip"
with_archive = pytest.mark.skipif(not RAW.is_file(), reason=f"MovieLens-1M is not at {RAW} (set CTRBENCH_RAW)")
MEMBERS = {
    "users.dat": "1::F::1::10::48067\n2::M::56::16::70072\n",
    "movies.dat": "1::Toy Story (1995)::Animation|Children's|Comedy\n2::Misérables, Les (1927)::Drama\n"
    "3::One: Two (Three) (2000)::A|B|C|D|E|F\n4::Psycho (1960)::Horror|Thriller\n",
    "ratings.dat": "1::1::5::978300760\n1::2::2::978302109\n2::3::4::978301968\n2::1::3::978300275\n2::4::1::9788\n",
}


@pytest.fixture
def archive(tmp_path):
    """Writes a zip in the archive's form, with some members replaced or (None) left out, and what to expect of it."""

    def write(rows=4, positives=2, **replaced):
        raw = tmp_path / "small.zip"
        with zipfile.ZipFile(raw, "w") as stream:
            for name, text in {**MEMBERS, **{f"{k}.dat": v for k, v in replaced.items()}}.items():
                if text is not None:
                    stream.writestr(f"ml-1m/{name}", text.encode("latin-1"))
        return raw, ml_1m.Archive(hashlib.md5(raw.read_bytes()).hexdigest(), rows, positives)

    return write


@with_archive
def test_published_rows_and_vocabularies(tmp_path):
    counts = ml_1m.prepare(RAW, tmp_path)
    assert counts == {"train": 591_209, "valid": 73_901, "test": 73_902} == ml_1m.PUBLISHED_ROWS
    splits = {split: pl.read_csv(tmp_path / f"{split}.csv", infer_schema=False) for split in counts}
    assert {split: frame.height for split, frame in splits.items()} == counts
    rows = pl.concat(splits.values())
    assert rows.columns == ["label", *ml_1m.FIELDS]
    assert rows["label"].cast(pl.Int64).sum() == 575_281
    train = splits["train"]
    published = {"UserID": 6042, "Gender": 4, "Age": 9, "Occupation": 23, "Release": 10}
    assert {field: train[field].n_unique() + 2 for field in published} == published
    assert train["MovieID"].n_unique() + 2 == pytest.approx(3643, abs=12)  # differs from split to split
    assert train["Genres"].str.split("^").explode().n_unique() + 2 == 20
    assert rows["Genres"].str.split("^").list.len().max() == 6
    assert sorted(train["Release"].unique()) == [
        "1919-1929", "1930s", "1940s", "1950s", "1960s", "1970s", "1980s", "1990-2000",
    ]  # fmt: skip


@with_archive
def test_seeds_and_formats(tmp_path):
    ml_1m.prepare(RAW, tmp_path / "a", seed=1)
    ml_1m.prepare(RAW, tmp_path / "b", seed=1, file_format="parquet")
    ml_1m.prepare(RAW, tmp_path / "c", seed=2)
    a, c = (pl.read_csv(tmp_path / folder / "test.csv", infer_schema=False) for folder in "ac")
    b = pl.read_parquet(tmp_path / "b" / "test.parquet")
    assert b.schema == {"label": pl.Int8, **dict.fromkeys(ml_1m.FIELDS, pl.String)}
    assert a.equals(b.cast(pl.String)) and not a.equals(c)


def test_a_small_archive(archive):
    rows = ml_1m.read_archive(*archive())
    assert rows.rows() == [
        (1, "1", "F", "1", "10", "1", "1990-2000", "Animation^Children's^Comedy"),
        (0, "1", "F", "1", "10", "2", "1919-1929", "Drama"),
        (1, "2", "M", "56", "16", "3", "1990-2000", "A^B^C^D^E^F"),
        (0, "2", "M", "56", "16", "4", "1960s", "Horror^Thriller"),
    ]


def test_windows_line_ends_and_no_final_one(archive):
    raw, expected = archive(users=MEMBERS["users.dat"].replace("\n", "\r\n"), movies=MEMBERS["movies.dat"].rstrip("\n"))
    assert ml_1m.read_archive(raw, expected).height == 4


def test_split_sizes(archive, tmp_path):
    raw, expected = archive(rows=10, positives=10, ratings="1::1::5::0\n" * 10)
    assert ml_1m.prepare(raw, tmp_path / "out", expected=expected) == {"train": 8, "valid": 1, "test": 1}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["test.csv", "train.csv", "valid.csv"]


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"ml-1m\.zip: no such file: download ml-1m\.zip from https://grouplens"):
        ml_1m.prepare(tmp_path / "ml-1m.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_checksum(archive, tmp_path):
    raw, actual = archive()
    with pytest.raises(DataError, match=f"its MD5 is {actual.md5}, expected {ml_1m.ML_1M.md5}: download .*grouplens"):
        ml_1m.prepare(raw, tmp_path / "out")


@pytest.mark.parametrize(
    "replaced, message",
    [
        ({"movies": None}, "ml-1m/movies.dat is missing in the archive"),
        ({"users": "1::F::1::10::48067\n2::M::56\n"}, "ml-1m/users.dat: line 2: expected 5 values .*got '2::M::56'"),
        ({"users": "1::F::1::10::1::0\n2::M::1::1::1\n"}, "ml-1m/users.dat: line 1: expected 5 values"),
        ({"ratings": ""}, "ml-1m/ratings.dat: line 1: expected 4 values"),
        ({"movies": "1::Toy Story::Comedy\n"}, "movies.dat: Title: expected a year in brackets at the end, got 'Toy"),
        ({"users": "1::F::1::10::48067\n"}, "Gender: 2 ratings name a user or movie that the archive does not list"),
        ({"rows": 5}, "expected 5 rows with 2 positive labels, got 4 with 2: download"),
    ],
)
def test_an_archive_of_another_form(archive, tmp_path, replaced, message):
    raw, expected = archive(**replaced)
    with pytest.raises(DataError, match=message):
        ml_1m.prepare(raw, tmp_path / "out", expected=expected)


def test_not_a_zip_archive(tmp_path):
    raw = tmp_path / "ml-1m.zip"
    raw.write_text("<html>")
    with pytest.raises(DataError, match="not a readable zip archive"):
        ml_1m.read_archive(raw, ml_1m.Archive(hashlib.md5(b"<html>").hexdigest(), 1, 1))


def test_unknown_format(tmp_path):
    with pytest.raises(DataError, match="--format must be csv or parquet, got 'npz'"):
        ml_1m.prepare(RAW, tmp_path, file_format="npz")


def test_command_line(tmp_path):
    command = [sys.executable, ROOT / "data" / "prepare" / "ml_1m.py", "--raw", tmp_path / "none.zip"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2 and "no such file" in done.stderr and "Traceback" not in done.stderr
