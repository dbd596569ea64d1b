# SPDX-License-Identifier: Apache-2.0
"""The shipped sweeps hold the published runs under their published numbers, with the published settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ctrbench.tuner.definition import load_sweep

ROOT = Path(__file__).resolve().parents[2]
LAYERS, DEEP, SHALLOW = "num_cross_layers", "num_deep_cross_layers", "num_shallow_cross_layers"


def _deep(layers: int, dropout: float) -> dict[str, Any]:
    return {LAYERS: layers, "net_dropout": dropout}


def _both(deep: int, shallow: int, deep_dropout: float, shallow_dropout: float) -> dict[str, Any]:
    return {
        DEEP: deep,
        SHALLOW: shallow,
        "deep_net_dropout": deep_dropout,
        "shallow_net_dropout": shallow_dropout,
    }


# Sweep, number in the name of the published run, its settings.
PUBLISHED = [
    *(("DCNv3_Criteo_x4_layers", layers, {LAYERS: layers}) for layers in range(1, 7)),
    *(("DCNv3_KDD12_layers", layers, {LAYERS: layers}) for layers in range(1, 9)),
    ("DCNv3_ML_1M", 5, _deep(2, 0.2)),
    ("DCNv3_ML_1M", 6, _deep(2, 0.3)),
    ("DCNv3_iPinYou_x1", 5, _deep(3, 0.2)),
    ("DCNv3_KKBox_x1", 8, _deep(3, 0.2)),
    ("SDCNv3_Criteo_x4", 11, _both(3, 4, 0.1, 0.2)),
    ("SDCNv3_Criteo_x4", 47, _both(4, 5, 0.1, 0.2)),
    ("SDCNv3_ML_1M", 100, _both(3, 4, 0.1, 0.1)),
    ("SDCNv3_ML_1M", 103, _both(3, 4, 0.2, 0.1)),
    ("SDCNv3_KDD12", 6, {DEEP: 4, SHALLOW: 4}),
    ("SDCNv3_iPinYou_x1", 32, _both(4, 3, 0.2, 0.2)),
    ("SDCNv3_KKBox_x1", 39, _both(4, 2, 0.1, 0.3)),
    ("SDCNv3_KKBox_x1", 102, _both(5, 5, 0.1, 0.3)),
]


@pytest.mark.parametrize(("name", "number", "settings"), PUBLISHED)
def test_a_published_run_has_its_number(name: str, number: int, settings: dict[str, Any]) -> None:
    path = ROOT / "model_zoo" / name.split("_")[0] / "config" / "tuner_config" / f"{name}.yaml"
    sweep = load_sweep(path, is_data_required=False)
    found = sweep.plan.get(number - 1)
    assert found is not None and found[1] == settings
    experiment = sweep.experiment(*found)
    assert experiment.expid.startswith(f"{sweep.base_name}_{number:03d}_")
    assert {key: experiment.model_params[key] for key in settings} == settings
