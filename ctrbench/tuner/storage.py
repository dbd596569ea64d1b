# SPDX-License-Identifier: Apache-2.0
"""Where a sweep's state is kept: a journal file on this machine, or any storage that Optuna has a URL for."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import filelock
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from ctrbench.errors import ConfigError, CtrbenchError

logger = logging.getLogger(__name__)
T = TypeVar("T")
JOURNAL = "journal.log"
# A store that cannot be reached is tried again for so long before the sweep gives up.
PATIENCE_SECONDS = 120.0


class FileLock:
    """Optuna's journal lock as a lock of the operating system, which goes with its process: no wait after a kill."""

    def __init__(self, path: Path):
        self._lock = filelock.FileLock(path)

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._lock.acquire()
        return True

    def release(self) -> None:
        """Let others have it."""
        self._lock.release()


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """The storage at `url`, or a journal in `folder`.

    Raises:
        ConfigError: not a URL, or a damaged journal.
    """
    if url is not None:
        if "://" not in url:
            raise ConfigError(
                f"--storage {url}: not a URL: use one as postgresql+psycopg://user@host/database or sqlite:///file.db, "
                "or leave the option out for a file in the sweep's folder"
            )
        return RDBStorage(url, engine_kwargs={"pool_pre_ping": True}, skip_compatibility_check=False)
    path = folder / JOURNAL
    lock = FileLock(folder / f"{JOURNAL}.lock")
    repair_journal(path, lock)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))  # type: ignore[arg-type]


def repair_journal(path: Path, lock: Any) -> None:
    """Cut off a last line that a full disk or a power cut left incomplete; Optuna could not read what follows it."""
    if not path.exists():
        return
    lock.acquire()
    try:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines(keepends=True)
        while lines and not _is_json(lines[-1]):
            lines.pop()
        kept = b"".join(lines)
        if len(kept) < len(content):
            logger.warning("%s: its last entry was incomplete and is left out", path)
            os.truncate(path, len(kept))
    finally:
        lock.release()
    for number, line in enumerate(lines, 1):
        if not _is_json(line):
            raise ConfigError(f"{path}: damaged in line {number}: restore it, or start over with --fresh")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def patiently(action: Callable[[], T], where: str) -> T:
    """Do something with a storage, again and again while it cannot be reached.

    Raises:
        CtrbenchError: it cannot be reached for longer than `PATIENCE_SECONDS`.
    """
    from sqlalchemy.exc import DBAPIError

    started, pause = time.monotonic(), 0.5
    while True:
        try:
            return action()
        except (StorageInternalError, OSError, DBAPIError) as error:
            if time.monotonic() - started > PATIENCE_SECONDS:
                raise CtrbenchError(
                    f"--storage {where}: lost for {PATIENCE_SECONDS:.0f} s: {first_line(error)}: finished runs are kept; "
                    "the same command goes on"
                ) from error
            logger.warning("The store does not answer (%s), trying again", first_line(error))
            time.sleep(pause)
            pause = min(2 * pause, 10.0)


def shown_url(url: str | None) -> str | None:
    """A URL as a message may show it."""
    if url is None or "@" not in url:
        return url
    scheme, _, rest = url.partition("://")
    login, _, host = rest.rpartition("@")
    return f"{scheme}://{login.split(':')[0]}@{host}"


def first_line(error: BaseException) -> str:
    """The first line of what a driver says."""
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
