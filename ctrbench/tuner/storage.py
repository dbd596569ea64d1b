# SPDX-License-Identifier: Apache-2.0
"""Where a sweep's state is kept: a journal file on this machine, or any storage that Optuna has a URL for."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import filelock
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from ctrbench.errors import ConfigError, CtrbenchError
from ctrbench.files import storage_error

logger = logging.getLogger(__name__)
T = TypeVar("T")
JOURNAL = "journal.log"
INCOMPLETE = "%s: its last entry was incomplete and is left out"
# Bytes that an entry of the journal stays below.
MAX_LINE = 1 << 20
# Times that an empty database is tried to be opened while others make its tables.
MAX_OPENINGS = 10
# A store that cannot be reached is tried again for so long before the sweep gives up.
PATIENCE_SECONDS = 120.0


class FileLock:
    """Optuna's journal lock as a lock of the operating system, which goes with its process: no wait after a kill."""

    def __init__(self, journal: Path):
        self._journal = journal
        self._lock = filelock.FileLock(journal.with_name(f"{journal.name}.lock"))

    def acquire(self) -> bool:
        """Wait for the lock, and cut off what a writer that died left of a line: ours would be lost behind it."""
        self._lock.acquire()
        if self._journal.exists():
            with self._journal.open("rb+") as stream:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(max(0, size - 1))
                if stream.read() not in (b"", b"\n"):
                    stream.seek(max(0, size - MAX_LINE))
                    tail = stream.read()
                    logger.warning(INCOMPLETE, self._journal)
                    stream.truncate(size - len(tail) + tail.rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Let others have it."""
        self._lock.release()


def open_storage(url: str | None, folder: Path, fresh: bool = False) -> BaseStorage:
    """The storage at `url`, or a journal in `folder`, an empty one if `fresh`.

    Raises:
        ConfigError: not a URL, or a damaged journal.
    """
    if url is not None:
        if "://" not in url:
            raise ConfigError(
                f"--storage {shown_url(url)}: not a URL: use one as postgresql+psycopg://user@host/database or sqlite:///file.db, "
                "or leave the option out for a file in the sweep's folder"
            )
        return _open_database(url)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / JOURNAL
    if fresh:
        path.unlink(missing_ok=True)
    lock = FileLock(path)
    repair_journal(path, lock)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))  # type: ignore[arg-type]


def _open_database(url: str) -> RDBStorage:
    import sqlalchemy

    is_sqlite = url.startswith("sqlite")
    options: dict[str, Any] = {"connect_args": {"timeout": PATIENCE_SECONDS}} if is_sqlite else {"pool_pre_ping": True}
    for attempt in itertools.count():
        try:
            storage = RDBStorage(url, engine_kwargs=options)
            break
        except Exception as error:
            # Others are making the tables of an empty database at this moment.
            is_race = re.search("already exists|unique|duplicate", str(error), re.IGNORECASE)
            if not is_race or attempt == MAX_OPENINGS:
                raise
            time.sleep(0.2 * (attempt + 1))
    if is_sqlite:
        # SQLite locks no rows: a transaction takes the whole file before it reads, so that a claim has one winner.
        sqlalchemy.event.listen(storage.engine, "connect", _leave_transactions_to_us)
        sqlalchemy.event.listen(
            storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE")
        )
        storage.engine.dispose()
    return storage


def _is_lost(error: Exception) -> bool:
    """Whether an error says that a storage does not answer, rather than what it answers."""
    if isinstance(error, StorageInternalError | OSError):
        return True
    from sqlalchemy.exc import DBAPIError

    return isinstance(error, DBAPIError)


def _leave_transactions_to_us(connection: Any, record: Any) -> None:
    connection.isolation_level = None


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
            logger.warning(INCOMPLETE, path)
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
    started, pause = time.monotonic(), 0.5
    while True:
        try:
            return action()
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise storage_error(error, Path(where)) from error
            if not _is_lost(error):
                raise
            if time.monotonic() - started > PATIENCE_SECONDS:
                raise CtrbenchError(
                    f"--storage {where}: lost for {PATIENCE_SECONDS:.0f} s: {first_line(error)}: finished runs are kept; "
                    "the same command goes on"
                ) from error
            logger.warning("The store does not answer (%s), trying again", first_line(error))
            time.sleep(pause)
            pause = min(2 * pause, 10.0)


def shown_url(url: str | None) -> str | None:
    """A URL as a message may show it: without its password."""
    if url is None:
        return None
    login, at, host = url.rpartition("@")
    user = re.match(r"(?:[^:/]*:/+)?[^:/]*", login)
    return re.sub(r"(?i)(password=)[^&]*", r"\1...", (user[0] + at if user and at else "") + host)


def first_line(error: BaseException) -> str:
    """The first line of what a driver says."""
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
