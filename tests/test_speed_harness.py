# SPDX-License-Identifier: Apache-2.0
"""The speed harness at tiny sizes: each side measures every kind, the tables show what was measured, nothing else."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SPEED = ROOT / "benchmarks" / "speed"
KINDS = ["batches", "epoch", "step", "predict", "evaluate"]
LIMITS = {"device": "", "threads": 1, "precision": "fp32", "bytes_per_second": 1e10, "flops_per_second": 1e11}


@pytest.fixture(scope="module")
def harness() -> Iterator[dict[str, ModuleType]]:
    """The harness's modules, which import each other by their bare names."""
    names = ("measure", "shapes", "plain_qin", "sides", "compare_tables", "first_step", "compare")
    sys.path.insert(0, str(SPEED))
    try:
        yield {name: __import__(name) for name in names}
    finally:
        sys.path.remove(str(SPEED))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def measured(
    harness: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, dict[str, Any]]]:
    """What each side measures on each shape, in this process."""
    folder = tmp_path_factory.mktemp("rows")
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in harness["shapes"].SHAPES:
        shape, files = harness["shapes"].shape_of(name, True), {}
        for key in ("train_file", "eval_file"):
            files[key] = str(folder / f"{name}_{key}.npz")
            harness["shapes"].write_columns(shape, 2 * shape.batch_size + 5, Path(files[key]))
        settings = {
            **{"kind": "side", "shape": name, "is_small": True, "device": "cpu", "overrides": {}, "num_workers": 0},
            **{
                "steps": 2,
                "warm_up_steps": 1,
                "times": 2,
                "kinds": [*KINDS, *(["attention"] * shape.has_items)],
                **files,
            },
        }
        found[name] = {side: harness["sides"].measure({**settings, "side": side}) for side in ("ctrbench", "fuxictr")}
    return found


def test_the_published_shapes(harness: dict[str, ModuleType]) -> None:
    shapes = harness["shapes"].SHAPES
    assert {name: sum(shape.fields.values()) for name, shape in shapes.items()} == {
        "Criteo_x4": 910_747,
        "Avazu_x4": 3_750_999,
        "ML_1M": 9_751,
        "MicroLens_1M": 0,
    }
    assert [len(shape.fields) for shape in shapes.values()] == [39, 24, 7, 0]
    assert [shape.batch_size for shape in shapes.values()] == [4096, 10_000, 4096, 8192]
    for shape in shapes.values():
        columns = harness["shapes"].make_columns(shape, 100)
        assert {len(x) for x in columns.values()} == {100} and set(np.unique(columns["label"])) == {0, 1}
        assert shape.num_columns == len(columns)
        for name, size in shape.fields.items():
            assert columns[name].min() >= 0 and columns[name].max() < size


def test_every_kind_of_every_shape_is_measured_on_both_sides(measured: dict[str, dict[str, dict[str, Any]]]) -> None:
    for name, sides in measured.items():
        for side, answer in sides.items():
            expected = [*KINDS, "attention"] if name == "MicroLens_1M" else KINDS
            assert list(answer["kinds"]) == expected
            assert all(kind["seconds"] > 0 for kind in answer["kinds"].values())
            rows = {kind: answer["kinds"][kind]["rows"] for kind in KINDS}
            epoch = 2 * 133 if side == "ctrbench" else 133
            assert rows == {"batches": 133, "epoch": epoch, "step": 64, "predict": 133, "evaluate": 133}
            assert set(answer["kinds"]["step"]["phases"]) == {"gather", "forward", "backward", "optimizer"}
            pairs = answer["kinds"]["step"]["paired"]
            assert len(pairs) == 2 and all(p["seconds"] > 0 and 1e8 < p["flops_per_second"] < 1e15 for p in pairs)
        costs = sides["ctrbench"]["costs"]
        assert costs["rows"] == 64 and min(costs["flops"].values()) > 0 and min(costs["bytes"].values()) > 0


def test_both_sides_train_the_same_model(harness: dict[str, ModuleType], tmp_path: Path) -> None:
    shape = harness["shapes"].shape_of("MicroLens_1M", True)
    file = tmp_path / "rows.npz"
    harness["shapes"].write_columns(shape, shape.batch_size, file)
    settings = {"device": "cpu", "overrides": {}, "num_workers": 0, "train_file": str(file), "eval_file": str(file)}
    ours, theirs = (harness["sides"].__dict__[side](shape, settings) for side in ("Ours", "Fuxictr"))
    ours.model.eval(), theirs.model.eval()
    theirs.model.load_state_dict(ours.model.state_dict())
    (batch,) = ours.resident(file, shuffle=False)
    with torch.no_grad():
        torch.testing.assert_close(ours.model.forward(batch)["y_pred"], theirs.model.forward(batch)["y_pred"])
        for a, b in zip(ours.attend()(ours.model, batch), theirs.attend()(theirs.model, batch), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    (loaded,) = theirs.loader(file, shuffle=False)
    assert all(torch.equal(loaded[name].to(x.dtype), x) for name, x in batch.items())


@pytest.mark.parametrize(("metric", "groups"), [("AUC", 0), ("gAUC", 20)])
def test_both_sides_compute_the_same_metric(harness: dict[str, ModuleType], metric: str, groups: int) -> None:
    settings = {"kind": "metric", "metric": metric, "rows": 2000, "groups": groups, "device": "cpu"}
    ours, theirs = (harness["sides"].measure({**settings, "side": side}) for side in ("ctrbench", "fuxictr"))
    assert ours["value"] == pytest.approx(theirs["value"], abs=1e-12) and 0.6 < ours["value"] < 1
    assert ours["seconds"] > 0 and theirs["seconds"] > 0


def test_rows_that_are_fewer_than_a_batch(harness: dict[str, ModuleType], tmp_path: Path) -> None:
    shape = harness["shapes"].shape_of("ML_1M", True)
    harness["shapes"].write_columns(shape, 10, tmp_path / "rows.npz")
    files = dict.fromkeys(("train_file", "eval_file"), str(tmp_path / "rows.npz"))
    side = harness["sides"].Ours(shape, {"device": "cpu", "overrides": {}, **files})
    with pytest.raises(ValueError, match="ML_1M: fewer rows than one batch of 64"):
        harness["sides"]._one_batch(side)


def report_of(harness: dict[str, ModuleType], measured: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """A report as compare.py writes it."""
    summarize = harness["compare"].summarize
    shapes = {}
    for name, sides in measured.items():
        shape = harness["shapes"].SHAPES[name]
        runs = {side: summarize([{**answer, "peak_mib": 100.0}] * 2) for side, answer in sides.items()}
        shapes[name] = {
            "batch_size": 64,
            "epoch_rows": shape.epoch_rows,
            "columns": shape.num_columns,
            "model": shape.model,
            "chosen": {side: {"threads": 1, "num_workers": 0} for side in runs},
            "costs": sides["ctrbench"]["costs"],
            "sides": runs,
            "overrides": {},
        }
    return {
        "device": "cpu",
        "cores": 1,
        "is_quick": False,
        "machine": {"cpu": "a processor", "cores": 1, "torch": torch.__version__},
        "ceilings": {"1 threads, fp32": LIMITS},
        "shapes": shapes,
        "skipped": {"building": "ray is not installed"},
    }


def test_tables_of_what_was_measured(
    harness: dict[str, ModuleType], measured: dict[str, dict[str, dict[str, Any]]]
) -> None:
    report = report_of(harness, measured)
    tables, figures = harness["compare_tables"], report["shapes"]["ML_1M"]["sides"]
    figures["ctrbench"]["kinds"]["epoch"] = {"rows": 600, "seconds": {"median": 2.0}}
    figures["fuxictr"]["kinds"]["epoch"] = {"rows": 300, "seconds": {"median": 3.0}}
    page = tables.to_markdown(report)
    row = next(line for line in page.partition("**ML_1M**")[2].splitlines() if "whole epoch" in line)
    assert row.startswith("| whole epoch, rows/s | 300 | 100 | **3.00x** |")
    assert "| epoch of 591,209 rows, s | 1,970.7 | 5,912.1 |" in page
    assert "| SDCNv3 on ML-1M, whole epoch | >= 2x | 3x | reached |" in page
    assert "| gAUC of 1 M rows in 50,000 groups | >= 500x |  | not measured |" in page
    assert page.endswith("Not measured: building, because ray is not installed")
    assert json.loads(json.dumps(report)) == report
    report["shapes"] = {}
    assert "ML_1M" not in tables.to_markdown(report)


def test_shares_of_what_the_machine_multiplies(
    harness: dict[str, ModuleType], measured: dict[str, dict[str, dict[str, Any]]]
) -> None:
    report, tables = report_of(harness, measured), harness["compare_tables"]
    shape = report["shapes"]["Criteo_x4"]
    step = shape["sides"]["ctrbench"]["kinds"]["step"]
    assert len(step["paired"]) == 2 * 2
    flops = sum(shape["costs"]["flops"].values())
    step["seconds"]["median"] = flops / (0.25 * LIMITS["flops_per_second"])
    step["paired"] = [{"seconds": flops / 1e9 * slow, "flops_per_second": 1e9} for slow in (1, 2, 4)]
    page = tables.to_markdown(report).partition("**Criteo_x4**")[2]
    assert re.search(r"\| step's share of the GFLOP/s ceiling \| 25% \|", page)
    assert re.search(r"\| - of square products beside it \| 50% \|", page)
    assert "its share of the matrix products' ceiling | >= 60% | 25% | missed" in page
    del step["paired"], shape["sides"]["fuxictr"]["kinds"]["step"]["paired"]
    page = tables.to_markdown(report).partition("**Criteo_x4**")[2]
    assert "| - its share of square products beside it | >= 60% |  | not measured |" in page


def test_floors(harness: dict[str, ModuleType]) -> None:
    floor = harness["compare_tables"].floor_seconds
    costs = {
        "rows": 10,
        "flops": {"forward": 1000, "backward": 2000},
        "bytes": {"data": 40, "gather": 60, "forward": 100, "backward": 200, "optimizer": 600},
    }
    memory, products = ({**LIMITS, "bytes_per_second": b, "flops_per_second": f} for b, f in ((1.0, 1e9), (1e9, 1.0)))
    assert floor(costs, memory, "batches", 10) == 40
    assert floor(costs, memory, "step", 10) == 960 and floor(costs, memory, "epoch", 20) == 2000
    assert floor(costs, memory, "evaluate", 10) == floor(costs, memory, "predict", 10) == 100 + 30 + 40
    assert floor(costs, memory, "step", 10, "optimizer") == 600
    assert floor(costs, products, "step", 10) == 3000 and floor(costs, products, "predict", 5) == 500
    assert floor(costs, products, "step", 10, "backward") == 2000
    assert floor(costs, products, "attention", 10) is None


def test_targets_tell_reached_from_missed(harness: dict[str, ModuleType]) -> None:
    target = harness["compare_tables"].Target
    result = {"value": 0.02, "rate": 4e6}
    assert target("AUC", 0.015, lambda r: r["value"], "ms", True).row(result) == ["AUC", "<= 15 ms", "20 ms", "missed"]
    rows = target("rows", 3e6, lambda r: r["rate"], "M rows/s").row(result)
    assert rows == ["rows", ">= 3 M rows/s", "4 M rows/s", "reached"]
    assert target("x", 2, lambda r: r["other"]).row(result) == ["x", ">= 2x", "", "not measured"]


def test_the_plans_of_a_gpu_and_of_a_trial(harness: dict[str, ModuleType]) -> None:
    compare, shapes = harness["compare"], harness["shapes"].SHAPES
    assert set(compare.PARTS) == {*shapes, "metrics", "building", "startup"}
    for shape in shapes.values():
        plan = compare.plan_of(shape, "cuda", 16, False)
        assert 0.9 < plan.times * plan.train_rows / shape.epoch_rows < 1.1 or plan.times == 1
        for device in ("cpu", "cuda"):
            plan = compare.plan_of(shape, device, 2, False)
            assert min(plan.train_rows, plan.theirs_rows, plan.eval_rows) >= shape.batch_size
        quick = compare.plan_of(shape.small(), "cpu", 2, True)
        assert quick.train_rows == 256 and quick.repeats == 1


def run(*arguments: str, **keywords: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SPEED / "compare.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **keywords)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--also", "precision"], r"expected KEY=VALUE\[,KEY=VALUE...\], as precision=bf16"),
        (["--also", "presision=bf16"], "--also presision: ctrbench has no such setting"),
        (["--parts", "Criteo"], "invalid choice: 'Criteo'"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str) -> None:
    done = run("--quick", *arguments)
    assert done.returncode and re.search(message, done.stderr)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there() -> None:
    assert "--device cuda: torch sees no GPU here" in run("--device", "cuda", "--quick").stderr


def test_what_is_measured_later_is_added_to_figures_of_the_same_machine(
    harness: dict[str, ModuleType], tmp_path: Path
) -> None:
    options = argparse.Namespace(device="cpu", cores=1, quick=True, also=[], output=tmp_path / "compare.json")
    options.output.write_text(json.dumps({**harness["compare"].Comparison(options, tmp_path).result, "metrics": {}}))
    assert "metrics" in harness["compare"].Comparison(options, tmp_path).result
    options.cores = 2
    assert "metrics" not in harness["compare"].Comparison(options, tmp_path).result


def test_the_command(tmp_path: Path) -> None:
    output = tmp_path / "compare.json"
    done = run("--quick", "--cores", "1", "--parts", "ML_1M", "--output", str(output))
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert list(report["shapes"]) == ["ML_1M"] and "1 threads, fp32" in report["ceilings"]
    sides = report["shapes"]["ML_1M"]["sides"]
    assert set(sides) == {"ctrbench", "fuxictr"} and all(side["peak_mib"] > 50 for side in sides.values())
    assert "A trial of the harness at tiny sizes" in done.stdout and "**ML_1M**, SDCNv3, B = 64" in done.stdout
