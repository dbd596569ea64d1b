# SPDX-License-Identifier: Apache-2.0
"""Split files: written as the text of the published CSV, compared with its MD5, kept as Parquet or CSV."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
import polars as pl

from ctrbench.datasets.description import Job, Outcome
from ctrbench.errors import DataError

# Level 1 and no statistics: twice as fast as the defaults, and the files are no larger.
PARQUET = {"row_group_size": 1 << 16, "compression": "zstd", "compression_level": 1, "statistics": False}
_CHUNK = 1 << 22


class SplitText:
    """The rows of every split as CSV text, in one or more parts each; close it by leaving the `with` block.

    Args:
        job: where to write and what to compare with.
        columns: names for the header.
        parts: names of the parts by split; the parts of a split follow one another in the published file.
        may_be_quoted: whether cells may be quoted.
    """

    def __init__(
        self, job: Job, columns: Sequence[str], parts: Mapping[str, Sequence[str]], may_be_quoted: bool = False
    ):
        self._job, self._columns, self._parts = job, list(columns), parts
        self._quote = '"' if may_be_quoted else None
        self._files: dict[str, IO[bytes]] = {}
        self._rows = {part: 0 for names in parts.values() for part in names}
        self._positives = 0

    def __enter__(self) -> SplitText:
        self._files = {part: self._path(part).open("wb") for part in self._rows}
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            with suppress(OSError):  # a full disk shows again here; the first error counts
                file.close()

    def add(self, part: str, text: bytes, num_rows: int, positives: int = 0) -> None:
        """Append whole lines."""
        self._files[part].write(text)
        self._rows[part] += num_rows
        self._positives += positives

    def distribute(self, text: bytes, which: np.ndarray, names: Sequence[str], labels: np.ndarray) -> None:
        """Append each line to the part `names[which[i]]`, in order.

        Args:
            text: n lines.
            which: (n,) indices into `names`.
            labels: (n,) 0 or 1.
        """
        lines = np.empty(len(which), object)
        lines[:] = text.split(b"\n")[:-1]
        for index, name in enumerate(names):
            chosen = lines[which == index]
            if len(chosen):
                self.add(name, b"\n".join(chosen) + b"\n", len(chosen))
        self._positives += int(labels.sum())

    def finish(self) -> Outcome:
        """Compare with the published split, then write each split under its final name in the job's folder.

        Raises:
            DataError: rows or MD5 differ from the published ones (a warning for a sample).
        """
        for file in self._files.values():
            file.close()
        outcome = Outcome(positives=self._positives)
        outcome.rows = {split: sum(self._rows[part] for part in parts) for split, parts in self._parts.items()}
        for split, rows in outcome.rows.items():
            if not rows:
                raise DataError(f"{self._job.raw}: no row is left for {split}: too few rows to split")
        line_ends = {split: self._compare_text(split, outcome) for split in self._parts}
        compare_rows(self._job, outcome)
        for split, parts in self._parts.items():
            name = outcome.files[split] = f"{split}.{self._job.file_format}"
            self._job.report(f"writing {name}")
            self._write(self._job.folder / name, parts, line_ends[split])
            for part in parts:
                self._path(part).unlink()
        return outcome

    def _path(self, part: str) -> Path:
        return self._job.folder / f"{part}.text"

    def _compare_text(self, split: str, outcome: Outcome) -> bytes:
        """The MD5 of one split; returns the line ends with which it is the published one."""
        published, parts = self._job.published, self._parts[split]
        known = published.md5.get(split)
        self._job.report(f"checking {split}")
        digests = {}
        # The publishers' tools wrote the line ends of the system that they ran on. Far other rows need no second look.
        is_near = abs(outcome.rows[split] - published.rows[split]) <= published.rows[split] // 100 + 1
        for line_end in (published.line_end, b"\n", b"\r\n") if known and is_near else (published.line_end,):
            if line_end not in digests:
                digests[line_end] = self._md5(parts, line_end)
            if digests[line_end] == known:
                break
        else:
            line_end = published.line_end
        outcome.md5[split] = digests[line_end]
        if known and digests[line_end] != known:
            rows = f"{outcome.rows[split]:,} rows, published are {published.rows[split]:,}"
            md5 = f"the MD5 of the CSV is {digests[line_end]}, published is {known}"
            refuse(self._job, outcome, f"{split}: {rows}; {md5}")
        return line_end

    def _md5(self, parts: Sequence[str], line_end: bytes) -> str:
        digest = hashlib.md5(usedforsecurity=False)
        for chunk in self._chunks(parts, line_end):
            digest.update(chunk)
        return digest.hexdigest()

    def _chunks(self, parts: Sequence[str], line_end: bytes) -> Iterator[bytes]:
        """The published CSV of one split."""
        yield ",".join(self._columns).encode() + line_end
        for part in parts:
            with self._path(part).open("rb") as file:
                while chunk := file.read(_CHUNK):
                    yield chunk if line_end == b"\n" else chunk.replace(b"\n", line_end)

    def _write(self, path: Path, parts: Sequence[str], line_end: bytes) -> None:
        if self._job.file_format == "csv":
            with path.open("wb") as file:
                for chunk in self._chunks(parts, line_end):
                    file.write(chunk)
            return
        filled = [self._path(part) for part in parts if self._rows[part]]
        schema = dict.fromkeys(self._columns, pl.String)
        scan = pl.scan_csv(filled, has_header=False, schema=schema, quote_char=self._quote)
        scan.sink_parquet(path, **PARQUET)


def compare_rows(job: Job, outcome: Outcome) -> None:
    """Refuse other numbers of rows or positive labels than the published ones (warn for a sample)."""
    for split, known in job.published.rows.items():
        is_proven = split in job.published.md5  # the MD5 has been compared, and it is the better witness
        if outcome.rows[split] != known and not is_proven:
            refuse(job, outcome, f"{split}: {outcome.rows[split]:,} rows, published are {known:,}")
    known_positives = job.published.positives
    if known_positives is not None and outcome.positives != known_positives:
        refuse(job, outcome, f"{outcome.positives:,} positive labels, published are {known_positives:,}")


def refuse(job: Job, outcome: Outcome, problem: str) -> None:
    """A difference to the published split: an error, or a warning for a sample and where the split's rule is inferred."""
    if job.published.is_exact and not job.is_sample:
        raise DataError(
            f"{job.raw}: {problem}: these are not the publisher's complete files: download them again, "
            "or pass --sample to prepare what is there"
        )
    outcome.warnings.append(problem)
