# SPDX-License-Identifier: Apache-2.0
"""Prepare one dataset: work in a scratch folder beside the result, then publish all split files at once with a record.

The record, prepared.json, is written last and removed first, so a folder that has it is complete, and the files in it are
of one split. After an error or Ctrl-C nothing remains; what a killed process leaves is removed by the next run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ctrbench import __version__
from ctrbench.datasets.description import Dataset, Job, Outcome, Published
from ctrbench.errors import ConfigError, DataError
from ctrbench.files import storage_error, sync, write_failure, write_json

RECORD = "prepared.json"
SCRATCH = ".prepare.partial"
_LOCK = ".prepare.lock"


def prepare(
    dataset: Dataset,
    raw: Path,
    output: Path,
    *,
    file_format: str | None = None,
    is_sample: bool = False,
    published: Published | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Write the split files of one dataset into `output`, all of them or none.

    Args:
        dataset: one of the catalog.
        raw: the raw download, as `dataset.raw` says.
        output: the folder, created when it is missing.
        file_format: parquet or csv; None is the dataset's own.
        is_sample: accept other sizes and checksums than the published ones, with a warning.
        published: compare with these instead of the dataset's own figures.
        report: shows one line of progress.

    Raises:
        ConfigError: the dataset cannot be written in this format.
        DataError: raw files that are missing or not as published; names the file, the line and the remedy.
        CtrbenchError: the disk is full, or the folder cannot be written.
    """
    file_format = file_format or dataset.default_format
    if file_format not in dataset.formats:
        known = " or ".join(dataset.formats)
        raise ConfigError(f"{dataset.dataset_id}: it is kept as {known}, not as {file_format}")
    if raw.is_dir() and output.resolve() == raw.resolve():
        raise DataError(f"{output}: --output is the folder of the raw files and would replace them: name another one")
    with _scratch(output) as scratch:
        job = Job(raw, scratch, file_format, is_sample, published or dataset.published, report)
        outcome = dataset.prepare(job)
        _publish(dataset, job, outcome, output)
    return outcome


def read_record(output: Path) -> dict[str, Any] | None:
    """The record of a folder, None when it has none or one that cannot be read."""
    try:
        record = json.loads((output / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_known = isinstance(record, dict) and isinstance(record.get("files"), dict)
    return record if is_known and all(isinstance(entry, dict) for entry in record["files"].values()) else None


@contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """An empty folder in `output` for this process alone."""
    is_new = not output.exists()
    scratch = output / SCRATCH
    lock = FileLock(output / _LOCK)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise DataError(f"{output}: another process prepares this folder: wait until it is done") from None
    except OSError as error:
        raise storage_error(error, output / _LOCK) from error
    is_done = False
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        yield scratch
        is_done = True
    except Exception as error:
        if (failure := write_failure(error)) is None:
            raise
        raise storage_error(failure, output) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        lock.release()
        if is_new and not is_done:
            (output / _LOCK).unlink(missing_ok=True)
            with suppress(OSError):  # it is kept when it holds something
                output.rmdir()


def _publish(dataset: Dataset, job: Job, outcome: Outcome, output: Path) -> None:
    """Move the files to their final names; earlier ones go first, so that two splits never stand mixed."""
    for name in outcome.files.values():
        sync(job.folder / name)
    earlier = read_record(output) or {"files": {}}
    (output / RECORD).unlink(missing_ok=True)
    for name in {*earlier["files"], *outcome.files.values()}:
        if name == Path(name).name:  # a record is a file that anybody can edit
            (output / name).unlink(missing_ok=True)
    files = {}
    for split, name in outcome.files.items():
        os.replace(job.folder / name, output / name)
        files[name] = {"rows": outcome.rows[split], "bytes": (output / name).stat().st_size}
    sync(output)
    record = {
        "dataset_id": dataset.dataset_id,
        "files": files,
        "csv_md5": outcome.md5,
        "positives": outcome.positives,
        "is_published_split": bool(job.published.md5) and not outcome.warnings,
        "warnings": outcome.warnings,
        "raw": job.raw.name,
        "ctrbench": __version__,
    }
    write_json(output / RECORD, record)
