# SPDX-License-Identifier: Apache-2.0
"""What a report says of the machine: versions, device, commit, peak memory."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import ctrbench
from ctrbench import native


def reset_peak_memory(gpu: int) -> None:
    """Let `peak_memory` speak of what follows only."""
    if gpu >= 0:
        torch.cuda.reset_peak_memory_stats(gpu)
    # Linux forgets the peak of the runs before this one; elsewhere it is that of the process.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> dict[str, int]:
    """Most memory in use since the last reset, in bytes: of the process and, on a GPU, of torch on the device."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        peak["host_bytes"] = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    if device.type == "cuda":
        peak["device_bytes"] = torch.cuda.max_memory_allocated(device)
    return peak


def describe_environment(root: Path, device: torch.device) -> dict[str, Any]:
    """Versions, device, threads, whether `ctrbench.native` is there, and the git commit of `root`."""
    packages = ("torch", "fuxictr", "numpy", "polars", "h5py")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {
        "ctrbench": ctrbench.__version__,
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "compiled_functions": native.library() is not None,
        "git_commit": git_commit(root),
    }


def processor_name() -> str:
    """The processor's name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@functools.cache
def git_commit(root: Path) -> str | None:
    """The commit of `root` when this was first asked, which a run does before it begins: the code that has been loaded."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
