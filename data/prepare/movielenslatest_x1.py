# SPDX-License-Identifier: Apache-2.0
"""MovielensLatest_x1: the libfm files that the authors of AFN released, or the published CSV, -> the split x1 of BARS.

    ctrbench prepare MovielensLatest_x1 --raw FOLDER | MovielensLatest_x1.zip

FOLDER holds train, valid and test.libsvm (`label user:1 item:1 tag:1`) or train, valid and test.csv. The ids are those of
the one-hot encoding, unique over all fields. The split comes with the files.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ctrbench.datasets.description import Dataset, Published, Remote

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also for whoever loads this file by its path
from bars_csv import BarsCsv, url
from libfm import Libfm

COLUMNS = ("label", "user_id", "item_id", "tag_id")
AGAIN = f"download it again from {url('MovielensLatest_x1')}"

DATASET = Dataset(
    dataset_id="MovielensLatest_x1",
    prepare=Libfm(
        COLUMNS, ("ml-tag.", "movielens."), AGAIN, BarsCsv("MovielensLatest_x1", COLUMNS, "label", AGAIN)
    ).prepare,
    raw="MovielensLatest_x1.zip of the BARS benchmark, or a folder with AFN's train, valid and test.libsvm",
    source="https://grouplens.org/datasets/movielens/latest/",
    terms="GroupLens': research use with citation, no commercial use, see the source",
    published=Published(
        {"train": 1_404_801, "valid": 401_373, "test": 200_686},
        {
            "train": "efc8bceeaa0e895d566470fc99f3f271",
            "valid": "e1930223a5026e910ed5a48687de8af1",
            "test": "54e8c6baff2e059fe067fb9b69e692d0",
        },
    ),
    split="random 7:2:1 of AFN's authors, seed unpublished; the files are published with MD5",
    remotes=(Remote(url("MovielensLatest_x1"), "MovielensLatest_x1.zip"),),
)
