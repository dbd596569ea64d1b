# SPDX-License-Identifier: Apache-2.0
"""What a leaderboard knows: plain values, from which tables and the page are made."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path
from typing import Any

# Metrics that are better when they are smaller.
LOSSES = ("logloss", "binary_crossentropy", "MSE", "MAE", "RMSE")


class Status(enum.Enum):
    """What stands behind a run.

    `PROVEN`: the stored weights were evaluated again on the data with the reported hash and gave the reported figures.
    `RECORDED`: all files but the weights are here, unaltered, and agree with each other and with the ledger.
    `UNPROVEN`: something is missing, altered or contradictory.
    """

    PROVEN = "proven"
    RECORDED = "recorded"
    UNPROVEN = "unproven"


@dataclasses.dataclass(frozen=True)
class Summary:
    """A metric over the seeds of an experiment.

    Attributes:
        values: by seed.
        mean: of the values.
        deviation: their standard deviation (n - 1); None for one value.
        low: lower end of the 95% t interval of the mean; None for one value.
        high: its upper end.
    """

    values: dict[int, float]
    mean: float
    deviation: float | None
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: its run directory.
        report: content of its report.json.
        curve: lines of its metrics.jsonl.
        status: what stands behind it.
        problems: why it is unproven.
        verification: content of its verification.json, if it is of this report.
    """

    folder: Path
    report: dict[str, Any]
    curve: list[dict[str, Any]]
    status: Status
    problems: tuple[str, ...] = ()
    verification: dict[str, Any] | None = None

    @property
    def seed(self) -> int:
        """Its seed."""
        return int(self.report["seed"])

    def metric(self, split: str, name: str) -> float | None:
        """A metric of the report."""
        value: float | None = self.report["metrics"].get(split, {}).get(name)
        return value


@dataclasses.dataclass(frozen=True)
class Published:
    """A published result.

    Attributes:
        metrics: name -> test value.
        source: where it was published.
        flags: what has to be known about it, in words.
    """

    metrics: dict[str, float]
    source: str
    flags: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Row:
    """An experiment on a dataset, over its seeds.

    Attributes:
        dataset_id: the dataset.
        expid: the experiment.
        model: its model class.
        label: what the table calls it.
        runs: one for each seed, by seed.
        summaries: (split, metric) -> over the seeds.
        status: what stands behind all of its runs.
        problems: why it is unproven; those of single runs begin with their seed.
        published: what the experiment is compared with.
        verdict: how the mean lies to the published value, in words; empty without one.
        is_comparable: whether it was trained on the same data as the dataset's other rows.
        published_in: source -> the value of the metric that it gives this experiment or model.
    """

    dataset_id: str
    expid: str
    model: str
    label: str
    runs: tuple[Run, ...]
    summaries: dict[tuple[str, str], Summary]
    status: Status
    problems: tuple[str, ...]
    published: Published | None
    verdict: str
    is_comparable: bool = True
    published_in: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        """Its seeds."""
        return [run.seed for run in self.runs]

    def summary(self, split: str, metric: str) -> Summary | None:
        """A metric over the seeds; None if no run has it."""
        return self.summaries.get((split, metric))

    def mean_of(self, *keys: str) -> float:
        """Mean over the runs of a number in their reports, found by its keys."""
        total = 0.0
        for run in self.runs:
            value: Any = run.report
            for key in keys:
                value = value.get(key, {}) if isinstance(value, dict) else {}
            total += float(value) if isinstance(value, int | float) else float("nan")
        return total / len(self.runs)

    @property
    def parameters(self) -> int:
        """Trainable parameters, those of the embedding tables included; the most if runs differ."""
        return max(int(run.report["parameters"]["total"]) for run in self.runs)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A paired t test between two experiments on the seeds that both have.

    Attributes:
        first: expid.
        second: expid.
        num_seeds: that they share.
        difference: mean of first - second.
        low: lower end of the 95% interval of the difference.
        high: its upper end.
        p: two-sided.
        adjusted_p: after Holm's correction over all pairs of the dataset.
    """

    first: str
    second: str
    num_seeds: int
    difference: float
    low: float
    high: float
    p: float
    adjusted_p: float


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of one dataset.

    Attributes:
        dataset_id: the dataset.
        metric: what it is ranked by.
        split: of which split: test, or valid where there are no test labels.
        rows: the best first.
        comparisons: of all pairs that share seeds.
        data_hash: of the data that its comparable rows were trained on.
    """

    dataset_id: str
    metric: str
    split: str
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    data_hash: str

    def against_best(self, row: Row) -> Comparison | None:
        """The comparison of a row with the first comparable one; None where there is none."""
        best = next((r for r in self.rows if r.is_comparable), None)
        if best is None:
            return None
        pair = {best.expid, row.expid}
        return next((c for c in self.comparisons if {c.first, c.second} == pair), None)


@dataclasses.dataclass(frozen=True)
class Board:
    """A leaderboard.

    Attributes:
        tables: one for each dataset, by its name.
        title: of the page.
        command: that made it.
        missing: cells of the suite that have no finished run.
    """

    tables: tuple[Table, ...]
    title: str
    command: str = ""
    missing: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Details:
    """A chosen run, looked at closely.

    Attributes:
        run: which one.
        metric: of the figures below, on the test split.
        value: of the metric on the rows that were looked at.
        num_rows: that were looked at.
        fields: names of the F fields.
        calibration: bins of equally many rows: `predicted` and `observed` click rate, `rows`.
        importance: for each field, the metric lost when its values are shuffled among the rows.
        interactions: (F, F), symmetric: what is lost by shuffling two fields beyond the sum of what each loses alone.
        layers: the model's own static interaction strength (F, F) by layer; empty if it has none.
    """

    run: Run
    metric: str
    value: float
    num_rows: int
    fields: tuple[str, ...]
    calibration: list[dict[str, float]]
    importance: list[float]
    interactions: list[list[float]]
    layers: dict[str, list[list[float]]]
