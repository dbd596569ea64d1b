# SPDX-License-Identifier: Apache-2.0
"""Outputs, losses, gradients, names and parameter totals against the authors' released modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuxictr.features import FeatureMap

from ctrbench.embedding import MergedEmbeddingDict, merge_embeddings
from ctrbench.zoo import build_model, load_model_class

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = sorted((ROOT / "tests" / "golden").glob("*.npz"))
PUBLISHED = json.loads((ROOT / "tests" / "golden" / "published_totals.json").read_text())
SETTINGS = {
    "optimizer": "adam",
    "loss": "binary_crossentropy",
    "metrics": ["AUC"],
    "verbose": 0,
    "model_root": "unused",
}


def make_model(name: str, features: dict[str, Any], params: dict[str, Any], labels: list[str]) -> torch.nn.Module:
    feature_map = FeatureMap("golden", "unused")
    feature_map.features.update(features)
    feature_map.labels = labels
    feature_map.num_fields = feature_map.get_num_fields()
    return build_model(load_model_class(ROOT / "model_zoo" / name, name), feature_map, {**SETTINGS, **params}, name)


@pytest.mark.parametrize("is_merged", [False, True], ids=["stock_embedding", "merged_table"])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_vectors(path: Path, is_merged: bool) -> None:
    golden = np.load(path)
    meta = json.loads(str(golden["meta"]))
    labels = [name[4:] for name in golden.files if name.lower() == "in::label"]
    model = make_model(meta["cls"], dict(meta["features"]), meta["params"], labels)
    if is_merged:
        merge_embeddings(model)
        assert any(isinstance(module, MergedEmbeddingDict) for module in model.modules())
    released = {name[4:]: torch.from_numpy(golden[name]) for name in golden.files if name.startswith("sd::")}
    model.load_state_dict(released, strict=True)
    saved = model.state_dict()
    assert {name: tuple(x.shape) for name, x in saved.items()} == {n: tuple(x.shape) for n, x in released.items()}
    assert all(torch.equal(saved[name], released[name]) for name in released)
    assert sum(p.numel() for p in model.parameters()) == meta["n_params"]

    inputs = {name[4:]: torch.from_numpy(golden[name]) for name in golden.files if name.startswith("in::")}
    batch = {name: x for name, x in inputs.items() if not name.startswith("table::")}
    model.feature_map.item_table = {name[7:]: x for name, x in inputs.items() if name.startswith("table::")}
    model.eval()
    outputs = model(batch)
    for name in (name for name in golden.files if name.startswith("out::eval_")):
        torch.testing.assert_close(outputs[name[10:]], torch.from_numpy(golden[name]), rtol=1e-5, atol=1e-7)
    model.train()
    loss = model.add_loss(model(batch), model.get_labels(batch))
    np.testing.assert_allclose(loss.item(), golden["out::train_loss"][0], rtol=1e-5)
    loss.backward()
    gradients = gradients_by_released_name(model)
    # A layer norm behind a batch norm cancels almost all of the latter's gradient, so that float32 leaves few digits
    # of it: tolerances are relative to the largest gradient of the model, 1e-5 of it.
    largest = max(np.abs(golden[name]).max() for name in golden.files if name.startswith("out::grad::"))
    names = [name[11:] for name in golden.files if name.startswith("out::grad::")]
    assert set(names) == set(gradients)
    for name in names:
        expected = golden[f"out::grad::{name}"]
        np.testing.assert_allclose(gradients[name], expected, rtol=1e-5, atol=1e-5 * largest, err_msg=name)
        error = np.linalg.norm(gradients[name] - expected) / max(np.linalg.norm(expected), 1e-2 * largest)
        assert error < 1e-5, (name, error)


def gradients_by_released_name(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Gradients under the names of the `state_dict`, the merged table's cut into its fields."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    trainable = {name for name, buffer in model.named_buffers()}
    return {name: x.numpy() for name, x in model.state_dict().items() if name not in trainable}


@pytest.mark.parametrize("run", PUBLISHED["totals"], ids=lambda run: run["source"])
def test_parameter_totals_are_the_published_ones(run: dict[str, Any]) -> None:
    from ctrbench.zoo import model_keys

    keys = model_keys(load_model_class(ROOT / "model_zoo" / run["model"], run["model"]))
    params = {key: value for key, value in run["hyperparameters"].items() if key in keys}
    model = make_model(run["model"], PUBLISHED["feature_maps"][run["dataset"]], params, ["label"])
    embedding = sum(p.numel() for n, p in model.named_parameters() if n.startswith("embedding_layer."))
    total = sum(p.numel() for p in model.parameters())
    assert (total, embedding) == (run["parameters"]["total"], run["parameters"]["embedding"])
