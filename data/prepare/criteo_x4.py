# SPDX-License-Identifier: Apache-2.0
"""Criteo_x4: train.txt of Criteo's Kaggle challenge, or the published CSV files, -> the split x4 of the BARS benchmark.

    ctrbench prepare Criteo_x4 --raw train.txt | dac.tar.gz | Criteo_x4.zip | FOLDER

train.txt has 45,840,617 lines of 40 cells between tabs and no header: Label, I1..I13 (integers or nothing), C1..C26 (8
hexadecimal digits or nothing). Every cell is kept as text. The split is that of ten stratified folds with seed 2018, as
scikit-learn 0.19.1 made them (ctrbench.datasets.folds): fold 0 is test, fold 1 validation, folds 2..9 one after the other
are train. It takes two passes over the file; memory does not depend on its length, but for one byte per row.

Numbers become categories when the dataset is built (config/dataset_config/Criteo_x4.yaml): floor(ln(v)^2) above 2.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ctrbench.datasets.description import Dataset, Published, Remote

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also for whoever loads this file by its path
from bars_csv import BarsCsv, url

COLUMNS = ("Label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27)))
SOURCE = "https://www.kaggle.com/c/criteo-display-ad-challenge/data"

DATASET = Dataset(
    dataset_id="Criteo_x4",
    prepare=BarsCsv(
        "Criteo_x4",
        COLUMNS,
        label="Label",
        raw_names=("train.txt", "train.txt.gz"),
        raw_archives=("dac.tar.gz",),
        raw_separator=b"\t",
        raw_has_header=False,
        alphabet=b"0123456789abcdef-",
        again=f"download it again from {SOURCE} (train.txt) or {url('Criteo_x4')} (train, valid and test.csv)",
    ).prepare,
    raw="train.txt or dac.tar.gz of the challenge, or Criteo_x4.zip of the BARS benchmark",
    source=SOURCE,
    terms="Criteo's, see the source",
    published=Published(
        {"train": 36_672_493, "valid": 4_584_062, "test": 4_584_062},
        {
            "train": "4a53bb7cbc0e4ee25f9d6a73ed824b1a",
            "valid": "fba5428b22895016e790e2dec623cb56",
            "test": "cfc37da0d75c4d2d8778e76997df2976",
        },
    ),
    split="ten stratified folds, seed 2018; published with MD5",
    size=11_000_000_000,
    remotes=(Remote(url("Criteo_x4"), "Criteo_x4.zip"),),
)
