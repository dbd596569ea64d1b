# SPDX-License-Identifier: Apache-2.0
import os

os.chdir(os.path.dirname(os.path.realpath(__file__)))
import argparse

import src as model_zoo
from fuxictr.features import FeatureMap
from fuxictr.preprocess import FeatureProcessor, build_dataset
from fuxictr.pytorch.dataloaders import RankDataLoader
from fuxictr.pytorch.torch_utils import seed_everything
from fuxictr.utils import load_config, set_logger
from src.history_dataloader import HistoryDataLoader

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=str, default="./config/", help="The config directory.")
    parser.add_argument("--expid", type=str, default="LongHistory_test", help="The experiment id to run.")
    parser.add_argument("--gpu", type=int, default=-1, help="The gpu index, -1 for cpu")
    args = vars(parser.parse_args())
    params = load_config(args["config"], args["expid"])
    params["gpu"] = args["gpu"]
    set_logger(params)
    seed_everything(seed=params["seed"])
    data_dir = os.path.join(params["data_root"], params["dataset_id"])
    params["train_data"], params["valid_data"], params["test_data"] = build_dataset(
        FeatureProcessor(**params), **params
    )
    feature_map = FeatureMap(params["dataset_id"], data_dir)
    feature_map.load(os.path.join(data_dir, "feature_map.json"), params)
    model = getattr(model_zoo, params["model"])(feature_map, **params)
    params["data_loader"] = HistoryDataLoader
    train_gen, valid_gen = RankDataLoader(feature_map, stage="train", **params).make_iterator()
    model.fit(train_gen, validation_data=valid_gen, **params)
