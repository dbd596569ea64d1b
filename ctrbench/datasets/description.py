# SPDX-License-Identifier: Apache-2.0
"""What is known of a public dataset: published sizes and checksums, where it comes from, its terms, how it is prepared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Published:
    """What the publisher says of the split.

    Attributes:
        rows: of each split file, in the order in which they are shown.
        md5: of each split as CSV; empty where none is published.
        line_end: of the CSV files that `md5` was taken of.
        positives: labels 1 of all splits together, where it is known.
        is_exact: False where the rule of the split is inferred, so that other figures are no fault of the raw files.
    """

    rows: Mapping[str, int]
    md5: Mapping[str, str] = field(default_factory=dict)
    line_end: bytes = b"\n"
    positives: int | None = None
    is_exact: bool = True


@dataclass(frozen=True)
class Remote:
    """A file that can be fetched without an account; size in bytes and MD5 where the publisher gives them."""

    url: str
    name: str
    size: int | None = None
    md5: str | None = None


@dataclass(frozen=True)
class Job:
    """What a preparer is asked to do.

    Attributes:
        raw: what the user passed as --raw.
        folder: where the split files (and scratch files) go; published as a whole when the preparer returns.
        file_format: parquet or csv.
        is_sample: sizes and checksums other than the published ones are warnings, not errors.
        published: what to compare with.
        report: shows one line of progress.
    """

    raw: Path
    folder: Path
    file_format: str
    is_sample: bool
    published: Published
    report: Callable[[str], None]


@dataclass
class Outcome:
    """What was written.

    Attributes:
        files: file name by what it holds (a split, or `item_info`).
        rows: of each of them.
        md5: of each split as CSV in the published form, where it was computed.
        positives: labels 1 of all splits together.
        notes: lines for the user.
        warnings: what is not as published.
    """

    files: dict[str, str] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    md5: dict[str, str] = field(default_factory=dict)
    positives: int | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Dataset:
    """One dataset of the catalog; each data/prepare/<dataset>.py that is one defines DATASET.

    Attributes:
        dataset_id: as in config/dataset_config/.
        prepare: does the work.
        raw: what --raw must be, for messages.
        source: the publisher's page.
        terms: the licence in a few words.
        published: sizes and checksums.
        size: of the raw files, roughly, in bytes; None where it is not known.
        remotes: what --download fetches.
        account: what a user must do by hand where there is nothing to fetch without an account.
        default_format: parquet, or csv where existing results depend on it.
        formats: those that `prepare` can write.
        split: how the rows were split, and whether that is reproducible.
    """

    dataset_id: str
    prepare: Callable[[Job], Outcome]
    raw: str
    source: str
    terms: str
    published: Published
    split: str
    size: int | None = None
    remotes: tuple[Remote, ...] = ()
    account: str = ""
    default_format: str = "parquet"
    formats: tuple[str, ...] = ("parquet", "csv")
