# SPDX-License-Identifier: Apache-2.0
"""Criteo_x4 and Avazu_x4 from raw files in the publishers' form, written here; KKBox_x1 and iPinYou_x1 from CSV files."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import random
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from conftest import ROOT

from ctrbench.datasets.catalog import find_dataset, load_catalog
from ctrbench.datasets.description import Published
from ctrbench.datasets.folds import stratified_folds
from ctrbench.datasets.preparation import prepare, read_record
from ctrbench.errors import DataError
from ctrbench.rawdata import RawReader
from ctrbench.schema import DatasetConfig

CRITEO, AVAZU = find_dataset("Criteo_x4", ROOT), find_dataset("Avazu_x4", ROOT)
KKBOX, IPINYOU = find_dataset("KKBox_x1", ROOT), find_dataset("iPinYou_x1", ROOT)
SPLITS = ("train", "valid", "test")


def published_of(folds, lines, header, line_end="\n"):
    """What a publisher would say of a split: the literal form of papers.md, with Python lists."""
    parts = {"test": [0], "valid": [1], "train": range(2, 10)}
    rows, md5 = {}, {}
    for split in SPLITS:
        chosen = [line for fold in parts[split] for line, f in zip(lines, folds, strict=True) if f == fold]
        rows[split] = len(chosen)
        md5[split] = hashlib.md5("".join(line + line_end for line in [header, *chosen]).encode()).hexdigest()
    return Published(rows, md5)


def plain_folds(labels):
    """Stratified folds as scikit-learn 0.19.1 made them, row by row."""
    folds = [-1] * len(labels)
    for label in sorted(set(labels)):
        members = [i for i, other in enumerate(labels) if other == label]
        order = np.arange(len(members))
        np.random.RandomState(2018).shuffle(order)
        start = 0
        for fold in range(10):
            size = len(members) // 10 + (fold < len(members) % 10)
            for place in order[start : start + size]:
                folds[members[place]] = fold
            start += size
    return folds


def criteo_lines(rows, seed=0):
    rng = random.Random(seed)
    lines = []
    for _ in range(rows):
        numbers = [rng.choice(["", "-1", "0", "1", "2", "3", str(rng.randrange(10_000))]) for _ in range(13)]
        tokens = [rng.choice(["", f"{rng.randrange(2**32):08x}"]) for _ in range(26)]
        lines.append([str(int(rng.random() < 0.3)), *numbers, *tokens])
    return lines


def avazu_lines(rows, seed=0):
    rng = random.Random(seed)
    columns = AVAZU.prepare.__self__.columns
    return [
        [
            f"{rng.randrange(10**19)}",
            str(int(rng.random() < 0.2)),
            "14102100",
            *(f"{rng.randrange(999):x}" for _ in columns[3:]),
        ]
        for _ in range(rows)
    ]


def write(path, lines, separator, header=None, line_end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(separator.join(line) + line_end for line in ([header] if header else []) + lines)
    path.write_bytes(text.encode())
    return path


def config_of(dataset_id, folder):
    section = yaml.safe_load((ROOT / "config" / "dataset_config" / f"{dataset_id}.yaml").read_text())[dataset_id]
    for key in ("train_data", "valid_data", "test_data"):
        section[key] = str(folder / Path(section[key]).name)
    return DatasetConfig(dataset_id=dataset_id, **section)


def prepared(folder, split):
    return pl.read_parquet(folder / f"{split}.parquet")


def refused(tmp_path, dataset, raw, message, **options):
    """The one line of the error; nothing was written."""
    with pytest.raises(DataError, match=message) as error:
        prepare(dataset, raw, tmp_path / "out", **options)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_folds_are_those_of_the_plain_form():
    for rows in (10, 37, 1000):
        labels = [int(x) for x in np.random.RandomState(rows).rand(rows) < 0.3]
        assert stratified_folds(np.array(labels, np.uint8)).tolist() == plain_folds(labels)


def test_the_folds_of_ten_rows():
    # RandomState(2018).permutation(10) is 8 9 5 0 7 2 4 3 1 6, so row 8 is in fold 0, row 9 in fold 1, and so on.
    order = np.arange(10)
    np.random.RandomState(2018).shuffle(order)
    assert stratified_folds(np.zeros(10, np.uint8)).tolist() == np.argsort(order).tolist()


@pytest.mark.parametrize("file_format", ["parquet", "csv"])
def test_criteo_is_rebuilt_byte_for_byte(tmp_path, file_format):
    lines = criteo_lines(3000)
    raw = write(tmp_path / "train.txt", lines, "\t")
    columns = CRITEO.prepare.__self__.columns
    assert columns[:3] == ("Label", "I1", "I2") and columns[13:15] == ("I13", "C1") and len(columns) == 40
    published = published_of(
        plain_folds([int(line[0]) for line in lines]), [",".join(x) for x in lines], ",".join(columns)
    )
    outcome = prepare(CRITEO, raw, tmp_path / "out", file_format=file_format, published=published)
    assert outcome.rows == published.rows and outcome.md5 == published.md5 and not outcome.warnings
    assert outcome.positives == sum(line[0] == "1" for line in lines)
    if file_format == "csv":
        assert {
            s: hashlib.md5((tmp_path / "out" / f"{s}.csv").read_bytes()).hexdigest() for s in SPLITS
        } == published.md5
        return
    frame = pl.concat([prepared(tmp_path / "out", split) for split in SPLITS])
    assert frame.schema == dict.fromkeys(columns, pl.String)
    assert sorted(frame.fill_null("").rows()) == sorted(tuple(line) for line in lines)
    assert read_record(tmp_path / "out")["is_published_split"] is True


def test_criteo_through_its_configuration(tmp_path):
    """Bucket edges: floor(ln(v)^2) above 2, else v; a missing number is 0, a missing category ''."""
    numbers = ["", "-2", "0", "1", "2", "3", "7", "8", "20", "21", "1000", "65535", "4"]
    # ln(3)^2 = 1.2, ln(7)^2 = 3.8, ln(8)^2 = 4.3, ln(20)^2 = 8.97, ln(21)^2 = 9.27, ln(1000)^2 = 47.7, ln(65535)^2 = 122.99
    buckets = ["0", "-2", "0", "1", "2", "1", "3", "4", "8", "9", "47", "122", "1"]
    lines = [["0", *numbers, *["", "68fd1e64"] * 13] for _ in range(20)]
    prepare(CRITEO, write(tmp_path / "train.txt", lines, "\t"), tmp_path / "out", is_sample=True)
    config = config_of("Criteo_x4", tmp_path / "out")
    reader = RawReader(config)
    [block] = reader.blocks(
        [tmp_path / "out" / "valid.parquet"], [*(f"I{i}" for i in range(1, 14)), "C1", "C2", "Label"]
    )
    assert block.frame.height == 2 and config.data_format == "parquet"
    row = block.frame.row(0)
    assert [str(value) for value in row[:13]] == buckets
    assert row[13:] == ("", "68fd1e64", 0.0)


def test_avazu_is_rebuilt_byte_for_byte(tmp_path):
    lines, columns = avazu_lines(2000), AVAZU.prepare.__self__.columns
    published = published_of(
        plain_folds([int(line[1]) for line in lines]), [",".join(x) for x in lines], ",".join(columns)
    )
    plain = write(tmp_path / "train.csv", lines, ",", columns)
    packed = tmp_path / "train.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    nested = tmp_path / "kaggle" / "avazu-ctr-prediction.zip"
    nested.parent.mkdir()
    with zipfile.ZipFile(nested, "w") as archive:
        archive.writestr("train.gz", packed.read_bytes())
        archive.writestr("test.gz", b"x")
    for number, raw in enumerate((plain, packed, nested, nested.parent)):
        outcome = prepare(AVAZU, raw, tmp_path / f"out{number}", published=published)
        assert outcome.md5 == published.md5
    assert prepared(tmp_path / "out0", "test").equals(prepared(tmp_path / "out3", "test"))
    assert prepared(tmp_path / "out0", "test").columns == list(columns)


def test_avazu_through_its_configuration(tmp_path):
    columns = AVAZU.prepare.__self__.columns
    # 21 October 2014, 0 h, is a Tuesday; 25 October 2014, 23 h, a Saturday.
    lines = [["1", "0", hour, *["5"] * 21] for hour in ["14102100"] * 10 + ["14102523"] * 10]
    prepare(AVAZU, write(tmp_path / "train.csv", lines, ",", columns), tmp_path / "out", is_sample=True)
    reader = RawReader(config_of("Avazu_x4", tmp_path / "out"))
    seen = set()
    for split in SPLITS:
        for block in reader.blocks([tmp_path / "out" / f"{split}.parquet"], ["hour", "weekday", "weekend", "C1"]):
            seen |= set(block.frame.rows())
    assert {tuple(map(str, row)) for row in seen} == {("0", "2", "0", "5"), ("23", "6", "1", "5")}


def test_the_published_csv_files_are_adopted(tmp_path):
    lines, columns = criteo_lines(40), CRITEO.prepare.__self__.columns
    raw = tmp_path / "raw"
    md5 = {}
    for split, part in zip(SPLITS, (lines[:30], lines[30:35], lines[35:]), strict=True):
        md5[split] = hashlib.md5(write(raw / f"{split}.csv", part, ",", columns).read_bytes()).hexdigest()
    published = Published({"train": 30, "valid": 5, "test": 5}, md5)
    outcome = prepare(CRITEO, raw, tmp_path / "out", published=published)
    assert outcome.md5 == md5
    assert prepared(tmp_path / "out", "valid").fill_null("").rows() == [tuple(line) for line in lines[30:35]]
    with zipfile.ZipFile(tmp_path / "Criteo_x4.zip", "w") as archive:
        for split in SPLITS:
            archive.write(raw / f"{split}.csv", f"Criteo_x4/{split}.csv")
    prepare(CRITEO, tmp_path / "Criteo_x4.zip", tmp_path / "zipped", published=published)
    assert (tmp_path / "zipped" / "train.parquet").read_bytes() == (tmp_path / "out" / "train.parquet").read_bytes()


def test_the_challenge_archive_of_criteo(tmp_path):
    lines = criteo_lines(60)
    plain = write(tmp_path / "train.txt", lines, "\t")
    with tarfile.open(tmp_path / "dac.tar.gz", "w:gz") as archive:
        archive.add(plain, "./train.txt")
    first = prepare(CRITEO, plain, tmp_path / "a", is_sample=True)
    assert prepare(CRITEO, tmp_path / "dac.tar.gz", tmp_path / "b", is_sample=True).md5 == first.md5


def test_windows_line_ends_and_a_byte_order_mark_make_no_difference(tmp_path):
    lines, columns = avazu_lines(200), AVAZU.prepare.__self__.columns
    raw = write(tmp_path / "train.csv", lines, ",", columns)
    expected = prepare(AVAZU, raw, tmp_path / "a", is_sample=True).md5
    write(raw, lines, ",", columns, "\r\n")
    raw.write_bytes(b"\xef\xbb\xbf" + raw.read_bytes().removesuffix(b"\r\n"))
    assert prepare(AVAZU, raw, tmp_path / "b", is_sample=True).md5 == expected


def test_published_with_windows_line_ends(tmp_path):
    """The MD5 of either line end is the published one, and CSV is written with those."""
    lines, columns = avazu_lines(100), AVAZU.prepare.__self__.columns
    folds = plain_folds([int(line[1]) for line in lines])
    published = published_of(folds, [",".join(x) for x in lines], ",".join(columns), "\r\n")
    raw = write(tmp_path / "train.csv", lines, ",", columns)
    outcome = prepare(AVAZU, raw, tmp_path / "out", published=published, file_format="csv")
    assert outcome.md5 == published.md5 and b"\r\n" in (tmp_path / "out" / "test.csv").read_bytes()


def kkbox(folder, artist='"Adele, and ""friends"""', more=("song_length",)):
    columns = [*KKBOX.prepare.__self__.columns, *more]
    for split in SPLITS:
        rows = [
            ["1", "7", "8", "tab", "", "radio", "13", "0", "female", "9", "465", artist, "3.0", "GBBKS1600007", "200"],
            ["0", "7", "9", "tab", "", "radio", "13", "27", "", "9", "465 | 458", "周杰倫", "3.0", "", "200"],
        ]
        write(folder / f"{split}.csv", rows, ",", columns)
    return folder


def test_kkbox_is_adopted_with_its_quoted_cells(tmp_path):
    outcome = prepare(KKBOX, kkbox(tmp_path / "raw"), tmp_path / "out", is_sample=True)
    assert outcome.rows == {"train": 2, "valid": 2, "test": 2} and outcome.positives == 3
    reader = RawReader(config_of("KKBox_x1", tmp_path / "out"))
    [block] = reader.blocks(
        [tmp_path / "out" / "train.parquet"], ["isrc", "bd", "artist_name", "gender", "source_screen_name"]
    )
    # The country of the ISRC; ages outside 1..95 are empty, 27 is in the third decade.
    assert block.frame.rows() == [
        ("GB", "", 'Adele, and "friends"', "female", ""),
        ("", "3", "周杰倫", "", ""),
    ]
    assert prepared(tmp_path / "out", "train")["song_length"].to_list() == ["200", "200"]


def test_kkbox_as_csv_keeps_every_byte(tmp_path):
    raw = kkbox(tmp_path / "raw")
    prepare(KKBOX, raw, tmp_path / "out", is_sample=True, file_format="csv")
    assert (tmp_path / "out" / "train.csv").read_bytes() == (raw / "train.csv").read_bytes()


@pytest.mark.parametrize(
    "artist, message",
    [
        ('"Adele', r"train.csv: line 2 has a quote that is not closed"),
        ('"Adele"x', r"train.csv: line 2 has a quote that is not closed, or text beside one"),
        ('"A",B', r"train.csv: line 2 has 16 cells, expected 15"),
        ("A,B", r"train.csv: line 2 has 16 cells, expected 15"),
    ],
)
def test_wrong_quotes(tmp_path, artist, message):
    refused(tmp_path, KKBOX, kkbox(tmp_path / "raw", artist), message, is_sample=True)


def test_ipinyou_has_no_validation_file(tmp_path):
    columns = [*IPINYOU.prepare.__self__.columns, "bidid"]
    rows = [["0", "6", "00", "180.127.189.*", "80", "87", "1", "tFKETuqyMo1mjMp45SqfNX", "mm_1", "300", "250", "2", "1",
             "00fccc64a1ee2809348509b7ac2a97a5", "2259", "windows_ie", "0", "x"]]  # fmt: skip
    for split in ("train", "test"):
        write(tmp_path / "raw" / f"{split}.csv", rows * 3, ",", columns)
    outcome = prepare(IPINYOU, tmp_path / "raw", tmp_path / "out", is_sample=True)
    assert outcome.rows == {"train": 3, "test": 3} and set(outcome.files) == {"train", "test"}
    config = config_of("iPinYou_x1", tmp_path / "out")
    assert config.valid_data == config.test_data
    wanted = [column.name for column in config.feature_cols]
    [block] = RawReader(config).blocks([Path(config.train_data)], [*wanted, "click"])
    assert block.frame.row(0) == (*rows[0][1:17], 0.0)


def test_what_differs_from_the_published_split(tmp_path):
    raw = write(tmp_path / "train.txt", criteo_lines(50), "\t")
    refused(
        tmp_path,
        CRITEO,
        raw,
        r"train: \d\d rows, published are 36,672,493; the MD5 of the CSV is \w{32}, published is 4a53",
    )
    outcome = prepare(CRITEO, raw, tmp_path / "out", is_sample=True)
    assert len(outcome.warnings) == 3 and read_record(tmp_path / "out")["is_published_split"] is False


def test_a_matching_md5_proves_the_rows(tmp_path):
    """Tables of publishers have typing errors; bytes have none."""
    lines, columns = avazu_lines(50), AVAZU.prepare.__self__.columns
    published = published_of(
        plain_folds([int(line[1]) for line in lines]), [",".join(x) for x in lines], ",".join(columns)
    )
    published = dataclasses.replace(published, rows={**published.rows, "valid": 1})
    assert not prepare(
        AVAZU, write(tmp_path / "t.csv", lines, ",", columns), tmp_path / "out", published=published
    ).warnings


def changed(lines, row, column, value):
    lines = [list(line) for line in lines]
    lines[row][column] = value
    return lines


@pytest.mark.parametrize(
    "content, message",
    [
        (lambda lines: [*lines[:3], lines[3][:-1], *lines[4:]], r"line 4 has 39 cells, expected 40: '"),
        (
            lambda lines: [*lines[:3], [*lines[3], "x"], *lines[4:]],
            r"line 4 holds 'x', which no cell of the publisher's file",
        ),
        (lambda lines: [*lines[:3], [*lines[3], "0"], *lines[4:]], r"line 4 has 41 cells, expected 40"),
        (lambda lines: [*lines[:3], [""], *lines[3:]], r"line 4 is empty"),
        (lambda lines: changed(lines, 4, 0, "2"), r"line 5, column 'Label': expected 0 or 1, got '2'"),
        (lambda lines: changed(lines, 4, 0, ""), r"line 5, column 'Label': expected 0 or 1, got ''"),
        (lambda lines: changed(lines, 4, 0, "10"), r"line 5, column 'Label': expected 0 or 1, got '10'"),
        (lambda lines: changed(lines, 4, 15, '"68fd1e64"'), r"line 5 holds a quote, and the publisher's file has none"),
        (lambda lines: changed(lines, 4, 15, "68fd\0e64"), r"line 5 holds a NUL byte"),
        (lambda lines: changed(lines, 4, 15, "a\rb"), r"line 5 holds a carriage return inside"),
        (lambda lines: changed(lines, 4, 15, "Zürich"), r"line 5 holds 'Z', which no cell"),
        (lambda lines: changed(lines, 4, 15, "ü"), r"line 5 holds 'ü', which no cell"),
        (lambda lines: [[*line[1:], line[0]] for line in lines], r"line 1, column 'Label': expected 0 or 1"),
        (lambda lines: lines[:1], r"no row is left for train: too few rows to split"),
    ],
)
def test_lines_of_another_form(tmp_path, content, message):
    lines = [line if line[0] == "0" else ["0", *line[1:]] for line in criteo_lines(12)]
    raw = write(tmp_path / "train.txt", content(lines), "\t")
    refused(tmp_path, CRITEO, raw, message, is_sample=True)


def test_text_that_is_not_utf8(tmp_path):
    raw = write(tmp_path / "train.txt", criteo_lines(12), "\t")
    raw.write_bytes(raw.read_bytes().replace(b"\n", b"\xe9\n", 1))
    refused(tmp_path, CRITEO, raw, r"train.txt: line 1 holds bytes that are not UTF-8", is_sample=True)
    raw.write_bytes("0\t1\n".encode("utf-16"))
    refused(tmp_path, CRITEO, raw, r"train.txt: the text is UTF-16, not UTF-8", is_sample=True)


@pytest.mark.parametrize(
    "header, message",
    [
        (
            lambda c: [c[0], c[2], c[1], *c[3:]],
            r"header: the columns are in another order: column 2 is 'hour', expected 'click'",
        ),
        (lambda c: [*c[:5], c[4], *c[6:]], r"header: it names 'banner_pos' twice"),
        (lambda c: [*c[:5], "site", *c[6:]], r"header: column 'site_id' is missing \(did you mean 'site'\?\)"),
        (lambda c: [*c, "more"], r"header: unknown column 'more'"),
        (lambda c: ["1", "0", *["5"] * 22], r"header: it names '5' twice"),
    ],
)
def test_headers_of_another_form(tmp_path, header, message):
    columns = AVAZU.prepare.__self__.columns
    raw = write(tmp_path / "train.csv", avazu_lines(30), ",", header(list(columns)))
    refused(tmp_path, AVAZU, raw, message, is_sample=True)


def test_files_that_are_missing_or_empty(tmp_path):
    refused(
        tmp_path,
        AVAZU,
        tmp_path / "none.csv",
        r"none.csv: no such file or folder: download it again from https://www.kaggle",
    )
    (tmp_path / "raw").mkdir()
    refused(
        tmp_path, AVAZU, tmp_path / "raw", r"raw: train.csv is missing in this folder \(nor avazu-ctr-prediction.zip or"
    )
    (tmp_path / "raw" / "train.csv").touch()
    refused(tmp_path, AVAZU, tmp_path / "raw", r"train.csv: the file is empty")
    (tmp_path / "raw" / "train.csv").write_bytes(b"\n\n")
    refused(tmp_path, AVAZU, tmp_path / "raw", r"train.csv: the file is empty")
    write(tmp_path / "raw" / "train.csv", [], ",", AVAZU.prepare.__self__.columns)
    refused(tmp_path, AVAZU, tmp_path / "raw", r"train.csv: there are no rows below the header")
    refused(
        tmp_path, KKBOX, tmp_path / "raw" / "train.csv", r"expected a folder or a zip archive with train.csv, valid.csv"
    )


def test_splits_with_other_columns(tmp_path):
    raw = kkbox(tmp_path / "raw")
    kkbox(tmp_path / "other", more=("song_size",))
    (tmp_path / "other" / "test.csv").replace(raw / "test.csv")
    refused(tmp_path, KKBOX, raw, r"test.csv: header: other columns than in train.csv", is_sample=True)


def test_truncated_archives(tmp_path):
    lines, columns = avazu_lines(3000), AVAZU.prepare.__self__.columns
    text = write(tmp_path / "train.csv", lines, ",", columns).read_bytes()
    packed = tmp_path / "train.gz"
    packed.write_bytes(gzip.compress(text)[:-5000])
    refused(tmp_path, AVAZU, packed, r"train.gz: truncated or damaged \(Compressed file ended", is_sample=True)
    broken = bytearray(gzip.compress(text))
    broken[-8] ^= 1
    packed.write_bytes(broken)
    refused(tmp_path, AVAZU, packed, r"train.gz: truncated or damaged \(CRC check failed", is_sample=True)
    packed.write_bytes(b"<html>")
    refused(tmp_path, AVAZU, packed, r"train.gz: truncated or damaged \(Not a gzipped file", is_sample=True)
    archive = tmp_path / "train.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as stream:
        stream.writestr("train.csv", text)
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-100])
    refused(tmp_path, AVAZU, archive, r"train.zip: not a readable zip archive, or a truncated one", is_sample=True)
    archive.write_bytes(whole[:5000] + bytes([whole[5000] ^ 255]) + whole[5001:])
    refused(tmp_path, AVAZU, archive, r"train.zip: train.csv: truncated or damaged", is_sample=True)


def zipped(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def test_archives_that_point_outside_or_to_links(tmp_path):
    raw = zipped(tmp_path / "a.zip", [("../../train.csv", "x")])
    refused(tmp_path, AVAZU, raw, r"a.zip: it holds '../../train.csv', which points outside of the archive: not read")
    raw = zipped(tmp_path / "b.zip", [("train.csv", "x"), ("C:\\other", "x")])
    refused(tmp_path, AVAZU, raw, r"b.zip: it holds 'C:.*', which points outside")
    link = zipfile.ZipInfo("train.csv")
    link.external_attr = 0o120777 << 16
    refused(tmp_path, AVAZU, zipped(tmp_path / "c.zip", [(link, "/etc/passwd")]), r"c.zip: train.csv is a link")
    raw = zipped(tmp_path / "d.zip", [("a/train.csv", "x"), ("b/train.csv", "x")])
    refused(tmp_path, AVAZU, raw, r"d.zip: the archive holds train.csv twice \(a/train.csv, b/train.csv\)")
    refused(tmp_path, AVAZU, zipped(tmp_path / "e.zip", [("train.csv", "")]), r"e.zip: train.csv: the file is empty")
    refused(
        tmp_path, AVAZU, zipped(tmp_path / "f.zip", [("x.csv", "x")]), r"f.zip: train.csv is missing in the archive"
    )


@pytest.mark.parametrize(
    "name, kind, message",
    [
        ("/elsewhere/train.txt", tarfile.REGTYPE, r"it holds '/elsewhere/train.txt', which points outside"),
        ("../train.txt", tarfile.REGTYPE, r"it holds '../train.txt', which points outside"),
        ("train.txt", tarfile.SYMTYPE, r"train.txt is a link or not a plain file"),
        ("train.txt", tarfile.LNKTYPE, r"train.txt is a link or not a plain file"),
        ("train.txt", tarfile.FIFOTYPE, r"train.txt is a link or not a plain file"),
        ("other.txt", tarfile.REGTYPE, r"train.txt is missing in the archive"),
    ],
)
def test_tar_archives_of_another_form(tmp_path, name, kind, message):
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, "/etc/passwd", 4 * (kind == tarfile.REGTYPE)
    with tarfile.open(tmp_path / "dac.tar.gz", "w:gz") as archive:
        archive.addfile(member, io.BytesIO(b"0\t1\n"))
    refused(tmp_path, CRITEO, tmp_path / "dac.tar.gz", rf"dac.tar.gz: {message}", is_sample=True)


def test_a_truncated_tar_archive(tmp_path):
    raw = write(tmp_path / "train.txt", criteo_lines(2000), "\t")
    with tarfile.open(tmp_path / "dac.tar.gz", "w:gz") as archive:
        archive.add(raw, "train.txt")
    whole = (tmp_path / "dac.tar.gz").read_bytes()
    (tmp_path / "dac.tar.gz").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, CRITEO, tmp_path / "dac.tar.gz", r"dac.tar.gz: train.txt: truncated or damaged", is_sample=True)


def test_small_blocks_give_the_same(tmp_path, monkeypatch):
    lines, columns = avazu_lines(500), AVAZU.prepare.__self__.columns
    raw = write(tmp_path / "train.csv", lines, ",", columns, "\r\n")
    expected = prepare(AVAZU, raw, tmp_path / "a", is_sample=True)
    reader = __import__("ctrbench.datasets.lines", fromlist=["x"])
    monkeypatch.setattr(reader.LineReader.__init__, "__defaults__", (97,))
    assert prepare(AVAZU, raw, tmp_path / "b", is_sample=True) == expected
    write(raw, [*lines[:300], lines[300][:-1]], ",", columns)
    refused(tmp_path, AVAZU, raw, r"line 302 has 23 cells, expected 24", is_sample=True)


def test_every_dataset_has_a_configuration_that_reads_what_is_written():
    for dataset_id, dataset in load_catalog(ROOT).items():
        section = yaml.safe_load((ROOT / "config" / "dataset_config" / f"{dataset_id}.yaml").read_text())[dataset_id]
        assert section["data_format"] == dataset.default_format, dataset_id
        for split in ("train", "valid", "test"):
            name = split if split in dataset.published.rows else "test"
            assert section[f"{split}_data"] == f"./data/raw/{dataset_id}/{name}.{dataset.default_format}"
