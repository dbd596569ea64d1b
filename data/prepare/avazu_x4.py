# SPDX-License-Identifier: Apache-2.0
"""Avazu_x4: train.csv of Avazu's Kaggle challenge, or the published CSV files, -> the split x4 of the BARS benchmark.

    ctrbench prepare Avazu_x4 --raw train.csv | train.gz | avazu-ctr-prediction.zip | Avazu_x4.zip | FOLDER

train.csv has a header and 40,428,967 rows of 24 cells between commas. Every cell is kept as text, `id` too, as in the
published files. The split is that of Criteo_x4: ten stratified folds with seed 2018, as scikit-learn 0.19.1 made them.

`id` is dropped, and `hour` (YYMMDDHH) becomes hour of the day, weekday and weekend, when the dataset is built
(config/dataset_config/Avazu_x4.yaml).
"""

from __future__ import annotations

import sys
from pathlib import Path

from ctrbench.datasets.description import Dataset, Published, Remote

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also for whoever loads this file by its path
from bars_csv import BarsCsv, url

COLUMNS = (
    "id", "click", "hour", "C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id", "app_domain",
    "app_category", "device_id", "device_ip", "device_model", "device_type", "device_conn_type", "C14", "C15", "C16",
    "C17", "C18", "C19", "C20", "C21",
)  # fmt: skip
SOURCE = "https://www.kaggle.com/c/avazu-ctr-prediction/data"

DATASET = Dataset(
    dataset_id="Avazu_x4",
    prepare=BarsCsv(
        "Avazu_x4",
        COLUMNS,
        label="click",
        raw_names=("train.csv", "train.gz", "train.csv.gz"),
        raw_archives=("avazu-ctr-prediction.zip", "train.zip"),
        alphabet=b"0123456789abcdef-",
        again=f"download it again from {SOURCE} (train.gz) or {url('Avazu_x4')} (train, valid and test.csv)",
    ).prepare,
    raw="train.csv or train.gz of the challenge, or Avazu_x4.zip of the BARS benchmark",
    source=SOURCE,
    terms="Kaggle's competition rules",
    published=Published(
        {"train": 32_343_172, "valid": 4_042_897, "test": 4_042_898},
        {
            "train": "de3a27264cdabf66adf09df82328ccaa",
            "valid": "33232931d84d6452d3f956e936cab2c9",
            "test": "3ebb774a9ca74d05919b84a3d402986d",
        },
    ),
    split="ten stratified folds, seed 2018; published with MD5",
    size=6_000_000_000,
    remotes=(Remote(url("Avazu_x4"), "Avazu_x4.zip"),),
)
