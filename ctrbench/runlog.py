# SPDX-License-Identifier: Apache-2.0
"""What a run says: FuxiCTR's log lines in train.log and on the terminal, progress bars where there is one."""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from ctrbench.errors import CtrbenchError
from ctrbench.files import storage_error, storing

FORMAT = "%(asctime)s P%(process)d %(levelname)s %(message)s"
T = TypeVar("T")


class RunLog:
    """Root logging of one run: to stderr at once, and to a file from the moment that the run directory exists.

    Lines before `open` are kept in memory, so that an experiment that is refused leaves no file behind.

    Args:
        verbose: 0 says nothing on the terminal.
        title: of one run of several in this process, each in its thread: the log then takes what this thread says, and lines
            on the terminal begin with it.
    """

    def __init__(self, verbose: int = 1, title: str = ""):
        self._terminal = logging.StreamHandler(sys.stderr)
        self._early = logging.handlers.MemoryHandler(capacity=100_000, flushLevel=logging.CRITICAL + 1)
        self._file: logging.FileHandler | None = None
        for handler in (self._terminal, self._early):
            handler.setFormatter(logging.Formatter(FORMAT))
        self._thread = threading.get_ident() if title else None
        if title:
            self._terminal.setFormatter(logging.Formatter(FORMAT.replace("%(message)s", f"{title}: %(message)s")))
            for handler in (self._terminal, self._early):
                handler.addFilter(self._is_own)
        self.verbose = verbose

    def __enter__(self) -> RunLog:
        root = logging.getLogger()
        self._level = root.level
        root.setLevel(logging.INFO)
        if self.verbose:
            root.addHandler(self._terminal)
        root.addHandler(self._early)
        return self

    def open(self, path: Path, append: bool) -> None:
        """Continue in `path`, the lines so far first."""
        with storing(path):
            self._file = _LogFile(path, mode="a" if append else "w", encoding="utf-8")
        self._file.setFormatter(logging.Formatter(FORMAT))
        self._file.addFilter(self._is_own)
        self._early.setTarget(self._file)
        self._early.flush()
        logging.getLogger().removeHandler(self._early)
        logging.getLogger().addHandler(self._file)

    def _is_own(self, record: logging.LogRecord) -> bool:
        return self._thread is None or record.thread == self._thread

    def close_file(self) -> None:
        """End the file; the terminal goes on."""
        if self._file is not None:
            logging.getLogger().removeHandler(self._file)
            self._file.close()
            self._file = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        root = logging.getLogger()
        if kind is not None and self._file is not None:
            # The command line prints the error; the file should end with it as well.
            record = logging.LogRecord("ctrbench", logging.ERROR, "", 0, f"{kind.__name__}: {error}", None, None)
            with contextlib.suppress(CtrbenchError):  # a full disk has been reported
                self._file.handle(record)
        for handler in (self._terminal, self._early, self._file):
            if handler is not None:
                root.removeHandler(handler)
        root.setLevel(self._level)
        with contextlib.suppress(OSError):
            self.close_file()


class _LogFile(logging.FileHandler):
    """A log that is part of a run's evidence: a line that cannot be written ends the run, where logging would go on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise storage_error(error, Path(self.baseFilename)) from error
        super().handleError(record)


def as_json(values: Mapping[str, Any]) -> str:
    """FuxiCTR's form of a block of settings: sorted JSON in which every value is a text."""
    return json.dumps({key: str(value) for key, value in sorted(values.items())}, indent=4)


def watch(items: Iterable[T], count: int, label: str) -> Iterator[T]:
    """Pass `items` on; on a terminal, with a progress bar that disappears when it is done."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, description=label, total=count, console=Console(stderr=True), transient=True)
