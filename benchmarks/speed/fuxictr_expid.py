# SPDX-License-Identifier: Apache-2.0
"""One trial of tuner.py on FuxiCTR's side: its loader, its training loop and its metrics, on our SDCNv3.

    python -u benchmarks/speed/fuxictr_expid.py --config DIR --expid ID --gpu -1

`fuxictr.autotuner.grid_search` starts it once for each setting. The data is encoded already; DIR/results.jsonl gets a line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from fuxictr.features import FeatureMap
from fuxictr.pytorch.dataloaders import RankDataLoader
from fuxictr.pytorch.torch_utils import seed_everything
from fuxictr.utils import load_config, set_logger

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "model_zoo" / "SDCNv3"))
from src import SDCNv3


def train(params: dict[str, Any]) -> dict[str, Any]:
    """Train a setting; metrics of both other splits, and the seconds of fitting and of the evaluations after it."""
    seed_everything(params["seed"])
    folder = Path(params["data_root"]) / params["dataset_id"]
    feature_map = FeatureMap(params["dataset_id"], str(folder))
    feature_map.load(str(folder / "feature_map.json"), params)
    model = SDCNv3(feature_map, **params)
    train_batches, valid_batches = RankDataLoader(feature_map, stage="train", **params)
    started = time.perf_counter()
    model.fit(train_batches, validation_data=valid_batches, **params)
    fitted = time.perf_counter()
    valid = model.evaluate(valid_batches)
    test = model.evaluate(RankDataLoader(feature_map, stage="test", **params))
    seconds = {"train_seconds": fitted - started, "evaluate_seconds": time.perf_counter() - fitted}
    return {**seconds, "valid_AUC": float(valid["AUC"]), "test_AUC": float(test["AUC"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--expid", required=True)
    parser.add_argument("--gpu", type=int, default=-1)
    arguments = parser.parse_args()
    params = {**load_config(str(arguments.config), arguments.expid), "gpu": arguments.gpu}
    set_logger(params)
    line = json.dumps({"expid": arguments.expid, **train(params)}) + "\n"
    with (arguments.config / "results.jsonl").open("a") as stream:
        stream.write(line)


if __name__ == "__main__":
    main()
