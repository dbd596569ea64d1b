# SPDX-License-Identifier: Apache-2.0
"""iPinYou_x1: the published CSV files, which are ready-made: checked and adopted.

    ctrbench prepare iPinYou_x1 --raw FOLDER | iPinYou_x1.zip

There are train.csv and test.csv and no validation file; config/dataset_config/iPinYou_x1.yaml says what that means.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ctrbench.datasets.description import Dataset, Published, Remote

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also for whoever loads this file by its path
from bars_csv import BarsCsv, url

COLUMNS = (
    "click", "weekday", "hour", "IP", "region", "city", "adexchange", "domain", "slotid", "slotwidth", "slotheight",
    "slotvisibility", "slotformat", "creative", "advertiser", "useragent", "slotprice",
)  # fmt: skip

DATASET = Dataset(
    dataset_id="iPinYou_x1",
    prepare=BarsCsv(
        "iPinYou_x1",
        COLUMNS,
        label="click",
        again=f"download it again from {url('iPinYou_x1')}",
        may_have_more=True,
        may_be_quoted=True,
        splits=("train", "test"),
    ).prepare,
    raw="iPinYou_x1.zip of the BARS benchmark, or a folder with its train.csv and test.csv",
    source="https://contest.ipinyou.com/",
    terms="iPinYou's, see the source",
    published=Published(
        {"train": 15_395_258, "test": 4_100_716},
        {"train": "9dd8979d265ab1ed7662ffd49fd73247", "test": "a94374868687794ff8c0c4d0b124a400"},
    ),
    split="the publisher's train and test, no validation file; published ready-made with MD5",
    remotes=(Remote(url("iPinYou_x1"), "iPinYou_x1.zip"),),
)
