# SPDX-License-Identifier: Apache-2.0
"""Optuna's samplers and pruners, as a tuner file names them."""

from __future__ import annotations

import json
import warnings
from typing import Any

import optuna
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import TPESampler

from ctrbench.files import sha256_of_value
from ctrbench.tuner.schema import PrunerConfig
from ctrbench.tuner.space import MAX_GRID, Space, Values

# Draws of TPE that give nothing new before the space is searched for what is left.
MAX_DRAWS = 50


def make_pruner(config: PrunerConfig) -> BasePruner:
    """The pruner of a tuner file."""
    if config.name == "median":
        return MedianPruner(config.num_startup_trials, config.num_warmup_evaluations + 1)  # steps count from 1
    if config.name == "successive_halving":
        return SuccessiveHalvingPruner(config.min_evaluations, config.reduction_factor)
    return NopPruner()


def draw_tpe(study: optuna.Study, trial_id: int, space: Space, seed: int, seen: set[str]) -> Values | None:
    """A new allowed setting near good ones (tree-structured Parzen estimator); None if all were tried.

    Args:
        study: what came out so far.
        trial_id: the trial that it is for.
        space: the search space.
        seed: fixes the draw.
        seen: names of settings that were drawn before, from `setting_name`.
    """
    trial = next(t for t in study.get_trials(deepcopy=False) if t._trial_id == trial_id)
    distributions = space.distributions()
    for attempt in range(MAX_DRAWS):
        sampler = TPESampler(seed=int(sha256_of_value([seed, trial.number, attempt])[:8], 16))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sampled: dict[str, Any] = sampler.sample_relative(study, trial, distributions)
            for key, distribution in distributions.items():
                if key not in sampled:
                    sampled[key] = sampler.sample_independent(study, trial, key, distribution)
        values = space.from_sampled({**sampled, **trial.params})
        if space.allows(values) and setting_name(values) not in seen:
            return values
    if space.size() > MAX_GRID:
        return None
    return next((values for values in space.grid() if setting_name(values) not in seen), None)


def setting_name(values: Values) -> str:
    """The same text for the same values."""
    return json.dumps(values, sort_keys=True, default=str)
