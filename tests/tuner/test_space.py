# SPDX-License-Identifier: Apache-2.0
"""Search spaces: ranges, choices, exclusions, and the plans and draws that are made from them."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import optuna
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from ctrbench.tuner.sampling import draw_tpe, make_pruner, setting_name
from ctrbench.tuner.schema import Exclusion, PrunerConfig, Range
from ctrbench.tuner.space import Dimension, Space, parse_space


def parse(tuner_space: dict[str, Any], exclude: list[dict[str, Any]] | None = None, is_grid: bool = False) -> Space:
    problems: list[str] = []
    exclusions = [Exclusion(condition=condition) for condition in exclude or []]
    space = parse_space(tuner_space, exclusions, is_grid, lambda key: f"t.yaml: {key}", problems)
    assert problems == []
    return space


def problems_of(
    tuner_space: dict[str, Any], exclude: tuple[dict[str, Any], ...] = (), is_grid: bool = False
) -> list[str]:
    problems: list[str] = []
    exclusions = [Exclusion(condition=condition) for condition in exclude]
    parse_space(tuner_space, exclusions, is_grid, lambda key: f"t.yaml: {key}", problems)
    return problems


def dimension(**values: Any) -> Dimension:
    return Dimension("x", range=Range(**values))


# Ranges


@pytest.mark.parametrize(
    ("values", "grid"),
    [
        ({"low": 1, "high": 4}, [1, 2, 3, 4]),
        ({"low": 2, "high": 2}, [2]),
        ({"low": 1, "high": 8, "step": 3}, [1, 4, 7]),
        ({"low": 64, "high": 256, "step": 64}, [64, 128, 192, 256]),
        ({"low": -2, "high": 2, "step": 2}, [-2, 0, 2]),
        ({"low": 0.0, "high": 0.3, "step": 0.1}, [0.0, 0.1, 0.2, 0.3]),
        ({"low": 0, "high": 0.5, "step": 0.1}, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]),
        ({"low": 0, "high": 1, "step": 0.25}, [0.0, 0.25, 0.5, 0.75, 1.0]),
        ({"low": 0.1, "high": 0.35, "step": 0.1}, [0.1, 0.2, 0.3]),
        ({"low": 0.1, "high": 0.7, "step": 0.1}, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]),
    ],
)
def test_the_values_of_a_range_with_both_ends(values: dict[str, Any], grid: list[Any]) -> None:
    found = dimension(**values).grid()
    assert found == grid and [type(x) for x in found] == [type(x) for x in grid]


def test_a_long_range_of_small_steps_keeps_its_end() -> None:
    found = dimension(low=0.0, high=1.0, step=1e-4).grid()
    assert len(found) == 10_001 and found[-1] == 1.0 and found[7] == 0.0007


def test_the_form_that_is_sampled_from() -> None:
    assert dimension(low=1, high=9, step=2).distribution() == IntDistribution(1, 9, step=2)
    assert dimension(low=8, high=512, log=True).distribution() == IntDistribution(8, 512, log=True)
    assert dimension(low=1e-4, high=1e-1, log=True).distribution() == FloatDistribution(1e-4, 1e-1, log=True)
    assert dimension(low=0, high=0.5, step=0.1).distribution() == FloatDistribution(0.0, 0.5, step=0.1)
    assert dimension(low=0, high=0.5).distribution() == FloatDistribution(0.0, 0.5)
    assert Dimension("x", (1, "a", None, [64, 32])).distribution() == CategoricalDistribution(
        [1, "a", None, "[64, 32]"]
    )


def test_first_and_single() -> None:
    assert dimension(low=0.1, high=0.5).first == 0.1 and not dimension(low=0.1, high=0.5).is_single
    assert dimension(low=3, high=3).is_single and Dimension("x", (None,)).is_single
    assert Dimension("x", ([1], [2])).first == [1] and not Dimension("x", (1, 2)).is_single


bounded = st.floats(1e-8, 1e8, allow_subnormal=False)


@given(st.tuples(bounded, bounded).map(sorted), st.floats(0, 1), st.booleans())
@settings(max_examples=50, deadline=None, derandomize=True)
def test_a_float_comes_back_as_it_was_written(ends: list[float], share: float, log: bool) -> None:
    low, high = ends
    assume(low < high)
    found = dimension(low=low, high=high, log=log)
    drawn = min(max(low + share * (high - low), low), high)
    value = found.value(drawn)
    assert value == json.loads(json.dumps(value)) and value == float(f"{value:.12g}")
    assert math.isclose(value, drawn, rel_tol=1e-11)
    sampled = found.sampled(value)
    assert low <= sampled <= high and found.distribution()._contains(sampled)
    assert found.value(sampled) == value


@given(st.integers(-1000, 1000), st.integers(0, 1000), st.integers(1, 50), st.data())
@settings(max_examples=50, deadline=None, derandomize=True)
def test_an_integer_comes_back(low: int, span: int, step: int, data: st.DataObject) -> None:
    found = dimension(low=low, high=low + span, step=step)
    value = data.draw(st.sampled_from(found.grid()))
    assert type(found.value(float(value))) is int
    assert found.value(found.sampled(value)) == value and low <= value <= low + span
    assert (value - low) % step == 0


@given(st.integers(0, 20), st.integers(1, 60), st.sampled_from([0.05, 0.1, 0.25, 0.3]))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_float_steps_are_the_numbers_that_a_person_writes(first: int, count: int, step: float) -> None:
    low = float(f"{first * step:.12g}")
    found = dimension(low=low, high=float(f"{low + count * step:.12g}"), step=step)
    grid = found.grid()
    assert len(grid) == count + 1 and len(set(grid)) == count + 1
    assert all(len(repr(abs(x))) <= 6 for x in grid)  # 0.3, not 0.30000000000000004
    distribution = found.distribution()
    for value in grid:
        assert distribution._contains(distribution.to_internal_repr(found.sampled(value)))
        assert found.value(found.sampled(value)) == value


def test_steps_across_zero() -> None:
    assert dimension(low=-0.3, high=0.3, step=0.1).grid() == [-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3]


@given(
    st.lists(st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.floats(-3, 3), st.text(max_size=3)), min_size=1)
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_a_choice_comes_back(choices: list[Any]) -> None:
    names = [json.dumps(choice) for choice in choices]
    assume(len(set(names)) == len(names))
    found = Dimension("x", tuple(choices))
    for choice in choices:
        again = found.value(found.sampled(choice))
        assert again == choice and type(again) is type(choice)


def test_one_true_and_one_point_zero_are_three_choices() -> None:
    space = parse({"x": [1, True, 1.0, 0, False]})
    [found] = space.dimensions
    assert [type(found.value(found.sampled(c))) for c in found.choices] == [int, bool, float, int, bool]
    assert [type(setting["x"]) for setting in space.grid()] == [int, bool, float, int, bool]


@pytest.mark.parametrize("choice", [[64, 32], {"AUC": 1, "logloss": -1}, [["a"], []], {}])
def test_a_choice_that_is_no_scalar_comes_back(choice: Any) -> None:
    found = Dimension("x", (choice, None))
    assert isinstance(found.sampled(choice), str) and found.value(found.sampled(choice)) == choice
    assert found.value(found.sampled(None)) is None


# Grids


def test_the_last_key_varies_fastest() -> None:
    space = parse({"a": [1, 2], "b": "x", "c": {"low": 0, "high": 2}}, is_grid=True)
    assert [tuple(s.values()) for s in space.grid()] == [*itertools.product([1, 2], ["x"], [0, 1, 2])]
    assert [list(s) for s in space.grid()] == [["a", "b", "c"]] * 6
    assert space.size() == 6


def test_size() -> None:
    assert parse({"a": [1, 2], "b": {"low": 0.0, "high": 1.0}}).size() == math.inf
    assert parse({"a": [1, 2], "b": {"low": 0.5, "high": 0.5}}).size() == 2
    assert parse({"a": {"low": 0.0, "high": 1.0, "step": 0.5}, "b": {"low": 1, "high": 4, "log": True}}).size() == 12


def test_only_keys_with_a_choice_are_sampled() -> None:
    space = parse({"a": 1, "b": {"low": 2, "high": 2}, "c": [3, 4], "d": [[5]]})
    assert list(space.distributions()) == ["c"]
    assert space.from_sampled({"c": 4}) == {"a": 1, "b": 2, "c": 4, "d": [5]}
    assert space.to_sampled({"a": 1, "b": 2, "c": 4, "d": [5]}) == {"c": 4}


def test_keys_on_a_log_scale() -> None:
    space = parse(
        {"a": {"low": 1e-4, "high": 1e-1, "log": True}, "b": [1e-3, 1e-2], "c": [1, 2], "d": [0, 10], "e": [1]}
    )
    assert space.log_keys == {"a", "b"}
    assert parse({"a": [True, 10], "b": ["x", "y"], "c": [None, 1]}).log_keys == frozenset()


# Exclusions


@pytest.mark.parametrize(
    ("condition", "left"),
    [
        ({"a": 1}, 6),
        ({"a": [1, 2]}, 3),
        ({"a": [3], "b": 0.1}, 8),
        ({"a": {"low": 2}}, 3),
        ({"a": {"high": 2}, "b": {"low": 0.2, "high": 0.3}}, 5),
        ({"a": 3, "b": [0.1, 0.2, 0.3]}, 6),
    ],
)
def test_excluded_combinations(condition: dict[str, Any], left: int) -> None:
    space = parse({"a": [1, 2, 3], "b": [0.1, 0.2, 0.3]}, [condition])
    assert len(list(space.grid())) == left


def test_several_exclusions_and_values_of_other_types() -> None:
    space = parse({"a": [1, 2], "b": [None, "x", True, [64, 32]]}, [{"a": 1, "b": None}, {"b": [["y"], "x"]}])
    assert [tuple(s.values()) for s in space.grid()] == [(1, True), (1, [64, 32]), (2, None), (2, True), (2, [64, 32])]
    assert len(list(parse({"b": [[64, 32], [32]]}, [{"b": [64, 32]}]).grid())) == 1
    # a range is about numbers, and true is none
    assert len(list(parse({"b": [True, "x", None, 1, [1]]}, [{"b": {"low": 0, "high": 2}}]).grid())) == 4
    assert len(list(parse({"b": [True, "x"]}, [{"b": True}]).grid())) == 1


def test_an_exclusion_may_list_lists() -> None:
    space = parse({"units": [[64], [64, 32], [32]]}, [{"units": [[64], [32]]}])
    assert [s["units"] for s in space.grid()] == [[64, 32]]


def test_an_exclusion_tells_one_from_true() -> None:
    assert [s["x"] for s in parse({"x": [1, True]}, [{"x": True}]).grid()] == [1]


# What is wrong with a space


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "t.yaml: tuner_space.x: an empty list leaves nothing to try: give values, or delete the key"),
        ([1, 2, 1], "t.yaml: tuner_space.x: lists 1 twice: keep one"),
        ([[64], [64]], "t.yaml: tuner_space.x: lists [64] twice: keep one"),
        ([{"a": 1, "b": 2}, {"b": 2, "a": 1}], "t.yaml: tuner_space.x: lists {'a': 1, 'b': 2} twice: keep one"),
        ({"low": 2, "high": 1}, "t.yaml: tuner_space.x: low is above high, got {'low': 2, 'high': 1}"),
        (
            {"low": 0, "high": 1.0, "log": True},
            "t.yaml: tuner_space.x: log needs low above 0, got {'low': 0, 'high': 1.0, 'log': True}",
        ),
        (
            {"low": -1.0, "high": 1.0, "log": True},
            "t.yaml: tuner_space.x: log needs low above 0, got {'low': -1.0, 'high': 1.0, 'log': True}",
        ),
        (
            {"low": 1, "high": 9, "log": True, "step": 2},
            "t.yaml: tuner_space.x: step must be positive and does not go with log, got "
            "{'low': 1, 'high': 9, 'log': True, 'step': 2}",
        ),
        (
            {"low": 1, "high": 9, "step": 0},
            "t.yaml: tuner_space.x: step must be positive and does not go with log, got "
            "{'low': 1, 'high': 9, 'step': 0}",
        ),
        (
            {"low": 1.0, "high": 9.0, "step": -0.5},
            "t.yaml: tuner_space.x: step must be positive and does not go with log, got "
            "{'low': 1.0, 'high': 9.0, 'step': -0.5}",
        ),
        (
            {"low": 0.0, "high": 1.0, "step": 1e-9},
            "t.yaml: tuner_space.x: step gives more than 1,000,000 values, got "
            "{'low': 0.0, 'high': 1.0, 'step': 1e-09}",
        ),
        ({"low": 1}, "t.yaml: tuner_space.x.high: missing, this key is required"),
        (
            {"low": 1, "high": 2, "logg": True},
            "t.yaml: tuner_space.x.logg: unknown key, got True (did you mean 'log'?)",
        ),
        ({"low": "a", "high": 2}, "t.yaml: tuner_space.x.low: must be a number, got 'a'"),
        ({"low": True, "high": 2}, "t.yaml: tuner_space.x.low: must be a number, got True"),
        ({"low": 0.1, "high": math.inf}, "t.yaml: tuner_space.x.high: must be a finite number, got inf"),
        ({"low": 1, "high": 2, "log": "yes"}, "t.yaml: tuner_space.x.log: must be a boolean, got 'yes'"),
    ],
)
def test_a_dimension_that_is_refused(value: Any, message: str) -> None:
    assert problems_of({"x": value}) == [message]


@pytest.mark.parametrize("value", [{"low": 0.1, "high": 0.5}, {"low": 1, "high": 64, "log": True}])
def test_a_grid_needs_steps(value: dict[str, Any]) -> None:
    message = (
        f"t.yaml: tuner_space.x: a grid needs a list of values or a step, got {value}: or set sampler: random or tpe"
    )
    assert problems_of({"x": value}, is_grid=True) == [message] and problems_of({"x": value}) == []


def test_all_that_is_wrong_is_told_at_once() -> None:
    found = problems_of({"a": [], "b": {"low": 2, "high": 1}, "c": [1, 1], "d": [1]}, ({"dd": 1},))
    assert [line.split(": ")[1] for line in found] == [
        "tuner_space.a",
        "tuner_space.b",
        "tuner_space.c",
        "exclude[0].if.dd",
    ]


def test_an_exclusion_of_a_key_that_is_not_tuned() -> None:
    assert problems_of({"a": [1, 2]}, ({"a": 1}, {"a": 2, "bb": [3]})) == [
        "t.yaml: exclude[1].if.bb: 'bb' is not in tuner_space, so this excludes nothing"
    ]


@pytest.mark.parametrize("wanted", [{"low": "a"}, {"low": None, "high": 1}])
def test_an_exclusion_with_ends_that_are_no_numbers(wanted: dict[str, Any]) -> None:
    problems: list[str] = []
    space = parse_space({"a": [1, 2]}, [Exclusion(condition={"a": wanted})], True, str, problems)
    assert problems or list(space.grid())


# Draws


def empty_study() -> optuna.Study:
    return optuna.create_study(direction="maximize", storage=optuna.storages.InMemoryStorage())


def draw_all(space: Space, count: int, seed: int = 1) -> list[dict[str, Any]]:
    """As the engine draws: every trial is complete before the next one."""
    study, drawn, seen = empty_study(), [], set()
    for number in range(count):
        trial_id = study._storage.create_new_trial(study._study_id, create_trial(state=TrialState.RUNNING))
        values = draw_tpe(study, trial_id, space, seed, seen)
        if values is None:
            break
        sampled = space.to_sampled(values)
        for key, distribution in space.distributions().items():
            study._storage.set_trial_param(trial_id, key, distribution.to_internal_repr(sampled[key]), distribution)
        study._storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [float(number % 3)])
        drawn.append(values)
        seen.add(setting_name(values))
    return drawn


def test_tpe_tries_all_of_a_small_space_once_and_ends() -> None:
    space = parse({"a": [1, 2, 3], "b": {"low": 0, "high": 2}, "c": ["x"]}, [{"a": 2, "b": {"low": 1}}])
    drawn = draw_all(space, 20)
    assert sorted(map(setting_name, drawn)) == sorted(map(setting_name, space.grid())) and len(drawn) == 7


def test_tpe_keeps_to_ranges_and_exclusions_and_is_fixed_by_its_seed() -> None:
    space = parse(
        {"lr": {"low": 1e-4, "high": 1e-1, "log": True}, "n": {"low": 1, "high": 4}, "units": [[64, 32], [32]]},
        [{"n": [1, 4]}, {"lr": {"low": 1e-2}}],
    )
    drawn = draw_all(space, 15)
    assert len({setting_name(values) for values in drawn}) == 15
    assert all(1e-4 <= v["lr"] < 1e-2 and v["n"] in (2, 3) and v["units"] in ([64, 32], [32]) for v in drawn)
    assert draw_all(space, 15) == drawn != draw_all(space, 15, seed=2)


def test_tpe_with_nothing_to_choose_or_nothing_left() -> None:
    assert draw_all(parse({"a": [1]}), 3) == [{"a": 1}]
    assert draw_all(parse({"a": [1, 2]}, [{"a": [1, 2]}]), 3) == []


def test_pruners() -> None:
    assert isinstance(make_pruner(PrunerConfig()), optuna.pruners.NopPruner)
    assert isinstance(make_pruner(PrunerConfig(name="median")), optuna.pruners.MedianPruner)
    halving = make_pruner(PrunerConfig(name="successive_halving", min_evaluations=2, reduction_factor=3))
    assert isinstance(halving, optuna.pruners.SuccessiveHalvingPruner) and halving._reduction_factor == 3
