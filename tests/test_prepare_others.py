# SPDX-License-Identifier: Apache-2.0
"""AutoInt's ML-1M, Frappe_x1, MovielensLatest_x1, KDD12 and MicroLens_1M_x1 through `prepare`."""

from __future__ import annotations

import hashlib
import random
import sys
import zipfile

import numpy as np
import polars as pl
import pytest
import yaml
from conftest import ROOT

from ctrbench.datasets.catalog import find_dataset
from ctrbench.datasets.description import Job, Published
from ctrbench.datasets.preparation import prepare
from ctrbench.errors import ConfigError, DataError
from ctrbench.rawdata import RawReader
from ctrbench.schema import DatasetConfig

AUTOINT, ML_1M = find_dataset("ML_1M_AutoInt", ROOT), find_dataset("ML_1M", ROOT)
FRAPPE, MOVIELENS = find_dataset("Frappe_x1", ROOT), find_dataset("MovielensLatest_x1", ROOT)
KDD12, MICROLENS = find_dataset("KDD12", ROOT), find_dataset("MicroLens_1M_x1", ROOT)
SPLITS = ("train", "valid", "test")
autoint = sys.modules["ctrbench_prepare_ml_1m_autoint"]
kdd12 = sys.modules["ctrbench_prepare_kdd12"]
# The beginnings of the SHA-256 of the three files of ML_1M.
DIGESTS = {"train": "c7d517f770739f5f", "valid": "dba7c4bc4d9bb898", "test": "f4a553715530d7e9"}


def parquet(folder, split):
    return pl.read_parquet(folder / f"{split}.parquet")


def refused(tmp_path, dataset, raw, message, **options):
    """The one line of the error; nothing was written."""
    with pytest.raises(DataError, match=message) as error:
        prepare(dataset, raw, tmp_path / "out", **options)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


# --- AutoInt's MovieLens-1M


def small_archive(folder):
    members = {
        "users.dat": "1::F::1::10::48067\n2::M::56::16::55117-1\n",
        "movies.dat": "1::Toy Story (1995)::Animation|Comedy\n2::Old (1927)::Drama\n3::Two (2000)::A|B|C|D|E|F\n"
        "4::Mid (1969)::Horror\n5::First (1970)::War\n",
        "ratings.dat": "1::1::5::1000\n1::2::2::1100\n2::3::4::2000\n2::1::3::9000\n2::4::1::1500\n1::5::4::1250\n",
    }
    with zipfile.ZipFile(folder / "ml-1m.zip", "w") as archive:
        for name, text in members.items():
            archive.writestr(f"ml-1m/{name}", text)
    content = (folder / "ml-1m.zip").read_bytes()
    return folder / "ml-1m.zip", autoint.ml_1m.Archive(hashlib.md5(content).hexdigest(), rows=5, positives=3)


def test_the_fields_of_autoint(tmp_path):
    rows = autoint.read_rows(*small_archive(tmp_path))
    assert rows.columns == ["label", *autoint.FIELDS]
    # Single years from 1970 on; times run from 0 to 1 over the rows that are kept (the 3 at time 9000 is not).
    assert rows.rows() == [
        (1, "F", "1", "10", "48067", "1995", 0.0, "Animation^Comedy"),
        (0, "F", "1", "10", "48067", "1919-1929", 0.1, "Drama"),
        (1, "M", "56", "16", "55117-1", "2000", 1.0, "A^B^C^D^E^F"),
        (0, "M", "56", "16", "55117-1", "1960s", 0.5, "Horror"),
        (1, "F", "1", "10", "48067", "1970", 0.25, "War"),
    ]


def test_the_split_of_autoint(tmp_path):
    raw, expected = small_archive(tmp_path)
    (tmp_path / "out").mkdir()
    job = Job(raw, tmp_path / "out", "parquet", False, AUTOINT.published, print)
    outcome = autoint.prepare(job, expected)
    assert outcome.rows == {"train": 4, "valid": 0, "test": 1}
    order = list(range(5))
    random.seed(2019)
    random.shuffle(order)
    rows = autoint.read_rows(raw, expected)
    got = pl.concat([parquet(tmp_path / "out", split) for split in SPLITS])
    assert got.equals(rows[order])


def test_autoint_on_the_real_archive(tmp_path, raw_data):
    outcome = prepare(AUTOINT, raw_data / "ml-1m", tmp_path / "out")
    assert outcome.rows == {"train": 591_209, "valid": 73_901, "test": 73_902} and outcome.positives == 575_281
    rows = pl.concat([parquet(tmp_path / "out", split) for split in SPLITS])
    assert rows.height == 739_012 and rows["label"].sum() == 575_281
    # AutoInt's 3,529 features: these, the 18 genres, five empty places of the genres, and the timestamp.
    counts = {field: rows[field].n_unique() for field in ("Gender", "Age", "Occupation", "Zipcode", "Release")}
    assert counts == {"Gender": 2, "Age": 7, "Occupation": 21, "Zipcode": 3439, "Release": 36}
    assert rows["Genres"].str.split("^").explode().n_unique() == 18
    assert sum(counts.values()) + 18 + 5 + 1 == 3529
    assert (rows["Timestamp"].min(), rows["Timestamp"].max()) == (0.0, 1.0)
    order = list(range(739_012))
    random.Random(2019).shuffle(order)
    plain = autoint.read_rows(raw_data / "ml-1m" / "ml-1m.zip")
    for row in (0, 1, 591_208, 591_209, 665_109, 665_110, 739_011):
        assert rows.row(row) == plain.row(order[row])
    section = yaml.safe_load((ROOT / "config/dataset_config/ML_1M_AutoInt.yaml").read_text())["ML_1M_AutoInt"]
    reader = RawReader(DatasetConfig(dataset_id="ML_1M_AutoInt", **section))
    block = next(iter(reader.blocks([tmp_path / "out" / "test.parquet"], [*autoint.FIELDS, "label"])))
    assert block.frame["Timestamp"].dtype == pl.Float64 and block.frame["Genres"].dtype == pl.String


def test_ml_1m_comes_out_as_from_its_script(tmp_path, raw_data):
    raw = raw_data / "ml-1m" / "ml-1m.zip"
    outcome = prepare(ML_1M, raw, tmp_path / "out")
    assert set(outcome.files.values()) == {"train.csv", "valid.csv", "test.csv"}
    # The leaderboards name the hash of these files.
    digests = {split: hashlib.sha256((tmp_path / "out" / f"{split}.csv").read_bytes()).hexdigest() for split in SPLITS}
    assert {split: digest[:16] for split, digest in digests.items()} == DIGESTS
    with pytest.raises(ConfigError, match="ML_1M: it is kept as csv, not as parquet"):
        prepare(ML_1M, raw, tmp_path / "out", file_format="parquet")


def test_another_archive(tmp_path):
    raw, _ = small_archive(tmp_path)
    for dataset in (ML_1M, AUTOINT):
        refused(tmp_path, dataset, raw, "not the MovieLens-1M archive: its MD5 is")
        refused(tmp_path, dataset, tmp_path / "none.zip", "none.zip: no such file")


# --- libfm files


def libfm(folder, dataset, rows=((1, 1), (0, 2), (0, 3)), ending="libsvm", line_end="\n"):
    """Files whose ids are 100 * place + number; their CSV as the publisher would write it."""
    folder.mkdir(exist_ok=True)
    columns = dataset.prepare.__self__.columns
    text = "".join(f"{y} {' '.join(f'{100 * i + n}:1' for i in range(1, len(columns)))}{line_end}" for y, n in rows)
    csv = [
        ",".join(columns),
        *(",".join([str(y), *(str(100 * i + n) for i in range(1, len(columns)))]) for y, n in rows),
    ]
    for split in SPLITS:
        (folder / f"{split}.{ending}").write_text(text, newline="")
    return csv


@pytest.mark.parametrize("dataset, line_end", [(FRAPPE, "\r\n"), (MOVIELENS, "\n"), (MOVIELENS, "\r\n")])
def test_libfm_to_the_published_csv(tmp_path, dataset, line_end):
    csv = libfm(tmp_path / "raw", dataset)
    md5 = hashlib.md5("".join(line + line_end for line in csv).encode()).hexdigest()
    published = Published(dict.fromkeys(SPLITS, 3), dict.fromkeys(SPLITS, md5), dataset.published.line_end)
    outcome = prepare(dataset, tmp_path / "raw", tmp_path / "out", published=published, file_format="csv")
    assert outcome.md5 == published.md5 and outcome.positives == 3
    assert (tmp_path / "out" / "valid.csv").read_bytes() == "".join(line + line_end for line in csv).encode()
    # The published CSV files themselves are adopted, and give the same.
    again = prepare(dataset, tmp_path / "out", tmp_path / "adopted", published=published, file_format="csv")
    assert again.md5 == published.md5
    prepare(dataset, tmp_path / "raw", tmp_path / "parquet", published=published)
    frame = parquet(tmp_path / "parquet", "train")
    assert frame.rows() == [tuple(line.split(",")) for line in csv[1:]]


def test_hand_computed_rows_of_frappe(tmp_path):
    (tmp_path / "raw").mkdir()
    line = "-1 451:1 4149:1 5041:1 5046:1 5053:1 5055:1 5058:1 5060:1 5069:1 5149:1\n"
    for name in ("frappe.train.libfm", "frappe.validation.libfm", "frappe.test.libfm"):
        (tmp_path / "raw" / name).write_text(line + line.replace("-1 451", "1 7"))
    prepare(FRAPPE, tmp_path / "raw", tmp_path / "out", is_sample=True)
    frame = parquet(tmp_path / "out", "valid")
    assert frame.columns == ["label", "user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather",
                             "country", "city"]  # fmt: skip
    rest = ("4149", "5041", "5046", "5053", "5055", "5058", "5060", "5069", "5149")
    assert frame.rows() == [("0", "451", *rest), ("1", "7", *rest)]


@pytest.mark.parametrize(
    "line, message",
    [
        (
            "1 101:1 201:2 301:1",
            r"line 2: expected a label \(0, 1 or -1\) and cells such as 17:1, got '1 101:1 201:2 301:1'",
        ),
        ("2 101:1 201:1 301:1", r"line 2: expected a label .* got '2 101"),
        ("1 101 201:1 301:1", r"line 2: expected a label .* got '1 101 201"),
        ("01 101:1 201:1 301:1", r"line 2: expected a label .* got '01 101"),
        ("1 101:1 201:1", r"line 2 has 3 cells, expected 4"),
        ("1 101:1 201:1 301:1 ", r"line 2 has 5 cells, expected 4"),
        ("1,101,201,301", r"line 2 holds ',', which no cell"),
    ],
)
def test_libfm_of_another_form(tmp_path, line, message):
    libfm(tmp_path / "raw", MOVIELENS)
    (tmp_path / "raw" / "valid.libsvm").write_text(f"1 101:1 201:1 301:1\n{line}\n")
    refused(tmp_path, MOVIELENS, tmp_path / "raw", f"valid.libsvm: {message}", is_sample=True)


def test_neither_libfm_nor_csv(tmp_path):
    refused(
        tmp_path, FRAPPE, tmp_path, r"train.csv, valid.csv, test.csv is missing in this folder \(nor Frappe_x1.zip\)"
    )


# --- KDD12

TRAINING = "1\t{i}\t14340390157469404125\t{ad}\t23808\t2\t1\t{q}\t5521\t7709\t576\t{user}\n"
PROFILES = "490234\t1\t5\n7\t2\t3\n90\t0\t1\n"


def kdd(folder, training=None, profiles=PROFILES):
    folder.mkdir(exist_ok=True)
    if training is None:
        users = [490234, 0, 7, 90, 8]
        training = "".join(TRAINING.format(i=i + 1, ad=1000 + i, q=i, user=users[i % 5]) for i in range(50))
    (folder / "training.txt").write_text(training)
    (folder / "userid_profile.txt").write_text(profiles)
    return folder


def test_kdd12_joins_the_profiles(tmp_path):
    outcome = prepare(KDD12, kdd(tmp_path / "raw"), tmp_path / "out", is_sample=True)
    assert outcome.rows == {"train": 24, "valid": 3, "test": 3}  # 30 rows of users with a profile; 0 and 8 have none
    assert outcome.notes == ["20 of 50 raw rows left out: users without a profile"]
    frames = [parquet(tmp_path / "out", split) for split in SPLITS]
    rows = pl.concat(frames)
    assert rows.columns == ["Click", "Depth", "Position", "Impression", "DisplayURL", "AdID", "AdvertiserID", "QueryID",
                            "KeywordID", "TitleID", "DescriptionID", "UserID", "Gender", "Age"]  # fmt: skip
    tail = ("23808", "{}", "5521", "7709", "576")
    expected = {
        ("1", "2", "1", str(i + 1), "14340390157469404125", str(1000 + i), *(c.format(i) for c in tail), *profile)
        for i in range(50)
        for profile in [{0: ("490234", "1", "5"), 2: ("7", "2", "3"), 3: ("90", "0", "1")}.get(i % 5)]
        if profile
    }
    assert set(rows.rows()) == expected and rows.height == 30
    for frame in frames:  # rows keep their order
        assert frame["AdID"].cast(int).is_sorted()
    order = np.repeat(np.arange(3), [24, 3, 3]).astype(np.uint8)
    np.random.RandomState(2018).shuffle(order)
    known = [1000 + i for i in range(50) if i % 5 in (0, 2, 3)]
    assert frames[1]["AdID"].cast(int).to_list() == [ad for ad, split in zip(known, order, strict=True) if split == 1]


def test_kdd12_clicks_and_buckets(tmp_path):
    lines = "".join(f"{clicks}\t{v}\t5\t1\t1\t3\t1\t0\t1\t1\t1\t7\n" for clicks, v in [(0, 1), (3, 1000)] * 20)
    prepare(KDD12, kdd(tmp_path / "raw", lines), tmp_path / "out", is_sample=True)
    section = yaml.safe_load((ROOT / "config/dataset_config/KDD12.yaml").read_text())["KDD12"]
    reader = RawReader(DatasetConfig(dataset_id="KDD12", **section))
    wanted = ["Click", "Impression", "Depth", "QueryID", "Gender", "Age"]
    [block] = reader.blocks([tmp_path / "out" / "train.parquet"], wanted)
    # ln(1000)^2 = 47.7 and ln(3)^2 = 1.2; an id of 0 is a token like any other.
    assert {tuple(map(str, row)) for row in block.frame.rows()} == {
        ("0.0", "1", "1", "0", "2", "3"),
        ("1.0", "47", "1", "0", "2", "3"),
    }


def test_kdd12_from_its_archive(tmp_path):
    kdd(tmp_path / "raw")
    with zipfile.ZipFile(tmp_path / "track2.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("training.txt", "userid_profile.txt"):
            archive.write(tmp_path / "raw" / name, f"track2/{name}")
    prepare(KDD12, tmp_path / "raw", tmp_path / "a", is_sample=True)
    prepare(KDD12, tmp_path / "track2.zip", tmp_path / "b", is_sample=True)
    assert parquet(tmp_path / "a", "test").equals(parquet(tmp_path / "b", "test"))


def test_kdd12_counts(tmp_path, monkeypatch):
    refused(
        tmp_path, KDD12, kdd(tmp_path / "raw"), r"training.txt: 50 lines, the complete file has 149,639,105: download"
    )
    monkeypatch.setattr(kdd12, "RAW_ROWS", 50)
    outcome = prepare(KDD12, tmp_path / "raw", tmp_path / "out")  # the rule is inferred: other counts are no error
    assert outcome.warnings[0] == "train: 24 rows, published are 113,096,830"


@pytest.mark.parametrize("user", ["7", "99999"])
def test_a_training_file_that_grows_between_the_passes(tmp_path, user):
    raw = kdd(tmp_path / "raw")

    def grow(line):
        if "have a user with a profile" in line:
            with (raw / "training.txt").open("a") as file:
                file.write(TRAINING.format(i=1, ad=1, q=1, user=user))

    refused(tmp_path, KDD12, raw, r"training.txt: it changed while it was read: run again", is_sample=True, report=grow)


@pytest.mark.parametrize(
    "profiles, message",
    [
        ("7\t2\t3\n7\t2\t3\n", r"userid_profile.txt: line 2: user 7 is there twice"),
        ("7\t2\n", r"userid_profile.txt: line 1 has 2 cells, expected 3"),
        ("7\t2\t100\n", r"line 1, column 'Age': expected an integer from 0 to 99, got '100'"),
        ("\t2\t1\n", r"line 1, column 'UserID': expected an integer from 0 to 1,000,000,000, got ''"),
        ("UserID\tGender\tAge\n", r"userid_profile.txt: line 1 holds 'U', which no cell"),
        ("", r"userid_profile.txt: the file is empty"),
    ],
)
def test_profiles_of_another_form(tmp_path, profiles, message):
    refused(tmp_path, KDD12, kdd(tmp_path / "raw", profiles=profiles), message, is_sample=True)


def test_training_of_another_form(tmp_path):
    refused(
        tmp_path,
        KDD12,
        kdd(tmp_path / "raw", "1\t2\n"),
        r"training.txt: line 1 has 2 cells, expected 12",
        is_sample=True,
    )
    line = TRAINING.format(i=1, ad=1, q=1, user="99999999999")
    message = r"training.txt: line 1, column 'UserID': expected an integer from 0 to 1,000,000,000, got '99999999999'"
    refused(tmp_path, KDD12, kdd(tmp_path / "raw", line), message, is_sample=True)
    clickless = TRAINING.format(i=1, ad=1, q=1, user=7).removeprefix("1")
    message = r"training.txt: line 1, column 'Click': expected an integer"
    refused(tmp_path, KDD12, kdd(tmp_path / "raw", clickless), message, is_sample=True)
    refused(
        tmp_path,
        KDD12,
        kdd(tmp_path / "raw", TRAINING.format(i=1, ad=1, q=1, user=5)),
        "no row is left for train",
        is_sample=True,
    )


# --- MicroLens_1M_x1


@pytest.fixture(scope="module")
def challenge(tmp_path_factory):
    from conftest import load_script

    folder = tmp_path_factory.mktemp("mmctr")
    script = load_script(ROOT / "data" / "make_tiny.py")
    assert script.main(["--dataset", "tiny_mm", "--output", str(folder), "--rows", "600"]) in (0, None)
    return folder


def test_microlens_from_a_folder_and_an_archive(tmp_path, challenge):
    refused(tmp_path, MICROLENS, challenge, r"train: \d+ rows, published are 3,600,000")
    outcome = prepare(MICROLENS, challenge, tmp_path / "a", is_sample=True)
    assert set(outcome.files) == {"train", "valid", "test", "item_info"} and outcome.warnings
    with zipfile.ZipFile(tmp_path / "files.zip", "w") as archive:
        for name in outcome.files.values():
            archive.write(challenge / name, f"MicroLens_1M_x1/{name}")
    prepare(MICROLENS, tmp_path / "files.zip", tmp_path / "b", is_sample=True)
    for name in outcome.files.values():
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert not list((tmp_path / "b").glob("*raw*"))
    with pytest.raises(ConfigError, match="MicroLens_1M_x1: it is kept as parquet, not as csv"):
        prepare(MICROLENS, challenge, tmp_path / "c", file_format="csv")
    refused(tmp_path, MICROLENS, tmp_path, r"train.parquet, valid.parquet, test.parquet, item_info.parquet is missing")
