# SPDX-License-Identifier: Apache-2.0
"""Time SDCNv3's training, batches alone and the start-up, against the installed FuxiCTR, in one run.

    python benchmarks/speed/train.py --output benchmarks/speed/results/train.json

Training: generated data of MovieLens-1M's shape, the settings of SDCNv3_ML_1M, B = 4096. FuxiCTR is its own
`BaseModel.train_epoch` on the same model class with stock embeddings, fed by its npz loader (RankDataLoader, the
fastest of the wheel's), with 0, 1 and 2 worker processes and 1 and 2 threads; ours is Trainer.step fed by Batches.
Every figure comes from a process of its own, the processes take turns, and medians count. Each side's best setting
makes the ratio.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import ROOT, describe, environment, markdown, run_worker, spread, use_cores, work, write_report

BATCH_SIZE = 4096
SIDES = ("ctrbench", "fuxictr_step", "fuxictr")
VOCAB_SIZES = {"UserID": 6042, "Gender": 4, "Age": 9, "Occupation": 23, "MovieID": 3643, "Release": 10, "Genres": 20}
MODEL = {
    "embedding_dim": 16,
    "num_deep_cross_layers": 3,
    "num_shallow_cross_layers": 4,
    "deep_net_dropout": 0.1,
    "shallow_net_dropout": 0.1,
    "num_heads": 1,
    "layer_norm": True,
    "batch_norm": True,
}


def make_columns(rows: int) -> dict[str, np.ndarray]:
    """Random ids of ML-1M's fields, Genres with 1 to 5 tokens, labels that a pair of fields decides."""
    random = np.random.default_rng(0)
    columns = {name: random.integers(1, size - 1, rows) for name, size in VOCAB_SIZES.items() if name != "Genres"}
    genres = random.integers(1, VOCAB_SIZES["Genres"] - 1, (rows, 5))
    genres[np.arange(5) >= random.integers(1, 6, rows)[:, None]] = 0
    columns["Genres"] = genres
    noise = random.random(rows) < 0.2
    columns["label"] = (((columns["UserID"] + columns["MovieID"]) % 3 > 0) ^ noise).astype(np.float64)
    return columns


def make_feature_map() -> Any:
    from fuxictr.features import FeatureMap

    feature_map = FeatureMap("ML_1M", "unused")
    for name, size in VOCAB_SIZES.items():
        spec: dict[str, Any] = {"source": "", "type": "categorical", "padding_idx": 0, "vocab_size": size}
        if name == "Genres":
            spec |= {"type": "sequence", "max_len": 5, "feature_encoder": "layers.MaskedAveragePooling()"}
        feature_map.features[name] = spec
    feature_map.labels = ["label"]
    feature_map.num_fields = len(VOCAB_SIZES)
    feature_map.set_column_index()
    return feature_map


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """One figure, in the process of a worker: rows per second."""
    if settings["kind"] == "batches":
        return {"rows_per_second": measure_batches(settings["rows"], settings["is_shuffled"])}
    return {"rows_per_second": measure_training(settings["side"], settings["num_workers"], Path(settings["data"]))}


def measure_training(side: str, num_workers: int, data: Path) -> float:
    """Rows per second of the second epoch."""
    import torch
    from fuxictr.pytorch.models import BaseModel

    from ctrbench.batches import Batches
    from ctrbench.schema import TrainingConfig
    from ctrbench.trainer import Trainer
    from ctrbench.zoo import build_model, load_model_class

    torch.manual_seed(0)
    settings = TrainingConfig(
        model="SDCNv3", dataset_id="ML_1M", embedding_regularizer=1e-2, batch_size=BATCH_SIZE, verbose=0
    )
    feature_map = make_feature_map()
    model_class = load_model_class(ROOT / "model_zoo" / "SDCNv3", "SDCNv3")
    model = build_model(model_class, feature_map, {**settings.model_dump(), **MODEL, "gpu": -1, "model_id": "m"}, "")
    columns = {n: torch.from_numpy(x) for n, x in np.load(data).items()}
    batches = Batches({n: x.float() if n == "label" else x.int() for n, x in columns.items()}, BATCH_SIZE, shuffle=True)
    loader: Any = batches
    if side == "ctrbench":
        trainer = Trainer(model, settings)
    else:
        BaseModel.compile(model, "adam", "binary_crossentropy", settings.learning_rate)
        model._max_gradient_norm, model._total_steps, model._eval_steps = 10.0, 0, sys.maxsize
        model._stop_training, model._verbose = False, 0
        if side == "fuxictr":  # otherwise its step on our batches: what the loader alone costs
            from fuxictr.pytorch.dataloaders.npz_dataloader import NpzDataLoader

            loader = NpzDataLoader(feature_map, str(data), BATCH_SIZE, shuffle=True, num_workers=num_workers)
    for _ in range(2):  # the first epoch warms up
        started = time.perf_counter()
        if side == "ctrbench":
            model.train()
            for batch in loader:
                float(trainer.step(batch))
        else:
            model.train_epoch(loader)
        seconds = time.perf_counter() - started
    return batches.num_rows / seconds


def measure_batches(rows: int, is_shuffled: bool) -> float:
    """Rows per second of 39 columns of ids, batches only."""
    import torch

    from ctrbench.batches import Batches

    columns = {f"C{i}": torch.randint(0, 100_000, (rows,), dtype=torch.int32) for i in range(39)}
    columns["label"] = torch.rand(rows)
    batches = Batches(columns, BATCH_SIZE, shuffle=is_shuffled)
    for _ in range(2):
        started = time.perf_counter()
        for batch in batches:
            assert len(batch) == 40
        seconds = time.perf_counter() - started
    return rows / seconds


FIRST_STEP = """
import sys, time
started = time.perf_counter()
from ctrbench import cli, trainer
step = trainer.Trainer.step
def first_step(self, batch):
    step(self, batch)
    print(time.perf_counter() - started, flush=True)
    raise KeyboardInterrupt
trainer.Trainer.step = first_step
cli.main(["run", "--expid", "SDCNv3_tiny", "--set", "verbose=0", "--set", "model_root=" + sys.argv[1]])
"""
BARE = "import time; started = time.perf_counter(); import torch; print(time.perf_counter() - started)"


def measure_startup(repeats: int, scratch: Path) -> dict[str, list[float]]:
    """Seconds of a bare `import torch`, and of all that SDCNv3_tiny does until its first training step is done."""
    subprocess.run([sys.executable, str(ROOT / "data" / "make_tiny.py")], check=True, capture_output=True)
    _seconds(FIRST_STEP, scratch)  # builds the data and fills the file cache
    taken: dict[str, list[float]] = {"import torch": [], "first training step": []}
    for _ in range(repeats):
        for name, code in zip(taken, (BARE, FIRST_STEP), strict=True):
            taken[name].append(_seconds(code, scratch))
    return taken


def _seconds(code: str, scratch: Path) -> float:
    """What a fresh process that runs `code` prints last."""
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(scratch)], cwd=ROOT, env=path, capture_output=True, text=True
    )
    if not done.stdout.strip():
        raise RuntimeError(done.stderr)
    return float(done.stdout.split()[-1])


def run_all(rows: int, repeats: int, workers: list[int], scratch: Path) -> dict[str, Any]:
    """Every figure, as often as `repeats` says, in turns."""
    data = scratch / "train.npz"
    np.savez(data, **make_columns(rows))
    jobs: dict[str, tuple[dict[str, Any], int]] = {}
    for threads in (1, 2):
        for side, count in [(s, n) for s in SIDES for n in (workers if s == "fuxictr" else [0])]:
            name = f"{side}, {threads} threads" + (f", {count} workers" if side == "fuxictr" else "")
            jobs[name] = {"kind": "training", "side": side, "num_workers": count, "data": str(data)}, threads
        for order in ("shuffled", "ordered"):
            settings = {"kind": "batches", "rows": max(2 * rows, 200_000), "is_shuffled": order == "shuffled"}
            jobs[f"batches, {order}, {threads} threads"] = settings, threads
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, (settings, threads) in jobs.items():
            taken[name].append(run_worker(Path(__file__).resolve(), settings, threads))
            print(f"  {name}: {taken[name][-1]['rows_per_second']:,.0f} rows/s", file=sys.stderr, flush=True)
    figures = {
        name: {**spread(run["rows_per_second"] for run in runs), "peak_mib": max(run["peak_mib"] for run in runs)}
        for name, runs in taken.items()
    }
    return {
        "rows": rows,
        "repeats": repeats,
        "machine": environment(["torch", "fuxictr", "numpy"]),
        "training_rows_per_second": {name: f for name, f in figures.items() if not name.startswith("batches")},
        "batches_rows_per_second": {name: f for name, f in figures.items() if name.startswith("batches")},
        "startup_seconds": {name: spread(s) for name, s in measure_startup(repeats + 2, scratch / "runs").items()},
    }


def to_markdown(result: dict[str, Any]) -> str:
    """The tables for the README of this folder."""
    training, startup = result["training_rows_per_second"], result["startup_seconds"]
    best = {
        side: max((n for n in training if n.startswith(f"{side},")), key=lambda n: training[n]["median"])
        for side in SIDES
    }
    reference = training[best["fuxictr"]]["median"]
    rows = [_row(n, f, reference) for n, f in training.items()]
    rows += [_row(n, f, None) for n, f in result["batches_rows_per_second"].items()]
    ratio = training[best["ctrbench"]]["median"] / reference
    start = startup["first training step"]["median"] / startup["import torch"]["median"]
    return "\n".join(
        [
            f"{result['rows']:,} rows, medians of {result['repeats']}; {describe(result['machine'])}.",
            "",
            markdown(["", "rows/s", "lowest to highest", "to FuxiCTR's best", "peak MiB"], rows),
            "",
            f"Training, each at its best setting: **{ratio:.2f}x** FuxiCTR ({best['ctrbench']} against {best['fuxictr']}).",
            f"Start-up to the first training step: **{start:.2f}x** a bare `import torch` "
            f"({startup['first training step']['median']:.2f} s against {startup['import torch']['median']:.2f} s).",
        ]
    )


def _row(name: str, figures: dict[str, float], reference: float | None) -> list[str]:
    ratio = f"{figures['median'] / reference:.2f}" if reference else ""
    span = f"{figures['min']:,.0f} to {figures['max']:,.0f}"
    return [name, f"{figures['median']:,.0f}", span, ratio, f"{figures['peak_mib']:,.0f}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="of FuxiCTR's loader")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        sys.path.insert(0, str(ROOT))
        work(arguments.worker, measure)
        return 0
    use_cores(2)
    with tempfile.TemporaryDirectory() as scratch:
        result = run_all(arguments.rows, arguments.repeats, arguments.workers, Path(scratch))
    write_report(arguments.output, result)
    print(to_markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
