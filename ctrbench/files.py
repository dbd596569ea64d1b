# SPDX-License-Identifier: Apache-2.0
"""Files that appear under their final name only when they are complete."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ctrbench.errors import CtrbenchError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it onto `path` when the block ends without an exception.

    The content is on disk before the rename and the rename before the return. After an exception nothing remains.

    Raises:
        CtrbenchError: the disk is full or the folder cannot be written, with the folder's name.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        make_folder(path.parent)
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except Exception as error:
        if (failure := write_failure(error)) is None:
            raise
        raise storage_error(failure, path) from error
    finally:
        with suppress(OSError):  # it must not hide the first error
            partial.unlink(missing_ok=True)


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn what the system says against writing `path` into one clear line; for files that are only passed on.

    Raises:
        CtrbenchError: the disk is full or the file cannot be written.
    """
    try:
        yield
    except Exception as error:
        if (failure := write_failure(error)) is None:
            raise
        raise storage_error(failure, path) from error


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are not there; their names are on disk when this returns."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    if not missing:
        return
    missing[0].mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_failure(error: BaseException) -> OSError | None:
    """The operating system's error behind `error`, if there is one: writers in C++ and Rust wrap a full disk in their own."""
    if isinstance(error, CtrbenchError | OSError):
        return error if isinstance(error, OSError) else None
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return cause
        if "No space left" in str(cause):
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        cause = cause.__cause__ or cause.__context__
    return None


def storage_error(error: OSError, path: Path) -> CtrbenchError:
    """Turn an operating system error met while writing `path` into one clear line."""
    folder = next((p for p in (path.parent, *path.parent.parents) if p.exists()), Path("/"))
    free = shutil.disk_usage(folder).free / 2**20
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return CtrbenchError(
            f"{path}: the disk is full ({free:.0f} MiB free in {folder}); nothing was kept of this file: "
            "free some space and run the same command again"
        )
    remedies = {
        errno.EFBIG: f"this file system or process may write no larger file (ulimit -f; {free:.0f} MiB are free)"
    }
    remedies |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder that may be written to")
    remedy = remedies.get(error.errno or 0)
    return CtrbenchError(f"{path}: cannot be written: {error.strerror or error}{f': {remedy}' if remedy else ''}")


def shown_path(path: Path) -> str:
    """A path as messages and logs show it: from the working directory where it lies below that."""
    path, here = path.absolute(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(stream)


def sha256_of_value(value: Any) -> str:
    """SHA-256 of a JSON-serialisable value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _sha256(stream: Any) -> str:  # Python 3.10 has no file_digest
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Return when the content of a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
