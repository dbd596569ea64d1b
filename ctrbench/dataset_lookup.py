# SPDX-License-Identifier: Apache-2.0
"""A dataset by its name in the configuration, or by the folder that it lies in."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ctrbench import manifest as manifests
from ctrbench.config import load_dataset
from ctrbench.errors import DataError
from ctrbench.features import FeatureMap, load_feature_map
from ctrbench.foreign_files import FORMATS, EncodedSplit, encoded_files
from ctrbench.ready_data import find_split, is_encoded
from ctrbench.schema import DatasetConfig
from ctrbench.splits import SPLITS
from ctrbench.storage import open_split

FEATURE_MAP = "feature_map.json"


@dataclasses.dataclass(frozen=True)
class EncodedDataset:
    """A dataset whose ids are made.

    Attributes:
        folder: of feature_map.json.
        splits: files by split, those that there are.
        is_built_here: the files carry checksums of this program.
    """

    folder: Path
    splits: dict[str, list[Path]]
    is_built_here: bool = False

    def feature_map(self) -> FeatureMap:
        """The feature map as it is stored."""
        return load_feature_map(self.folder / FEATURE_MAP, None, {"embedding_dim": 1})

    def open(self, split: str) -> EncodedSplit:
        """The files of a split.

        Raises:
            DataError: they are damaged.
        """
        return EncodedSplit(self.splits[split])

    def verify(self, feature_map: FeatureMap) -> None:
        """Compare the checksums of files that have some.

        Raises:
            DataError: they are damaged.
        """
        for split, files in self.splits.items() if self.is_built_here else ():
            open_split(files[0], feature_map, labels_required=split != "test").close()


@dataclasses.dataclass(frozen=True)
class Found:
    """What a name stands for.

    Attributes:
        name: as given.
        encoded: the dataset, None where it is not built yet.
        dataset: its section in the configuration, None for a folder.
        root: the folder that the section's paths are meant from.
    """

    name: str
    encoded: EncodedDataset | None
    dataset: DatasetConfig | None = None
    root: Path = Path()


def find_dataset(name: str, config_dir: Path | None = None) -> Found:
    """A folder with a feature_map.json, or a dataset_id of the configuration.

    Args:
        name: the path of a folder or a dataset_id.
        config_dir: configuration folder; by default the repository's config/.

    Raises:
        ConfigError: there is no such dataset_id.
        DataError: the folder holds no splits.
    """
    path = Path(name)
    if (path / FEATURE_MAP).is_file():
        return Found(name, encoded_in(path))
    dataset, root = load_dataset(name, config_dir)
    folder = dataset.folder(root)
    if is_encoded(dataset, folder):
        named = {split: text for split in SPLITS if (text := getattr(dataset, f"{split}_data"))}
        files = {s: encoded_files(find_split(dataset, root, t), dataset.data_format) for s, t in named.items()}
        return Found(name, EncodedDataset(folder, files), dataset, root)
    is_built = manifests.read(folder) is not None
    return Found(name, encoded_in(folder) if is_built else None, dataset, root)


def encoded_in(folder: Path) -> EncodedDataset:
    """The dataset of a folder: what was built here, or the splits that FuxiCTR names so.

    Raises:
        DataError: there are none.
    """
    manifest = manifests.read(folder)
    if manifest is not None:
        files = {split: [folder / f"{split}.h5"] for split in SPLITS if split in manifest["num_rows"]}
        return EncodedDataset(folder, files, is_built_here=True)
    for data_format in FORMATS:
        found = {}
        for split in SPLITS:
            file, blocks = folder / f"{split}.{data_format}", folder / split
            if file.is_file():
                found[split] = [file]
            elif blocks.is_dir() and any(blocks.glob(f"*.{data_format}")):
                found[split] = encoded_files(blocks, data_format)
        if found:
            return EncodedDataset(folder, found)
    raise DataError(
        f"{folder}: it has a feature_map.json but neither train.h5, train.parquet, train.npz nor a folder train/ of them"
    )
