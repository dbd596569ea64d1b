# SPDX-License-Identifier: Apache-2.0
"""What `ctrbench inspect` counts, checked against plain forms, and the leaks that it must see."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from ctrbench.cli import main
from ctrbench.dataset_lookup import encoded_in
from ctrbench.export import export_dataset
from ctrbench.inspection.measure import inspect_source
from ctrbench.inspection.opening import inspect_dataset
from ctrbench.inspection.page import render_page
from ctrbench.inspection.records import Field, Inspection
from ctrbench.inspection.sources import RawSource
from ctrbench.inspection.tally import DenseTally, SparseTally, auc_alone, auc_of_groups, row_hashes
from ctrbench.inspection.text import share_text, table, to_text
from ctrbench.preprocess import build_dataset
from ctrbench.schema import DatasetConfig


def field(found: Inspection, name: str) -> Field:
    return next(f for f in found.fields if f.name == name)


def warnings(found: Inspection) -> list[str]:
    return [f.text for f in found.findings if f.level == "warning"]


def clicks(count: int, first: int = 0, seed: int = 0) -> pl.DataFrame:
    """Rows whose label depends on nothing."""
    random = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "user": [f"u{i}" for i in random.integers(0, 40, count)],
            "price": pl.Series(
                np.where(random.random(count) < 0.1, np.nan, random.normal(size=count).round(6))
            ).fill_nan(None),
            "tags": ["^".join(f"t{i}" for i in random.integers(0, 20, random.integers(0, 6))) for _ in range(count)],
            "impression": [f"i{first + i}" for i in range(count)],
            "click": random.integers(0, 2, count),
        }
    )


def write(folder: Path, **frames: pl.DataFrame) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, frame in frames.items():
        frame.write_csv(folder / f"{split}.csv")
    return folder


SECTION = {
    "dataset_id": "clicks",
    "data_root": "data",
    "feature_cols": [
        {"name": "user", "dtype": "str", "type": "categorical", "min_categr_count": 3},
        {"name": "price", "dtype": "float", "type": "numeric"},
        {"name": "tags", "dtype": "str", "type": "sequence", "max_len": 4},
        {"name": "impression", "dtype": "str", "type": "meta"},
    ],
    "label_col": {"name": "click", "dtype": "float"},
}


def build(root: Path, **frames: pl.DataFrame) -> Path:
    """The folder of a dataset that is built here; its section is in `root`'s configuration."""
    write(root, **frames)
    section = {**SECTION, **{f"{split}_data": f"{split}.csv" for split in frames}}
    (root / "model_zoo").mkdir()
    (root / "config" / "dataset_config").mkdir(parents=True)
    stored = {key: value for key, value in section.items() if key != "dataset_id"}
    (root / "config" / "dataset_config" / "clicks.yaml").write_text(json.dumps({"clicks": stored}))
    return build_dataset(DatasetConfig.model_validate(section), root=root).path


# ---------------------------------------------------------------- counts


def test_tallies_against_a_plain_form() -> None:
    random = np.random.default_rng(0)
    values, labels = random.integers(0, 50, 3000), random.integers(0, 2, 3000).astype(float)
    dense, sparse = DenseTally(60), SparseTally()
    for start in range(0, 3000, 700):
        for tally in (dense, sparse):
            tally.add(values[start : start + 700], labels[start : start + 700])
    for tally in (dense, sparse):
        assert tally.keys.tolist() == sorted(set(values.tolist()))
        for key, rows, positives in zip(tally.keys, tally.rows, tally.positives, strict=True):
            assert rows == (values == key).sum() and positives == labels[values == key].sum()
    assert len(SparseTally().keys) == 0 and auc_alone(SparseTally(), dense) is None


@pytest.mark.parametrize("kind", [lambda: DenseTally(30), SparseTally])
def test_auc_of_one_field_against_sklearn(kind: Any) -> None:
    random = np.random.default_rng(1)
    fitted, checked = kind(), kind()
    train, train_labels = random.integers(0, 20, 500), random.integers(0, 2, 500).astype(float)
    fitted.add(train, train_labels)
    valid = random.integers(0, 30, 400)  # values that train never shows too
    labels = (random.random(400) < np.where(valid % 3 == 0, 0.8, 0.2)).astype(float)
    checked.add(valid, labels)
    overall = train_labels.mean()
    rates = {v: (train_labels[train == v].sum() + 10 * overall) / ((train == v).sum() + 10) for v in range(20)}
    scores = [rates.get(v, overall) for v in valid]
    assert auc_alone(fitted, checked) == pytest.approx(roc_auc_score(labels, scores))
    assert auc_of_groups(np.ones(1), np.ones(1), np.ones(1)) is None, "labels of one kind"


def test_row_hashes_tell_rows_and_columns_apart() -> None:
    ids, wide = np.array([1, 2, 1, 1]), np.array([[3, 4], [3, 4], [3, 4], [4, 3]])
    hashes = row_hashes([ids, wide])
    assert hashes[0] == hashes[2] and len(set(hashes.tolist())) == 3
    assert row_hashes([ids, ids[::-1]])[1] != row_hashes([ids[::-1], ids])[1]
    assert row_hashes([np.array([0.0])])[0] == row_hashes([np.array([-0.0])])[0]


def test_every_figure_of_built_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = {"train": clicks(300), "valid": clicks(200, 300, 1)}
    frames["valid"] = frames["valid"].with_columns(
        user=pl.when(pl.int_range(pl.len()) < 30).then(pl.lit("new")).otherwise("user")
    )
    folder = build(tmp_path, **frames)
    monkeypatch.chdir(tmp_path)
    found = inspect_dataset("clicks")
    assert found.source == "built here" and found.rows == {"train": 300, "valid": 200} and found.checked_on == "valid"
    assert found.label_rates == {split: frame["click"].mean() for split, frame in frames.items()}
    counts = frames["train"]["user"].value_counts()
    kept = counts.filter(pl.col("count") >= 3)["user"]
    user = field(found, "user")
    assert user.vocab_size == len(kept) + 2 and user.parts["train"].distinct == len(kept)
    for split, frame in frames.items():
        assert user.parts[split].oov == pytest.approx((~frame["user"].is_in(kept.to_list())).mean())
        price = field(found, "price").parts[split]
        assert price.missing == pytest.approx(frame["price"].is_null().mean()), "told by the raw files"
        lengths = frame["tags"].map_elements(lambda t: min(len(t.split("^")), 4) if t else 0, return_dtype=pl.Int64)
        tags = field(found, "tags").parts[split]
        assert tags.mean_length == pytest.approx(lengths.mean()) and tags.longest == 4
        assert tags.full == pytest.approx((lengths == 4).mean()) and tags.missing == pytest.approx(
            (lengths == 0).mean()
        )
    assert field(found, "tags").parts["train"].distinct == 20
    assert [bar.rows for bar in field(found, "tags").shape] == [
        (
            (
                frames["train"]["tags"].fill_null("").str.split("^").list.len().clip(0, 4)
                * (frames["train"]["tags"] != "")
            )
            == n
        ).sum()
        for n in range(5)
    ]
    assert sum(bar.rows for bar in field(found, "price").shape) == 300
    (tmp_path / "train.csv").unlink()
    gone = inspect_dataset("clicks")
    assert field(gone, "price").parts["train"].missing is None, "encoded data does not tell it"
    assert inspect_dataset(str(folder)).rows == found.rows


def test_the_same_of_raw_built_and_exported_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = {"train": clicks(400), "valid": clicks(150, 400, 1)}
    folder = build(tmp_path, **frames)
    monkeypatch.chdir(tmp_path)
    built = inspect_dataset(str(folder))
    for data_format in ("h5", "parquet", "npz"):
        exported = export_dataset(encoded_in(folder), data_format, tmp_path / data_format, 100)
        foreign = inspect_dataset(str(exported))
        assert foreign.source == "encoded by FuxiCTR" and not (exported / "ctrbench").exists()
        assert foreign.fields == built.fields and foreign.repeats == built.repeats
        assert foreign.label_rates == built.label_rates
    raw = inspect_dataset(str(write(tmp_path / "raw", **frames)))
    assert raw.source == "raw rows" and raw.label == "click" and raw.label_rates == built.label_rates
    assert [f.kind for f in raw.fields] == ["categorical", "numeric", "sequence", "categorical"]
    assert field(raw, "user").parts["train"].distinct == 40
    assert field(raw, "price").parts["train"].missing == pytest.approx(frames["train"]["price"].is_null().mean())
    for split, frame in frames.items():
        frame.with_columns(tags=pl.col("tags").str.split("^")).write_parquet(tmp_path / "raw" / f"{split}.parquet")
        (tmp_path / "raw" / f"{split}.csv").unlink()
    parquet = inspect_dataset(str(tmp_path / "raw"))
    assert field(parquet, "tags").kind == "sequence" and field(parquet, "price").kind == "numeric"
    assert field(parquet, "user").auc == pytest.approx(field(raw, "user").auc)
    assert field(parquet, "price").auc == pytest.approx(field(raw, "price").auc)


def test_a_section_whose_data_is_not_built_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build(tmp_path, train=clicks(300), valid=clicks(100, 300, 1))
    for path in folder.iterdir():
        path.unlink()
    monkeypatch.chdir(tmp_path)
    found = inspect_dataset("clicks")
    assert found.source == "raw rows" and [f.kind for f in found.fields] == [
        "categorical",
        "numeric",
        "sequence",
        "meta",
    ]
    assert not list(folder.iterdir()), "nothing is built"


def test_one_file_is_checked_on_every_other_row(tmp_path: Path) -> None:
    frame = clicks(400).with_columns(hint=pl.col("click") + 0)
    frame.write_parquet(tmp_path / "some.parquet")
    found = inspect_dataset(str(tmp_path / "some.parquet"))
    assert found.checked_on == "every other row of train" and not found.repeats
    assert field(found, "hint").auc == 1.0
    assert found.rows == {"train": 400}


# ---------------------------------------------------------------- leaks


def test_clean_data_has_no_warning(tmp_path: Path) -> None:
    folder = write(tmp_path, train=clicks(1000), valid=clicks(300, 1000, 1), test=clicks(300, 1300, 2))
    found = inspect_dataset(str(folder))
    assert not warnings(found)
    assert all(f.auc is None or 0.35 < f.auc < 0.65 for f in found.fields)
    assert "field 'impression' names rows: hardly any of its values comes twice" in [f.text for f in found.findings]


def test_rows_and_ids_that_repeat(tmp_path: Path) -> None:
    train = clicks(1000)
    valid = pl.concat([clicks(270, 1000, 1), train.head(30)])
    renamed = train.head(15).with_columns(impression=pl.lit("other") + pl.col("impression"), click=1 - pl.col("click"))
    test = pl.concat([clicks(285, 2000, 2), renamed])
    found = inspect_dataset(str(write(tmp_path, train=train, valid=valid, test=test)))
    assert found.repeats["valid"].share == pytest.approx(0.1, abs=0.02)
    assert found.repeats["valid"].same_label > 0.9 and found.repeats["valid"].within_train < 0.03
    assert found.repeats["test"].share == pytest.approx(0.05, abs=0.02)
    text = "\n".join(warnings(found))
    assert re.search(r"1\d\.\d\d% of the valid rows are rows of train, \d+% of them with its label, while", text)
    assert re.search(r"% of the test rows are rows of train", text), "their new ids do not hide them"
    assert (
        "field 'impression' names rows: hardly any of its values comes twice in train, yet 10.0% of the valid rows"
        in text
    )


def test_rows_that_come_twice_anyway(tmp_path: Path) -> None:
    """Two fields of few values: any split of them shares rows."""

    def frame(seed: int) -> pl.DataFrame:
        random = np.random.default_rng(seed)
        return pl.DataFrame(
            {name: random.integers(0, 5, 500) for name in ("a", "b")} | {"click": random.integers(0, 2, 500)}
        )

    found = inspect_dataset(str(write(tmp_path, train=frame(0), valid=frame(1))))
    assert not warnings(found) and found.repeats["valid"].share == 1.0
    assert "as 100.00% of the train rows are of other train rows" in found.findings[0].text


@pytest.mark.parametrize("kind", ["number", "token", "length", "missing"])
def test_a_field_that_tells_the_label(tmp_path: Path, kind: str) -> None:
    random = np.random.default_rng(0)

    def leak(frame: pl.DataFrame) -> pl.DataFrame:
        click = frame["click"].to_numpy()
        columns = {
            "number": click + random.normal(0, 0.2, len(click)),
            "token": [
                f"{'yes' if c else 'no'}{i}" for c, i in zip(click, random.integers(0, 5, len(click)), strict=True)
            ],
            "length": ["a^b^c" if c else "a^b" for c in click],
            "missing": [None if c else "x" for c in click],
        }
        return frame.with_columns(pl.Series("leaking", columns[kind]))

    frames = {"train": leak(clicks(1000)), "valid": leak(clicks(300, 1000, 1))}
    found = inspect_dataset(str(write(tmp_path, **frames)))
    (text,) = warnings(found)
    assert re.search(
        r"field 'leaking' alone predicts the label: AUC (0\.9|1\.0)\d+ on valid: is it known before the click\?", text
    )


def test_other_notes(tmp_path: Path) -> None:
    train = clicks(1000).with_columns(one=pl.lit("same"), rare=pl.Series([None] * 900 + ["x"] * 100))
    strange = clicks(500, 1000, 1).with_columns(
        one=pl.lit("same"), rare=pl.lit("x"), user=pl.lit("new"), click=pl.lit(1)
    )
    found = inspect_dataset(str(write(tmp_path, train=train, valid=strange)))
    text = to_text(found)
    assert "! every label of valid is 1" in text
    assert re.search(r"- label rate of valid is 1.0000, of train 0\.\d+: not a random split", text)
    assert "- field 'one' has one value in all rows of train" in text
    assert "- field 'rare' is missing in 90.0% of the rows" in text
    assert "- field 'user': 100.0% of the valid rows are out of vocabulary" in text
    unlabelled = inspect_dataset(str(write(tmp_path / "x", train=train.drop("click"))))
    assert "no label column" in unlabelled.findings[0].text and unlabelled.label_rates == {}


def test_many_rows_are_sampled_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ctrbench.inspection.measure

    train, other = clicks(4000).drop("impression"), clicks(1000, 0, 1).drop("impression")
    folder = write(tmp_path, train=train, valid=pl.concat([other, train.head(1000)]))
    whole = inspect_dataset(str(folder)).repeats["valid"].share
    monkeypatch.setattr(ctrbench.inspection.measure, "MAX_HASHES", 1000)
    assert inspect_dataset(str(folder)).repeats["valid"].share == pytest.approx(whole, abs=0.08)


# ---------------------------------------------------------------- shown


class Elements(HTMLParser):
    """The tags of a page, with the attributes that could load something."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(name)
        self.loads += [v for k, v in attributes if k in ("src", "href") and v and not v.startswith(("#", "data:"))]


def test_the_page(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    frame = clicks(200).rename({"user": bad}).with_columns(hint=pl.col("click") + 0)
    folder = write(tmp_path / "raw", train=frame, valid=frame)
    page = render_page(inspect_dataset(str(folder)))
    elements = Elements(page)
    assert bad not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert not elements.loads and "script" not in elements.tags and "http:" not in page and "https:" not in page
    assert elements.tags.count("svg") == 2 * 5 + 5, "rows and rates of five fields, and their AUC"
    assert "prefers-color-scheme: dark" in page and "<title>" in page
    assert "predicts the label" in page and 'class="leaks"' in page


def test_text_is_aligned() -> None:
    lines = table(["name", "n"], [["a", "1"], ["bcdef", "1,000"]], right_from=1)
    assert lines == ["name       n", "-----  -----", "a          1", "bcdef  1,000"]
    assert [share_text(v) for v in (None, 0.0, 0.00001, 0.5)] == ["–", "0", "<0.01%", "50.00%"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "raw", train=clicks(200), valid=clicks(50, 200, 1))
    page = tmp_path / "page.html"
    assert main(["inspect", str(folder), "--output", str(page)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^train +200 +0\.\d{4}$", shown, re.M) and re.search(r"^price +numeric", shown, re.M)
    assert str(page) in shown and page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert main(["inspect", str(folder / "train.csv"), "--json", "--label", "user"]) == 2  # users are no numbers
    assert "label column 'user' holds values that are not numbers" in capsys.readouterr().err
    assert main(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == {"train": 200, "valid": 50}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{raw}", "--label", "clik"], "--label clik: no such column (did you mean 'click'?); there are user, price"),
        (["{raw}/train.parquet"], "train.parquet: no such file"),
        (["{raw}", "--output", "page.txt"], "--output page.txt: must end in .html"),
        (["{empty}"], "holds neither a feature_map.json nor raw files train.csv or train.parquet"),
        (["{other}"], "valid.csv: column 'user' is missing (did you mean 'users'?)"),
        (["{header}"], "train.csv: no rows: nothing to inspect"),
        (["{text}/train.parquet"], "train.parquet: cannot be read"),
        (["no_such_dataset"], "unknown dataset, got 'no_such_dataset'"),
    ],
    ids=str,
)
def test_what_cannot_be_inspected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write(tmp_path / "raw", train=clicks(20))
    write(tmp_path / "other", train=clicks(20), valid=clicks(20).rename({"user": "users"}))
    write(tmp_path / "header", train=clicks(0))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.parquet").write_text("text")
    places = {name: str(tmp_path / name) for name in ("raw", "other", "header", "empty", "text")}
    assert main(["inspect", *(argument.format(**places) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_ids_outside_the_feature_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "their"
    folder.mkdir()
    features = [{"item": {"type": "categorical", "source": "", "vocab_size": 4}}]
    (folder / "feature_map.json").write_text(
        json.dumps({"dataset_id": "their", "labels": ["click"], "features": features})
    )
    np.savez(folder / "train.npz", item=np.array([1, 9]), click=np.array([0.0, 1.0]))
    assert main(["inspect", str(folder)]) == 2
    assert "column 'item' holds ids outside 0..3: it is not of this feature_map.json" in capsys.readouterr().err


def test_a_source_without_fields(tmp_path: Path) -> None:
    write(tmp_path, train=clicks(20).select("click"))
    found = inspect_source(RawSource({"train": [tmp_path / "train.csv"]}), "clicks")
    assert found.fields == [] and found.label_rates["train"] == clicks(20)["click"].mean()
    assert "clicks: raw rows" in to_text(found) and "<h1>clicks</h1>" in render_page(found)
