# SPDX-License-Identifier: Apache-2.0
"""What a trained cross network has learned: field interactions and Self-Mask activity, as numbers and as plots.

Works for any model with `field_interactions()` -> {layer: (F, F)} and `mask_activity(batch)` -> {layer: (B, F)}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctrbench.errors import ConfigError, DataError
from ctrbench.files import atomic_path, write_json
from ctrbench.run import load_trained, open_batches


def plot_run(
    run_dir: Path, rows: Sequence[int], split: str = "test", output: Path | None = None, gpu: int = -1
) -> list[Path]:
    """Plot a finished run's static field interactions and the Self-Mask's activity on some rows of a split.

    Args:
        run_dir: a finished run.
        rows: row numbers of the split, from 0.
        split: train, valid or test; rows are numbered in file order.
        output: folder to write to; the run directory by default.
        gpu: where the model runs.

    Returns:
        The files written: field_interactions.png, mask_activity.png and interpretation.json with their numbers.

    Raises:
        ConfigError: the model offers no interpretation.
        DataError: a row that the split does not have.
    """
    experiment, data, feature_map, trainer = load_trained(run_dir, gpu)
    model = trainer.model
    if not (hasattr(model, "field_interactions") and hasattr(model, "mask_activity")):
        raise ConfigError(f"{run_dir}: {experiment.training.model} has neither field_interactions nor mask_activity")
    batches = open_batches(experiment, data, feature_map, split, trainer)
    for row in rows:
        if not 0 <= row < batches.num_rows:
            raise DataError(f"--rows {row}: the {split} split has rows 0 to {batches.num_rows - 1}")
    fields = [name for name, spec in feature_map.features.items() if spec["type"] != "meta"]
    batch = batches.rows(rows)
    model.eval()
    interactions = {layer: x.cpu().numpy() for layer, x in model.field_interactions().items()}
    activity = {layer: x.cpu().numpy() for layer, x in model.mask_activity(batch).items()}
    probabilities = model.forward(batch)["y_pred"].detach().reshape(-1).cpu().tolist()

    output = output or run_dir
    paths = [output / "field_interactions.png", output / "mask_activity.png", output / "interpretation.json"]
    title = f"{experiment.expid}, seed {experiment.training.seed}"
    _plot_interactions(interactions, fields, title, paths[0])
    samples = [f"row {row}\np = {p:.3f}" for row, p in zip(rows, probabilities, strict=True)]
    _plot_activity(activity, fields, samples, title, paths[1])
    numbers = {
        "fields": fields,
        "field_interactions": {layer: x.tolist() for layer, x in interactions.items()},
        "rows": list(rows),
        "predictions": probabilities,
        "mask_activity": {layer: x.tolist() for layer, x in activity.items()},
    }
    write_json(paths[2], json.loads(json.dumps(numbers)))
    return paths


def _plot_interactions(interactions: dict[str, np.ndarray], fields: list[str], title: str, path: Path) -> None:
    columns = min(len(interactions), 4)
    lines = math.ceil(len(interactions) / columns)
    side = max(2.6, 0.22 * len(fields) + 1.4)
    figure, axes = _figure(lines, columns, side * columns + 0.8, side * lines)
    highest = max(float(norms.max()) for norms in interactions.values())  # one scale, so that layers compare
    for i, (axis, (layer, norms)) in enumerate(zip(axes, interactions.items(), strict=False)):
        image = axis.imshow(norms, cmap="viridis", vmin=0, vmax=highest)
        _label(axis.set_xticks, axis.set_xticklabels, fields, rotation=90)
        _label(axis.set_yticks, axis.set_yticklabels, fields if i % columns == 0 else [""] * len(fields))
        axis.set_title(layer, fontsize=9)
    for axis in axes[: len(interactions) : columns]:
        axis.set_ylabel("output field (rows of W)", fontsize=8)
    figure.supxlabel("input field (columns of W)", fontsize=8)
    figure.colorbar(image, ax=axes[: len(interactions)], fraction=0.03, label="Frobenius norm of the block")
    figure.suptitle(f"Static field interactions\n{title}", fontsize=10)
    _save(figure, path)


def _plot_activity(
    activity: dict[str, np.ndarray], fields: list[str], samples: list[str], title: str, path: Path
) -> None:
    width = max(3.6, 0.26 * len(fields) + 1.2)
    columns = min(len(samples), 4)
    lines = math.ceil(len(samples) / columns)
    figure, axes = _figure(lines, columns, width * columns + 1.4, (0.3 * len(activity) + 1.6) * lines)
    stacked = np.stack(list(activity.values()), axis=1)  # (samples, layers, F)
    for i, (axis, sample) in enumerate(zip(axes, samples, strict=False)):
        image = axis.imshow(stacked[i], cmap="magma", vmin=0, vmax=1, aspect="auto")
        _label(axis.set_xticks, axis.set_xticklabels, fields, rotation=90)
        _label(axis.set_yticks, axis.set_yticklabels, list(activity) if i % columns == 0 else [""] * len(activity))
        axis.set_title(sample, fontsize=9)
    figure.colorbar(image, ax=axes[: len(samples)], fraction=0.03, label="share of open entries")
    figure.suptitle(f"Self-Mask activity by layer and field\n{title}", fontsize=10)
    _save(figure, path)


def _figure(lines: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    figure = Figure(figsize=(width, height + 0.4), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel().tolist()
    return figure, axes


def _label(set_ticks: Any, set_labels: Any, names: list[str], **options: Any) -> None:
    set_ticks(range(len(names)))
    set_labels(names, fontsize=7, **options)


def _save(figure: Any, path: Path) -> None:
    for axis in figure.axes:
        if not axis.has_data():
            axis.set_visible(False)
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=130, format="png")
