# SPDX-License-Identifier: Apache-2.0
"""Suites: what they consist of, and how a wrong one is refused, each problem in one line."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_repository import ROOT, SmallRepository

from ctrbench.bench import describe
from ctrbench.cli import main
from ctrbench.errors import ConfigError
from ctrbench.suite import list_suites, load_suite
from ctrbench.yamlfile import dump_yaml, load_yaml

SUITES = sorted(path.stem for path in (ROOT / "config" / "suites").glob("*.yaml"))
GOOD = {"models": ["LR", "FM"], "datasets": ["tiny_ctr"], "seeds": [1, 2]}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> SmallRepository:
    """A repository without data, which no test changes but for its suites."""
    folder = tmp_path_factory.mktemp("suites")
    (folder / "raw").mkdir()
    made = SmallRepository.make(folder / "repository", folder / "raw")
    shutil.copy(ROOT / "config" / "dataset_config" / "tiny_mm.yaml", made.folder / "config" / "dataset_config")
    return made


@pytest.fixture
def refused(repository: SmallRepository, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `ctrbench bench` on a suite that must be refused; returns its lines, without the file's name."""
    monkeypatch.chdir(repository.folder)

    def run(content: Any, name: str = "wrong") -> list[str]:
        path = repository.folder / "config" / "suites" / f"{name}.yaml"
        path.write_text(content if isinstance(content, str) else dump_yaml(content))
        capsys.readouterr()
        assert main(["bench", name]) == 2
        output = capsys.readouterr()
        path.unlink()
        assert output.out == "" and not (repository.folder / "runs").exists()
        lines = output.err.splitlines()
        assert all(line.startswith(f"error: {path}: ") for line in lines), output.err
        return [line.removeprefix(f"error: {path}: ") for line in lines]

    return run


# Shipped suites


@pytest.mark.parametrize("name", SUITES)
def test_a_shipped_suite(name: str) -> None:
    suite = load_suite(name, ROOT)
    assert suite.root == ROOT and suite.name == name and suite.path == ROOT / "config" / "suites" / f"{name}.yaml"
    assert suite.config.description and all(path.is_file() for path in suite.sweeps)
    cells = list(suite.cells())
    assert len(cells) == len(suite.experiments) * len(suite.config.seeds) == len({(c.expid, c.seed) for c in cells})
    assert [cell.seed for cell in cells] == sorted((c.seed for c in cells), key=suite.config.seeds.index)
    # its first lines say how it is run
    assert f"ctrbench bench {name} --gpu " in suite.path.read_text(encoding="utf-8")


def test_the_suites_that_are_known() -> None:
    assert list_suites(ROOT) == SUITES and {"tiny", "ml_1m", "criteo_x4", "microlens_1m"} <= set(SUITES)
    tiny = load_suite("tiny", ROOT)
    folders = {path.name for path in (ROOT / "model_zoo").iterdir() if (path / "src").is_dir()}
    assert {zoo.name for zoo, _, _ in tiny.experiments} == folders  # every model
    ml_1m = load_suite("ml_1m", ROOT)
    assert ml_1m.config.seeds == [2024, 2025, 2026, 2027, 2028] and len(ml_1m.experiments) == 17
    assert {dataset for _, _, dataset in ml_1m.experiments} == {"ML_1M"}


@pytest.mark.parametrize("name", SUITES)
def test_a_dry_run_needs_no_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a copy of the repository that has neither raw nor built data; one seed of each experiment says it all."""
    for zoo in {zoo for zoo, _, _ in load_suite(name, ROOT).experiments}:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(zoo, tmp_path / "model_zoo" / zoo.name, ignore=ignored)
    shutil.copytree(ROOT / "config", tmp_path / "config")
    monkeypatch.chdir(tmp_path)
    suite = load_suite(name)
    assert suite.root == tmp_path
    one = dataclasses.replace(suite, config=suite.config.model_copy(update={"seeds": [2024]}))
    expected = [f"{expid}, seed 2024: to do" for _, expid, _ in suite.experiments]
    sweeps = [f"sweep {path.stem}, then its best setting with 1 seed" for path in suite.sweeps]
    assert describe(one) == expected + sweeps
    assert {path.name for path in tmp_path.iterdir()} == {"model_zoo", "config"}


def test_the_dry_run_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["bench", "kdd12", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    seeds = (2024, 2025, 2026, 2027, 2028)
    assert [line.split(":")[0] for line in lines] == [
        f"{m}_KDD12, seed {s}" for s in seeds for m in ("DCNv3", "SDCNv3")
    ]


# What a suite consists of


def test_cells(repository: SmallRepository) -> None:
    repository.suite("good", seeds=[7, 5])
    suite = load_suite("good", repository.folder)
    assert [(c.expid, c.dataset_id, c.seed, c.zoo.name) for c in suite.cells()] == [
        ("LR_tiny", "tiny_ctr", 7, "LR"),
        ("FM_tiny", "tiny_ctr", 7, "FM"),
        ("LR_tiny", "tiny_ctr", 5, "LR"),
        ("FM_tiny", "tiny_ctr", 5, "FM"),
    ]
    cell = next(suite.cells())
    experiment = cell.experiment(is_data_required=False)
    assert experiment.training.seed == 7 and experiment.expid == "LR_tiny"
    with pytest.raises(ConfigError, match=r"tiny_ctr\.train_data: "):
        cell.experiment()


def test_the_command_of_a_cell(repository: SmallRepository, tmp_path: Path) -> None:
    repository.suite("good")
    cell = next(load_suite("good", repository.folder).cells())
    command = "python model_zoo/LR/run_expid.py --expid LR_tiny --seed 1 --gpu -1"
    assert cell.command(repository.folder, -1) == command
    best = dataclasses.replace(cell, config_dir=repository.folder / "runs" / "sweeps" / "x" / "best_config")
    words = shlex.split(best.command(repository.folder, 0))
    assert (
        words[:4] == ["python", "model_zoo/LR/run_expid.py", "--config", "runs/sweeps/x/best_config"]
        and words[-1] == "0"
    )
    zoo = tmp_path / "Foreign Model"
    (zoo / "config").mkdir(parents=True)
    foreign = dataclasses.replace(cell, zoo=zoo, config_dir=zoo / "config")
    assert foreign.command(repository.folder, 1) == f"ctrbench run --zoo '{zoo}' --expid LR_tiny --seed 1 --gpu 1"


def test_experiments_that_are_named(repository: SmallRepository) -> None:
    repository.write_section("LR", "LR_other", learning_rate=0.02)
    repository.suite("good", expids={"LR": {"tiny_ctr": ["LR_other", "LR_tiny"]}, "FM": {"tiny_ctr": "FM_tiny"}})
    assert [e for _, e, _ in load_suite("good", repository.folder).experiments] == ["LR_other", "LR_tiny", "FM_tiny"]
    # of several on a dataset the one with the model's and the dataset's name is the default, and here there is none
    repository.suite("good")
    with pytest.raises(
        ConfigError, match=r"LR has no experiment 'LR_tiny_ctr' for tiny_ctr \(did you mean 'LR_\w+'\?\): add "
    ):
        load_suite("good", repository.folder)
    repository.write_section("LR", "LR_tiny_ctr")
    assert [e for _, e, _ in load_suite("good", repository.folder).experiments] == ["LR_tiny_ctr", "FM_tiny"]
    path = repository.folder / "model_zoo" / "LR" / "config" / "model_config.yaml"
    content = load_yaml(path)
    path.write_text(dump_yaml({k: v for k, v in content.items() if k not in ("LR_other", "LR_tiny_ctr")}))


def test_a_model_folder_elsewhere(repository: SmallRepository) -> None:
    target = repository.folder / "mine" / "LR2"
    shutil.copytree(repository.folder / "model_zoo" / "LR", target)
    repository.suite("good", models=["mine/LR2", "FM"], expids={"mine/LR2": {"tiny_ctr": "LR_tiny"}})
    suite = load_suite("good", repository.folder)
    assert [(zoo.relative_to(repository.folder).as_posix(), e) for zoo, e, _ in suite.experiments] == [
        ("mine/LR2", "LR_tiny"),
        ("model_zoo/FM", "FM_tiny"),
    ]
    repository.suite("good", models=["mine/LR2", "LR"])
    with pytest.raises(ConfigError, match=r"good\.yaml: LR_tiny on tiny_ctr is in it twice: keep one$"):
        load_suite("good", repository.folder)
    shutil.rmtree(target.parent)


def test_a_suite_that_is_a_file(repository: SmallRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(dump_yaml(GOOD))
    suite = load_suite(str(path), repository.folder / "model_zoo" / "LR")
    assert suite.name == "mine" and suite.root == repository.folder and len(list(suite.cells())) == 4
    monkeypatch.chdir(tmp_path)
    assert load_suite("mine.yaml").root == ROOT  # where there is no repository around, the one of this program


# Bad input


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"models": ["LR", "FMM"]}, r"models: no model folder, got 'FMM' \(did you mean 'FM'\?\)"),
        ({"models": ["LR", "mine/FM"]}, r"models: no model folder, got 'mine/FM'( \(did you mean 'FM'\?\))?"),
        ({"models": ["LR", "LR"]}, r"models: 'LR' is in it twice: keep one"),
        ({"models": ["LR", "model_zoo/LR"]}, r"LR_tiny on tiny_ctr is in it twice: keep one"),
        ({"models": "LR"}, r"models: must be a list, got 'LR'"),
        ({"models": [""]}, r"models: must not be empty, got ''"),
        ({"models": []}, r"it needs models and datasets, or sweeps"),
        ({"datasets": []}, r"it needs models and datasets, or sweeps"),
        ({"datasets": ["tiny_crt"]}, r"datasets: unknown dataset, got 'tiny_crt' \(did you mean 'tiny_ctr'\?\)"),
        (
            {"datasets": ["tiny_ctr", "tiny_mm"]},
            r"datasets: none of the models has an experiment on it: leave it out, got 'tiny_mm'",
        ),
        (
            {"expids": {"LR": {"tiny_ctr": "LR_tyny"}}},
            r"LR has no experiment 'LR_tyny' for tiny_ctr \(did you mean 'LR_tiny'\?\): add it to LR/config, or name another one "
            r"under expids",
        ),
        (
            {"expids": {"LR": {"tiny_ctr": ["LR_tiny", "LR_ML_1M"]}}},
            r"LR has no experiment 'LR_ML_1M' for tiny_ctr: add it to LR/config, or name another one under expids",
        ),
        ({"expids": {"LR": {"tiny_ctr": ["LR_tiny", "LR_tiny"]}}}, r"LR_tiny on tiny_ctr is in it twice: keep one"),
        ({"expids": {"LRR": {"tiny_ctr": "LR_tiny"}}}, r"expids\.LRR: not one of the models \(did you mean 'LR'\?\)"),
        (
            {"expids": {"LR": {"tiny_crt": "LR_tiny"}}},
            r"expids\.LR\.tiny_crt: not one of the datasets \(did you mean 'tiny_ctr'\?\)",
        ),
        ({"expids": {"LR": {"tiny_ctr": []}}}, r"expids: must not be empty, got \[\]"),
        ({"expids": {"LR": {"tiny_ctr": 5}}}, r"expids: must be a string or a list, got 5"),
        ({"expids": {"LR": None}}, r"expids: must be a dictionary, got None"),
        ({"modles": ["LR"]}, r"modles: unknown key, got \['LR'\] \(did you mean 'models'\?\)"),
        ({"seeds": [1, 2, 1]}, r"seeds: 1 is in it twice: keep one"),
        ({"seeds": []}, r"seeds: must not be empty, got \[\]"),
        ({"seeds": None}, r"seeds: missing, this key is required"),
        ({"seeds": 5}, r"seeds: must be a list, got 5"),
        ({"seeds": [-1]}, r"seeds: must be greater than or equal to 0, got -1"),
        ({"seeds": [2**32]}, r"seeds: must be less than 4294967296, got 4294967296"),
        ({"seeds": ["a"]}, r"seeds: must be an integer, got 'a'"),
        ({"seeds": [True]}, r"seeds: must be an integer, got True"),
        ({"sweeps": ["tuner/x.yaml"]}, r"sweeps: no such file, got 'tuner/x\.yaml'"),
    ],
)
def test_a_suite_that_is_wrong(refused: Callable[..., list[str]], changes: dict[str, Any], told: str) -> None:
    content = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    [line] = refused(content)
    assert re.fullmatch(told, line), line


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("models: [LR", "line 1: "),
        ("- a", "must hold a mapping of sections, got list"),
        ("seeds: [1]\nseeds: [2]", "line 2: duplicate key 'seeds'"),
        ("", "seeds: missing, this key is required"),
    ],
)
def test_a_file_that_is_none(refused: Callable[..., list[str]], content: str, told: str) -> None:
    [line] = refused(content)
    assert line.startswith(told)


def test_all_that_is_wrong_is_told_at_once(refused: Callable[..., list[str]]) -> None:
    lines = refused({"models": ["LRR", "FM"], "datasets": ["tiny_ctr", "no"], "seeds": [1, 1], "sweeps": ["x", "y"]})
    assert [line.split(":")[0] for line in lines] == ["seeds", "sweeps", "sweeps", "datasets", "models"]


def test_a_suite_that_does_not_exist(
    repository: SmallRepository, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository.folder)
    repository.suite("small")
    monkeypatch.setattr("ctrbench.tuner.slots.preload", lambda: None)
    for name, near in (("smal", " (did you mean 'small'?)"), ("/tmp", ""), ("", "")):
        assert main(["bench", name, "--dry-run"]) == 2
        known = ", ".join(list_suites(repository.folder))
        assert capsys.readouterr().err == f"error: {name}: no such suite{near}; known: {known}\n"
    assert main(["bench", "small", "--gpu", "99"]) == 2
    assert capsys.readouterr().err.startswith("error: --gpu 99: no such GPU, this machine has ")
