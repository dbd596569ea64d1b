# SPDX-License-Identifier: Apache-2.0
"""Tuner files as FuxiCTR has them, and what our own keys add: which experiments a sweep stands for, in which order."""

from __future__ import annotations

import itertools
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ctrbench.config import Experiment, load_experiment
from ctrbench.errors import ConfigError
from ctrbench.tuner.definition import Sweep, load_sweep
from ctrbench.tuner.engine import num_settings
from ctrbench.yamlfile import load_yaml

DROPOUTS = {"net_dropout": [0.1, 0.2]}


def settings_of(sweep: Sweep, count: int | None = None) -> list[dict[str, Any]]:
    numbers = range(len(sweep.plan) if count is None else count)
    return [sweep.plan.get(number)[1] for number in numbers]  # type: ignore[index]


def experiments(sweep: Sweep) -> list[Experiment]:
    return [sweep.experiment(*sweep.plan.get(number)) for number in range(len(sweep.plan))]  # type: ignore[misc]


def expids(sweep: Sweep) -> list[str]:
    return [experiment.expid for experiment in experiments(sweep)]


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Fail instead of hanging."""

    def stop(*_: object) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


# FuxiCTR's files


@pytest.mark.parametrize(
    ("file", "base_config"),
    [
        ("tuners/sweep.yaml", "model_zoo/DCNv3/config"),  # from the root
        ("tuners/sweep.yaml", "./model_zoo/DCNv3/config/"),
        ("benchmarks/sweep.yaml", "../model_zoo/DCNv3/config"),  # from the tuner file
        ("config/deep/er/sweep.yaml", "../model_zoo/DCNv3/config"),  # from FuxiCTR's folder of scripts
        ("model_zoo/DCNv3/config/sweep.yaml", None),  # where the tuner file lies
        ("model_zoo/DCNv3/config/tuner_config/sweep.yaml", None),  # and above
        ("model_zoo/DCNv3/tuners/sweep.yaml", "../config/"),
    ],
)
def test_where_base_config_is_found(repository: Any, file: str, base_config: str | None) -> None:
    sweep = repository.load(DROPOUTS, file=file, base_config=base_config)
    assert sweep.base.zoo == repository.zoo and sweep.base.root == repository.folder
    assert sweep.folder == repository.runs / "sweeps" / "sweep"
    assert [re.sub("[0-9a-f]{8}$", "", name) for name in expids(sweep)] == ["DCNv3_tiny_001_", "DCNv3_tiny_002_"]


def test_base_config_may_be_absolute_or_relative_to_here(
    repository: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = expids(repository.load(DROPOUTS))
    path = repository.tuner(DROPOUTS, base_config=str(repository.config_dir), file="../elsewhere/sweep.yaml")
    assert expids(load_sweep(path)) == names
    monkeypatch.chdir(repository.zoo)
    path = repository.tuner(DROPOUTS, base_config="config", file="../elsewhere/sweep.yaml")
    assert expids(load_sweep(path)) == names


def test_a_tuner_file_in_the_root(repository: Any) -> None:
    assert len(expids(repository.load(DROPOUTS, file="sweep.yaml", base_config="../model_zoo/DCNv3/config"))) == 2


def test_a_file_of_fuxictr(repository: Any) -> None:
    path = repository.folder / "tuners" / "DCNv3_tuner_config_01.yaml"
    path.write_text("""base_config: ../model_zoo/DCNv3/config/
base_expid: DCNv3_tiny
dataset_id: tiny_ctr

tuner_space:
    model_root: './runs/'
    feature_specs: null
    metrics: [[AUC, logloss]]
    monitor: {'AUC': 1, 'logloss': -1}
    monitor_mode: max
    num_workers: 3
    embedding_regularizer: [1.e-5, 1e-6, 'l2(1.e-4)', 0]
    net_dropout: [0, 0.1]
    batch_size: 512
    learning_rate: 1.e-3
    epochs: 100
    seed: [2019]
""")
    sweep = load_sweep(path)
    assert sweep.name == "DCNv3_tuner_config_01" and sweep.direction == "max"
    assert sweep.monitor == "validation AUC + -1 logloss" and sweep.seeds == (2019,)
    found = experiments(sweep)
    assert [(e.model_params["net_dropout"], e.training.embedding_regularizer) for e in found] == [
        *itertools.product([0, 0.1], [1e-5, 1e-6, "l2(1.e-4)", 0])
    ]  # in the order of the base configuration, as FuxiCTR counts
    assert all(e.training.metrics == ["AUC", "logloss"] and e.training.seed == 2019 for e in found)
    assert all(e.training.monitor == {"AUC": 1, "logloss": -1} and e.training.feature_specs is None for e in found)
    assert len(set(expids(sweep))) == 8


def test_scalars_and_lists_of_one_are_the_same(repository: Any) -> None:
    one = repository.load({"batch_size": 256, "net_dropout": [0.1, 0.2], "metrics": [["AUC"]], "group_id": None})
    other = repository.load({"batch_size": [256], "net_dropout": [0.1, 0.2], "metrics": [["AUC"]], "group_id": [None]})
    assert expids(one) == expids(other) and experiments(one)[0].training.batch_size == 256


def test_lists_in_lists_are_values(repository: Any) -> None:
    sweep = repository.load({"use_features": [["user_id", "item_id"], ["user_id", "device"], None]})
    found = [experiment.training.use_features for experiment in experiments(sweep)]
    assert found == [["user_id", "item_id"], ["user_id", "device"], None]


@pytest.mark.parametrize("given", ["tiny_ctr", None])
def test_a_base_that_leaves_the_dataset_open(repository: Any, given: str | None) -> None:
    repository.write_base("DCNv3_default", dataset_id="TBD")
    if given is None:
        with pytest.raises(ConfigError, match="dataset_id: unknown dataset, got 'TBD'; known: tiny_ctr"):
            repository.load(DROPOUTS, base_expid="DCNv3_default", dataset_id=None)
        return
    sweep = repository.load(DROPOUTS, base_expid="DCNv3_default", dataset_id=given)
    assert sweep.base_name == "DCNv3_tiny_ctr" and sweep.base.training.dataset_id == "tiny_ctr"
    assert all(re.fullmatch(r"DCNv3_tiny_ctr_00[12]_[0-9a-f]{8}", name) for name in expids(sweep))


def test_the_dataset_of_the_experiment_is_the_default_and_another_may_be_named(repository: Any) -> None:
    assert repository.load(DROPOUTS, dataset_id=None).base_dataset_id == "tiny_ctr"
    repository.dataset_file.write_text(repository.dataset_file.read_text().replace("tiny_ctr:", "other:"))
    sweep = repository.load(DROPOUTS, dataset_id="other")
    assert sweep.base_name == "DCNv3_tiny" and {e.training.dataset_id for e in experiments(sweep)} == {"other"}


def test_sections_written_in_place(repository: Any) -> None:
    section = load_yaml(repository.config_dir / "model_config.yaml")
    base, tiny = section["Base"], section["DCNv3_tiny"]
    names = expids(repository.load(DROPOUTS))
    keys: dict[str, Any] = {"base_config": None, "model_config": {"Base": base, "DCNv3_tiny": tiny}}
    assert expids(repository.load(DROPOUTS, **keys)) == names
    keys["model_config"] = {"DCNv3_tiny": {**base, **tiny}}
    assert expids(repository.load(DROPOUTS, **keys)) == names
    keys["dataset_config"] = load_yaml(repository.dataset_file)
    repository.dataset_file.write_text("")
    assert expids(repository.load(DROPOUTS, **keys)) == names
    # beside a folder, what is written in place wins
    keys |= {"base_config": "model_zoo/DCNv3/config", "model_config": {"X": {**base, **tiny, "batch_size": 64}}}
    sweep = repository.load(DROPOUTS, base_expid="X", **keys)
    assert sweep.base.training.batch_size == 64 and expids(sweep)[0].startswith("X_001_")


def test_sections_written_in_place_in_the_root(repository: Any) -> None:
    section = load_yaml(repository.config_dir / "model_config.yaml")
    keys = {"base_config": None, "model_config": {"X": {**section["Base"], **section["DCNv3_tiny"]}}, "base_expid": "X"}
    assert len(expids(repository.load(DROPOUTS, file="sweep.yaml", **keys))) == 2


def test_a_dataset_key_that_nothing_reads_may_have_one_value(repository: Any) -> None:
    assert len(expids(repository.load({**DROPOUTS, "data_block_size": -1}))) == 2


# Names


@pytest.mark.parametrize(
    "space",
    [
        {"min_categr_count": [12, 21, 112, 211, 121]},
        {"net_dropout": [0.12, 0.21, 0.102, 0.201]},
        {"batch_size": [128, 182, 218, 281, 812, 821]},
        {"learning_rate": [1e-3, 1e-5], "embedding_regularizer": [1e-5, 1e-3]},
        {"embedding_dim": [4, 8], "num_cross_layers": [8, 4]},
    ],
)
def test_values_with_the_same_characters_have_different_hashes(repository: Any, space: dict[str, Any]) -> None:
    found = experiments(repository.load(space))
    assert len({experiment.expid[-8:] for experiment in found}) == len(found)
    assert len({experiment.run_dir for experiment in found}) == len(found)


def test_the_hash_is_of_the_setting_not_of_its_place(repository: Any) -> None:
    first = experiments(repository.load({"net_dropout": [0.1, 0.2]}))
    second = experiments(repository.load({"net_dropout": [0.3, 0.2], "batch_size": [128]}))
    assert first[1].expid == second[1].expid == f"DCNv3_tiny_002_{first[1].config_hash[:8]}"
    # where runs are written does not change a result
    third = experiments(repository.load({"net_dropout": [0.1, 0.2], "model_root": "elsewhere", "verbose": 0}))
    assert [e.expid for e in third] == [e.expid for e in first]
    assert third[0].run_dir.is_relative_to(repository.folder / "elsewhere")


def test_more_than_999_trials(repository: Any) -> None:
    sweep = repository.load({"batch_size": {"low": 1, "high": 1200}})
    index, values = sweep.plan.get(1199)  # type: ignore[misc]
    assert sweep.experiment(index, values).expid.startswith("DCNv3_tiny_1200_")
    assert len(sweep.plan) == 1200 and sweep.plan.get(1200) is None


def test_data_of_its_own_has_a_folder_of_its_own(repository: Any) -> None:
    sweep = repository.load({"min_categr_count": [2, 12, 21], "net_dropout": [0.1, 0.2], "split_seed": 2018})
    ids = [experiment.training.dataset_id for experiment in experiments(sweep)]
    # model keys first, dataset keys last and fastest, as FuxiCTR counts
    assert ids[0] == "tiny_ctr" and ids[:3] == ids[3:] and len(set(ids)) == 3
    assert all(re.fullmatch("tiny_ctr_[0-9a-f]{8}", name) for name in ids[1:3])
    for experiment in experiments(sweep):
        assert experiment.dataset.dataset_id == experiment.training.dataset_id
        assert experiment.run_dir.parts[-3] == experiment.dataset.dataset_id
    assert [e.dataset.min_categr_count for e in experiments(sweep)] == [2, 12, 21] * 2


def test_where_data_lies_makes_no_other_data(repository: Any) -> None:
    sweep = repository.load({**DROPOUTS, "data_root": str(repository.folder / "data")})
    assert [experiment.dataset.dataset_id for experiment in experiments(sweep)] == ["tiny_ctr", "tiny_ctr"]
    assert expids(sweep) == expids(repository.load(DROPOUTS))


def test_seeds_may_be_compared(repository: Any) -> None:
    found = experiments(repository.load({"seed": [1, 2, 3]}))
    assert [experiment.training.seed for experiment in found] == [1, 2, 3]


def test_seeds_of_a_setting(repository: Any) -> None:
    sweep = repository.load({**DROPOUTS, "verbose": 0}, seeds=[7, 8])
    [first, _] = experiments(sweep)
    assert sweep.seeds == (7, 8) and first.training.seed == 7
    other = sweep.with_seed(first, 8)
    assert (other.training.seed, other.expid, other.run_dir.name) == (8, first.expid, "seed_8")
    assert repository.load(DROPOUTS).seeds == (2024,)


# Order and tags


def test_fuxictrs_order_the_last_key_fastest(repository: Any) -> None:
    space = {
        "min_categr_count": [2, 3],
        "net_dropout": [0.1, 0.2],
        "learning_rate": [0.01, 0.02],
        "group_id": ["user_id", None],
    }
    found = settings_of(repository.load(space))
    # DCNv3_tiny has learning_rate (in Base) before net_dropout, and no group_id
    keys = ["learning_rate", "net_dropout", "group_id", "min_categr_count"]
    assert [list(values) for values in found] == [keys] * 16
    assert [tuple(v.values()) for v in found] == [*itertools.product(*(space[key] for key in keys))]
    assert settings_of(repository.load(dict(reversed(space.items())))) == found


def test_num_trials_takes_the_first(repository: Any) -> None:
    space = {"net_dropout": [0.1, 0.2, 0.3], "batch_size": [64, 128]}
    assert settings_of(repository.load(space, num_trials=4)) == settings_of(repository.load(space))[:4]
    assert num_settings(repository.load(space, num_trials=40)) == 6


def test_exclusions(repository: Any) -> None:
    space = {"num_heads": [1, 2, 3], "embedding_dim": [8, 16], "learning_rate": [1e-3, 1e-2]}
    exclude = [
        {"if": {"num_heads": [3], "embedding_dim": 16}},
        {"if": {"learning_rate": {"low": 5e-3}, "num_heads": 1}},
    ]
    sweep = repository.load(space, exclude=exclude)
    found = [tuple(values.values()) for values in settings_of(sweep)]
    wanted = [
        (lr, dim, heads)
        for lr, dim, heads in itertools.product([1e-3, 1e-2], [8, 16], [1, 2, 3])
        if not (heads == 3 and dim == 16) and not (lr >= 5e-3 and heads == 1)
    ]
    assert found == wanted and [name[:14] for name in expids(sweep)][-1] == "DCNv3_tiny_008"


def test_a_tag_picks_expids_and_keeps_their_numbers(repository: Any) -> None:
    space = {"net_dropout": [0.1, 0.2, 0.3], "batch_size": [64, 128]}
    names = expids(repository.load(space))
    assert expids(repository.load(space, tag="_004_")) == [names[3]]
    tagged = repository.load(space, tag=names[1][-8:])
    assert expids(tagged) == [names[1]] and tagged.plan.get(1) is None and num_settings(tagged) == 1
    assert tagged.name == f"sweep@{names[1][-8:]}" and tagged.folder.name == tagged.name
    assert repository.load(space, tag="_004_", name="mine").name == "mine"
    assert expids(repository.load(space, tag="tiny")) == names
    drawn = repository.load(space, sampler="random", num_trials=4, tag="_003_")
    assert expids(drawn) == [expids(repository.load(space, sampler="random", num_trials=4))[2]]


def test_a_tag_beside_a_combination_that_contradicts_itself(repository: Any) -> None:
    space = {"min_learning_rate": [1e-6, 1e-3], "learning_rate": [1e-2, 1e-4]}
    assert [name[:15] for name in expids(repository.load(space, tag="_001_"))] == ["DCNv3_tiny_001_"]


# Random searches


SPACE = {
    "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
    "net_dropout": {"low": 0.0, "high": 0.5, "step": 0.1},
    "num_cross_layers": {"low": 1, "high": 4},
    "layer_norm": [True, False],
    "batch_size": 256,
}


def test_a_random_plan_is_fixed_by_its_seed_and_has_no_duplicates(repository: Any) -> None:
    found = settings_of(repository.load(SPACE, sampler="random", num_trials=30))
    assert found == settings_of(repository.load(SPACE, sampler="random", num_trials=30))
    assert found != settings_of(repository.load(SPACE, sampler="random", num_trials=30, sampler_seed=1))
    assert len({repr(values) for values in found}) == 30
    for values in found:
        assert 1e-4 <= values["learning_rate"] <= 1e-1 and values["batch_size"] == 256
        assert values["net_dropout"] in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
        assert type(values["num_cross_layers"]) is int and 1 <= values["num_cross_layers"] <= 4
        assert type(values["layer_norm"]) is bool
    assert sum(values["learning_rate"] < 10**-2.5 for values in found) in range(7, 24)  # on a log scale


def test_a_longer_random_plan_begins_as_the_shorter_one(repository: Any) -> None:
    short = repository.load(SPACE, sampler="random", num_trials=5)
    long = repository.load(SPACE, sampler="random", num_trials=12)
    assert settings_of(long)[:5] == settings_of(short) and expids(long)[:5] == expids(short)
    endless = repository.load(SPACE, sampler="random", timeout=60)
    assert settings_of(endless, 12) == settings_of(long) and num_settings(endless) == float("inf")


def test_a_random_plan_honours_exclusions(repository: Any) -> None:
    exclude = [{"if": {"num_cross_layers": [1, 4]}}, {"if": {"learning_rate": {"low": 1e-2}, "layer_norm": True}}]
    found = settings_of(repository.load(SPACE, sampler="random", num_trials=20, exclude=exclude))
    assert len(found) == 20
    assert all(v["num_cross_layers"] in (2, 3) and not (v["learning_rate"] >= 1e-2 and v["layer_norm"]) for v in found)


def test_a_random_plan_of_a_small_space_ends_when_all_is_drawn(repository: Any) -> None:
    space = {"net_dropout": [0.1, 0.2, 0.3], "layer_norm": [True, False]}
    exclude = [{"if": {"net_dropout": 0.3, "layer_norm": True}}]
    found = settings_of(repository.load(space, sampler="random", num_trials=100, exclude=exclude))
    grid = settings_of(repository.load(space, exclude=exclude))
    assert len(found) == 5 and sorted(map(repr, found)) == sorted(map(repr, grid))


def test_a_tag_that_an_endless_random_search_may_never_match(repository: Any) -> None:
    with at_most(2), pytest.raises(ConfigError, match="--tag"):
        repository.load(SPACE, sampler="random", timeout=60, tag="no such")


# What a sweep is


@pytest.mark.parametrize(
    "change",
    [
        {"tuner_space": {"net_dropout": [0.1, 0.3]}},
        {"tuner_space": {"net_dropout": [0.2, 0.1]}},
        {"tuner_space": {"net_dropout": [0.1, 0.2], "batch_size": 256}},
        {"seeds": [2024, 1]},
        {"pruner": "median"},
        {"sampler_seed": 5},
        {"exclude": [{"if": {"net_dropout": 0.2}}]},
        {"tag": "_001_"},
        {"base": {"learning_rate": 0.5}},
        {"dataset": {"min_categr_count": 4}},
    ],
)
def test_what_makes_another_sweep(repository: Any, change: dict[str, Any]) -> None:
    before = repository.load(DROPOUTS).spec()
    if "base" in change:
        repository.write_base("X", **change.pop("base"))
        change = {"base_expid": "X"}
    repository.write_dataset(**change.pop("dataset", {}))
    assert repository.load(**{"tuner_space": DROPOUTS, **change}).spec() != before


def test_what_may_change_when_a_sweep_goes_on(repository: Any) -> None:
    before = repository.load(DROPOUTS).spec()
    for change in ({"num_trials": 1}, {"timeout": 60}, {"base_config": str(repository.config_dir)}):
        assert repository.load(DROPOUTS, **change).spec() == before
    repository.write_dataset(data_root=str(repository.folder / "data"))
    repository.write_base("X", model_root="elsewhere", verbose=0, epochs=8)
    assert repository.load(DROPOUTS, base_expid="X").spec() == before


def test_another_order_of_the_trials_is_another_sweep(repository: Any) -> None:
    space = {"group_id": ["user_id", None], "checkpoint_every": None, "use_features": [None, ["user_id", "device"]]}
    one, other = repository.load(space), repository.load(dict(reversed(space.items())))
    assert settings_of(one) == settings_of(other) or one.spec() != other.spec()


@pytest.mark.parametrize(
    ("monitor", "mode", "shown"),
    [
        ("AUC", "max", "validation AUC"),
        ("logloss", "min", "validation logloss"),
        ({"AUC": 1, "logloss": 0}, "max", "validation AUC"),
        ({"AUC": 2, "logloss": -0.5}, "max", "validation 2 AUC + -0.5 logloss"),
    ],
)
def test_what_is_optimised(repository: Any, monitor: Any, mode: str, shown: str) -> None:
    sweep = repository.load({**DROPOUTS, "monitor": [monitor], "monitor_mode": mode})
    assert (sweep.monitor, sweep.direction) == (shown, mode)


def test_a_valid_size_is_a_validation_split(repository: Any) -> None:
    repository.write_dataset(valid_data=None, valid_size=0.2)
    assert len(expids(repository.load(DROPOUTS))) == 2


def test_the_experiment_of_a_setting_is_that_of_the_files(repository: Any) -> None:
    """As `run_expid.py --set` would have it."""
    sweep = repository.load({"net_dropout": [0.3], "learning_rate": [1e-5], "min_categr_count": [2]})
    [found] = experiments(sweep)
    overrides = ["net_dropout=0.3", "learning_rate=1e-05"]
    wanted = load_experiment(repository.config_dir, "DCNv3_tiny", None, overrides)
    assert found.config_hash == wanted.config_hash and found.dataset == wanted.dataset


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "model_zoo").glob("*/config/tuner_config/*.yaml")))
def test_the_shipped_tuner_files(path: Path) -> None:
    sweep = load_sweep(path, is_data_required=False)
    assert len(set(expids(sweep))) == len(sweep.plan) > 1
