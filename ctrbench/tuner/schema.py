# SPDX-License-Identifier: Apache-2.0
"""The keys of a tuner file: FuxiCTR's (`base_config`, `base_expid`, `dataset_id`, `tuner_space`) and our own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
Number = int | Annotated[float, Field(allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Range(_Section):
    """All numbers from `low` to `high`, both included: `{low: 1.e-4, high: 1.e-1, log: true}`.

    Whole numbers where both ends are written without a point.
    """

    low: Number
    high: Number
    log: bool = False
    step: Number | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the numbers are integers."""
        return isinstance(self.low, int) and isinstance(self.high, int) and not isinstance(self.step, float)


class Between(_Section):
    """Part of a range, in an exclusion: `{low: 0.3}` is all from 0.3 on."""

    low: Number | None = None
    high: Number | None = None


class PrunerConfig(_Section):
    """When a trial is given up, by the curve of its monitored validation value.

    `median`: its best value so far is worse than the median of the others at the same evaluation.
    `successive_halving`: it is not among the best 1/reduction_factor of those that reached the same rung (asynchronous).
    """

    name: Literal["none", "median", "successive_halving"] = "none"
    num_startup_trials: Annotated[int, Field(ge=0)] = 5
    num_warmup_evaluations: Annotated[int, Field(ge=0)] = 1
    min_evaluations: PositiveInt = 1
    reduction_factor: Annotated[int, Field(ge=2)] = 4


def _by_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else {"name": "none"} if value is None else value


class Exclusion(_Section):
    """A combination that is left out: all of these keys have one of these values (a value, a list or a range)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)

    condition: Annotated[dict[str, Any], Field(alias="if", min_length=1)]


class TunerConfig(_Section):
    """A tuner file.

    Attributes:
        base_config: configuration folder; by default the one that the tuner file lies in.
        base_expid: the experiment that the trials vary.
        dataset_id: its data; by default the experiment's.
        model_config_: `model_config` written in place, with a section `base_expid`.
        dataset_config: `dataset_config` written in place, with a section `dataset_id`.
        tuner_space: key of the model or the dataset -> values, a single value, or a range.
        sampler: `grid` runs all combinations in order, `random` draws them, `tpe` draws where good ones were.
        sampler_seed: fixes the draws.
        num_trials: settings to run; a grid runs all of them by default.
        timeout: seconds after which no further trial is started.
        seeds: seeds that each setting is run with; the objective is their mean. By default the experiment's one seed.
        pruner: when to give up a trial.
        exclude: combinations to leave out.
    """

    base_config: str | None = None
    base_expid: Annotated[str, Field(min_length=1)]
    dataset_id: str | None = None
    model_config_: Annotated[dict[str, dict[str, Any]] | None, Field(alias="model_config")] = None
    dataset_config: dict[str, dict[str, Any]] | None = None
    tuner_space: Annotated[dict[str, Any], Field(min_length=1)]
    sampler: Literal["grid", "random", "tpe"] = "grid"
    sampler_seed: Annotated[int, Field(ge=0, lt=2**32)] = 2024
    num_trials: PositiveInt | None = None
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)] | None = None
    pruner: Annotated[PrunerConfig, BeforeValidator(_by_name)] = PrunerConfig()
    exclude: list[Exclusion] = []
