# SPDX-License-Identifier: Apache-2.0
"""Exports that stock FuxiCTR reads with its own loaders, and that open here again as if nothing had happened."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuxictr.features
import h5py
import numpy as np
import polars as pl
import pytest
import torch

import ctrbench.export
from ctrbench.batches import Batches
from ctrbench.cli import main
from ctrbench.config import load_experiment
from ctrbench.dataset_lookup import EncodedDataset, encoded_in
from ctrbench.errors import ConfigError, CtrbenchError, DataError
from ctrbench.export import export_dataset
from ctrbench.features import load_feature_map
from ctrbench.preprocess import DataFolder, build_dataset
from ctrbench.run import run
from ctrbench.schema import DatasetConfig, TrainingConfig
from ctrbench.yamlfile import load_yaml

ROOT = Path(__file__).resolve().parents[1]
SPLITS = {"train": 250, "valid": 70, "test": 90}
BLOCK = 100
FORMATS = ("h5", "parquet", "npz")
COLUMNS: list[dict[str, Any]] = [
    {"name": "item", "dtype": "str", "type": "categorical"},
    {"name": "history", "dtype": "str", "type": "sequence", "max_len": 4, "padding": "pre", "share_embedding": "item"},
    {"name": "price", "dtype": "float", "type": "numeric", "normalizer": "StandardScaler"},
    {"name": "image", "dtype": "float", "type": "embedding", "pretrain_dim": 3},
    {"name": "user", "dtype": "int", "type": "meta"},
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """A dataset with a column of every type, built here."""
    root = tmp_path_factory.mktemp("built")
    random, tokens = np.random.default_rng(0), [f"t{i}" for i in range(300)]
    for split, count in SPLITS.items():
        frame = {
            "item": random.choice(tokens, count).tolist(),
            "history": ["^".join(random.choice(tokens, random.integers(0, 7))) for _ in range(count)],
            "price": random.normal(size=count).tolist(),
            "image": random.normal(size=(count, 3)).tolist(),
            "user": random.integers(0, 40, count).tolist(),
            "click": random.integers(0, 2, count).tolist(),
        }
        pl.DataFrame(frame).write_parquet(root / f"{split}.parquet")
    section = {"dataset_id": "ours", "data_root": "data", "data_format": "parquet", "feature_cols": COLUMNS}
    section |= {f"{split}_data": f"{split}.parquet" for split in SPLITS} | {"label_col": {"name": "click"}}
    return build_dataset(DatasetConfig.model_validate(section), root=root)


def columns_of(data: DataFolder, split: str) -> dict[str, np.ndarray]:
    feature_map = load_feature_map(data.feature_map_file, None, {"embedding_dim": 4})
    (whole,) = Batches.from_file(data.splits[split], feature_map, 1 << 20)
    return {name: values.numpy() for name, values in whole.items()}


def export(built: DataFolder, data_format: str, output: Path, block_size: int = 0) -> tuple[Path, dict[str, Any]]:
    """The folder and its dataset section."""
    folder = export_dataset(encoded_in(built.path), data_format, output, block_size)
    return folder, load_yaml(folder / "dataset_config.yaml")["ours"]


def fuxictr_map(folder: Path, **params: Any) -> fuxictr.features.FeatureMap:
    """As stock FuxiCTR loads it."""
    feature_map = fuxictr.features.FeatureMap("ours", str(folder))
    feature_map.load(str(folder / "feature_map.json"), {"embedding_dim": 4, **params})
    return feature_map


# ---------------------------------------------------------------- stock FuxiCTR reads it


def assert_loads_the_same(built: DataFolder, loaders: dict[str, Any]) -> None:
    for split, count in SPLITS.items():
        batches = list(loaders[split])
        ours = columns_of(built, split)
        assert loaders[split].num_samples == count and set(batches[0]) == set(ours)
        for name, values in ours.items():
            theirs = torch.cat([batch[name] for batch in batches]).numpy()
            assert theirs.shape == values.shape, name
            np.testing.assert_array_equal(theirs.astype(np.float64), values.astype(np.float64), err_msg=name)


@pytest.mark.parametrize("block_size", [0, BLOCK])
def test_fuxictr_s_npz_loaders(built: DataFolder, tmp_path: Path, block_size: int) -> None:
    from fuxictr.pytorch.dataloaders import RankDataLoader

    folder, section = export(built, "npz", tmp_path, block_size)
    files = {f"{split}_data": section[f"{split}_data"] for split in SPLITS}
    settings = {"data_format": "npz", "batch_size": 64, "shuffle": False, "num_workers": 0}
    loaders = RankDataLoader(fuxictr_map(folder), stage="both", **files, **settings)
    assert_loads_the_same(built, dict(zip(SPLITS, loaders, strict=True)))
    assert loaders[0].num_blocks == (3 if block_size else 1)


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    # Without aiohttp, the threads that list several files trip over each other's failed import of it.
    context.use_datasource_v2 = False
    yield ray
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [0, BLOCK])
def test_fuxictr_s_parquet_loader(built: DataFolder, tmp_path: Path, ray: Any, block_size: int) -> None:
    from fuxictr.pytorch.dataloaders import RankDataLoader

    folder, section = export(built, "parquet", tmp_path, block_size)
    files = {f"{split}_data": section[f"{split}_data"] for split in SPLITS}
    settings = {"data_format": "parquet", "batch_size": 64, "shuffle": False}
    loaders = RankDataLoader(fuxictr_map(folder), stage="both", **files, **settings)
    assert_loads_the_same(built, dict(zip(SPLITS, loaders, strict=True)))
    assert loaders[0].num_blocks == (3 if block_size else 1)


@pytest.mark.parametrize("block_size", [0, BLOCK])
def test_the_layout_of_fuxictr_2_0(built: DataFolder, tmp_path: Path, block_size: int) -> None:
    """No release on the registry reads H5 any more: the layout is compared, and the array that FuxiCTR 2.0 made of it."""
    folder, _ = export(built, "h5", tmp_path, block_size)
    feature_map = fuxictr_map(folder)
    names = [*feature_map.features, *feature_map.labels]
    types = {"item": "int64", "history": "int32", "price": "float64", "image": "float32", "user": "int64"}
    for split, count in SPLITS.items():
        paths = sorted(folder.glob(f"{split}/*.h5")) if block_size else [folder / f"{split}.h5"]
        assert len(paths) == (-(-count // BLOCK) if block_size else 1)
        arrays = []
        for path in paths:
            with h5py.File(path) as file:
                assert set(file) == set(names) and not file.attrs
                assert {name: file[name].dtype.name for name in names} == {**types, "click": "float64"}
                assert all(file[name].chunks is None and not file[name].attrs for name in names)
                arrays.append(np.column_stack([file[name][:] for name in names]))
        stacked, ours = np.concatenate(arrays), columns_of(built, split)
        for name in names:
            np.testing.assert_array_equal(stacked[:, feature_map.get_column_index(name)], ours[name])


def test_fuxictr_trains_on_it(built: DataFolder, tmp_path: Path) -> None:
    """FuxiCTR's own loop on the export, and ours on the data that it was made from: one trajectory."""
    from fuxictr.pytorch.dataloaders import RankDataLoader
    from fuxictr.pytorch.torch_utils import seed_everything

    from ctrbench.trainer import Trainer
    from ctrbench.zoo import load_model_class

    folder, section = export(built, "npz", tmp_path)
    model_class = load_model_class(ROOT / "model_zoo" / "FM", "FM")
    params: dict[str, Any] = {"optimizer": "adam", "loss": "binary_crossentropy", "learning_rate": 1e-2, "verbose": 0}
    params |= {"embedding_dim": 4, "metrics": ["AUC", "logloss"], "model_root": str(tmp_path / "theirs"), "gpu": -1}
    files = {f"{split}_data": section[f"{split}_data"] for split in ("train", "valid")}
    seed_everything(1)
    used = {"use_features": ["item", "history", "price"]}
    theirs = model_class(fuxictr_map(folder, **used), **params)
    settings = {"batch_size": 50, "shuffle": False, "num_workers": 0}
    train, valid = RankDataLoader(fuxictr_map(folder, **used), stage="train", data_format="npz", **files, **settings)
    (tmp_path / "theirs" / "ours").mkdir(parents=True)
    theirs.fit(train, epochs=2, validation_data=valid)

    seed_everything(1)
    feature_map = load_feature_map(built.feature_map_file, "ours", {"embedding_dim": 4, **used})
    training = TrainingConfig(
        model="FM", dataset_id="ours", batch_size=50, epochs=2, learning_rate=1e-2, shuffle=False, verbose=0
    )
    trainer = Trainer(model_class(feature_map, **params), training, tmp_path / "ours")
    batches = {s: Batches.from_file(built.splits[s], feature_map, 50) for s in ("train", "valid")}
    trainer.fit(trainer.adapt(batches["train"]), trainer.adapt(batches["valid"]))
    ours = trainer.evaluate(trainer.adapt(batches["valid"]))
    for name, value in theirs.evaluate(valid, metrics=["AUC", "logloss"]).items():
        assert ours[name] == pytest.approx(value, abs=1e-5)


# ---------------------------------------------------------------- and so does this program


@pytest.mark.parametrize("block_size", [0, BLOCK])
@pytest.mark.parametrize("data_format", FORMATS)
def test_round_trip(built: DataFolder, tmp_path: Path, data_format: str, block_size: int) -> None:
    folder, section = export(built, data_format, tmp_path, block_size)
    section.pop("data_block_size", None)
    opened = build_dataset(DatasetConfig.model_validate({**section, "dataset_id": "ours"}), root=tmp_path)
    assert opened.num_rows == built.num_rows == SPLITS
    maps = [load_feature_map(d.feature_map_file, "ours", {"embedding_dim": 4}) for d in (built, opened)]
    assert maps[0].content_hash() == maps[1].content_hash() and list(maps[0].features) == list(maps[1].features)
    assert (folder / "feature_vocab.json").read_bytes() == (built.path / "feature_vocab.json").read_bytes()
    for split in SPLITS:
        batches = [
            Batches.from_file(d.splits[split], m, 32, shuffle=True, seed=7)
            for d, m in zip((built, opened), maps, strict=True)
        ]
        for one, other in zip(*batches, strict=True):
            assert list(one) == list(other)
            for name in one:
                assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


@pytest.mark.parametrize(("first", "second"), [("npz", "parquet"), ("parquet", "h5"), ("h5", "npz")])
def test_from_one_form_to_another(built: DataFolder, tmp_path: Path, first: str, second: str) -> None:
    """A foreign folder is exported too, read as it lies."""
    source, _ = export(built, first, tmp_path / "a", BLOCK)
    folder = export_dataset(encoded_in(source), second, tmp_path / "b")
    direct, _ = export(built, second, tmp_path / "c")
    assert not (source / "ctrbench").exists()
    for split in SPLITS:
        read = [encoded_in(place).open(split) for place in (folder, direct)]
        for block, other in zip(*(r.blocks(r.columns) for r in read), strict=True):
            assert block.columns.keys() == other.columns.keys()
            for name, values in block.columns.items():
                assert values.dtype == other.columns[name].dtype
                np.testing.assert_array_equal(values, other.columns[name])


@pytest.mark.parametrize("data_format", FORMATS)
def test_the_same_training_result(
    tiny_overrides: list[str], tiny_data_root: Path, tmp_path: Path, data_format: str
) -> None:
    zoo = ROOT / "model_zoo" / "FM"
    overrides = [*tiny_overrides, "epochs=1"]
    experiment = load_experiment(zoo / "config", "FM_tiny", zoo, overrides)
    first = run(experiment)
    assert (
        main(["export", str(tiny_data_root / "tiny_ctr"), "--format", data_format, "--output", str(tmp_path / "x")])
        == 0
    )
    section = load_yaml(tmp_path / "x" / "tiny_ctr" / "dataset_config.yaml")["tiny_ctr"]
    changed = [f"{key}={json.dumps(value)}" for key, value in section.items()]
    second = run(load_experiment(zoo / "config", "FM_tiny", zoo, [*overrides, *changed]))
    assert second["metrics"] == first["metrics"] and second["rows"] == first["rows"]
    assert second["data_hash"] != first["data_hash"]


# ---------------------------------------------------------------- the command, and what it refuses


def repository(folder: Path, **section: Any) -> Path:
    (folder / "model_zoo").mkdir(parents=True)
    (folder / "config" / "dataset_config").mkdir(parents=True)
    (folder / "config" / "dataset_config" / "ours.yaml").write_text(json.dumps({"ours": section}))
    return folder


def test_by_name_also_before_it_is_built(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "ctrbench.export")
    (tmp_path / "train.csv").write_text("item,click\na,1\nb,0\n")
    columns = [{"name": "item", "dtype": "str", "type": "categorical"}]
    root = repository(tmp_path / "repo", train_data="../train.csv", feature_cols=columns, label_col={"name": "click"})
    monkeypatch.chdir(root / "config")
    assert main(["export", "ours", "--format", "npz", "--output", str(tmp_path / "x")]) == 0
    assert f"{tmp_path / 'x' / 'ours'}: ready for FuxiCTR" in capsys.readouterr().out
    assert "Exported train: 2 rows" in caplog.text
    assert np.load(tmp_path / "x" / "ours" / "train.npz")["item"].tolist() == [1, 2]
    assert (root / "data" / "ours" / "manifest.json").exists()
    assert main(["export", "ours", "--format", "npz", "--output", str(tmp_path / "x")]) == 2
    assert "exists already: remove it or name another folder" in capsys.readouterr().err
    assert main(["export", "oours", "--format", "npz", "--output", str(tmp_path / "y")]) == 2
    assert "unknown dataset, got 'oours' (did you mean 'ours'?)" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "feature_map.json").write_text("{}")
    assert main(["export", str(empty), "--format", "npz", "--output", str(tmp_path / "y")]) == 2
    assert "neither train.h5, train.parquet, train.npz nor a folder train/ of them" in capsys.readouterr().err


def test_settings_that_cannot_be(built: DataFolder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--format csv: must be one of h5, parquet, npz"):
        export(built, "csv", tmp_path)
    with pytest.raises(ConfigError, match=r"--block-size -1: must be at least 1"):
        export(built, "npz", tmp_path, -1)


def test_damaged_data_is_not_exported(built: DataFolder, tmp_path: Path) -> None:
    copy = tmp_path / "ours"
    copy.mkdir()
    for path in built.path.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    with h5py.File(copy / "valid.h5", "r+") as file:
        file["item"][3] = 1 + file["item"][3] % 5
    with pytest.raises(DataError, match=r"valid.h5: damaged file: checksum of column 'item'"):
        export_dataset(encoded_in(copy), "npz", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_item_tables_and_histories_have_no_form_there(tmp_path: Path) -> None:
    def dataset(**content: Any) -> EncodedDataset:
        stored = {"dataset_id": "ours", "labels": ["click"], **content}
        (tmp_path / "feature_map.json").write_text(json.dumps(stored))
        return EncodedDataset(tmp_path, {})

    item = {"item": {"type": "categorical", "source": "item", "vocab_size": 9}}
    with pytest.raises(DataError, match=r"FuxiCTR's loaders have no item tables"):
        export_dataset(dataset(features=[item], item_key="item"), "npz", tmp_path / "x")
    with pytest.raises(DataError, match=r"column 'seen': FuxiCTR's loaders have no meta columns of lists"):
        export_dataset(dataset(features=[item, {"seen": {"type": "meta", "max_len": 5}}]), "npz", tmp_path / "x")


@pytest.mark.parametrize("data_format", FORMATS)
def test_a_full_disk_leaves_nothing(
    built: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_format: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ctrbench.export.WRITERS[data_format], "append", full)
    with pytest.raises(CtrbenchError, match="the disk is full"):
        export(built, data_format, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing(
    built: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ctrbench.export, "_write_companions", stop)
    with pytest.raises(KeyboardInterrupt):
        export(built, "npz", tmp_path, BLOCK)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_is_removed(built: DataFolder, tmp_path: Path) -> None:
    mine, dead = (tmp_path / f".ours.{number}.partial" for number in (os.getppid(), 2**22 + 1))
    for folder in (mine, dead):
        folder.mkdir()
    export(built, "npz", tmp_path)
    assert mine.exists() and not dead.exists()


def test_an_output_that_cannot_be_written(built: DataFolder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CtrbenchError, match=r"cannot be written"):
        export(built, "npz", tmp_path / "file")


def test_pretrained_vectors_go_along(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("item,click\na,1\nb,0\n")
    np.savez(tmp_path / "vectors.npz", key=np.array(["a", "b"]), value=np.eye(2, dtype=np.float32))
    column = {"name": "item", "dtype": "str", "type": "categorical", "pretrained_emb": "vectors.npz", "pretrain_dim": 2}
    section = {"dataset_id": "ours", "data_root": "data", "train_data": "train.csv", "feature_cols": [column]}
    built = build_dataset(DatasetConfig.model_validate({**section, "label_col": {"name": "click"}}), root=tmp_path)
    folder, exported = export(built, "parquet", tmp_path / "x")
    assert np.load(folder / "pretrained_item.npz")["value"].tolist() == [[1, 0], [0, 1]]
    opened = build_dataset(DatasetConfig.model_validate({**exported, "dataset_id": "ours"}), root=tmp_path)
    first = opened.data_hash
    np.savez(folder / "pretrained_item.npz", key=np.array(["a", "b"]), value=np.ones((2, 2), np.float32))
    again = build_dataset(DatasetConfig.model_validate({**exported, "dataset_id": "ours"}), root=tmp_path)
    assert again.data_hash != first, "other vectors are other data"
