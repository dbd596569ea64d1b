# SPDX-License-Identifier: Apache-2.0
"""What a process of `compare.py` measures: one side on one shape, metrics, ceilings.

The sides are ctrbench, with any settings of its configuration, and the installed FuxiCTR: its `train_epoch`, `train_step`,
`evaluate` and `predict` on the same model class with stock embeddings, fed by its npz loader, the fastest of the wheel's.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from plain_qin import RowLoader, attend, plain_attend, plain_forward
from shapes import Shape, make_model, read_columns, shape_of

METRICS = ["AUC", "logloss"]
# Repeats of a metric by the side that takes milliseconds.
METRIC_REPEATS = 7
# At most so many products are timed before a step, and after it.
MOST_PRODUCTS = 200


class Side:
    """One side on one shape: a model with all that it needs.

    Args:
        shape: whose data and model.
        settings: of the worker; see `compare.py`.
    """

    def __init__(self, shape: Shape, settings: dict[str, Any]):
        self.shape, self.settings, self.device = shape, settings, settings["device"]
        self.train_file, self.eval_file = (Path(settings[name]) for name in ("train_file", "eval_file"))

    def resident(self, file: Path, shuffle: bool, times: int = 1) -> Any:
        """All rows of a file on the device, `times` times over, as ctrbench's batches."""
        from ctrbench.batches import Batches

        columns = {name: x.to(self.device) for name, x in read_columns(file).items()}
        if times > 1:
            columns = {name: x.repeat(times, *[1] * (x.dim() - 1)) for name, x in columns.items()}
        return Batches(columns, self.shape.batch_size, shuffle, device=self.device)

    def loader(self, file: Path, shuffle: bool) -> Any:
        """The side's own batches."""
        raise NotImplementedError

    def train_epoch(self) -> tuple[float, int]:
        """Seconds of the second epoch, batches included, and its rows."""
        raise NotImplementedError

    def step(self, batch: Any) -> None:
        """One training step."""
        raise NotImplementedError

    def evaluate(self, loader: Any) -> None:
        """Predictions of a split and their AUC and logloss."""
        raise NotImplementedError

    def predict(self, loader: Any) -> None:
        """Predictions of a split, on the host."""
        raise NotImplementedError

    def attend(self) -> Callable[[Any, dict[str, Any]], tuple[Any, Any]]:
        """Items and attention of QIN."""
        raise NotImplementedError


class Ours(Side):
    """ctrbench."""

    def __init__(self, shape: Shape, settings: dict[str, Any]):
        super().__init__(shape, settings)
        from ctrbench.trainer import Trainer

        self.model, training = make_model(shape, self.device, settings["overrides"])
        self.trainer = Trainer(self.model, training)

    def loader(self, file: Path, shuffle: bool) -> Any:
        if not shuffle:
            return self.resident(file, shuffle).ordered(self.trainer.evaluation_rows, False, 0)
        return self.resident(file, shuffle)

    def train_epoch(self) -> tuple[float, int]:
        batches = self.resident(self.train_file, shuffle=True, times=self.settings["times"])
        history = self.trainer.fit(batches, None).history
        return history[-1]["train_seconds"] - history[-2]["train_seconds"], batches.num_rows

    def step(self, batch: Any) -> None:
        self.trainer.step(batch)

    def evaluate(self, loader: Any) -> None:
        self.trainer.evaluate(loader, METRICS)

    def predict(self, loader: Any) -> None:
        self.trainer.predict(loader).cpu()

    def attend(self) -> Callable[[Any, dict[str, Any]], tuple[Any, Any]]:
        return attend


class Fuxictr(Side):
    """The installed FuxiCTR; with MicroLens_1M, whose model it lacks, the plain form of QIN's equations."""

    def __init__(self, shape: Shape, settings: dict[str, Any]):
        super().__init__(shape, settings)
        from fuxictr.pytorch.models import BaseModel

        self.model, training = make_model(shape, self.device)
        model = self.model
        if shape.has_items:
            model.forward = types.MethodType(plain_forward, model)
        BaseModel.compile(model, "adam", "binary_crossentropy", training.learning_rate)
        # What its `fit` sets before the first epoch; a model of this number of steps is never evaluated on the way.
        model._max_gradient_norm, model._total_steps, model._eval_steps = 10.0, 0, sys.maxsize
        model._stop_training, model._verbose, model._epoch_index = False, 0, 0

    def loader(self, file: Path, shuffle: bool) -> Any:
        if self.shape.has_items:
            return RowLoader(self.shape, read_columns(file), self.shape.batch_size, shuffle)
        workers = self.settings["num_workers"]
        loader_class = npz_loader_class()
        return loader_class(self.model.feature_map, str(file), self.shape.batch_size, shuffle, num_workers=workers)

    def train_epoch(self) -> tuple[float, int]:
        loader = self.loader(self.train_file, shuffle=True)
        self.model.train_epoch(loader)
        return timed(lambda: self.model.train_epoch(loader), self.device), _rows_of(self.train_file)

    def step(self, batch: Any) -> None:
        self.model.train_step(batch)

    def evaluate(self, loader: Any) -> None:
        self.model.evaluate(loader, METRICS)

    def predict(self, loader: Any) -> None:
        self.model.predict(loader)

    def attend(self) -> Callable[[Any, dict[str, Any]], tuple[Any, Any]]:
        return plain_attend


def npz_loader_class() -> Any:
    """FuxiCTR's NpzDataLoader, from its own file: its package imports ray, which is not needed for it."""
    import fuxictr

    path = Path(fuxictr.__file__).parent / "pytorch" / "dataloaders" / "npz_dataloader.py"
    spec = importlib.util.spec_from_file_location("fuxictr_npz_dataloader", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # worker processes look it up
    spec.loader.exec_module(module)
    return module.NpzDataLoader


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """What a worker is asked for: the kinds of `settings`, each with seconds and rows."""
    if settings["kind"] == "ceilings":
        import torch

        from ctrbench import ceilings

        return dataclasses.asdict(ceilings.measure(torch.device(settings["device"]), settings["precision"]))
    if settings["kind"] == "metric":
        return measure_metric(settings)
    return measure_side(settings)


def measure_side(settings: dict[str, Any]) -> dict[str, Any]:
    """Every kind that is asked for, in one process, and what a step costs at least."""
    import torch

    shape = shape_of(settings["shape"], settings["is_small"])
    side = (Fuxictr if settings["side"] == "fuxictr" else Ours)(shape, settings)
    found: dict[str, Any] = {}
    for kind in settings["kinds"]:
        found[kind] = _MEASURED[kind](side)
    answer: dict[str, Any] = {"kinds": found}
    if settings["side"] == "ctrbench" and "step" in settings["kinds"]:
        from ctrbench.costs import count_step

        answer["costs"] = dataclasses.asdict(count_step(side.model, _one_batch(side)))
    if side.device == "cuda":
        answer["device_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return answer


def _batches(side: Side) -> dict[str, Any]:
    loader = side.loader(side.train_file, shuffle=True)

    def drain() -> None:
        for batch in loader:
            assert "label" in batch

    if isinstance(side, Ours):
        drain()  # the first epoch touches the memory for the first time
        times = [timed(drain, side.device) for _ in range(5)]
        return {"seconds": statistics.median(times), "rows": loader.num_rows}
    return {"seconds": timed(drain, side.device), "rows": _rows_of(side.train_file)}


def _epoch(side: Side) -> dict[str, Any]:
    seconds, rows = side.train_epoch()
    return {"seconds": seconds, "rows": rows}


def _step(side: Side) -> dict[str, Any]:
    """Steps on batches that are on the device already: what a loop and a loader add is not in them."""
    import torch

    from ctrbench.phases import PhaseClock

    batches = _cycle(side)
    side.model.train()
    for _ in range(side.settings["warm_up_steps"]):
        side.step(next(batches))
    is_compiled = bool(side.settings["overrides"].get("compile"))
    with PhaseClock(side.model, torch.device(side.device), is_compiled=is_compiled) as clock:
        for _ in range(side.settings["steps"]):
            batch = next(batches)
            with clock.step():
                side.step(batch)
    medians = {name: statistics.median(values) for name, values in clock.seconds().items()}
    paired = _paired_steps(side, batches)
    return {"seconds": medians.pop("step"), "rows": side.shape.batch_size, "phases": medians, "paired": paired}


def _paired_steps(side: Side, batches: Iterator[Any]) -> list[dict[str, float]]:
    """As many steps again, each between large square products that take about as long.

    What a shared machine can do changes from second to second: only what ran side by side can be compared.
    """
    multiply, flops = _square_product(side)
    multiply()
    alone = timed(multiply, side.device)
    of_step = timed(lambda: side.step(next(batches)), side.device)
    count = max(2, min(MOST_PRODUCTS, round(of_step / alone / 2)))

    def multiplied() -> tuple[float, float]:
        return count * flops, timed(lambda: [multiply() for _ in range(count)], side.device)

    around, pairs = [multiplied()], []
    for _ in range(side.settings["steps"]):
        batch = next(batches)
        seconds = timed(functools.partial(side.step, batch), side.device)
        around.append(multiplied())
        done, spent = (sum(figures) for figures in zip(*around[-2:], strict=True))
        pairs.append({"seconds": seconds, "flops_per_second": done / spent})
    return pairs


def _square_product(side: Side) -> tuple[Callable[[], Any], int]:
    """A product of random square matrices in the precision of the side's steps, and its floating point operations."""
    import torch

    from ctrbench.ceilings import PRODUCT_ROWS

    rows = PRODUCT_ROWS[side.device][-1]
    is_bf16 = side.settings["overrides"].get("precision") == "bf16"
    dtype = torch.bfloat16 if is_bf16 else torch.float32  # whether tf32 is used is a setting of the process
    generator = torch.Generator(side.device).manual_seed(0)
    left, right = (torch.randn(rows, rows, generator=generator, device=side.device).to(dtype) for _ in range(2))
    target = torch.empty_like(left)
    return functools.partial(torch.mm, left, right, out=target), 2 * rows**3


def _attention(side: Side) -> dict[str, Any]:
    """Forward and backward of QIN's items and attention alone."""
    part, model, batch = side.attend(), side.model, _one_batch(side)
    model.train()

    def run() -> None:
        model.zero_grad(set_to_none=True)
        target, attended = part(model, batch)
        (target.square().mean() + attended.square().mean()).backward()

    times = [timed(run, side.device) for _ in range(side.settings["steps"])]
    return {"seconds": statistics.median(times), "rows": side.shape.batch_size}


def _evaluate(side: Side) -> dict[str, Any]:
    loader = side.loader(side.eval_file, shuffle=False)
    return {"seconds": timed(lambda: side.evaluate(loader), side.device), "rows": _rows_of(side.eval_file)}


def _predict(side: Side) -> dict[str, Any]:
    loader = side.loader(side.eval_file, shuffle=False)
    if isinstance(side, Ours):
        side.predict(loader)  # memory and, on a GPU, kernels are touched for the first time
    return {"seconds": timed(lambda: side.predict(loader), side.device), "rows": _rows_of(side.eval_file)}


def _rows_of(file: Path) -> int:
    return len(read_columns(file)["label"])


_MEASURED: dict[str, Callable[[Side], dict[str, Any]]] = {
    "batches": _batches,
    "epoch": _epoch,
    "step": _step,
    "attention": _attention,
    "predict": _predict,
    "evaluate": _evaluate,
}


def _one_batch(side: Side) -> Any:
    return next(_cycle(side))


def _cycle(side: Side) -> Iterator[Any]:
    """Full batches on the device, over and over, the same for both sides."""
    rows, kept = side.resident(side.train_file, shuffle=False), []
    for batch in rows:
        if len(batch["label"]) == side.shape.batch_size:
            kept.append(batch)
        if len(kept) == 4:
            break
    if not kept:
        raise ValueError(f"{side.shape.name}: fewer rows than one batch of {side.shape.batch_size}")
    while True:
        yield from kept


def timed(function: Callable[[], Any], device: str) -> float:
    """Seconds of a call, of all that it starts on a GPU included."""
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def measure_metric(settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of one metric of random predictions; the value too, which the sides must agree on."""
    import torch

    random = np.random.default_rng(0)
    rows, groups, name, device = (settings[key] for key in ("rows", "groups", "metric", "device"))
    y_pred = random.random(rows, np.float32)
    y_true = (random.random(rows) < y_pred).astype(np.float32)
    group_id = random.integers(0, groups, rows) if groups else None
    if settings["side"] == "fuxictr":
        from fuxictr.metrics import evaluate_metrics as theirs

        truth, scores = y_true.astype(np.float64), y_pred.astype(np.float64)
        value: list[float] = []
        seconds = timed(lambda: value.append(float(theirs(truth, scores, [name], group_id)[name])), "cpu")
        return {"seconds": seconds, "rows": rows, "value": value[0]}
    from ctrbench.metrics import evaluate_metrics

    tensors: Iterable[Any] = (y_true, y_pred, *([] if group_id is None else [group_id]))
    truth, scores, *group = (torch.from_numpy(x).to(device) for x in tensors)

    def compute() -> float:
        return evaluate_metrics(truth, scores, [name], *group)[name]

    compute()
    times = [timed(compute, device) for _ in range(METRIC_REPEATS)]
    return {"seconds": statistics.median(times), "rows": rows, "value": compute()}
