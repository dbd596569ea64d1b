# SPDX-License-Identifier: Apache-2.0
"""What a machine can do at most: bytes copied and floating point operations multiplied a second, measured once.

The figures lie in `$XDG_CACHE_HOME/ctrbench/ceilings.json` (or in `~/.cache`), by device, threads, precision and version
of torch. Copying counts every byte read and every byte written. A product of square matrices of N rows counts 2 N^3.
Both are the best of as many repeats as a tenth of a second or two allow, so that a busy machine matters little.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ctrbench.environment import processor_name
from ctrbench.errors import CtrbenchError
from ctrbench.files import write_json

# Far beyond any cache, so that copies go to memory.
COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 29}
# Rows of the matrices, small ones first.
PRODUCT_ROWS = {"cpu": (256, 1024), "cuda": (2048, 8192)}
SECONDS = 0.12
MIN_REPEATS = 3
PRECISIONS = ("fp32", "tf32", "bf16")
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The most that a device did in a short test.

    Attributes:
        device: its name.
        threads: of torch, which count on a CPU.
        precision: of the matrix product: fp32, tf32 or bf16.
        bytes_per_second: read and written by a copy.
        flops_per_second: of a matrix product.
    """

    device: str
    threads: int
    precision: str
    bytes_per_second: float
    flops_per_second: float


def ceilings(device: torch.device, precision: str = "fp32", may_measure: bool = True) -> Ceilings | None:
    """The ceilings of a device with as many threads as torch has now.

    Args:
        device: a CPU or a GPU.
        precision: of matrix products; tf32 exists on GPUs only.
        may_measure: when nothing is stored, take about half a second to measure.

    Returns:
        None when nothing is stored and nothing may be measured, or the device has no memory left for it.
    """
    path, key = cache_file(), _key(device, precision)
    stored = _read(path)
    if (found := _parse(stored.get(key))) is not None or not may_measure:
        return found
    try:
        measured = measure(device, precision)
    except torch.cuda.OutOfMemoryError:
        return None
    try:
        # What others stored meanwhile is read again; should two processes write at once, one of them measures again.
        write_json(path, {**_read(path), key: dataclasses.asdict(measured)})
    except (OSError, CtrbenchError) as error:
        logger.debug("%s: not stored: %s", path, error)
    return measured


def cache_file() -> Path:
    """Where ceilings are stored."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not folder.is_absolute():  # the specification ignores relative ones
        folder = Path.home() / ".cache"
    return folder / "ctrbench" / "ceilings.json"


def measure(device: torch.device, precision: str = "fp32") -> Ceilings:
    """Measure now.

    Raises:
        ValueError: a precision that is none.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    return Ceilings(
        device_name(device),
        torch.get_num_threads(),
        precision,
        measure_copy(device),
        measure_product(device, precision),
    )


@torch.no_grad()
def measure_copy(device: torch.device) -> float:
    """Bytes read and written a second by a copy in the device's memory."""
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES[device.type] / best_seconds(lambda: target.copy_(source), device)


@torch.no_grad()
def measure_product(device: torch.device, precision: str) -> float:
    """Floating point operations a second of a product of random square matrices."""
    generator = torch.Generator(device=device).manual_seed(0)  # the global one is the run's
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    best = 0.0
    for rows in PRODUCT_ROWS[device.type]:
        left, right = (torch.randn((rows, rows), generator=generator, device=device).to(dtype) for _ in range(2))
        target = torch.empty_like(left)
        with _float32_products("high" if precision == "tf32" else "highest"):
            seconds = best_seconds(functools.partial(torch.mm, left, right, out=target), device, SECONDS / 2)
        best = max(best, 2 * rows**3 / seconds)
        if 64 * seconds > SECONDS:
            break  # the next one, four times as wide, would take too long: a processor without bf16 takes seconds
    return best


def best_seconds(function: Callable[[], Any], device: torch.device, seconds: float = SECONDS) -> float:
    """The shortest time of a call, of at least three and of as many as fit into `seconds`, after one that is not timed."""
    function()
    _wait(device)
    best, repeats, end = math.inf, 0, time.perf_counter() + seconds
    while repeats < MIN_REPEATS or time.perf_counter() < end:
        started = time.perf_counter()
        function()
        _wait(device)
        best, repeats = min(best, time.perf_counter() - started), repeats + 1
    return best


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the processor and its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {os.cpu_count()} cores"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _key(device: torch.device, precision: str) -> str:
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return " | ".join([device_name(device), f"{threads} threads", precision, torch.__version__])


def _read(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _parse(entry: Any) -> Ceilings | None:
    """A stored entry; None if it is none, or damaged."""
    try:
        found = Ceilings(**entry)
        rates = (found.bytes_per_second, found.flops_per_second)
        is_sound = all(isinstance(rate, float) and 0 < rate < math.inf for rate in rates)
    except TypeError:
        return None
    return found if is_sound else None
