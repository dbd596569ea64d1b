# SPDX-License-Identifier: Apache-2.0
"""Frappe_x1: the libfm files that the authors of AFN released, or the published CSV files, -> the split x1 of BARS.

    ctrbench prepare Frappe_x1 --raw FOLDER | Frappe_x1.zip

FOLDER holds train, valid and test.libsvm (`label id:1` and nine more cells) or train, valid and test.csv. The ids are those
of the one-hot encoding, unique over all fields. The split comes with the files; the published CSV files have Windows line
ends, which `--csv` keeps.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ctrbench.datasets.description import Dataset, Published, Remote

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also for whoever loads this file by its path
from bars_csv import BarsCsv, url
from libfm import Libfm

COLUMNS = (
    "label", "user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city",
)  # fmt: skip
AGAIN = f"download it again from {url('Frappe_x1')}"

DATASET = Dataset(
    dataset_id="Frappe_x1",
    prepare=Libfm(COLUMNS, ("frappe.",), AGAIN, BarsCsv("Frappe_x1", COLUMNS, "label", AGAIN)).prepare,
    raw="Frappe_x1.zip of the BARS benchmark, or a folder with AFN's train, valid and test.libsvm",
    source="https://www.baltrunas.info/context-aware",
    terms="the publisher's, with citation, see the source",
    published=Published(
        {"train": 202_027, "valid": 57_722, "test": 28_860},
        {
            "train": "ba7306e6c4fc19dd2cd84f2f0596d158",
            "valid": "88d51bf2173505436d3a8f78f2a59da8",
            "test": "3470f6d32713dc5f7715f198ca7c612a",
        },
        line_end=b"\r\n",
    ),
    split="random 7:2:1 of AFN's authors, seed unpublished; the files are published with MD5",
    remotes=(Remote(url("Frappe_x1"), "Frappe_x1.zip"),),
)
