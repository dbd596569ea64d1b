# SPDX-License-Identifier: Apache-2.0
"""Where the shards of a build are worked on: processes of this machine, or a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ctrbench.errors import ConfigError, CtrbenchError
from ctrbench.fitting import num_cores

Shared = TypeVar("Shared")
Task = TypeVar("Task")
Result = TypeVar("Result")

ENGINES = ("local", "ray")
_THREAD_VARIABLE = "POLARS_MAX_THREADS"  # read when polars is loaded


class Engine(Protocol):
    """Applies a function of a module to tasks, in other processes."""

    workers: int

    def map(
        self, function: Callable[[Shared, Task], Result], shared: Shared, tasks: Sequence[Task]
    ) -> Iterator[Result]:
        """`function(shared, task)` of each task, in the order of the tasks; `shared` travels once for each worker.

        Raises:
            CtrbenchError: a worker died. Errors of the function are raised as they are, the first task's first.
        """


class LocalEngine:
    """Processes of this machine, which share its cores.

    Args:
        workers: how many.
    """

    def __init__(self, workers: int):
        self.workers = workers

    def map(
        self, function: Callable[[Shared, Task], Result], shared: Shared, tasks: Sequence[Task]
    ) -> Iterator[Result]:
        """See `Engine`."""
        context = multiprocessing.get_context("spawn")  # forking a process whose threads hold locks may hang
        workers = min(self.workers, len(tasks)) or 1
        with _environment(_THREAD_VARIABLE, str(max(1, num_cores() // workers))):
            pool = ProcessPoolExecutor(workers, context, _start_worker, (function, shared))
            futures = [pool.submit(_work, task) for task in tasks]  # this starts the processes
        try:
            for future in futures:
                yield future.result()
        except BrokenProcessPool:
            raise CtrbenchError(
                "a worker process was killed, most often because memory ran out: use fewer --workers"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_job: tuple[Callable[[Any, Any], Any], Any] | None = None


def _start_worker(function: Callable[[Any, Any], Any], shared: Any) -> None:
    global _job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    _job = function, shared


def _work(task: Any) -> Any:
    assert _job is not None
    function, shared = _job
    return function(shared, task)


class RayEngine:
    """A Ray cluster, or a local one of `workers` processes where none is named.

    All its nodes must see the dataset's folder and the raw files under the same paths, and have this package installed.

    Args:
        workers: of a local cluster; tasks at once on another one.
        address: of a running cluster, as `ray start` prints it; by default RAY_ADDRESS, then a local cluster.

    Raises:
        ConfigError: ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, workers: int, address: str | None = None):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # 30 are too few for a busy machine
        try:
            import ray
        except ImportError:
            raise ConfigError("--engine ray: ray is not installed: pip install ray, or use --engine local") from None
        self.workers = workers
        self._ray = ray
        address = address or os.environ.get("RAY_ADDRESS")
        self._is_started_here = not ray.is_initialized()
        if not self._is_started_here:
            return
        options: dict[str, Any] = {"address": address} if address else {"num_cpus": workers, "address": "local"}
        try:
            ray.init(include_dashboard=None if address else False, log_to_driver=False, **options)
        except Exception as error:  # some of them are of no class of their own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            where = f"{address}: no Ray cluster there" if address else "Ray could not be started"
            raise ConfigError(f"--engine ray: {where} ({reason}): check --address, or use --engine local") from None

    def map(
        self, function: Callable[[Shared, Task], Result], shared: Shared, tasks: Sequence[Task]
    ) -> Iterator[Result]:
        """See `Engine`."""
        remote = self._ray.remote(num_cpus=1)(function)
        kept = self._ray.put(shared)
        waiting = [remote.remote(kept, task) for task in tasks[: self.workers]]
        try:
            for position in range(len(tasks)):
                result = self._ray.get(waiting[position])
                if len(waiting) < len(tasks):
                    waiting.append(remote.remote(kept, tasks[len(waiting)]))
                yield result
        except self._ray.exceptions.RayTaskError as error:
            raise getattr(error, "cause", None) or error from None
        except self._ray.exceptions.RayError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CtrbenchError(f"--engine ray: a worker was lost ({reason}): run the same command again") from None
        finally:
            for task in waiting:
                self._ray.cancel(task, force=False)

    def close(self) -> None:
        """Leave the cluster; end it if it was started here."""
        if self._is_started_here:
            self._ray.shutdown()


@contextmanager
def open_engine(name: str, workers: int, address: str | None = None) -> Iterator[Engine | None]:
    """The engine of that name; None for one local worker, which is this process itself.

    Raises:
        ConfigError: there is no such engine, or it cannot be started.
    """
    if name not in ENGINES:
        raise ConfigError(f"--engine {name}: must be one of {', '.join(ENGINES)}")
    if workers < 1:
        raise ConfigError(f"--workers {workers}: must be at least 1")
    if name == "local":
        if address:
            raise ConfigError("--address: of a Ray cluster, so it goes with --engine ray")
        yield LocalEngine(workers) if workers > 1 else None
        return
    engine = RayEngine(workers, address)
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def check_is_shared(folder: Path) -> None:
    """Refuse to work on a machine that does not see the dataset's folder.

    Raises:
        CtrbenchError: it is not there.
    """
    if not folder.is_dir():
        raise CtrbenchError(
            f"{folder}: a worker on {platform.node()} does not see it: data_root and the raw files must lie on a "
            "file system that all nodes share"
        )
