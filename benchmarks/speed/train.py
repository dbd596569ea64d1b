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
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
BATCH_SIZE = 4096
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


def measure_training(side: str, workers: int, rows: int, data: Path) -> float:
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
    columns = {n: x.float() if n == "label" else x.int() for n, x in columns.items()}
    batches = Batches(columns, BATCH_SIZE, shuffle=True)
    if side == "fuxictr":
        from fuxictr.pytorch.dataloaders.npz_dataloader import NpzDataLoader

        BaseModel.compile(model, "adam", "binary_crossentropy", settings.learning_rate)
        loader: Any = NpzDataLoader(feature_map, str(data), BATCH_SIZE, shuffle=True, num_workers=workers)
    elif side == "fuxictr_step":  # FuxiCTR's step on our batches: what the loader alone costs
        BaseModel.compile(model, "adam", "binary_crossentropy", settings.learning_rate)
        loader = batches
    else:
        trainer, loader = Trainer(model, settings), batches
    if side != "ctrbench":
        model._max_gradient_norm, model._total_steps, model._eval_steps = 10.0, 0, sys.maxsize
        model._stop_training, model._verbose = False, 0
    for _ in range(2):  # the first epoch warms up
        started = time.perf_counter()
        if side == "ctrbench":
            model.train()
            for batch in loader:
                float(trainer.step(batch))
        else:
            model.train_epoch(loader)
        seconds = time.perf_counter() - started
    return rows / seconds


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


STARTUP = """
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


def in_process(code: list[str], threads: int) -> float:
    """Run a child with `threads` threads; the number that it prints last."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *code], cwd=ROOT, env=environment, capture_output=True, text=True)
    if not done.stdout.strip():
        raise RuntimeError(done.stderr)
    return float(done.stdout.split()[-1])


def medians(settings: dict[str, tuple[list[str], int]], repeats: int) -> dict[str, float]:
    """Median figure of each setting; the settings take turns."""
    figures: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(repeats):
        for name, (code, threads) in settings.items():
            figures[name].append(in_process(code, threads))
            print(f"  {name}: {figures[name][-1]:,.2f}", file=sys.stderr, flush=True)
    return {name: statistics.median(values) for name, values in figures.items()}


def run_all(rows: int, repeats: int, scratch: Path) -> dict[str, Any]:
    data = scratch / "train.npz"
    np.savez(data, **make_columns(rows))
    here = str(Path(__file__).resolve())
    training = {}
    for threads in (1, 2):
        for side, workers in (("ctrbench", 0), ("fuxictr_step", 0), ("fuxictr", 0), ("fuxictr", 1), ("fuxictr", 2)):
            name = f"{side}, {threads} threads" + (f", {workers} workers" if side == "fuxictr" else "")
            training[name] = ([here, "--child", side, str(workers), str(rows), str(data)], threads)
    batches = {
        f"{order}, {threads} threads": (
            [here, "--child", "batches", order, str(max(rows, 10 * BATCH_SIZE) * 2)],
            threads,
        )
        for order in ("shuffled", "ordered")
        for threads in (1, 2)
    }
    subprocess.run([sys.executable, str(ROOT / "data" / "make_tiny.py")], check=True, capture_output=True)
    startup = {
        "import torch": (["-c", BARE], 2),
        "first training step": (["-c", STARTUP, str(scratch / "runs")], 2),
    }
    in_process(["-c", STARTUP, str(scratch / "runs")], 2)  # builds the data and fills the file cache
    return {
        "rows": rows,
        "training_rows_per_second": medians(training, repeats),
        "batches_rows_per_second": medians(batches, repeats),
        "startup_seconds": medians(startup, max(repeats, 3) + 2),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }


def to_markdown(result: dict[str, Any]) -> str:
    training, startup = result["training_rows_per_second"], result["startup_seconds"]
    best = {side: max(n for n in training if n.startswith(f"{side},")) for side in ("ctrbench", "fuxictr")}
    for side in best:
        best[side] = max((n for n in training if n.startswith(f"{side},")), key=training.__getitem__)
    ratio = training[best["ctrbench"]] / training[best["fuxictr"]]
    lines = ["| measure | figure | ratio to FuxiCTR's best |", "|---|---|---|"]
    lines += [
        f"| training, {name} | {value:,.0f} rows/s | {value / training[best['fuxictr']]:.2f} |"
        for name, value in training.items()
    ]
    lines += [
        f"| batches alone, 39 columns, {n} | {v:,.0f} rows/s | |" for n, v in result["batches_rows_per_second"].items()
    ]
    lines += [f"| start-up, {name} | {value:.2f} s | |" for name, value in startup.items()]
    lines += [
        "",
        f"Training, each at its best setting: {ratio:.2f}x FuxiCTR ({best['ctrbench']} against {best['fuxictr']}). "
        f"Start-up to the first step: {startup['first training step'] / startup['import torch']:.2f}x a bare import of torch.",
    ]
    return "\n".join(lines)


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        kind, *values = sys.argv[2:]
        if kind == "batches":
            print(measure_batches(int(values[1]), values[0] == "shuffled"))
        else:
            print(measure_training(kind, int(values[0]), int(values[1]), Path(values[2])))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = run_all(arguments.rows, arguments.repeats, Path(scratch))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(to_markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
