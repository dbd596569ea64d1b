# SPDX-License-Identifier: Apache-2.0
"""`ctrbench bench`: runs what is missing of a suite, repeats nothing finished, and goes on after whatever stopped it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest
from conftest import ROOT, load_script
from small_repository import SEEDS, SmallRepository, edit_report, report_of, reseal

from ctrbench.bench import MAX_DEATHS, Bench
from ctrbench.checkpoint import load_checkpoint
from ctrbench.cli import main, run_expid
from ctrbench.evidence import WEIGHTS, problems_of
from ctrbench.leaderboard.collect import collect
from ctrbench.leaderboard.records import Status
from ctrbench.suite import load_suite
from ctrbench.yamlfile import dump_yaml, load_yaml

kill_test = load_script(ROOT / "benchmarks" / "tuner_kill_test.py")
ALL = {f"{expid}/seed_{seed}" for expid in ("LR_tiny", "FM_tiny") for seed in SEEDS}


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw files of tiny_ctr with 600 rows."""
    folder = tmp_path_factory.mktemp("few") / "tiny_ctr"
    load_script(ROOT / "data" / "make_tiny.py").make_tiny_ctr(folder, rows=600)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, few: Path) -> SmallRepository:
    """A repository in which `ctrbench bench small` came to its end, which no test changes."""
    made = SmallRepository.make(tmp_path_factory.mktemp("bench") / "repository", few)
    made.suite()
    here = Path.cwd()
    os.chdir(made.folder)
    try:
        assert main(["bench", "small", "--gpu", "-1", "-1"]) == 0
    finally:
        os.chdir(here)
    return made


@pytest.fixture
def repository(finished: SmallRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallRepository:
    """A private copy of it, which is the working directory."""
    copied = finished.copy(tmp_path / "repository")
    monkeypatch.chdir(copied.folder)
    return copied


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `ctrbench bench` on a suite; it must end with this status. Returns what it printed, without the clock."""

    def run(status: int, suite: str = "small", *options: str) -> str:
        capsys.readouterr()
        assert main(["bench", suite, *options]) == status
        output = capsys.readouterr()
        return re.sub(r"^\d\d:\d\d:\d\d ", "", output.out, flags=re.MULTILINE) + output.err

    return run


def changed(before: dict[str, int], after: dict[str, int]) -> set[str]:
    """The runs that were finished meanwhile."""
    return {name for name, mark in after.items() if before.get(name) != mark}


# To the end


def test_a_suite_runs_to_its_end(finished: SmallRepository) -> None:
    assert set(finished.marks()) == ALL
    for name in ALL:
        run_dir = finished.runs / "tiny_ctr" / name
        report = report_of(run_dir)
        assert problems_of(run_dir, report) == [] and report["metrics"].keys() == {"valid", "test"}
        model, seed = name.split("_")[0], name.rsplit("_")[-1]
        command = f"python model_zoo/{model}/run_expid.py --expid {model}_tiny --seed {seed} --gpu -1"
        assert report["command"] == command and "sweep" not in report
    assert len(finished.ledger()) == 6 == len((finished.runs / "results.csv").read_text().splitlines())
    assert {path.name for path in (finished.runs / "suites" / "small").iterdir()} <= {"workers.log", ".lock"}
    assert {row.status for row in collect(finished.runs, load_suite("small", finished.folder)).tables[0].rows} == {
        Status.RECORDED
    }


def test_the_command_of_a_report_gives_the_same(
    repository: SmallRepository, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = repository.run_dir("FM_tiny", 2)
    before, weights = report_of(run_dir), (run_dir / WEIGHTS).read_bytes()
    words = shlex.split(before["command"])
    assert words[:2] == ["python", "model_zoo/FM/run_expid.py"]
    assert run_expid(repository.folder / "model_zoo" / "FM", words[2:]) == 0
    after = report_of(run_dir)
    assert after["metrics"] == before["metrics"] and after["config_hash"] == before["config_hash"]
    assert (run_dir / WEIGHTS).read_bytes() == weights


def test_nothing_finished_is_repeated(repository: SmallRepository, bench: Callable[..., str]) -> None:
    before = repository.marks()
    assert bench(0) == "small: 6 runs, 6 of them finished, 0 to do\n"
    assert repository.marks() == before
    shutil.rmtree(repository.run_dir("LR_tiny", 2))
    text = bench(0)
    assert text.startswith("small: 6 runs, 5 of them finished, 1 to do\n[6/6] LR_tiny, seed 2: valid AUC 0.")
    assert changed(before, repository.marks()) == {"LR_tiny/seed_2"}


def test_what_is_printed_of_a_run(
    finished: SmallRepository, repository: SmallRepository, bench: Callable[..., str]
) -> None:
    shutil.rmtree(repository.runs / "tiny_ctr" / "FM_tiny")
    lines = bench(0, "small", "--gpu", "-1", "-1").splitlines()
    assert lines[0] == "small: 6 runs, 3 of them finished, 3 to do" and len(lines) == 4
    for number, line in enumerate(sorted(lines[1:]), 4):
        found = re.fullmatch(
            r"\[(\d)/6\] FM_tiny, seed (\d): valid AUC (\S+), test AUC (\S+) \(\d+\.\d s on cpu\)", line
        )
        assert found is not None and int(found[1]) == number
        metrics = report_of(finished.run_dir("FM_tiny", int(found[2])))["metrics"]
        assert [found[3], found[4]] == [f"{metrics[s]['AUC']:.6f}" for s in ("valid", "test")]


def test_fresh_runs_all_again(repository: SmallRepository, bench: Callable[..., str]) -> None:
    before = repository.marks()
    metrics = {name: report_of(repository.runs / "tiny_ctr" / name)["metrics"] for name in ALL}
    assert bench(0, "small", "--fresh").startswith("small: 6 runs, 0 of them finished, 6 to do\n")
    assert changed(before, repository.marks()) == ALL
    assert metrics == {name: report_of(repository.runs / "tiny_ctr" / name)["metrics"] for name in ALL}
    assert len(repository.ledger()) == 12
    # the same seeds with the same results are no offence
    assert {row.status for row in collect(repository.runs).tables[0].rows} == {Status.RECORDED}


@pytest.mark.parametrize("how", ["report", "weights", "log", "curve", "no weights' hash", "damaged report"])
def test_a_run_that_was_altered_is_run_again(how: str, repository: SmallRepository, bench: Callable[..., str]) -> None:
    run_dir, before = repository.run_dir("LR_tiny", 3), repository.marks()
    if how == "report":
        edit_report(run_dir, epochs=1)
    elif how == "weights":
        shutil.copy(repository.run_dir("LR_tiny", 1) / WEIGHTS, run_dir / WEIGHTS)
    elif how == "no weights' hash":
        edit_report(run_dir, evidence={})
        reseal(run_dir)
        edit_report(run_dir, evidence=None)
    elif how == "damaged report":
        (run_dir / "report.json").write_text("{")
    else:
        with (run_dir / {"log": "train.log", "curve": "metrics.jsonl"}[how]).open("a") as stream:
            stream.write(" ")
    assert "LR_tiny, seed 3: to do\n" in bench(0, "small", "--dry-run")
    bench(0)
    assert changed(before, repository.marks()) == {"LR_tiny/seed_3"}
    assert problems_of(run_dir, report_of(run_dir)) == []
    assert "0 to do" in bench(0)


def test_what_changed_since_is_run_again(repository: SmallRepository, bench: Callable[..., str]) -> None:
    before = repository.marks()
    repository.write_section("FM", "FM_tiny", epochs=2)
    assert "3 of them finished, 3 to do" in bench(0)
    assert changed(before, repository.marks()) == {name for name in ALL if name.startswith("FM")}
    # settings that change no result
    repository.write_section("FM", "FM_tiny", verbose=0)
    assert "6 of them finished, 0 to do" in bench(0)
    # the data
    path = repository.raw / "train.csv"
    path.write_text(path.read_text().replace("\n0,", "\n1,", 1))
    before = repository.marks()
    assert "0 of them finished, 6 to do" in bench(0, "small", "--gpu", "-1", "-1")
    assert changed(before, repository.marks()) == ALL
    # data that are gone: the reports stand for what they were
    shutil.rmtree(repository.folder / "data")
    assert "6 of them finished, 0 to do" in bench(0)


def test_a_dry_run(repository: SmallRepository, bench: Callable[..., str]) -> None:
    shutil.rmtree(repository.run_dir("LR_tiny", 1))
    repository.write_section("FM", "FM_tiny", no_such_key=1)
    before = sorted(repository.folder.rglob("*"))
    lines = bench(0, "small", "--dry-run").splitlines()
    wrong = f"{repository.folder}/model_zoo/FM/config/model_config.yaml: FM_tiny.no_such_key: unknown key, got 1"
    assert lines == [
        "LR_tiny, seed 1: to do",
        f"FM_tiny, seed 1: cannot run: {wrong}",
        "LR_tiny, seed 2: finished",
        f"FM_tiny, seed 2: cannot run: {wrong}",
        "LR_tiny, seed 3: finished",
        f"FM_tiny, seed 3: cannot run: {wrong}",
    ]
    assert [p for p in sorted(repository.folder.rglob("*")) if "__pycache__" not in p.parts] == [
        p for p in before if "__pycache__" not in p.parts
    ]


# What cannot be run


def test_a_model_folder_that_does_not_import(repository: SmallRepository, bench: Callable[..., str]) -> None:
    """Its error is told, the others go on, and the same command tries it again."""
    source = repository.folder / "model_zoo" / "LR" / "src" / "LR.py"
    text = source.read_text()
    source.write_text(text.replace("from torch import Tensor\n", "from torch import Tensor\nimport no_such_module\n"))
    shutil.rmtree(repository.runs)
    text_said = bench(1)
    assert set(repository.marks()) == {name for name in ALL if name.startswith("FM")}
    assert "\nsmall: 6 runs, 0 of them finished, 3 to do\n" in text_said and "[3/6] FM_tiny, seed" in text_said
    ending = text_said[text_said.index("3 failed, the same command tries them again:\n") :].splitlines()
    for seed, line in zip(SEEDS, ending[1:], strict=True):
        assert line.startswith(f"  LR_tiny, seed {seed}: {source}:") and "No module named 'no_such_module'" in line
        assert line.removeprefix("  ").replace(": ", ": failed: ", 1) in text_said.splitlines()
    source.write_text(text)
    before = repository.marks()
    assert "3 of them finished, 3 to do" in bench(0) and not changed(before, {k: repository.marks()[k] for k in before})
    assert set(repository.marks()) == ALL


def test_an_experiment_that_is_wrong(repository: SmallRepository, bench: Callable[..., str]) -> None:
    shutil.rmtree(repository.runs)
    repository.write_section("LR", "LR_tiny", epochs=0, learning_rte=1)
    text = bench(1)
    file = f"{repository.folder}/model_zoo/LR/config/model_config.yaml"
    assert (
        f"  LR_tiny, seed 1: {file}: LR_tiny.epochs: must be greater than or equal to 1, got 0; {file}: LR_tiny.learn"
        in text
    )
    assert text.count("learning_rte: unknown key, got 1 (did you mean 'learning_rate'?)") == 6
    assert set(repository.marks()) == {name for name in ALL if name.startswith("FM")}


def test_raw_data_that_are_missing(repository: SmallRepository, bench: Callable[..., str]) -> None:
    shutil.rmtree(repository.runs)
    shutil.rmtree(repository.folder / "data")
    text = bench(1)
    assert text.startswith("LR_tiny, seed 1: failed: ") and "small: 6 runs, 0 of them finished, 0 to do\n" in text
    file = f"{repository.folder}/config/dataset_config/tiny_ctr.yaml"
    assert f"  FM_tiny, seed 3: {file}: tiny_ctr.train_data: no such file, got './data/raw/tiny_ctr/train.csv'" in text
    assert not repository.marks() and not (repository.folder / "data").exists()


def test_another_process_that_runs_the_suite(repository: SmallRepository, capsys: pytest.CaptureFixture[str]) -> None:
    folder = repository.runs / "suites" / "small"
    with filelock.FileLock(folder / ".lock"):
        assert main(["bench", "small"]) == 2
        repository.suite("other", models=["FM"])
        assert main(["bench", "other"]) == 0  # another suite
    line = f"error: {folder}: another process is running this suite: wait for it\n"
    assert capsys.readouterr().err == line
    assert main(["bench", "small"]) == 0


def test_a_folder_that_cannot_be_written(repository: SmallRepository, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(repository.runs)
    repository.runs.touch()
    assert main(["bench", "small"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {repository.runs}/suites/small: cannot be written: ") and error.count("\n") == 1


# A model that does what its experiments say


class Moods:
    """A repository with the model Moody, whose experiments Moody_<mood> do what their names say."""

    def __init__(self, folder: Path, raw: Path):
        self.repository = SmallRepository.make(folder, raw, models=())
        self.folder, self.place = folder, folder / "place"
        self.place.mkdir()
        self.zoo = folder / "model_zoo" / "Moody"
        (self.zoo / "src").mkdir(parents=True)
        (self.zoo / "config").mkdir()
        (self.zoo / "src" / "__init__.py").write_text(kill_test.MODEL)

    def suite(self, moods: dict[str, dict[str, Any]], seeds: list[int], **keys: Any) -> None:
        """Write the experiments and the suite `moody` of them."""
        base = {"model": "Moody", "dataset_id": "tiny_ctr", "place": str(self.place), **kill_test.BASE}
        content = {f"Moody_{mood}": {"mood": mood, **values} for mood, values in moods.items()}
        (self.zoo / "config" / "model_config.yaml").write_text(dump_yaml({"Base": base, **content}))
        expids = {"Moody": {"tiny_ctr": list(content)}}
        self.repository.suite("moody", **{"models": ["Moody"], "seeds": seeds, "expids": expids, **keys})

    def command(self, *gpus: str) -> Any:
        """The suite in processes of its own."""
        script = str(Path(sys.executable).with_name("ctrbench"))
        return kill_test.Command([script, "bench", "moody", "--gpu", *(gpus or ("-1", "-1"))], self.folder)

    def checkpoints(self) -> list[Path]:
        return sorted(self.repository.runs.glob("tiny_ctr/*/*/last.ckpt"))


@pytest.fixture
def moods(tmp_path: Path, few: Path, monkeypatch: pytest.MonkeyPatch) -> Moods:
    made = Moods(tmp_path / "moods", few)
    monkeypatch.chdir(made.folder)
    return made


@pytest.fixture
def started() -> Iterator[list[Any]]:
    """Commands that are ended with the test."""
    commands: list[Any] = []
    yield commands
    for command in commands:
        command.kill()


def test_a_run_that_fails(moods: Moods, bench: Callable[..., str]) -> None:
    moods.suite({"broken": {}, "fine": {}}, [1, 2])
    text = bench(1, "moody")
    assert re.search(
        r"^2 failed, the same command tries them again:\n  Moody_broken, seed 1: .*LookupError: broken on purpose\n  Moody_bro",
        text,
        re.MULTILINE,
    )
    assert set(moods.repository.marks()) == {"Moody_fine/seed_1", "Moody_fine/seed_2"}
    assert "2 of them finished, 2 to do" in bench(1, "moody")


def test_where_an_unforeseen_error_came_from(repository: SmallRepository) -> None:
    at = Bench(load_suite("small"), [-1])
    at._fail("LR_tiny, seed 2", "KeyError: 'x'", "Traceback ...\n")
    assert at.failed == {"LR_tiny, seed 2": "KeyError: 'x'"}
    assert (repository.runs / "suites" / "small" / "errors" / "LR_tiny_seed_2.txt").read_text() == "Traceback ...\n"


def test_a_worker_that_dies(moods: Moods, bench: Callable[..., str]) -> None:
    moods.suite({"killed_once": {}, "fine": {}}, [1])
    text = bench(0, "moody")
    told = "Moody_killed_once, seed 1: its worker died (SIGKILL, perhaps the machine was out of memory): it goes on"
    assert told in text and set(moods.repository.marks()) == {"Moody_killed_once/seed_1", "Moody_fine/seed_1"}


def test_a_worker_that_dies_every_time(moods: Moods, bench: Callable[..., str]) -> None:
    moods.suite({"killed": {}, "fine": {}}, [1])
    text = bench(1, "moody")
    assert (
        f"  Moody_killed, seed 1: its worker died {MAX_DEATHS} times (SIGKILL, perhaps the machine was out of me"
        in text
    )
    assert (moods.place / "deaths").read_text() == "x" * MAX_DEATHS
    assert set(moods.repository.marks()) == {"Moody_fine/seed_1"}


def test_a_device_with_too_little_memory(moods: Moods, bench: Callable[..., str]) -> None:
    """It is tried once more with the device to itself; where that does not help it has failed."""
    moods.suite({"neighbour": {}, "greedy": {}}, [1])
    text = bench(0, "moody", "--gpu", "-1", "-1")
    assert "Moody_greedy, seed 1: out of memory on cpu: it is run once more with the device to itself\n" in text
    assert (moods.place / "alone").exists() and len(moods.repository.marks()) == 2
    moods.suite({"out_of_memory": {}}, [1])
    said = "\n  Moody_out_of_memory, seed 1: not enough memory on cpu for a batch of 400 rows: lower batch_size"
    assert said in bench(1, "moody")
    # Two attempts; each goes on to look for a batch that would fit, down to one row.
    tried = len((moods.place / "attempts").read_text())
    assert tried == 2 * (tried // 2) and tried // 2 in range(2, 12)


def interrupt_when(condition: Callable[[], Any], number: int) -> None:
    """Send a signal to this process as soon as something holds."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_suite_that_is_stopped(number: int, moods: Moods, bench: Callable[..., str]) -> None:
    """Ctrl-C writes checkpoints; the same command goes on from them and repeats nothing finished."""
    moods.suite({"fine": {}, "slow": {"epochs": 3, "batch_size": 64}}, [1, 2])
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    interrupt_when(lambda: moods.checkpoints() and any("slow" in str(p) for p in moods.checkpoints()), number)
    text = bench(130, "moody")
    assert "stopping: running experiments write a checkpoint; once more to stop at once\n" in text
    assert text.endswith("stopped: the same command goes on where it was\n")
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    before = moods.repository.marks()
    assert set(before) == {"Moody_fine/seed_1"}
    [checkpoint] = [path for path in moods.checkpoints() if path.parents[1].name == "Moody_slow"]
    steps = load_checkpoint(checkpoint)["progress"]["total_steps"]
    (moods.place / "hurry").touch()
    assert "4 runs, 1 of them finished, 3 to do" in bench(0, "moody")
    after = moods.repository.marks()
    assert len(after) == 4 and changed(before, after) == set(after) - set(before)
    report = report_of(checkpoint.parent)
    assert report["is_resumed"] and f", step {steps}\n" in (checkpoint.parent / "train.log").read_text()
    assert len(moods.repository.ledger()) == 4


def test_a_second_signal_stops_at_once(moods: Moods, bench: Callable[..., str]) -> None:
    moods.suite({"stuck": {"epochs": 3}}, [1])
    interrupt_when(lambda: list(moods.place.glob("stuck_*")), signal.SIGINT)
    interrupt_when(lambda: list(moods.place.glob("stuck_*")), signal.SIGTERM)
    begun = time.monotonic()
    text = bench(130, "moody")
    assert text.count("stopping: ") == 1 and time.monotonic() - begun < 25
    (moods.place / "hurry").touch()
    assert "[1/1] Moody_stuck, seed 1: " in bench(0, "moody")


def test_killed_and_started_again(moods: Moods, started: list[Any], bench: Callable[..., str]) -> None:
    """SIGKILL of a worker, then of the parent: what was finished is not touched, the results are those of an unbroken suite."""
    moods.suite({"fine": {}, "slow": {"epochs": 5, "batch_size": 64}}, [1, 2])
    command = moods.command()
    started.append(command)
    command.until(lambda: len(moods.repository.marks()) >= 1 and len(command.workers) == 2)
    os.kill(command.workers[0], signal.SIGKILL)
    command.until_it_says("its worker died (SIGKILL")
    command.until(lambda: len(moods.repository.marks()) >= 2 and any("slow" in str(p) for p in moods.checkpoints()))
    workers, before = command.workers, moods.repository.marks()
    os.kill(command.process.pid, signal.SIGKILL)
    command.process.wait()
    deadline = time.monotonic() + 20
    while any(map(kill_test.is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(kill_test.is_running, workers))
    before = {**before, **moods.repository.marks()}
    (moods.place / "hurry").touch()
    text = bench(0, "moody", "--gpu", "-1", "-1")
    assert f"moody: 4 runs, {len(before)} of them finished, {4 - len(before)} to do\n" in text
    after = moods.repository.marks()
    assert len(after) == 4 and changed(before, after) == set(after) - set(before)
    metrics = {name: report_of(moods.repository.runs / "tiny_ctr" / name)["metrics"] for name in after}
    entries = moods.repository.ledger()
    assert {(e["expid"], e["seed"]) for e in entries} == {(f"Moody_{m}", s) for m in ("fine", "slow") for s in (1, 2)}
    # an unbroken suite
    shutil.rmtree(moods.repository.runs)
    bench(0, "moody", "--gpu", "-1", "-1")
    assert metrics == {name: report_of(moods.repository.runs / "tiny_ctr" / name)["metrics"] for name in after}


# Sweeps


def write_tuner(repository: SmallRepository, **keys: Any) -> str:
    """A tuner file of three settings of LR."""
    path = repository.folder / "tuners" / "rates.yaml"
    path.parent.mkdir(exist_ok=True)
    content = {"base_config": "model_zoo/LR/config", "base_expid": "LR_tiny", "dataset_id": "tiny_ctr"}
    path.write_text(dump_yaml({**content, "tuner_space": {"learning_rate": [0.001, 0.1, 0.01]}, **keys}))
    return "tuners/rates.yaml"


def test_a_sweep_and_its_best_setting(repository: SmallRepository, bench: Callable[..., str]) -> None:
    """The best on validation, whatever it is on test, with all seeds as a row of its own."""
    tuner = write_tuner(repository, seeds=[2])
    repository.suite("swept", models=["FM"], sweeps=[tuner])
    plan = bench(0, "swept", "--dry-run").splitlines()
    assert plan == [*(f"FM_tiny, seed {s}: finished" for s in SEEDS), "sweep rates, then its best setting with 3 seeds"]
    suite = load_suite("swept")
    assert collect(repository.runs, suite).missing == ("the best setting of the sweep rates",)
    text = bench(0, "swept", "--gpu", "-1", "-1")
    trials = {}
    for path in repository.runs.glob("tiny_ctr/LR_tiny_0*/seed_2/report.json"):
        rate = load_yaml(path.with_name("config.yaml"))["training"]["learning_rate"]
        trials[path.parents[1].name] = (rate, report_of(path.parent)["metrics"]["valid"]["AUC"])
    assert sorted(rate for rate, _ in trials.values()) == [0.001, 0.01, 0.1]
    best = max(trials, key=lambda expid: trials[expid][1])
    assert "swept: sweep rates\n" in text and "swept: 3 runs, 1 of them finished, 2 to do\n" in text
    assert {path.name for path in (repository.runs / "tiny_ctr" / best).iterdir()} == {f"seed_{s}" for s in SEEDS}
    board = collect(repository.runs, suite)
    assert {row.expid: (row.seeds, row.status) for row in board.tables[0].rows} == {
        "FM_tiny": ([1, 2, 3], Status.RECORDED),
        best: ([1, 2, 3], Status.RECORDED),
    }
    assert board.missing == ()
    for seed in SEEDS:
        report = report_of(repository.run_dir(best, seed))
        assert ("sweep" in report) is (seed == 2)
        config = f"runs/sweeps/rates/best_config --expid {best}"
        assert seed == 2 or f"--config {config} --seed {seed} --gpu -1" in report["command"]
    [row] = [row for row in board.tables[0].rows if row.expid == best]
    values = [report_of(repository.run_dir(best, s))["metrics"]["test"]["AUC"] for s in SEEDS]
    found = row.summary("test", "AUC")
    assert found is not None and found.mean == pytest.approx(statistics.fmean(values), abs=1e-15)
    # once more: nothing to do
    before = repository.marks()
    assert bench(0, "swept").count("to do") == 2 and repository.marks() == before


def test_a_sweep_with_other_seeds(repository: SmallRepository, bench: Callable[..., str]) -> None:
    """Its own seed chose the setting and does not count as left out."""
    repository.suite("swept", models=None, datasets=None, sweeps=[write_tuner(repository, seeds=[9])])
    bench(0, "swept")
    [row] = collect(repository.runs, load_suite("swept")).tables[0].rows
    assert row.seeds == [1, 2, 3] and row.problems == () and row.status is Status.RECORDED


def test_a_sweep_that_fails(repository: SmallRepository, bench: Callable[..., str]) -> None:
    """A wrong tuner file, or trials that fail, are told; the suite's other runs are finished."""
    shutil.rmtree(repository.run_dir("FM_tiny", 1))
    repository.suite("swept", models=["FM"], sweeps=[write_tuner(repository, tuner_space={"learning_rte": [1]})])
    wrong = "tuner_space.learning_rte: unknown key, got 1 (did you mean 'learning_rate'?)"
    assert wrong in bench(0, "swept", "--dry-run").splitlines()[-1]
    text = bench(1, "swept")
    assert "1 failed, the same command tries them again:\n  rates: " in text and text.rstrip().endswith(wrong)
    assert "FM_tiny/seed_1" in repository.marks()
    write_tuner(repository, tuner_space={"learning_rate": [1e30, 0.01]})
    text = bench(1, "swept")
    told = f"  rates: some of its trials failed: ctrbench tune --config {repository.folder}/tuners/rates.yaml --retry-failed\n"
    assert told in text and "swept: 3 runs, 0 of them finished, 3 to do\n" in text
    write_tuner(repository, tuner_space={"learning_rate": [1e30]})
    shutil.rmtree(repository.runs / "sweeps")
    assert "  rates: no trial of the sweep is complete\n" in bench(1, "swept")


def test_failed_cells_do_not_count_for_a_sweep(repository: SmallRepository, bench: Callable[..., str]) -> None:
    repository.write_section("FM", "FM_tiny", no_such_key=1)
    repository.suite("swept", models=["FM"], sweeps=[write_tuner(repository, tuner_space={"learning_rate": [0.01]})])
    text = bench(1, "swept")
    assert (
        "swept: 3 runs, 0 of them finished, 0 to do\n" in text
        and "swept: 3 runs, 0 of them finished, 3 to do\n" in text
    )
    assert "[3/3] LR_tiny_001_" in text and "3 failed, " in text
