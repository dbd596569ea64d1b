# SPDX-License-Identifier: Apache-2.0
"""The tables of compare.py's report: figures of both sides, their ratio, the floor, and the targets."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

from measure import describe, markdown

OURS, THEIRS = "ctrbench", "fuxictr"
PHASES = ("gather", "forward", "backward", "optimizer")
TITLES = {
    "batches": "batches alone",
    "epoch": "whole epoch",
    "predict": "prediction",
    "evaluate": "evaluation, AUC and logloss",
    "attention": "items and attention alone",
}
# Ratios that the project's README repeats.
HEADLINES = {("Criteo_x4", "epoch"), ("Avazu_x4", "epoch"), ("ML_1M", "epoch"), ("ML_1M", "evaluate")}
HEADLINES |= {("MicroLens_1M", "step"), ("MicroLens_1M", "attention"), ("MicroLens_1M", "batches")}


def to_markdown(result: dict[str, Any]) -> str:
    """All tables of a report; parts that were not measured are left out."""
    cores = f"bound to {result['cores']} cores" + (", GPU" if result["device"] == "cuda" else "")
    lines = [f"{describe(result['machine'])}; {cores}.", ""]
    if result["is_quick"]:
        lines += ["A trial of the harness at tiny sizes: no figure means anything.", ""]
    if result["ceilings"]:
        rows = [
            [name, f"{found['bytes_per_second'] / 1e9:,.1f}", f"{found['flops_per_second'] / 1e9:,.0f}"]
            for name, found in sorted(result["ceilings"].items())
        ]
        lines += [markdown(["this machine's ceilings", "copied GB/s", "GFLOP/s"], rows), ""]
    for name, shape in result["shapes"].items():
        lines += [*_shape_lines(result, name, shape), ""]
    lines += [line for table in (_metric_table(result), _startup_lines(result)) for line in table]
    lines += ["", markdown(["target", "aim", "measured", ""], [t.row(result) for t in TARGETS[result["device"]]])]
    if result["skipped"]:
        lines += ["", "Not measured: " + "; ".join(f"{what}, because {why}" for what, why in result["skipped"].items())]
    return "\n".join(lines)


def limits_of(result: dict[str, Any], shape: dict[str, Any], side: str = OURS) -> dict[str, float]:
    """The ceilings that hold for a side: at its threads and at its precision."""
    threads = shape["chosen"][THEIRS if side == THEIRS else OURS]["threads"]
    precision = shape["overrides"].get(side, {}).get("precision", "fp32")
    if f"{threads} threads, {precision}" not in result["ceilings"]:
        threads = shape["chosen"][OURS]["threads"]
    limits: dict[str, float] = result["ceilings"][f"{threads} threads, {precision}"]
    return limits


def floor_seconds(
    costs: dict[str, Any], limits: dict[str, float], kind: str, rows: int, phase: str = ""
) -> float | None:
    """The least time of a kind of work on `rows` rows: of its bytes or of its FLOPs, whichever is longer; None if unknown."""
    flops, moved = costs["flops"], costs["bytes"]
    step = sum(moved[part] for part in PHASES)
    if phase:
        work = flops.get(phase, 0), moved[phase]
    elif kind == "attention":
        return None
    else:
        work = {
            "batches": (0, moved["data"]),
            "step": (sum(flops.values()), step),
            "epoch": (sum(flops.values()), step + moved["data"]),
        }.get(kind, (flops["forward"], moved["forward"] + moved["gather"] // 2 + moved["data"]))
    seconds = max(work[0] / limits["flops_per_second"], work[1] / limits["bytes_per_second"])
    return seconds * rows / costs["rows"]


def rate(shape: dict[str, Any], side: str, kind: str) -> float | None:
    """Rows a second; None where that was not measured."""
    found = shape["sides"].get(side, {}).get("kinds", {}).get(kind)
    return found["rows"] / found["seconds"]["median"] if found else None


def flop_share(result: dict[str, Any], shape: dict[str, Any], side: str) -> float | None:
    """The share of the ceiling of matrix products that a side's training step reaches."""
    found = shape["sides"].get(side, {}).get("kinds", {}).get("step")
    if not found:
        return None
    limit = limits_of(result, shape, side)["flops_per_second"]
    share: float = _flops(shape, found) / found["seconds"]["median"] / limit
    return share


def paired_share(result: dict[str, Any], shape: dict[str, Any], side: str) -> float | None:
    """The same of what large square products reach just before and after each step; None where that was not measured."""
    found = shape["sides"].get(side, {}).get("kinds", {}).get("step", {})
    shares = [_flops(shape, found) / pair["seconds"] / pair["flops_per_second"] for pair in found.get("paired", ())]
    return statistics.median(shares) if shares else None


def _flops(shape: dict[str, Any], found: dict[str, Any]) -> float:
    flops: float = sum(shape["costs"]["flops"].values()) * found["rows"] / shape["costs"]["rows"]
    return flops


def epoch_seconds(shape: dict[str, Any], side: str) -> float | None:
    """Seconds of an epoch of the published training split, by the rate of the measured one, or of steps and batches."""
    per_second = rate(shape, side, "epoch")
    if per_second is not None:
        return shape["epoch_rows"] / per_second
    parts = [rate(shape, side, kind) for kind in ("step", "batches")]
    return None if None in parts else sum(shape["epoch_rows"] / r for r in parts if r)


def _shape_lines(result: dict[str, Any], name: str, shape: dict[str, Any]) -> list[str]:
    sides = list(shape["sides"])
    header = ["", *sides, f"{OURS} to {THEIRS}", "floor", "reached of it"]
    rows = [_rate_row(result, name, shape, kind) for kind in ("batches", "epoch", "predict", "evaluate")]
    seconds = [epoch_seconds(shape, side) for side in sides]
    rows.insert(
        2, [f"epoch of {shape['epoch_rows']:,} rows, s", *(f"{s:,.1f}" if s else "" for s in seconds), "", "", ""]
    )
    rows.append(_seconds_row(result, name, shape, "step", "training step, ms"))
    rows += [_seconds_row(result, name, shape, "step", f"- {phase}, ms", phase) for phase in PHASES]
    for share, title in (
        (flop_share, "step's share of the GFLOP/s ceiling"),
        (paired_share, "- of square products beside it"),
    ):
        if any(shares := [share(result, shape, side) for side in sides]):
            rows.append([title, *(f"{s:.0%}" if s else "" for s in shares), "", "", ""])
    if any("attention" in side["kinds"] for side in shape["sides"].values()):
        rows.append(_seconds_row(result, name, shape, "attention", f"{TITLES['attention']}, ms"))
    rows.append(_memory_row(shape, "peak_mib", "peak MiB"))
    if any("device_peak_mib" in side for side in shape["sides"].values()):
        rows.append(_memory_row(shape, "device_peak_mib", "peak MiB of the GPU"))
    chosen = "; ".join(
        f"{side}: {setting['threads']} threads" + (f", {setting['num_workers']} workers" if side == THEIRS else "")
        for side, setting in shape["chosen"].items()
    )
    title = f"**{name}**, {shape['model']}, B = {shape['batch_size']:,}, {shape['columns']} columns. {chosen}."
    return [title, "", markdown(header, rows)]


def _rate_row(result: dict[str, Any], name: str, shape: dict[str, Any], kind: str) -> list[str]:
    rates = [rate(shape, side, kind) for side in shape["sides"]]
    ours, theirs = rate(shape, OURS, kind), rate(shape, THEIRS, kind)
    floor = floor_seconds(shape["costs"], limits_of(result, shape), kind, rows=1)
    best = 1 / floor if floor else None
    if best and ours and ours > best:
        best = None  # not a floor: prediction needs less than training's forward pass where a model folds its weights, as QIN
    return [
        f"{TITLES[kind]}, rows/s",
        *(f"{r:,.0f}" if r else "" for r in rates),
        _ratio(ours, theirs, (name, kind) in HEADLINES),
        f"{best:,.0f}" if best else "",
        f"{ours / best:.1%}" if best and ours else "",
    ]


def _seconds_row(
    result: dict[str, Any], name: str, shape: dict[str, Any], kind: str, title: str, phase: str = ""
) -> list[str]:
    def of(side: str) -> float | None:
        found = shape["sides"].get(side, {}).get("kinds", {}).get(kind)
        found = found.get("phases", {}).get(phase) if found and phase else found and found["seconds"]
        return found["median"] if found else None

    ours, theirs = of(OURS), of(THEIRS)
    floor = floor_seconds(shape["costs"], limits_of(result, shape), kind, shape["batch_size"], phase)
    return [
        title,
        *(f"{1e3 * s:,.2f}" if (s := of(side)) else "" for side in shape["sides"]),
        _ratio(theirs, ours, not phase and (name, kind) in HEADLINES),
        f"{1e3 * floor:,.2f}" if floor else "",
        f"{floor / ours:.1%}" if floor and ours else "",
    ]


def _memory_row(shape: dict[str, Any], key: str, title: str) -> list[str]:
    peaks = [side.get(key) for side in shape["sides"].values()]
    ours, theirs = (shape["sides"].get(side, {}).get(key) for side in (OURS, THEIRS))
    ratio = f"{ours / theirs:.2f}x" if ours and theirs else ""
    return [title, *(f"{peak:,.0f}" if peak else "" for peak in peaks), ratio, "", ""]


def _ratio(large: float | None, small: float | None, is_headline: bool = False) -> str:
    if not large or not small:
        return ""
    ratio = large / small
    shown = f"{ratio:,.0f}x" if ratio >= 1000 else f"{ratio:.1f}x" if ratio >= 10 else f"{ratio:.2f}x"
    return f"**{shown.replace(',', '')}**" if is_headline else shown


def _metric_table(result: dict[str, Any]) -> list[str]:
    rows = []
    for name, found in result.get("metrics", {}).items():
        ours, theirs = (found.get(side, {}).get("median") for side in (OURS, THEIRS))
        floors = [found["bytes"] / limits["bytes_per_second"] for limits in result["ceilings"].values()]
        times = [f"{1e3 * seconds:,.2f}" if seconds else "" for seconds in (ours, theirs, min(floors, default=None))]
        rows.append([name, *times[:2], _ratio(theirs, ours, is_headline=name.startswith("gAUC")), times[2]])
    header = ["metric, ms", OURS, THEIRS, f"{OURS} to {THEIRS}", "reading once"]
    return [markdown(header, rows), ""] if rows else []


def _startup_lines(result: dict[str, Any]) -> list[str]:
    lines = []
    if building := result.get("building"):
        ours, theirs = (building["sides"][side]["rows_per_second"] for side in (OURS, THEIRS))
        lines.append(
            f"Building a Criteo-shaped dataset of {building['rows']:,} rows: {ours:,.0f} rows/s against {theirs:,.0f}, "
            f"{ours / theirs:.1f}x, {building['memory_ratio']:.2f}x the memory."
        )
    if startup := result.get("startup"):
        ours, bare = startup[OURS]["median"], startup["import torch"]["median"]
        theirs = f", FuxiCTR's after {startup[THEIRS]['median']:.2f} s" if THEIRS in startup else ""
        lines.append(
            f"The first training step on tiny data is done after {ours:.2f} s, **{ours / bare:.2f}x** a bare "
            f"`import torch` ({bare:.2f} s){theirs}."
        )
    return lines


@dataclasses.dataclass(frozen=True)
class Target:
    """What the figures are to show.

    Attributes:
        what: in words.
        aim: the bound.
        value: of a report; it may raise KeyError or TypeError where a part was not measured.
        unit: of the bound.
        is_upper: the bound is the most rather than the least.
    """

    what: str
    aim: float
    value: Callable[[dict[str, Any]], float]
    unit: str = "x"
    is_upper: bool = False

    def row(self, result: dict[str, Any]) -> list[str]:
        """Cells of the table."""
        aim = f"{'<=' if self.is_upper else '>='} {_quantity(self.aim, self.unit)}"
        try:
            value = self.value(result)
            is_reached = value <= self.aim if self.is_upper else value >= self.aim
        except (KeyError, TypeError, ZeroDivisionError):
            return [self.what, aim, "", "not measured"]
        return [self.what, aim, _quantity(value, self.unit), "reached" if is_reached else "missed"]


def _quantity(value: float, unit: str) -> str:
    scale = {"M rows/s": 1e6, "ms": 1e-3, "%": 1e-2}.get(unit, 1.0)
    shown = f"{value / scale:,.0f}" if value / scale >= 1000 else f"{value / scale:.3g}"
    return f"{shown}{'' if unit in ('x', '%') else ' '}{unit}"


def _of(name: str, side: str, kind: str) -> Callable[[dict[str, Any]], float]:
    def value(result: dict[str, Any]) -> float:
        found = rate(result["shapes"][name], side, kind)
        if found is None:
            raise KeyError(kind)
        return found

    return value


def _ratio_of(name: str, kind: str) -> Callable[[dict[str, Any]], float]:
    return lambda result: _of(name, OURS, kind)(result) / _of(name, THEIRS, kind)(result)


def _variant(precision: str) -> str:
    return f"{OURS}, precision {precision}"


def _seconds_of_epoch(side: str) -> Callable[[dict[str, Any]], float]:
    def value(result: dict[str, Any]) -> float:
        seconds = epoch_seconds(result["shapes"]["MicroLens_1M"], side)
        if seconds is None:
            raise KeyError(side)
        return seconds

    return value


def _share_of(name: str, of: Callable[..., float | None]) -> Callable[[dict[str, Any]], float]:
    def value(result: dict[str, Any]) -> float:
        share = of(result, result["shapes"][name], OURS)
        if share is None:
            raise KeyError(name)
        return share

    return value


def _metric(start: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda result: next((found for name, found in result["metrics"].items() if name.startswith(start)), {})


def _gauc_ratio(result: dict[str, Any]) -> float:
    found = _metric("gAUC")(result)
    ratio: float = found[THEIRS]["median"] / found[OURS]["median"]
    return ratio


def _large_auc_seconds(result: dict[str, Any]) -> float:
    found = max((m for name, m in result["metrics"].items() if name.startswith("AUC")), key=lambda m: m["rows"])
    seconds: float = found[OURS]["median"]
    return seconds


def _startup_ratio(result: dict[str, Any]) -> float:
    ratio: float = result["startup"][OURS]["median"] / result["startup"]["import torch"]["median"]
    return ratio


_ANYWHERE = (
    Target("gAUC of 1 M rows in 50,000 groups", 500, _gauc_ratio),
    Target("CSV to H5, Criteo's shape", 10, lambda result: result["building"]["speedup"]),
    Target("- its peak memory", 0.5, lambda result: result["building"]["memory_ratio"], is_upper=True),
    Target("start-up to first step, over `import torch`", 2, _startup_ratio, is_upper=True),
)
TARGETS = {
    "cpu": (
        Target("SDCNv3 on ML-1M, whole epoch", 2, _ratio_of("ML_1M", "epoch")),
        Target("SDCNv3 on Criteo's shape, whole epoch", 1.5, _ratio_of("Criteo_x4", "epoch")),
        Target("- its share of the matrix products' ceiling", 0.6, _share_of("Criteo_x4", flop_share), "%"),
        Target("- its share of square products beside it", 0.6, _share_of("Criteo_x4", paired_share), "%"),
        Target("QIN's step against the plain form", 3, _ratio_of("MicroLens_1M", "step")),
        Target("batches alone, 39 fields", 5e6, _of("Criteo_x4", OURS, "batches"), "M rows/s"),
        Target("evaluation of 1 M rows", 3, _ratio_of("ML_1M", "evaluate")),
        *_ANYWHERE,
    ),
    "cuda": (
        Target("SDCNv3 on ML-1M, whole epoch", 30, _ratio_of("ML_1M", "epoch")),
        Target("SDCNv3 on Criteo's shape, fp32", 3e6, _of("Criteo_x4", OURS, "epoch"), "M rows/s"),
        Target("- in tf32", 6e6, _of("Criteo_x4", _variant("tf32"), "epoch"), "M rows/s"),
        Target("- in bf16", 6e6, _of("Criteo_x4", _variant("bf16"), "epoch"), "M rows/s"),
        Target("QIN's epoch, fp32", 6, _seconds_of_epoch(OURS), "s", is_upper=True),
        Target("- in tf32", 6, _seconds_of_epoch(_variant("tf32")), "s", is_upper=True),
        Target("- in bf16", 3, _seconds_of_epoch(_variant("bf16")), "s", is_upper=True),
        Target("batches alone, 39 fields", 1e8, _of("Criteo_x4", OURS, "batches"), "M rows/s"),
        Target("AUC of 4.6 M rows", 0.015, _large_auc_seconds, "ms", is_upper=True),
        *_ANYWHERE,
    ),
}
