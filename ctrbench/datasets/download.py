# SPDX-License-Identifier: Apache-2.0
"""Download one file over HTTP: resumed, retried, checked, and under its final name only when it is complete."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from ctrbench import __version__
from ctrbench.datasets.description import Dataset, Remote
from ctrbench.errors import ConfigError, CtrbenchError, DataError
from ctrbench.files import storage_error, sync, write_text

_CHUNK = 1 << 20
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_TEMPORARY = (408, 425, 429, 500, 502, 503, 504)
_MOST_SECONDS = 60.0


class _RetryError(Exception):
    """Something that may work the next time."""


@dataclass(frozen=True)
class Policy:
    """How patient a download is.

    Attributes:
        attempts: tries in a row that bring less than `progress` bytes before it gives up.
        progress: bytes that count as progress.
        delay: seconds before the second try, doubled with each further one up to a minute.
        timeout: seconds of silence after which a connection counts as lost.
        sleep: waits.
    """

    attempts: int = 6
    progress: int = 1 << 20
    delay: float = 1.0
    timeout: float = 60.0
    sleep: Callable[[float], None] = time.sleep


def instructions(dataset: Dataset) -> str:
    """How a user gets the raw files."""
    if dataset.remotes:
        urls = ", ".join(remote.url for remote in dataset.remotes)
        return f"Get it from {urls}, or pass --download (terms: {dataset.terms})"
    return f"It cannot be fetched without you: {dataset.account}, then pass its path as --raw (terms: {dataset.terms})"


def fetch(
    dataset: Dataset, folder: Path, *, policy: Policy | None = None, report: Callable[[str], None] = lambda line: None
) -> list[Path]:
    """Download what `dataset` needs into `folder`, unless it is there.

    Raises:
        ConfigError: the publisher wants an account, so that only the user can download it.
        DataError: a file cannot be had, or is another one than the publisher's.
        CtrbenchError: the disk is full.
    """
    if not dataset.remotes:
        raise ConfigError(f"{dataset.dataset_id}: --download: {instructions(dataset)}")
    if folder.is_file():
        raise ConfigError(f"{folder}: with --download, --raw must be a folder: leave out --download to use this file")
    report(f"{dataset.dataset_id}: terms: {dataset.terms}; see {dataset.source}")
    paths = [folder / remote.name for remote in dataset.remotes]
    for remote, path in zip(dataset.remotes, paths, strict=True):
        download(remote, path, policy=policy, report=report)
    return paths


def download(
    remote: Remote, target: Path, *, policy: Policy | None = None, report: Callable[[str], None] = lambda line: None
) -> None:
    """Fetch `remote` as `target`.

    What came so far is in `.<name>.part`; the next call goes on from there when the server can, and only if it still offers
    the same file.

    Raises:
        DataError: refused by the server, lost too often, or not the publisher's file.
        CtrbenchError: the disk is full.
    """
    if target.exists():
        _check_complete(remote, target)
        report(f"{target}: already there")
        return
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise DataError(f"{target}: another process downloads it: wait until it is done") from None
    except OSError as error:
        raise storage_error(error, target) from error
    try:
        _Download(remote, target, policy or Policy(), report).run()
    finally:
        lock.release()


class _Download:
    def __init__(self, remote: Remote, target: Path, policy: Policy, report: Callable[[str], None]):
        self._remote, self._target, self._policy, self._report = remote, target, policy, report
        self._part = target.with_name(f".{target.name}.part")
        self._state = target.with_name(f".{target.name}.part.json")
        self._shown = time.monotonic()

    def run(self) -> None:
        failures, was_wrong = 0, False
        while True:
            before = self._size()
            try:
                self._attempt()
                problem = _problem(self._remote, self._part)
                if problem is None:
                    break
                self._discard()
                if was_wrong:
                    raise DataError(
                        f"{self._target}: {problem}: {self._remote.url} does not offer the publisher's file"
                    )
                was_wrong = True
                raise _RetryError(problem)
            except _RetryError as error:
                failures = 1 if self._size() - before >= self._policy.progress else failures + 1
                if failures >= self._policy.attempts:
                    raise DataError(
                        f"{self._target}: gave up after {failures} failed attempts ({error}): {self._size():,} bytes are "
                        "kept, the same command goes on from there"
                    ) from None
                self._report(f"{self._target.name}: {error}; trying again")
                self._policy.sleep(min(self._policy.delay * 2 ** (failures - 1), _MOST_SECONDS))
        sync(self._part)
        os.replace(self._part, self._target)
        self._state.unlink(missing_ok=True)
        sync(self._target.parent)
        self._report(f"{self._target}: {self._target.stat().st_size:,} bytes")

    def _attempt(self) -> None:
        """One request; returns when the part is complete as far as the server says."""
        offset, state = self._resumable()
        if urlsplit(self._remote.url).scheme not in ("http", "https"):
            raise DataError(f"{self._remote.url}: only http and https addresses are fetched")
        headers = {"User-Agent": f"ctrbench/{__version__}", "Accept-Encoding": "identity"}
        if offset:
            headers |= {"Range": f"bytes={offset}-", "If-Range": state["validator"]}
        request = urllib.request.Request(self._remote.url, headers=headers)
        try:
            with _OPENER.open(request, timeout=self._policy.timeout) as response:
                self._receive(response, offset, state)
        except urllib.error.HTTPError as error:
            error.close()
            self._refused(error, offset, state)
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            raise _RetryError(str(getattr(error, "reason", "") or error) or type(error).__name__) from None

    def _receive(self, response: http.client.HTTPResponse, offset: int, state: dict[str, Any]) -> None:
        length = response.headers.get("Content-Length", "")
        body = int(length) if length.isdigit() else None
        if response.status == 206:
            match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != offset or int(match[3]) != state["total"]:
                self._discard()
                raise _RetryError("the server sent another range than asked for")
            total: int | None = int(match[3])
        else:
            offset, total = 0, body
        expected = self._remote.size
        if expected is not None and total is not None and total != expected:
            raise DataError(
                f"{self._target}: {self._remote.url} offers {total:,} bytes, the publisher's file has {expected:,}: "
                "the address does not offer the publisher's file"
            )
        is_chunked = response.headers.get("Transfer-Encoding", "").lower() == "chunked"
        if total is None and expected is None and not self._remote.md5 and not is_chunked:
            raise DataError(
                f"{self._target}: {self._remote.url} does not say how long the file is, so nobody can tell whether it is "
                "complete: download it with a browser"
            )
        self._check_space(total, offset)
        if offset == 0:
            self._keep_state(response, total)
        received = self._copy(response, offset, total if total is not None else expected)
        if total is not None and received < total:
            raise _RetryError(f"the connection ended after {received:,} of {total:,} bytes")

    def _copy(self, response: http.client.HTTPResponse, offset: int, most: int | None) -> int:
        received = offset
        try:
            file = self._part.open("ab" if offset else "wb")
        except OSError as error:
            raise storage_error(error, self._target) from error
        with file:
            while chunk := response.read(_CHUNK):
                received += len(chunk)
                if most is not None and received > most:
                    raise DataError(
                        f"{self._target}: {self._remote.url} sends more than the {most:,} bytes of the file"
                    )
                try:
                    file.write(chunk)
                    file.flush()
                except OSError as error:
                    raise storage_error(error, self._target) from error
                self._show(received, most)
        return received

    def _refused(self, error: urllib.error.HTTPError, offset: int, state: dict[str, Any]) -> None:
        if error.code == 416 and offset:
            if offset == state.get("total"):
                return
            self._discard()
            raise _RetryError("the server cannot go on from there")
        said = f"{self._target}: {self._remote.url} answers {error.code} {error.reason}"
        if error.code in _TEMPORARY:
            raise _RetryError(f"the server answers {error.code} {error.reason}")
        if error.code in (401, 403):
            raise DataError(
                f"{said}: it wants an account or an accepted licence: sign in there, download the file and pass its path as --raw"
            )
        raise DataError(f"{said}: look for the file on the publisher's page and pass its path as --raw")

    def _resumable(self) -> tuple[int, dict[str, Any]]:
        """Bytes that can be kept, and what was known of the file that they are of."""
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
            is_ours = state["url"] == self._remote.url and state["validator"] and isinstance(state["total"], int)
        except (OSError, ValueError, KeyError, TypeError):
            return 0, {}
        size = self._size()
        return (size, state) if is_ours and 0 < size <= state["total"] else (0, {})

    def _keep_state(self, response: http.client.HTTPResponse, total: int | None) -> None:
        """Note which file the part is of; a weak ETag does not vouch for the bytes."""
        self._discard()
        tag = response.headers.get("ETag", "")
        validator = tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified", "")
        write_text(self._state, json.dumps({"url": self._remote.url, "validator": validator, "total": total}))

    def _check_space(self, total: int | None, offset: int) -> None:
        free = shutil.disk_usage(self._target.parent).free
        if total is not None and total - offset > free:
            raise CtrbenchError(
                f"{self._target}: the disk is too small: {(total - offset) / 2**20:,.0f} MiB are missing, "
                f"{free / 2**20:,.0f} MiB are free: free some space and run the same command again"
            )

    def _show(self, received: int, most: int | None) -> None:
        if time.monotonic() - self._shown > 10:
            self._shown = time.monotonic()
            of = f" of {most / 2**20:,.0f}" if most else ""
            self._report(f"{self._target.name}: {received / 2**20:,.0f}{of} MiB")

    def _size(self) -> int:
        return self._part.stat().st_size if self._part.exists() else 0

    def _discard(self) -> None:
        self._part.unlink(missing_ok=True)
        self._state.unlink(missing_ok=True)


def _check_complete(remote: Remote, path: Path) -> None:
    if problem := _problem(remote, path):
        raise DataError(f"{path}: {problem}: delete it and run the same command again")


def _problem(remote: Remote, path: Path) -> str | None:
    """What is wrong with a file that should be complete."""
    size = path.stat().st_size
    if remote.size is not None and size != remote.size:
        return f"it has {size:,} bytes, the publisher's file has {remote.size:,}"
    if remote.md5 and (got := _md5(path)) != remote.md5:
        return f"its MD5 is {got}, the publisher's is {remote.md5}"
    if remote.name.endswith(".zip") and not zipfile.is_zipfile(path):
        return "it is not a zip archive, or a truncated one"
    return None


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to HTTP(S) only, and never from HTTPS to HTTP."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        before, after = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if after not in ("http", "https") or (before == "https" and after != "https"):
            raise DataError(f"{req.full_url}: it points to {newurl}, which is not safe to follow")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        _Redirects,
    ):
        opener.add_handler(handler())
    return opener


_OPENER = _opener()
