# SPDX-License-Identifier: Apache-2.0
"""Time QIN's training step at the real shape of MicroLens_1M_x1, against the plain form of its equations, in one run.

    python benchmarks/speed/qin.py --output benchmarks/speed/results/qin.json

91,718 items, B = 8192, the newest 64 of 100 history slots, lengths as in the data (median 6, mean 8), R = 4. The plain
form encodes every slot of every history, forms all keys and values and keeps the R rows of each quadratic layer apart,
with stock embeddings and FuxiCTR's `train_step`; ours is the model folder with Trainer.step. Batches are compared with
a loader that fetches row by row and looks the items of a batch up in a DataFrame. Every figure comes from a process
of its own, the processes take turns, and medians count.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measure import ROOT, describe, environment, markdown, run_worker, spread, use_cores, work, write_report

NUM_ITEMS, NUM_TAGS, SLOTS, MAX_LEN, BATCH_SIZE, WIDTH = 91_718, 11_740, 100, 64, 8192, 128
KINDS = ("items and attention", "whole step", "batches")
SIDES = ("plain", "ctrbench")


def make_rows(rows: int) -> dict[str, np.ndarray]:
    """Random rows of the real shape: long-tailed items, left-padded histories of lognormal length."""
    random = np.random.default_rng(0)
    weights = 1 / np.arange(1, NUM_ITEMS) ** 0.7
    shares = weights / weights.sum()
    lengths = np.clip(random.lognormal(math.log(6), 0.7, rows).round(), 0, SLOTS).astype(np.int64)
    history = random.choice(NUM_ITEMS - 1, (rows, SLOTS), p=shares).astype(np.int32) + 1
    history[np.arange(SLOTS) < SLOTS - lengths[:, None]] = 0
    return {
        "item_seq": history,
        "likes_level": random.integers(0, 11, rows).astype(np.int32),
        "views_level": random.integers(0, 11, rows).astype(np.int32),
        "item_id": random.choice(NUM_ITEMS - 1, rows, p=shares).astype(np.int32) + 1,
        "label": (random.random(rows) < 0.25).astype(np.float32),
    }


def make_items() -> dict[str, np.ndarray]:
    """The item table: up to five tags and 128 numbers an item."""
    random = np.random.default_rng(1)
    tags = random.integers(1, NUM_TAGS, (NUM_ITEMS, 5)).astype(np.int32)
    tags[np.arange(5) < random.integers(0, 5, (NUM_ITEMS, 1))] = 0
    vectors = random.standard_normal((NUM_ITEMS, WIDTH), np.float32)
    tags[0], vectors[0] = 0, 0
    return {"item_id": np.arange(NUM_ITEMS, dtype=np.int32), "item_tags": tags, "item_emb_d128": vectors}


def make_feature_map() -> Any:
    import torch
    from fuxictr.features import FeatureMap

    feature_map = FeatureMap("MicroLens_1M_x1", "unused")
    categorical = {"type": "categorical", "padding_idx": 0}
    tags = {"max_len": 5, "vocab_size": NUM_TAGS, "feature_encoder": "layers.MaskedAveragePooling()"}
    feature_map.features.update(
        item_seq={"type": "meta", "max_len": SLOTS},
        likes_level={**categorical, "source": "", "vocab_size": 11},
        views_level={**categorical, "source": "", "vocab_size": 11},
        item_id={**categorical, "source": "item", "vocab_size": NUM_ITEMS},
        item_tags={**categorical, **tags, "type": "sequence", "source": "item"},
        item_emb_d128={"source": "item", "type": "embedding", "embedding_dim": WIDTH, "pretrain_dim": WIDTH},
    )
    feature_map.labels = ["label"]
    feature_map.num_fields = feature_map.get_num_fields()
    feature_map.item_table = {name: torch.from_numpy(x) for name, x in make_items().items()}
    return feature_map


def make_model() -> tuple[Any, Any]:
    """QIN as published (R = 4) and its training settings."""
    import torch

    from ctrbench.schema import TrainingConfig
    from ctrbench.zoo import build_model, load_model_class

    torch.manual_seed(0)
    settings = TrainingConfig(
        model="QIN", dataset_id="MicroLens_1M_x1", embedding_regularizer=2e-4, learning_rate=2e-3, verbose=0
    )
    params = {"embedding_dim": WIDTH, "max_len": MAX_LEN, "num_layers": 4, "num_row": 4, "net_dropout": 0.1}
    model_class = load_model_class(ROOT / "model_zoo" / "QIN", "QIN")
    params = {**settings.model_dump(), **params, "gpu": -1, "model_id": "m"}
    return build_model(model_class, make_feature_map(), params, ""), settings


def plain_attend(model: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    """Target and attention output, every slot encoded, keys and values formed."""
    import torch

    history = batch["item_seq"][:, -MAX_LEN:]
    shown = torch.cat([history, batch["item_id"].unsqueeze(1)], dim=1)  # (B, L + 1)
    table = model.feature_map.item_table
    rows = {name: column[shown.flatten().long()] for name, column in table.items()}
    items = model.embedding_layer(rows, flatten_emb=True).view(*shown.shape, -1)  # (B, L + 1, d)
    target, slots, attention = items[:, -1], items[:, :-1], model.attention_layers
    q, k, v = attention.W_q(target), attention.W_k(slots), attention.W_v(slots)  # (B, d_a), (B, L, d_a) twice
    s = (q.unsqueeze(1) @ k.transpose(1, 2) / math.sqrt(k.shape[-1])).squeeze(1)  # (B, L)
    a = torch.relu(s * (history > 0))
    return target, attention.W_o((a.unsqueeze(1) @ v).squeeze(1)) + target


def plain_forward(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The model's equations as they stand."""
    import torch

    target, attended = plain_attend(model, batch)
    levels = {name: batch[name] for name in ("likes_level", "views_level")}
    x = torch.cat([model.embedding_layer(levels, flatten_emb=True), target, attended], dim=-1)
    for i, layer in enumerate(model.qnn.layer):
        rows = layer.linear(x).view(len(x), layer.num_row, -1)  # (B, R, N)
        product = model.qnn.norm[i](x * rows.sum(1))
        x = x + model.qnn.dropout(model.qnn.activation[i](product))
    return {"y_pred": torch.sigmoid(model.qnn.fc(x))}


def attend(model: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    """The same by the model folder's own parts."""
    ragged = sys.modules[type(model).__mro__[1].__module__.rpartition(".")[0] + ".ragged"]
    ids, targets, pairs = ragged.distinct_items(batch["item_id"], batch["item_seq"][:, -MAX_LEN:])
    items = model.encode(ids)
    target = items.index_select(0, targets)
    return target, model.attention_layers(target, items, pairs)


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of one step, or rows per second of the batches, in the process of a worker."""
    if settings["kind"] == "batches":
        return {"seconds": batch_seconds(settings["side"], settings["rows"])}
    import torch

    from ctrbench.trainer import Trainer

    model, training = make_model()
    batch = {name: torch.from_numpy(x) for name, x in make_rows(BATCH_SIZE).items()}
    model.train()
    is_plain = settings["side"] == "plain"
    if settings["kind"] == "whole step":
        if is_plain:
            type(model).forward = plain_forward
            type(model).__mro__[2].compile(model, "adam", "binary_crossentropy", training.learning_rate)
            model._max_gradient_norm, step = 10.0, model.train_step
        else:
            step = Trainer(model, training).step
    else:
        Trainer(model, training, use_fast_path=not is_plain)
        step = _forward_and_backward(model, plain_attend if is_plain else attend)
    taken = []
    for _ in range(settings["steps"]):
        started = time.perf_counter()
        step(batch)
        taken.append(time.perf_counter() - started)
    return {"seconds": min(taken)}


def _forward_and_backward(model: Any, part: Callable[[Any, dict[str, Any]], tuple[Any, Any]]) -> Callable[[Any], None]:
    def step(batch: dict[str, Any]) -> None:
        model.zero_grad(set_to_none=True)
        target, attended = part(model, batch)
        (target.square().mean() + attended.square().mean()).backward()

    return step


def batch_seconds(side: str, rows: int) -> float:
    """Seconds to make the batches of `rows` rows."""
    import pandas as pd
    import torch

    from ctrbench.batches import Batches

    columns = make_rows(rows)
    if side == "ctrbench":
        batches = Batches({n: torch.from_numpy(x) for n, x in columns.items()}, BATCH_SIZE, shuffle=True)
        taken = []
        for _ in range(5):  # the first epoch touches the memory for the first time
            started = time.perf_counter()
            for batch in batches:
                assert len(batch) == len(columns)
            taken.append(time.perf_counter() - started)
        return min(taken)
    table = pd.DataFrame({name: list(x) for name, x in make_items().items()})
    frame = pd.DataFrame({name: list(x) for name, x in columns.items()})
    order = np.random.default_rng(0).permutation(rows)
    started = time.perf_counter()
    for first in range(0, rows, BATCH_SIZE):
        samples = [frame.iloc[i].to_dict() for i in order[first : first + BATCH_SIZE]]
        batch = {name: torch.as_tensor(np.array([sample[name] for sample in samples])) for name in columns}
        shown = torch.cat([batch["item_seq"][:, -MAX_LEN:], batch["item_id"].unsqueeze(1)], dim=1)
        looked_up = table.iloc[shown.flatten().numpy()]
        batch |= {f"item {name}": torch.as_tensor(np.array(looked_up[name].tolist())) for name in table.columns}
    return time.perf_counter() - started


def run_all(rows: int, repeats: int, steps: int, threads: int) -> dict[str, Any]:
    """Every figure, as often as `repeats` says, in turns."""
    taken: dict[str, list[dict[str, Any]]] = {f"{kind}, {side}": [] for kind in KINDS for side in SIDES}
    for _ in range(repeats):
        for kind in KINDS:
            for side in SIDES:
                settings = {"kind": kind, "side": side, "rows": rows, "steps": steps}
                measured = run_worker(Path(__file__).resolve(), settings, threads, timeout=1200)
                taken[f"{kind}, {side}"].append(measured)
                print(f"  {kind}, {side}: {measured}", file=sys.stderr, flush=True)
    return {
        "batch_size": BATCH_SIZE,
        "rows": rows,
        "repeats": repeats,
        "steps": steps,
        "threads": threads,
        "machine": environment(["torch", "fuxictr", "numpy", "pandas"]),
        "figures": {
            name: {**spread(run["seconds"] for run in runs), "peak_mib": max(run["peak_mib"] for run in runs)}
            for name, runs in taken.items()
        },
    }


def to_markdown(result: dict[str, Any]) -> str:
    """The table for the README of this folder."""
    lines = []
    for kind in KINDS:
        rows = result["rows"] if kind == "batches" else result["batch_size"]
        plain, ours = (result["figures"][f"{kind}, {side}"] for side in SIDES)
        for side, figures in zip(SIDES, (plain, ours), strict=True):
            ratio = f"**{plain['median'] / ours['median']:.1f}x**" if side == "ctrbench" else ""
            memory = f"{ours['peak_mib'] / plain['peak_mib']:.2f}x" if side == "ctrbench" else ""
            seconds, speed = f"{figures['median']:.3f}", f"{rows / figures['median']:,.0f}"
            lines.append([kind, side, seconds, speed, f"{figures['peak_mib']:,.0f}", ratio, memory])
    head = (
        f"B = {result['batch_size']:,}, {result['threads']} threads, best of {result['steps']} steps, medians of "
        f"{result['repeats']}; {describe(result['machine'])}."
    )
    header = ["", "", "seconds", "rows/s", "peak MiB of the process", "faster", "memory"]
    return f"{head}\n\n{markdown(header, lines, num_texts=2)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=32_768, help="rows whose batches are timed")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        sys.path.insert(0, str(ROOT))
        work(arguments.worker, measure)
        return 0
    use_cores(arguments.threads)
    result = run_all(arguments.rows, arguments.repeats, arguments.steps, arguments.threads)
    write_report(arguments.output, result)
    print(to_markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
