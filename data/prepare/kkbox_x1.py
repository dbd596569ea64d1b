# SPDX-License-Identifier: Apache-2.0
"""KKBox_x1: the published CSV files, which are ready-made: checked and adopted.

    ctrbench prepare KKBox_x1 --raw FOLDER | KKBox_x1.zip

The files hold `label` and 19 fields of user and song, of which the published runs read 13. `isrc` becomes its country code
and `bd` a decade of age when the dataset is built (config/dataset_config/KKBox_x1.yaml).
"""

from __future__ import annotations

import sys
from pathlib import Path

from ctrbench.datasets.description import Dataset, Published, Remote

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also for whoever loads this file by its path
from bars_csv import BarsCsv, url

COLUMNS = (
    "label", "msno", "song_id", "source_system_tab", "source_screen_name", "source_type", "city", "bd", "gender",
    "registered_via", "genre_ids", "artist_name", "language", "isrc",
)  # fmt: skip

DATASET = Dataset(
    dataset_id="KKBox_x1",
    prepare=BarsCsv(
        "KKBox_x1",
        COLUMNS,
        label="label",
        again=f"download it again from {url('KKBox_x1')}",
        may_have_more=True,
        may_be_quoted=True,
    ).prepare,
    raw="KKBox_x1.zip of the BARS benchmark, or a folder with its train, valid and test.csv",
    source="https://www.kaggle.com/c/kkbox-music-recommendation-challenge",
    terms="Kaggle's competition rules",
    published=Published(
        {"train": 5_901_932, "valid": 737_743, "test": 737_743},
        {
            "train": "195b1ae8fc2d9267d7c8656c07ea1304",
            "valid": "398e97ac139611a09bd61a58e4240a3e",
            "test": "8c5f7add05a6f5258b6b3bcc00ba640b",
        },
    ),
    split="random 8:1:1, seed unpublished; published ready-made with MD5",
    remotes=(Remote(url("KKBox_x1"), "KKBox_x1.zip"),),
)
