# SPDX-License-Identifier: Apache-2.0
"""Published results that ours are compared with: `benchmarks/published.yaml`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ctrbench.errors import ConfigError, did_you_mean
from ctrbench.leaderboard.records import Published, Summary
from ctrbench.validation import Where, validate
from ctrbench.yamlfile import load_yaml


class Entry(BaseModel):
    """One published result.

    Attributes:
        of: the model, or one experiment of it.
        metrics: name -> value on the test split, or on the one that a flag names.
        source: key of `sources`.
        run: name of the run in the authors' logs.
        flags: keys of `flags`.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    of: str
    metrics: Annotated[dict[str, float], Field(min_length=1)]
    source: str
    run: str = ""
    flags: list[str] = []


class PublishedFile(BaseModel):
    """The file: what sources and flags mean, and the results of each dataset, the one to compare with first."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    sources: dict[str, str]
    flags: dict[str, str] = {}
    results: dict[str, list[dict[str, Any]]]


class PublishedResults:
    """Looks up what was published.

    Args:
        path: the file.

    Raises:
        ConfigError: with one line per problem.
    """

    def __init__(self, path: Path):
        problems: list[str] = []
        content: PublishedFile | None = validate(PublishedFile, load_yaml(path), Where(f"{path}"), problems)
        if content is None:
            raise ConfigError(line.replace(f"{path}.", f"{path}: ", 1) for line in problems)
        self.content = content
        self.results: dict[str, list[Entry]] = {}
        for dataset, entries in content.results.items():
            for number, values in enumerate(entries):
                where = f"{path}: results.{dataset}.{values.get('of', number)}"
                entry: Entry | None = validate(Entry, values, Where(where), problems)
                if entry is not None:
                    self.results.setdefault(dataset, []).append(entry)
                    problems += [f"{where}: {problem}" for problem in self._unknown(entry)]
        if problems:
            raise ConfigError(problems)

    def _unknown(self, entry: Entry) -> Iterator[str]:
        sources, flags = self.content.sources, self.content.flags
        if entry.source not in sources:
            yield f"unknown source, got '{entry.source}'{did_you_mean(entry.source, sources)}"
        for flag in entry.flags:
            if flag not in flags:
                yield f"unknown flag, got '{flag}'{did_you_mean(flag, flags)}"

    def find(self, dataset_id: str, expid: str, model: str) -> Published | None:
        """What is published of an experiment, or else of its model on that dataset."""
        entries = self.results.get(dataset_id, [])
        for name in (expid, model):
            for entry in entries:
                if entry.of == name:
                    source = self.content.sources[entry.source] + (f", run {entry.run}" if entry.run else "")
                    return Published(entry.metrics, source, tuple(self.content.flags[flag] for flag in entry.flags))
        return None

    def by_source(self, dataset_id: str, expid: str, model: str, metric: str) -> dict[str, float]:
        """Source -> the value that it gives an experiment, or else its model."""
        found: dict[str, float] = {}
        for name in (expid, model):
            for entry in self.results.get(dataset_id, []):
                if entry.of == name and metric in entry.metrics:
                    found.setdefault(self.content.sources[entry.source], entry.metrics[metric])
        return found


def find_published(folder: Path) -> PublishedResults | None:
    """The file of the repository around `folder`; None if there is none."""
    for around in (folder.resolve(), *folder.resolve().parents):
        path = around / "benchmarks" / "published.yaml"
        if path.is_file():
            return PublishedResults(path)
    return None


def verdict(summary: Summary | None, published: Published | None, metric: str) -> str:
    """How a mean over seeds lies to the published value: inside its 95% interval, or by how much it is off."""
    value: Any = published.metrics.get(metric) if published else None
    if summary is None or value is None:
        return ""
    gap = summary.mean - value
    if summary.low is None or summary.high is None:
        return f"one seed, {gap:+.4f}"
    if summary.low <= value <= summary.high:
        return f"inside, {gap:+.4f}"
    return f"{'above' if gap > 0 else 'below'}, {gap:+.4f}"
