# SPDX-License-Identifier: Apache-2.0
"""Splits of the BARS benchmark that come from libfm files: one-hot rows `label id:1 id:1 ...`, a field for each place."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ctrbench.datasets.archives import MissingFileError, RawMember, find
from ctrbench.datasets.description import Job, Outcome
from ctrbench.datasets.lines import LineBlock, TextForm, read_lines
from ctrbench.datasets.writing import SplitText
from ctrbench.errors import DataError

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also for whoever loads this file by its path
from bars_csv import BarsCsv

SPLITS = ("train", "valid", "test")
_CELL = re.compile(rb" (\d+):1(?=[ \n])")
_ROW = re.compile(rb"[01](,\d+)+")


@dataclass(frozen=True)
class Libfm:
    """How one dataset is read from libfm files.

    Attributes:
        columns: label and fields, in the order of the cells.
        stems: beginnings of the files' names before `train.libfm`, such as `frappe.`.
        again: what to do when a file is not as it should be.
        csv: the same dataset from its published CSV files.
    """

    columns: tuple[str, ...]
    stems: tuple[str, ...]
    again: str
    csv: BarsCsv

    def prepare(self, job: Job) -> Outcome:
        """Convert the libfm files where they are, else adopt the published CSV files."""
        try:
            members = self.find(job)
        except MissingFileError:
            return self.csv.prepare(job)
        return self.convert(job, members)

    def find(self, job: Job) -> dict[str, RawMember]:
        """The three libfm files.

        Raises:
            MissingFileError: they are not there.
        """
        names = {split: (split, "validation") if split == "valid" else (split,) for split in SPLITS}
        endings = ("libsvm", "libfm")
        wanted = {
            split: tuple(
                f"{stem}{name}.{ending}" for stem in ("", *self.stems) for name in names[split] for ending in endings
            )
            for split in SPLITS
        }
        return find(job.raw, wanted, self.again)

    def convert(self, job: Job, members: dict[str, RawMember]) -> Outcome:
        """Keep the id before each colon; a label of -1 becomes 0."""
        form = TextForm(self.columns, b" ", has_header=False, alphabet=b"0123456789:-")
        with SplitText(job, self.columns, {split: (split,) for split in SPLITS}) as splits:
            for split, member in members.items():
                for block in read_lines(member, form):
                    text = self._to_csv(block, member)
                    starts = np.flatnonzero(np.frombuffer(b"\n" + text[:-1], np.uint8) == ord("\n"))
                    positives = int((np.frombuffer(text, np.uint8)[starts] == ord("1")).sum())
                    splits.add(split, text, block.num_lines, positives)
            return splits.finish()

    def _to_csv(self, block: LineBlock, member: RawMember) -> bytes:
        text = re.sub(rb"(?m)^-1 ", b"0 ", block.text)
        text, num_cells = _CELL.subn(rb",\1", text)
        rows = text[:-1].split(b"\n")
        if num_cells != block.num_lines * (len(self.columns) - 1) or any(
            row[1:2] != b"," or row[0] not in b"01" for row in rows
        ):
            wrong = next(i for i, row in enumerate(rows) if not _ROW.fullmatch(row))
            line = block.text.split(b"\n")[wrong][:60].decode()
            raise DataError(
                f"{member.name}: line {block.first_line + wrong:,}: expected a label (0, 1 or -1) and cells such as 17:1, "
                f"got '{line}': {self.again}"
            )
        return text
