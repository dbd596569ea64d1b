# SPDX-License-Identifier: Apache-2.0
"""The known datasets: what the scripts in data/prepare/ of a repository define."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from ctrbench.datasets.description import Dataset
from ctrbench.errors import ConfigError, did_you_mean

FOLDER = Path("data") / "prepare"


def find_root(here: Path | None = None) -> Path:
    """The repository around `here` (the working directory), else the one that this package lies in.

    Raises:
        ConfigError: neither has data/prepare/.
    """
    here = (here or Path.cwd()).resolve()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[2]):
        if (folder / FOLDER).is_dir() and (folder / "model_zoo").is_dir():
            return folder
    raise ConfigError(f"{here}: no ctrbench repository (a folder with data/prepare/) is here or above: change into one")


def load_catalog(root: Path) -> dict[str, Dataset]:
    """All datasets by dataset_id, in alphabetical order."""
    found = {}
    for script in sorted((root / FOLDER).glob("*.py")):
        if "\nDATASET = " in script.read_text(encoding="utf-8"):
            dataset = _load(script)
            found[dataset.dataset_id] = dataset
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def find_dataset(name: str, root: Path) -> Dataset:
    """The dataset `name`; capitals, - and _ do not matter.

    Raises:
        ConfigError: there is none of that name.
    """
    catalog = load_catalog(root)
    plain = {_plain(dataset_id): dataset for dataset_id, dataset in catalog.items()}
    if _plain(name) not in plain:
        raise ConfigError(f"{name}: unknown dataset{did_you_mean(name, catalog)}: known are {', '.join(catalog)}")
    return plain[_plain(name)]


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _load(script: Path) -> Dataset:
    name = f"ctrbench_prepare_{script.stem}"
    if name not in sys.modules or Path(str(sys.modules[name].__file__)) != script:
        spec = importlib.util.spec_from_file_location(name, script)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    dataset = sys.modules[name].DATASET
    assert isinstance(dataset, Dataset)
    return dataset
