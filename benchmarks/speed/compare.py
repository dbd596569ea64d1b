# SPDX-License-Identifier: Apache-2.0
"""Measure ctrbench against the installed FuxiCTR: batches, training, evaluation, metrics, building, start-up, in one run.

    python benchmarks/speed/compare.py --output benchmarks/speed/results/compare.json            # two CPU cores, 15 minutes
    python benchmarks/speed/compare.py --device cuda --output benchmarks/speed/results/cuda.json  # one GPU
    python benchmarks/speed/compare.py --quick                                                    # does all of it work?

Generated data of the published shapes; see shapes.py. Every figure comes from a process of its own, the sides take turns,
and medians of the repeats count. FuxiCTR's loader gets the number of workers and threads that is fastest in a short trial
on the same machine. Beside each figure stands its floor: the least bytes and FLOPs (`ctrbench.costs`) over what this
machine copies and multiplies at most, measured in the same run. The JSON is written after each part, and parts that are
measured later on the same machine are added to it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compare_tables import to_markdown
from first_step import measure_startup
from measure import RESULTS, ROOT, environment, run_worker, spread, use_cores, work, write_report
from shapes import SHAPES, Shape, shape_of, write_columns

HERE = Path(__file__).resolve().parent
PARTS = (*SHAPES, "metrics", "building", "startup")
KINDS = ("batches", "epoch", "step", "predict", "evaluate")
OURS, THEIRS = "ctrbench", "fuxictr"
SCAN_ROWS_SHARE = 4


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one shape is measured.

    Attributes:
        train_rows: of ctrbench's data.
        theirs_rows: of FuxiCTR's.
        eval_rows: of the split that is evaluated and predicted.
        steps: that are timed, one by one.
        warm_up_steps: before them.
        repeats: processes of each side.
        candidates: (threads, workers of FuxiCTR's loader) to choose from.
        ours_kinds: what is measured of ctrbench; items and attention of QIN besides.
        theirs_kinds: what is measured of FuxiCTR.
        theirs_repeats: processes of FuxiCTR, where they take minutes.
        times: how often ctrbench's rows are repeated for the epoch.
    """

    train_rows: int
    theirs_rows: int
    eval_rows: int
    steps: int
    warm_up_steps: int
    repeats: int
    candidates: tuple[tuple[int, int], ...]
    ours_kinds: tuple[str, ...] = KINDS
    theirs_kinds: tuple[str, ...] = KINDS
    theirs_repeats: int | None = None
    times: int = 1


def plan_of(shape: Shape, device: str, cores: int, is_quick: bool) -> Plan:
    """How a shape is measured on this device."""
    if is_quick:
        rows = 4 * shape.batch_size
        return Plan(rows, rows, rows, 2, 1, 1, ((1, 0),))
    if device == "cuda":
        return _gpu_plan(shape, cores)
    both, every = ((cores, 0), (cores, 1)), tuple((t, w) for t in sorted({1, cores}) for w in (0, 1, 2))
    return {
        "Criteo_x4": Plan(8 * 4096, 8 * 4096, 32_768, 4, 1, 3, both),
        "Avazu_x4": Plan(3 * 10_000, 3 * 10_000, 30_000, 2, 1, 2, ((cores, 0),)),
        "ML_1M": Plan(200_000, 200_000, 1_000_000, 15, 3, 3, every),
        # A step of the plain form takes a minute and 8 GB, one of ctrbench's ten seconds.
        "MicroLens_1M": Plan(
            *(2 * 8192, 8192, 16_384, 2, 0, 2, ((cores, 0),)),
            ours_kinds=("batches", "step", "predict", "evaluate"),
            theirs_kinds=("batches", "step"),
            theirs_repeats=1,
        ),
    }[shape.name]


def _gpu_plan(shape: Shape, cores: int) -> Plan:
    threads = min(cores, 8)
    some = tuple((threads, workers) for workers in (0, 2, threads))
    rows = 100 * shape.batch_size
    times = max(1, round(shape.epoch_rows / rows))
    if shape.has_items:
        theirs = 4 * shape.batch_size
        return Plan(rows, theirs, theirs, 20, 5, 2, ((threads, 0),), theirs_repeats=1, times=times)
    theirs = 30 * shape.batch_size
    return Plan(rows, theirs, 1_000_000, 50, 10, 2, some if shape.name != "Avazu_x4" else some[-1:], times=times)


class Comparison:
    """Runs the parts and keeps what they give.

    Args:
        options: of the command line.
        scratch: an empty folder.
    """

    def __init__(self, options: argparse.Namespace, scratch: Path):
        self.options, self.scratch = options, scratch
        machine = environment(["torch", "fuxictr", "polars", "h5py", "numpy", "scikit-learn", "ray"])
        if options.device == "cuda":
            machine["gpu"] = _gpu_name()
        self.result: dict[str, Any] = {
            "device": options.device,
            "cores": options.cores,
            "is_quick": options.quick,
            "machine": machine,
            "ceilings": {},
            "shapes": {},
            "skipped": {},
        }
        if options.output and options.output.exists():
            before = json.loads(options.output.read_text())
            if all(before.get(key) == self.result[key] for key in ("device", "cores", "is_quick", "machine")):
                self.result = before
        self.precisions = ["fp32", "tf32", "bf16"] if options.device == "cuda" else ["fp32"]
        wanted = [also.get("precision") for also in options.also]
        self.precisions += [p for p in dict.fromkeys(wanted) if p and p not in self.precisions]

    def run(self, part: str) -> None:
        """Measure one part and write the report so far."""
        print(f"{part}:", file=sys.stderr, flush=True)
        if part in SHAPES:
            self._measure_shape(shape_of(part, self.options.quick))
        else:
            {"metrics": self._metrics, "building": self._building, "startup": self._startup}[part]()
        write_report(self.options.output, self.result)

    def _worker(self, settings: dict[str, Any], threads: int, label: str) -> dict[str, Any]:
        settings = {"device": self.options.device, "is_small": self.options.quick, **settings}
        measured = run_worker(HERE / "compare.py", settings, threads, timeout=1200, sample_seconds=0.5)
        shown = measured.get("kinds") or measured
        rates = {k: v["rows"] / v["seconds"] for k, v in shown.items() if isinstance(v, dict) and "rows" in v}
        print(f"  {label}: " + (", ".join(f"{k} {r:,.0f} rows/s" for k, r in rates.items()) or "done"), file=sys.stderr)
        return measured

    def _measure_ceilings(self, threads: int) -> None:
        """The highest of all measurements counts: others may have been at work in the first."""
        for precision in self.precisions:
            settings = {"kind": "ceilings", "precision": precision}
            found = self._worker(settings, threads, f"ceilings, {precision}, {threads} threads")
            key = f"{threads} threads, {precision}"
            kept = self.result["ceilings"].setdefault(key, found)
            for rate in ("bytes_per_second", "flops_per_second"):
                kept[rate] = max(kept[rate], found[rate])

    def _measure_shape(self, shape: Shape) -> None:
        plan = plan_of(shape, self.options.device, self.options.cores, self.options.quick)
        files = {
            name: str(self.scratch / f"{shape.name}_{name}.npz") for name in ("ours", "theirs", "eval", "scan", "few")
        }
        rows = {"ours": plan.train_rows, "theirs": plan.theirs_rows, "eval": plan.eval_rows}
        rows["scan"] = max(plan.theirs_rows // SCAN_ROWS_SHARE, 2 * shape.batch_size)
        rows["few"] = shape.batch_size
        for name, count in rows.items():
            write_columns(shape, count, Path(files[name]))
        common = {
            **{"kind": "side", "shape": shape.name, "eval_file": files["eval"], "steps": plan.steps, "overrides": {}},
            **{"warm_up_steps": plan.warm_up_steps, "num_workers": 0, "times": plan.times},
        }
        chosen, scan = self._choose(shape, plan, {**common, "train_file": files["scan"], "times": 1})
        sides: list[tuple[str, dict[str, Any]]] = [(OURS, {}), *((_name(also), also) for also in self.options.also)]
        kept: dict[str, list[dict[str, Any]]] = {name: [] for name, _ in sides} | {THEIRS: []}
        more = ["attention"] if shape.has_items else []
        ours_kinds = [*plan.ours_kinds, *more]
        theirs_kinds = [kind for kind in plan.theirs_kinds if kind != "evaluate" or is_installed("sklearn")] + more
        for repeat in range(self.options.repeats or plan.repeats):
            threads, _ = chosen[OURS]
            self._measure_ceilings(threads)
            for name, overrides in sides:
                settings = {**common, "side": OURS, "train_file": files["ours"], "kinds": ours_kinds}
                kept[name].append(self._worker({**settings, "overrides": overrides}, threads, name))
            if repeat < (plan.theirs_repeats or repeat + 1):
                threads, workers = chosen[THEIRS]
                settings = {**common, "side": THEIRS, "train_file": files["theirs"], "kinds": theirs_kinds}
                kept[THEIRS].append(self._worker({**settings, "num_workers": workers}, threads, THEIRS))
        for file in files.values():
            Path(file).unlink()
        self.result["shapes"][shape.name] = {
            "batch_size": shape.batch_size,
            "epoch_rows": shape.epoch_rows,
            "columns": shape.num_columns,
            "model": shape.model,
            "chosen": {side: {"threads": t, "num_workers": w} for side, (t, w) in chosen.items()},
            "scan_rows_per_second": scan,
            "costs": next(run["costs"] for run in kept[OURS]),
            "sides": {name: summarize(runs) for name, runs in kept.items() if runs},
            "overrides": {name: overrides for name, overrides in sides if overrides},
        }

    def _choose(
        self, shape: Shape, plan: Plan, common: dict[str, Any]
    ) -> tuple[dict[str, tuple[int, int]], dict[str, float]]:
        """Threads and workers of each side: the fastest epoch in a short trial, where there is a choice."""
        chosen, tried = {}, {}
        ours = [(threads, 0) for threads in dict.fromkeys(t for t, _ in plan.candidates)]
        for side, candidates in ((OURS, ours), (THEIRS, plan.candidates)):
            if len(candidates) == 1:
                chosen[side] = candidates[0]
                continue
            rates = {}
            for threads, workers in candidates:
                label = f"{side}, {threads} threads, {workers} workers"
                settings = {**common, "side": side, "kinds": ["epoch"], "num_workers": workers}
                epoch = self._worker(settings, threads, f"trial of {label}")["kinds"]["epoch"]
                rates[threads, workers] = tried[label] = epoch["rows"] / epoch["seconds"]
            chosen[side] = max(rates, key=rates.__getitem__)
        return chosen, tried

    def _metrics(self) -> None:
        scale = 1000 if self.options.quick else 1
        wanted = [("AUC", 1_000_000, 0, 3), ("AUC", 4_600_000, 0, 3), ("gAUC", 1_000_000, 50_000, 1)]
        has_theirs = is_installed("sklearn")
        if not has_theirs:
            self.result["skipped"]["FuxiCTR's metrics"] = "scikit-learn is not installed"
        found = {}
        for metric, rows, groups, theirs_repeats in wanted:
            settings = {"kind": "metric", "metric": metric, "rows": rows // scale, "groups": groups // scale}
            runs: dict[str, list[dict[str, Any]]] = {OURS: [], THEIRS: []}
            for repeat in range(1 if self.options.quick else 3):
                for side in (OURS, THEIRS) if has_theirs and repeat < theirs_repeats else (OURS,):
                    measured = self._worker({**settings, "side": side}, self.options.cores, f"{metric}, {side}")
                    runs[side].append(measured)
            name = f"{metric} of {rows // scale:,} rows" + (f" in {groups // scale:,} groups" if groups else "")
            found[name] = {
                **{side: spread(run["seconds"] for run in of) for side, of in runs.items() if of},
                "peak_mib": {side: max(run["peak_mib"] for run in of) for side, of in runs.items() if of},
                "values": {side: of[0]["value"] for side, of in runs.items() if of},
                "rows": rows // scale,
                "bytes": (rows // scale) * (16 if groups else 8),
            }
        self.result["metrics"] = found

    def _building(self) -> None:
        """The other script's figures at a size that takes a minute."""
        if not is_installed("ray"):
            self.result["skipped"]["building"] = "ray, which FuxiCTR builds with, is not installed"
            return
        rows, output = (3000 if self.options.quick else 200_000), self.scratch / "build.json"
        command = [sys.executable, str(HERE / "build_dataset.py"), "--rows", str(rows), "--output", str(output)]
        done = subprocess.run([*command, "--threads", str(self.options.cores)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"build_dataset.py: {done.stderr[-3000:]}")
        self.result["building"] = json.loads(output.read_text())

    def _startup(self) -> None:
        has_theirs = is_installed("ray")
        if not has_theirs:
            self.result["skipped"]["FuxiCTR's start-up"] = "ray, which its run_expid.py imports, is not installed"
        taken = measure_startup(1 if self.options.quick else 3, self.scratch, has_theirs)
        self.result["startup"] = {name: spread(seconds) for name, seconds in taken.items()}


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median, lowest and highest of the repeats of one side, by kind."""
    kinds = {}
    for kind in runs[0]["kinds"]:
        of = [run["kinds"][kind] for run in runs]
        kinds[kind] = {"rows": of[0]["rows"], "seconds": spread(run["seconds"] for run in of)}
        if "phases" in of[0]:
            kinds[kind]["phases"] = {
                name: spread(run["phases"][name] for run in of if name in run["phases"]) for name in of[0]["phases"]
            }
        if "paired" in of[0]:
            kinds[kind]["paired"] = [pair for run in of for pair in run["paired"]]
    summary: dict[str, Any] = {"kinds": kinds, "peak_mib": max(run["peak_mib"] for run in runs)}
    if "device_peak_mib" in runs[0]:
        summary["device_peak_mib"] = max(run["device_peak_mib"] for run in runs)
    return summary


def is_installed(package: str) -> bool:
    """Whether a package could be imported, which is not done."""
    return importlib.util.find_spec(package) is not None


def _name(overrides: dict[str, Any]) -> str:
    return f"{OURS}, " + ", ".join(f"{key} {value}" for key, value in overrides.items())


def _gpu_name() -> str:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here")
    return torch.cuda.get_device_name(0)


def _parse_also(text: str) -> dict[str, Any]:
    overrides = {}
    for item in text.split(","):
        key, sign, value = item.partition("=")
        if not sign:
            raise argparse.ArgumentTypeError(f"{text}: expected KEY=VALUE[,KEY=VALUE...], as precision=bf16")
        try:
            overrides[key] = json.loads(value)
        except ValueError:
            overrides[key] = value
    return overrides


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cores", type=int, help="cores that everything is bound to; default: 2, with a GPU all")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--repeats", type=int, help="processes of each side and shape; default: 1 to 3 by their cost")
    parser.add_argument(
        "--also",
        type=_parse_also,
        action="append",
        metavar="KEY=VALUE[,...]",
        help="measure ctrbench with these settings too; on a GPU precision=tf32 and precision=bf16 by default",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, once: whether it works, not how fast")
    parser.add_argument("--output", type=Path, help=f"JSON file to write, e.g. {(RESULTS / 'compare.json').name}")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        sys.path.insert(0, str(ROOT))
        from sides import measure

        work(options.worker, measure)
        return 0
    options.also = _known(options.also, options.device)
    options.cores = options.cores or (2 if options.device == "cpu" else len(os.sched_getaffinity(0)))
    use_cores(options.cores)
    with tempfile.TemporaryDirectory() as scratch:
        comparison = Comparison(options, Path(scratch))
        for part in options.parts:
            comparison.run(part)
    print(to_markdown(comparison.result))
    return 0


def _known(also: list[dict[str, Any]] | None, device: str) -> list[dict[str, Any]]:
    """The variants of ctrbench to measure: those that are asked for, or else what a GPU offers beyond fp32."""
    sys.path.insert(0, str(ROOT))
    from ctrbench.schema import TrainingConfig

    for overrides in also or []:
        if unknown := [key for key in overrides if key not in TrainingConfig.model_fields]:
            raise SystemExit(f"--also {unknown[0]}: ctrbench has no such setting")
    if also is not None or device == "cpu":
        return also or []
    return [{"precision": p} for p in ("tf32", "bf16")] if "precision" in TrainingConfig.model_fields else []


if __name__ == "__main__":
    sys.exit(main())
