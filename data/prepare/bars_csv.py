# SPDX-License-Identifier: Apache-2.0
"""Splits of the BARS benchmark: adopted from the published CSV files, or rebuilt from the raw file as ten stratified folds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ctrbench.datasets.archives import MissingFileError, RawMember, find
from ctrbench.datasets.description import Job, Outcome
from ctrbench.datasets.folds import stratified_folds
from ctrbench.datasets.lines import LineReader, TextForm, read_lines
from ctrbench.datasets.writing import SplitText
from ctrbench.errors import DataError

NUM_FOLDS, SEED = 10, 2018
PARTS = {"train": tuple(f"fold_{i}" for i in range(2, NUM_FOLDS)), "valid": ("fold_1",), "test": ("fold_0",)}


def url(dataset_id: str) -> str:
    """Where the benchmark publishes its CSV files."""
    return f"https://huggingface.co/datasets/reczoo/{dataset_id}/resolve/main/{dataset_id}.zip"


@dataclass(frozen=True)
class BarsCsv:
    """How one dataset of the benchmark is prepared.

    Attributes:
        dataset_id: its name, and that of its archive.
        columns: of the CSV files; with `may_have_more`, those that the published configuration reads.
        label: the column of labels.
        again: what to do when a file is not as it should be.
        raw_names: names of the raw file; none for a dataset that is published ready-made.
        raw_archives: names of archives that hold it.
        raw_separator: between its cells.
        raw_has_header: whether it names its columns.
        alphabet: bytes that its cells may hold; empty for any text.
        may_have_more: the published files have further columns.
        may_be_quoted: cells may be quoted.
        splits: the files that are published.
    """

    dataset_id: str
    columns: tuple[str, ...]
    label: str
    again: str
    raw_names: tuple[str, ...] = ()
    raw_archives: tuple[str, ...] = ()
    raw_separator: bytes = b","
    raw_has_header: bool = True
    alphabet: bytes = b""
    may_have_more: bool = False
    may_be_quoted: bool = False
    splits: tuple[str, ...] = ("train", "valid", "test")

    def prepare(self, job: Job) -> Outcome:
        """Adopt the published files where they are, else split the raw file."""
        wanted = {split: (f"{split}.csv",) for split in self.splits}
        try:
            published = find(job.raw, wanted, self.again, [f"{self.dataset_id}.zip"])
        except MissingFileError:
            if not self.raw_names:
                raise
            return self.split(job, find(job.raw, {"raw": self.raw_names}, self.again, self.raw_archives)["raw"])
        return self.adopt(job, published)

    def adopt(self, job: Job, members: Mapping[str, RawMember]) -> Outcome:
        """Check the published files and take them over row by row."""
        form = TextForm(
            self.columns,
            b",",
            has_header=True,
            label=self.label,
            may_have_more=self.may_have_more,
            may_be_quoted=self.may_be_quoted,
            alphabet=self.alphabet,
        )
        columns = self._common_columns(members, form)
        with SplitText(job, columns, {split: (split,) for split in members}, self.may_be_quoted) as splits:
            for split, member in members.items():
                job.report(f"reading {member.name}")
                for block in read_lines(member, form, job.report):
                    splits.add(split, block.text, block.num_lines, int(block.labels.sum()))
            return splits.finish()

    def split(self, job: Job, raw: RawMember) -> Outcome:
        """Assign the rows of the raw file to ten folds (first pass), then write them (second pass)."""
        separator = self.raw_separator
        form = TextForm(self.columns, separator, self.raw_has_header, self.label, alphabet=self.alphabet)
        job.report(f"reading {raw.name}: the labels")
        labels = np.concatenate([block.labels for block in read_lines(raw, form, job.report)])
        folds = stratified_folds(labels, NUM_FOLDS, SEED)
        job.report(f"reading {raw.name}: {len(labels):,} rows into {NUM_FOLDS} folds")
        names = [f"fold_{i}" for i in range(NUM_FOLDS)]
        changed = DataError(f"{raw.name}: it changed while it was read: run again when it is complete")
        first = 0
        with SplitText(job, self.columns, PARTS) as splits:
            for block in read_lines(raw, form, job.report):
                rows = slice(first, first + block.num_lines)
                if not np.array_equal(block.labels, labels[rows]):
                    raise changed
                text = block.text if separator == b"," else block.text.replace(separator, b",")
                splits.distribute(text, folds[rows], names, block.labels)
                first += block.num_lines
            if first != len(labels):
                raise changed
            return splits.finish()

    def _common_columns(self, members: Mapping[str, RawMember], form: TextForm) -> tuple[str, ...]:
        found = {}
        for split, member in members.items():
            with member.open() as stream:
                found[split] = LineReader(stream, form, block_bytes=1 << 16).columns
        for split, columns in found.items():
            if columns != found[self.splits[0]]:
                raise DataError(
                    f"{members[split].name}: header: other columns than in {self.splits[0]}.csv, "
                    f"got {','.join(columns)[:200]}: {self.again}"
                )
        return columns
