# SPDX-License-Identifier: Apache-2.0
"""What the speed benchmarks share: work in fresh processes, memory of a process tree, machine, tables, reports.

A worker is a call of the benchmark's own script with `--worker FILE`, where FILE holds its settings as JSON; it writes
what it measured beside FILE. So no measurement inherits memory, threads or imports from another one.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
SAMPLE_SECONDS = 0.1


def use_cores(count: int) -> None:
    """Bind this process and all that it starts to `count` of its cores, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def run_worker(
    script: Path,
    settings: dict[str, Any],
    threads: int,
    timeout: float = 300,
    sample_seconds: float = SAMPLE_SECONDS,
) -> dict[str, Any]:
    """Run `script --worker` in a fresh process.

    Args:
        script: the benchmark.
        settings: what the worker reads, JSON-serialisable.
        threads: OMP_NUM_THREADS of the worker.
        timeout: seconds after which the worker is killed.
        sample_seconds: how often its memory is looked at; of a large process each look takes milliseconds.

    Returns:
        What the worker measured, and `peak_mib`, the peak memory of its process tree (proportional set size).

    Raises:
        RuntimeError: the worker failed or took too long; with the end of its output.
    """
    with tempfile.TemporaryDirectory() as name:
        file, log = Path(name) / "settings.json", Path(name) / "log"
        file.write_text(json.dumps(settings))
        with log.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, str(script), "--worker", str(file)],
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
            peak, deadline = 0.0, time.monotonic() + timeout
            while process.poll() is None:
                if time.monotonic() > deadline:
                    process.kill()
                    process.wait()
                peak = max(peak, tree_mib(process.pid))
                time.sleep(sample_seconds)
        if process.returncode:
            raise RuntimeError(f"{script.name} {settings}: status {process.returncode}\n{log.read_text()[-3000:]}")
        measured: dict[str, Any] = json.loads(_answer(file).read_text())
    return {**measured, "peak_mib": peak}


def work(file: Path, measure: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The worker's side of `run_worker`: read the settings, measure, write the answer."""
    _answer(file).write_text(json.dumps(measure(json.loads(file.read_text()))))


def _answer(file: Path) -> Path:
    return file.with_name("answer.json")


def tree_mib(root: int) -> float:
    """Proportional set size in MiB of process `root` and all its descendants; 0 where /proc does not tell."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it ended between the listing and the reading
    tree, grown = {root}, True
    while grown:
        children = {pid for pid, parent in parents.items() if parent in tree} - tree
        tree, grown = tree | children, bool(children)
    return sum(_pss_kib(pid) for pid in tree) / 1024


def _pss_kib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, smallest and largest value."""
    listed = list(values)
    return {"median": statistics.median(listed), "min": min(listed), "max": max(listed)}


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """Machine and versions, for the report."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count(),
        "python": platform.python_version(),
        **{name: version for name in packages if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def describe(machine: dict[str, Any]) -> str:
    """One line for the head of a table."""
    return f"{machine['cpu']}, {machine['cores']} cores; " + ", ".join(
        f"{name} {version}" for name, version in machine.items() if name not in ("cpu", "cores")
    )


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], num_texts: int = 1) -> str:
    """A table whose first `num_texts` columns are text and whose others are right-aligned."""
    rule = ["---" if i < num_texts else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows))


def write_report(path: Path | None, report: dict[str, Any]) -> None:
    """Write the JSON report, if a path is given."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")
