# SPDX-License-Identifier: Apache-2.0
"""Memory of the machine and of a device: what is free, what an embedding table needs, and what ran out of it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctrbench.errors import ConfigError, TrainingError
from ctrbench.features import FeatureMap

# A weight, its gradient and Adam's two moments, in fp32.
BYTES_PER_PARAMETER = 16
GIB = 2**30
_MEMINFO = Path("/proc/meminfo")
# Limit and use of a container's memory, in the two versions of Linux' control groups.
_CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
# Less than this is there anyway.
_SMALL = 1 << 26
# What torch says, on a GPU, on Linux and elsewhere.
_RAN_OUT = re.compile("out of memory|not enough memory|can't allocate memory")


def free_memory(device: torch.device | str) -> int | None:
    """Bytes that are free on a device, within the limit of the container on a CPU; None where nobody knows."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [value for value in (_available(), *(_below_limit(*names) for names in _CGROUPS)) if value is not None]
    return min(found) if found else None


def _available() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None  # not Linux


def _below_limit(folder: Path, limit: str, usage: str) -> int | None:
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cache = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))  # given back when it is needed
        return max(0, int((folder / limit).read_text()) - int((folder / usage).read_text()) + cache)
    except (OSError, ValueError):  # no control group, or no limit
        return None


def bytes_per_parameter(optimizer: str) -> int:
    """Weight and gradient in fp32, and what the optimizer keeps of each."""
    return 8 if optimizer.lower() == "sgd" else BYTES_PER_PARAMETER


def check_tables(
    feature_map: FeatureMap, device: torch.device | str, where: str, per_parameter: int = BYTES_PER_PARAMETER
) -> None:
    """Refuse a model whose embedding tables alone do not fit, before any of them is allocated.

    One table for each field counts; models may have more of them.

    Args:
        feature_map: the fields, with the run's parameters applied.
        device: where the model is to be.
        where: file and section of the configuration, for the message.
        per_parameter: bytes that go with each of their numbers.

    Raises:
        ConfigError: they need more than is free; names the largest table.
    """
    tables = embedding_tables(feature_map)
    needed = per_parameter * sum(rows * width for rows, width in tables.values())
    if needed <= _SMALL:
        return
    free = free_memory(device)
    if free is None or needed <= free:
        return
    name, (rows, width) = max(tables.items(), key=lambda item: item[1][0] * item[1][1])
    what = "fp32" if per_parameter == 4 else "with its gradient and the optimizer's state"
    raise ConfigError(
        f"{where}: not enough memory for the embedding tables, which need {needed / GIB:.3g} GiB on {device} "
        f"({per_parameter} bytes a weight, {what}), but {free / GIB:.3g} GiB are free; the largest is '{name}' with {rows:,} "
        f"rows of width {width}: lower embedding_dim, raise min_categr_count, leave the field out (use_features), or take a "
        "device with more memory"
    )


def embedding_tables(feature_map: FeatureMap) -> dict[str, tuple[int, int]]:
    """Rows and width of each field's table of its own."""
    default = getattr(feature_map, "default_emb_dim", None) or 1
    return {
        name: (spec["vocab_size"], spec.get("embedding_dim") or default)
        for name, spec in feature_map.features.items()
        if spec["type"] in ("categorical", "sequence") and spec.get("share_embedding") not in feature_map.features
    }


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a device or the machine had too little memory, also where it is the cause of another error."""
    while error is not None:
        if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError | ValueError) and _RAN_OUT.search(str(error)):
            return True
        error = error.__cause__
    return False


@contextlib.contextmanager
def enough_memory(device: torch.device, batch_size: int) -> Iterator[None]:
    """Say in one line that batches without gradients were too large for the device.

    Raises:
        TrainingError: they were.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"not enough memory on {device} for batches of {batch_size} rows without gradients: set eval_batch_size to "
            f"{max(1, batch_size // 4)} or less"
        ) from error


def fitting_rows(step: Callable[[Any], Any], batch: Any, num_rows: int) -> int | None:
    """Rows of the largest power-of-two part of a batch that `step` can do; None if it can do none.

    Args:
        step: what ran out of memory.
        batch: a tensor, or a dict, list or tuple of batches.
        num_rows: of the batch.
    """
    rows = 1 << max(0, (num_rows - 1).bit_length() - 1)
    while rows:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        with contextlib.suppress(Exception):  # also where the part itself is what the step cannot do
            step(_first_rows(batch, rows))
            return rows
        rows //= 2
    return None


def _first_rows(batch: Any, rows: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[:rows]
    if isinstance(batch, dict):
        return {name: _first_rows(part, rows) for name, part in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(_first_rows(part, rows) for part in batch)
    return batch
