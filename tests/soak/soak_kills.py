# SPDX-License-Identifier: Apache-2.0
"""Kill runs at random moments, repeat the command, and compare the result with that of an unbroken run, bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from soak_outcome import CONTEXT, ROOT, Outcome, one_line, timed

# Experiment, and what is set besides; all with dropout.
SIDES: dict[str, tuple[str, tuple[str, ...]]] = {
    "resident": ("DCNv3_tiny", ("eval_steps=3", "checkpoint_every=2")),
    "streamed": ("DCNv3_tiny", ("device_cache=stream", "shuffle_buffer=200", "checkpoint_every=3")),
    "QIN": ("QIN_tiny_mm", ("checkpoint_every=2", "batch_size=128")),
}
ML_1M = "CTRBENCH_SOAK_ML_1M"  # folder of the prepared MovieLens-1M, whose runs are then killed too
if _folder := os.environ.get(ML_1M):
    _files = (f"{split}_data={_folder}/{split}.csv" for split in ("train", "valid", "test"))
    SIDES["ML-1M"] = ("DCNv3_ML_1M", (*_files, "epochs=1", "checkpoint_every=20"))
# Losing a run this often without any progress would be a defect of its own.
MAX_ATTEMPTS = 4


def soak(kills: int, seed: int, folder: Path) -> Outcome:
    """Kill so many runs, in turn of each side, at moments drawn from the length of its unbroken run.

    Args:
        kills: how many.
        seed: of the moments.
        folder: an empty one.
    """
    dice = random.Random(seed)
    outcome = Outcome(
        "kills at random moments", "the resumed run is bit-identical; no file is taken for whole that is not"
    )
    raw = make_raw(folder / "raw")
    with timed(outcome):
        references: dict[str, tuple[dict[str, Any], float]] = {}
        for number in range(kills):
            side = list(SIDES)[number % len(SIDES)]
            if side not in references:
                _in_child(build, side, raw, folder / "data", folder / "whole" / side)
                started = time.perf_counter()
                _train_whole(side, raw, folder, folder / "whole" / side)
                references[side] = result_of(folder / "whole" / side), time.perf_counter() - started
            expected, seconds = references[side]
            how, failure = _kill_and_resume(side, raw, folder, folder / f"killed_{number}", expected, dice, seconds)
            outcome.add(f"{side}: {how}", failure and f"kill {number} ({side}): {failure}")
    return outcome


def _kill_and_resume(
    side: str, raw: Path, folder: Path, runs: Path, expected: dict[str, Any], dice: random.Random, seconds: float
) -> tuple[str, str | None]:
    process = CONTEXT.Process(target=train, args=(side, raw, folder / "data", runs))
    process.start()
    time.sleep(dice.uniform(0.0, 1.05 * seconds))
    process.kill()
    process.join()
    found = unfinished_files(runs)
    if found:
        return "failed", f"after the kill: {found}"
    if list(runs.rglob("DONE")):
        how = "finished before"
    else:
        is_saved = bool(list(runs.rglob("last.ckpt")))
        for _ in range(MAX_ATTEMPTS):
            code = _in_child(train, side, raw, folder / "data", runs)
            if code == 0:
                break
        else:
            return "failed", f"the repeated command ends with status {code}"
        [report] = runs.rglob("report.json")
        is_resumed = json.loads(report.read_text())["is_resumed"]
        if is_saved and not is_resumed:
            return "failed", "there was a checkpoint, but the run began anew"
        how = "resumed" if is_resumed else "began anew, nothing was saved yet"
    found = result_of(runs)
    differing = [key for key in expected if found[key] != expected[key]]
    return how, f"{', '.join(differing)} differ from the unbroken run" if differing else None


def make_raw(folder: Path, rows: int = 1200) -> Path:
    """tiny_ctr and tiny_mm in `folder`."""
    sys.path.insert(0, str(ROOT / "data"))
    from make_tiny import make_tiny_ctr
    from make_tiny_mm import make_tiny_mm

    sys.path.remove(str(ROOT / "data"))
    make_tiny_ctr(folder / "tiny_ctr", rows=rows)
    make_tiny_mm(folder / "tiny_mm", rows=2 * rows)
    return folder


def overrides_of(side: str, raw: Path, data_root: Path, runs: Path) -> list[str]:
    """The `--set` values of a side."""
    expid, more = SIDES[side]
    name, suffix = ("tiny_mm", "parquet") if expid.endswith("_mm") else ("tiny_ctr", "csv")
    files = [f"{split}_data={raw / name / split}.{suffix}" for split in ("train", "valid", "test")]
    files += [f"item_info={raw / name / 'item_info.parquet'}"] if name == "tiny_mm" else []
    return [*files, f"data_root={data_root}", f"model_root={runs}", "verbose=0", "epochs=3", *more]


def build(side: str, raw: Path, data_root: Path, runs: Path) -> None:
    """Build the dataset of a side, in this process."""
    from ctrbench.config import load_experiment
    from ctrbench.preprocess import build_dataset

    expid = SIDES[side][0]
    zoo = ROOT / "model_zoo" / expid.split("_")[0]
    experiment = load_experiment(zoo / "config", expid, zoo, overrides_of(side, raw, data_root, runs))
    build_dataset(experiment.dataset, root=experiment.root, task=experiment.training.task)


def train(side: str, raw: Path, data_root: Path, runs: Path, changes: Sequence[str] = ()) -> None:
    """One run, in this process."""
    import torch

    torch.set_num_threads(1)
    from ctrbench.config import load_experiment
    from ctrbench.run import Session, run

    expid = SIDES[side][0]
    zoo = ROOT / "model_zoo" / expid.split("_")[0]
    overrides = [*overrides_of(side, raw, data_root, runs), *changes]
    run(load_experiment(zoo / "config", expid, zoo, overrides), session=Session(is_quiet=True))


def _train_whole(side: str, raw: Path, folder: Path, runs: Path) -> None:
    code = _in_child(train, side, raw, folder / "data", runs)
    assert code == 0, f"the unbroken {side} run ends with status {code}"


def _in_child(action: Callable[..., None], *arguments: Any) -> int:
    """The exit status of an action in a process of its own."""
    process = CONTEXT.Process(target=action, args=arguments)
    process.start()
    process.join(300)
    process.kill()
    process.join()
    return int(process.exitcode)


def result_of(runs: Path) -> dict[str, Any]:
    """What must be the same of two runs: weights, curve without times, metrics, epochs."""
    [report_file] = runs.rglob("report.json")
    report = json.loads(report_file.read_text())
    lines = (report_file.parent / "metrics.jsonl").read_text().splitlines()
    curve = [{k: v for k, v in json.loads(line).items() if not k.endswith("_seconds")} for line in lines]
    weights = hashlib.sha256((report_file.parent / "best.safetensors").read_bytes()).hexdigest()
    return {"weights": weights, "curve": curve, "metrics": report["metrics"], "epochs": report["epochs"]}


def unfinished_files(runs: Path) -> str:
    """What is wrong with the files under their final names; empty if they all are whole."""
    from ctrbench.checkpoint import check_weights, load_checkpoint
    from ctrbench.files import sha256_of_file

    try:
        for path in runs.rglob("*"):
            if path.name == "last.ckpt":
                load_checkpoint(path)
            elif path.name == "best.safetensors":
                check_weights(path)
            elif path.name == "metrics.jsonl":
                [json.loads(line) for line in path.read_text().splitlines()]
            elif path.name in ("report.json", "data_hash.json"):
                json.loads(path.read_text())
            elif path.name == "DONE" and path.read_text().strip() != sha256_of_file(path.with_name("report.json")):
                return "DONE is not of report.json"
    except (OSError, ValueError) as error:
        return one_line(error)
    return ""
