# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import OneHotEncoder

from ctrbench.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("make_tiny", ROOT / "data" / "make_tiny.py")
make_tiny = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make_tiny)
FIELDS = ["user_id", "item_id", "category", "device", "weekday", "slot", "price", "age", "history"]


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny_ctr")
    start = time.perf_counter()
    counts = make_tiny.make_tiny_ctr(folder)
    assert time.perf_counter() - start < 2
    assert counts == {"train": 4000, "valid": 1000, "test": 1000}
    return {split: pl.read_csv(folder / f"{split}.csv", infer_schema=False) for split in counts}


def test_rows_and_columns(splits):
    assert {split: frame.height for split, frame in splits.items()} == {"train": 4000, "valid": 1000, "test": 1000}
    assert all(frame.columns == ["label", *FIELDS] for frame in splits.values())
    assert 0.4 < splits["train"]["label"].cast(pl.Float64).mean() < 0.55


def test_what_a_preprocessor_must_cope_with_is_present(splits):
    train, test = splits["train"], splits["test"]
    for column in ("device", "slot", "price", "age"):
        assert train[column].null_count() > 20 and test[column].null_count() > 2
    assert train["user_id"].value_counts().filter(pl.col("count") == 1).height > 20
    assert (~test["user_id"].is_in(train["user_id"].implode())).sum() > 0
    assert (~test["item_id"].is_in(train["item_id"].implode())).sum() > 0
    length = train["history"].fill_null("").str.count_matches("c")
    assert length.min() == 0 and length.max() == 12 and 0.1 < (length > 6).mean() < 0.4


def test_same_seed_same_bytes(tmp_path):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_tiny.make_tiny_ctr(tmp_path / folder, rows=600, seed=seed)
    for split in ("train", "valid", "test"):
        a, b, c = ((tmp_path / folder / f"{split}.csv").read_bytes() for folder in "abc")
        assert a == b != c


def test_the_planted_effects_need_crosses():
    frame, probability = make_tiny.generate(6000, 2024)
    label = frame["label"].to_numpy()
    assert roc_auc_score(label[5000:], probability[5000:]) == pytest.approx(0.911, abs=1e-3)

    def test_auc(columns):
        tokens = OneHotEncoder(handle_unknown="ignore").fit_transform(columns.cast(pl.String).fill_null("").to_numpy())
        model = LogisticRegression(C=0.1, max_iter=500).fit(tokens[:4000], label[:4000])
        return roc_auc_score(label[5000:], model.predict_proba(tokens[5000:])[:, 1])

    fields = frame.select("user_id", "item_id", "category", "device", "weekday", "slot")
    crosses = frame.select(
        (pl.col("device").fill_null("") + pl.col("category")).alias("device_category"),
        (pl.col("weekday").cast(pl.String) + pl.col("slot").fill_null("")).alias("weekday_slot"),
    )
    assert test_auc(fields) < 0.68
    assert test_auc(pl.concat([fields, crosses], how="horizontal")) > 0.80


def test_bayes_auc_of_the_docstring():
    frame, probability = make_tiny.generate(100_000, 2024)
    assert np.isfinite(probability).all()
    assert roc_auc_score(frame["label"], probability) == pytest.approx(0.902, abs=5e-3)


def test_too_few_rows(tmp_path):
    with pytest.raises(DataError, match="--rows: 60 are the fewest that make three useful files, got 59"):
        make_tiny.make_tiny_ctr(tmp_path, rows=59)


def run(arguments, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "data" / "make_tiny.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


def test_command_line(tmp_path):
    command = ["--dataset", "tiny_ctr", "--output", tmp_path / "out", "--rows"]
    done = run([*command, "600"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "train 400 rows, valid 100 rows, test 100 rows" in done.stdout
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["test.csv", "train.csv", "valid.csv"]
    refused = run([*command, "5"], tmp_path)
    assert refused.returncode == 2 and "60 are the fewest" in refused.stderr and "Traceback" not in refused.stderr


def test_command_line_of_tiny_mm(tmp_path, capsys):
    command = ["--dataset", "tiny_mm", "--output", str(tmp_path), "--rows", "800", "--items", "50", "--tags", "30"]
    assert make_tiny.main(command) == 0
    assert f"{tmp_path}: train 600 rows, valid 100 rows, test 100 rows" in capsys.readouterr().out
    assert pl.read_parquet(tmp_path / "item_info.parquet").height == 51


def test_without_arguments_both_are_written(tmp_path, capsys, monkeypatch):
    makers = {name: (make, tmp_path / name, accepted) for name, (make, _, accepted) in make_tiny.MAKERS.items()}
    monkeypatch.setattr(make_tiny, "MAKERS", makers)
    start = time.perf_counter()
    assert make_tiny.main([]) == 0
    assert time.perf_counter() - start < 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny_ctr", "tiny_mm"]
    assert "tiny_mm: train 24,000 rows, valid 4,000 rows, test 4,000 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rows", "600"], "--rows: is meant for one data set: add --dataset tiny_ctr or --dataset tiny_mm"),
        (["--dataset", "tiny_ctr", "--items", "50"], "--items: tiny_ctr has no such option: leave it out, or use"),
    ],
)
def test_options_of_one_data_set(arguments, message, capsys):
    assert make_tiny.main(arguments) == 2
    assert message in capsys.readouterr().err
