# SPDX-License-Identifier: Apache-2.0
"""The directory of one run before and after its training: locked, cleared or gone on with, and its row among the results."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import filelock

from ctrbench.checkpoint import check_weights, load_checkpoint
from ctrbench.config import Experiment, load_run
from ctrbench.errors import ConfigError, DataError
from ctrbench.files import storage_error, storing
from ctrbench.preprocess import DataFolder
from ctrbench.profiling import PROFILE, TRACE

logger = logging.getLogger(__name__)


def exclusive(run_dir: Path, patience: float) -> Any:
    """A context in which no other process runs in this directory, which is made if need be.

    Args:
        run_dir: the directory.
        patience: seconds to wait for another process.

    Raises:
        ConfigError: another process does.
        CtrbenchError: the directory cannot be made.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(run_dir / ".lock").acquire(timeout=patience)
    except filelock.Timeout as error:
        raise ConfigError(
            f"{run_dir}: another process is running this experiment: wait for it, or use another seed"
        ) from error
    except OSError as error:
        raise storage_error(error, run_dir) from error


def can_resume(experiment: Experiment, data: DataFolder) -> bool:
    """Whether there is an unfinished run of the same configuration and data to go on with; if it is another, it says so."""
    run_dir = experiment.run_dir
    if (run_dir / "DONE").exists() or not (run_dir / "last.ckpt").exists():
        return False
    try:
        previous = load_run(run_dir)
        state = load_checkpoint(run_dir / "last.ckpt")
        if state.get("progress", {}).get("best_epoch"):  # weights that only the end of the run would miss
            check_weights(run_dir / "best.safetensors")
        same = previous.config_hash == experiment.config_hash
        same = same and json.loads((run_dir / "data_hash.json").read_text()) == data.data_hash
    except (ConfigError, DataError, OSError, ValueError, AttributeError) as error:
        logger.warning("The unfinished run in %s is damaged: starting anew (%s)", run_dir, error)
        return False
    if not same:
        logger.info("The unfinished run in %s is of another configuration or data: starting anew", run_dir)
    return same


def clear(run_dir: Path, keep_progress: bool) -> None:
    """Remove what a run before this one left, but for its progress if that is to be kept."""
    leftovers = [run_dir / name for name in ("DONE", "report.json", PROFILE, TRACE)]
    for leftover in (*leftovers, *run_dir.glob(".*.partial")):
        leftover.unlink(missing_ok=True)
    if not keep_progress:
        for name in ("metrics.jsonl", "best.safetensors", "best.model", "last.ckpt", "data_hash.json", "train.log"):
            (run_dir / name).unlink(missing_ok=True)


def append_result(experiment: Experiment, report: dict[str, Any], command: str) -> None:
    """FuxiCTR's result row, in `<model_root>/results.csv`; one writer at a time."""
    path = experiment.root / experiment.training.model_root / "results.csv"

    def cell(split: str) -> str:
        values = report["metrics"].get(split, {})
        return " - ".join(f"{name}: {value:.6f}" for name, value in values.items()) or "N.A."

    row = (
        f" {time.strftime('%Y%m%d-%H%M%S')},[command] {command},[exp_id] {experiment.expid},"
        f"[dataset_id] {experiment.training.dataset_id},[train] N.A.,[val] {cell('valid')},[test] {cell('test')}\n"
    )
    with storing(path), filelock.FileLock(f"{path}.lock"), path.open("a", encoding="utf-8") as stream:
        stream.write(row)
