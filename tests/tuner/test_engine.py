# SPDX-License-Identifier: Apache-2.0
"""Sweeps of trials that fail, die, run out of memory or are given up, and what they share."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, load_script

from ctrbench.cli import main
from ctrbench.tuner import engine as engine_module

Capture = pytest.CaptureFixture[str]
Sandbox = load_script(ROOT / "benchmarks" / "tuner_kill_test.py").Sandbox


@pytest.fixture(scope="session")
def few_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_ctr with 600 rows."""
    folder = tmp_path_factory.mktemp("few") / "tiny_ctr"
    load_script(ROOT / "data" / "make_tiny.py").make_tiny_ctr(folder, rows=600)
    return folder


@pytest.fixture
def box(tmp_path: Path, few_rows: Path) -> Any:
    return Sandbox(tmp_path / "box", few_rows)


@pytest.fixture
def tune(box: Any, capsys: Capture) -> Callable[..., tuple[int, str, str]]:
    """Runs the sweep of sweep.yaml in this process; its status, stdout and stderr."""

    def run(*arguments: str, slots: int = 1) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([*box.command(*arguments, slots=slots)[1:]])
        output = capsys.readouterr()
        return status, output.out, output.err

    return run


def by_mood(box: Any) -> dict[str, Any]:
    return {record.values["mood"]: record for record in box.records()}


def test_trials_that_fail_or_die_do_not_harm_the_others(box: Any, tune: Callable[..., tuple[int, str, str]]) -> None:
    moods = ["fine", "broken", "killed", "killed_once", "unheard_of", "slow"]
    box.tuner({"mood": moods})
    status, out, err = tune(slots=2)
    assert status == 1
    found = by_mood(box)
    assert {mood: record.state for mood, record in found.items()} == {
        "fine": "complete",
        "broken": "failed",
        "killed": "failed",
        "killed_once": "complete",
        "unheard_of": "failed",
        "slow": "complete",
    }
    # An exception: its last line in the table, all of it in a file.
    broken = found["broken"]
    assert broken.error.endswith("Moody fails in epoch 1, batch 1: LookupError: broken on purpose")
    trace = (box.runs / "sweeps" / "sweep" / "errors" / f"{broken.expid}.txt").read_text()
    assert trace.startswith("Traceback (most recent call last):") and "raise LookupError" in trace
    assert (box.runs / "sweeps" / "sweep" / "errors" / f"{found['unheard_of'].expid}.txt").exists()
    # A trial that kills its worker is given up after three deaths, one that was killed once goes on.
    assert found["killed"].error == (
        "its worker died 3 times in a row (SIGKILL, perhaps the machine was out of memory)"
    )
    assert (box.place / "deaths").read_text() == "xxx"
    died = [line for line in err.splitlines() if "its worker died (SIGKILL" in line]
    assert sorted(line.split()[1] for line in died) == sorted(
        [f"{found['killed'].expid}:"] * 2 + [f"{found['killed_once'].expid}:"]
    )
    # The end names what failed, and each finished run has one row.
    assert out.startswith("3 complete, 3 failed\nbest: Moody_test_00")
    tail = err[err.index("3 failed (--retry-failed runs them again):") :].splitlines()
    assert tail[1:] == [f"  {record.expid}: {record.error}" for record in box.records() if record.state == "failed"]
    assert box.rows() == {record.expid: 1 for record in box.records() if record.state == "complete"}
    # The same command runs nothing; with --retry-failed it runs them once more.
    status, out, err = tune(slots=2)
    assert (
        status == 1 and "started on" not in err and "continued: 6 trials were finished before, 0 are run again" in err
    )
    box.tuner({"mood": moods})
    (box.folder / "model_zoo" / "Moody" / "src" / "__init__.py").write_text(
        (box.folder / "model_zoo" / "Moody" / "src" / "__init__.py")
        .read_text()
        .replace('raise LookupError("broken on purpose")', "pass")
    )
    status, out, err = tune("--retry-failed")
    assert status == 1 and out.startswith("4 complete, 2 failed\n") and by_mood(box)["broken"].state == "complete"
    assert "continued: 3 trials were finished before, 3 are run again" in err
    with (box.runs / "sweeps" / "sweep" / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["state"] for row in rows] == [record.state for record in box.records()] and len(rows) == 6


def test_a_loss_that_is_not_finite(box: Any, tune: Callable[..., tuple[int, str, str]]) -> None:
    box.tuner({"learning_rate": [0.01, 1e30], "epochs": 2, "batch_size": 64})
    status, out, err = tune(slots=2)
    assert status == 1 and out.startswith("1 complete, 1 failed\n")
    failed = box.records()[1]
    assert re.match(r"the training loss became (nan|inf) in epoch \d, batch \d+: lower learning_rate or", failed.error)
    assert f"  {failed.expid}: {failed.error}" in err.splitlines()
    assert not (box.runs / "sweeps" / "sweep" / "errors").exists()  # nothing but what it says


def test_a_trial_that_runs_out_of_memory_beside_another_is_run_alone(
    box: Any, tune: Callable[..., tuple[int, str, str]]
) -> None:
    box.tuner({"mood": ["neighbour", "greedy", "fine"]})
    status, out, err = tune(slots=2)
    assert status == 0 and out.startswith("3 complete\n"), err
    assert (box.place / "alone").exists()
    greedy = by_mood(box)["greedy"].expid
    assert err.count(f"{greedy}: out of memory on cpu: it is run once more with the device to itself") == 1
    lines = [line.split(" ", 1)[1] for line in err.splitlines()]
    second = [i for i, line in enumerate(lines) if line == f"{greedy}: started on cpu"][-1]
    done = next(i for i, line in enumerate(lines) if f"{greedy}: validation" in line)
    assert err.count(f"{greedy}: started") == 2 and not any("started" in line for line in lines[second + 1 : done])


def test_a_trial_that_never_has_enough_memory_fails_after_two_attempts(
    box: Any, tune: Callable[..., tuple[int, str, str]]
) -> None:
    box.tuner({"mood": ["out_of_memory", "fine"]})
    status, out, err = tune(slots=1)
    assert status == 1 and out.startswith("1 complete, 1 failed\n")
    # Two attempts; each goes on to look for a batch that would fit, down to one row.
    tried = len((box.place / "attempts").read_text())
    assert tried == 2 * (tried // 2) and tried // 2 in range(2, 12)
    assert "not enough memory on cpu for a batch of" in by_mood(box)["out_of_memory"].error
    assert "its worker died" not in err  # what the sweep itself ended did not die


def test_a_worker_that_cannot_start(
    box: Any, tune: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    box.tuner({"learning_rate": [0.01, 0.02]})
    monkeypatch.setattr("ctrbench.tuner.worker.main", os._exit)  # which refuses what a worker is given
    status, out, err = tune()
    assert (status, out) == (2, "")
    log = box.runs / "sweeps" / "sweep" / "workers.log"
    assert err.splitlines()[-1] == (
        f"error: the worker of slot 0 (cpu) died 3 times before it could start (exit status 1): {log} has what it said"
    )
    monkeypatch.undo()
    assert tune()[0] == 0 and [record.state for record in box.records()] == ["complete"] * 2


def test_seeds(box: Any, tune: Callable[..., tuple[int, str, str]]) -> None:
    box.tuner({"learning_rate": [0.01, 0.02], "epochs": 2}, seeds=[7, 8])
    status, _, err = tune(slots=2)
    assert status == 0 and "2 trials, 2 seeds each" in err
    for record in box.records():
        assert [run.seed for run in record.seeds] == [7, 8]
        reports = [json.loads((Path(run.run_dir) / "report.json").read_text()) for run in record.seeds]
        assert [run.metrics for run in record.seeds] == [report["metrics"] for report in reports]
        assert reports[0]["metrics"] != reports[1]["metrics"]
        assert record.objective == sum(report["best_value"] for report in reports) / 2
        first = (Path(record.seeds[0].run_dir) / "metrics.jsonl").read_text().splitlines()
        assert record.curve == [json.loads(line)["AUC"] for line in first] and len(record.curve) == 2


@pytest.mark.parametrize("pruner", [None, {"name": "median", "num_startup_trials": 9}], ids=["none", "median"])
def test_seeds_of_a_tiny_trial_are_trained_together(
    pruner: dict[str, Any] | None, box: Any, tune: Callable[..., tuple[int, str, str]]
) -> None:
    """A pruner judges a setting by its first seed, which is trained alone first."""
    box.tuner({"batch_size": [64, 4096]}, seeds=[7, 8, 9], pruner=pruner)
    status, _, err = tune()
    assert status == 0, err
    for record in box.records():
        assert [run.seed for run in record.seeds] == [7, 8, 9] and len(record.curve) == 1
        reports = {run.seed: json.loads((Path(run.run_dir) / "report.json").read_text()) for run in record.seeds}
        stacks = [report.get("stack", {}).get("seeds") for report in reports.values()]
        is_tiny = record.values["batch_size"] == 64
        together = ([7, 8, 9] if pruner is None else [8, 9]) if is_tiny else None
        assert stacks == [together if together and seed in together else None for seed in (7, 8, 9)]
        command = reports[9]["command"]
        assert ("--together" in command) is is_tiny
        if is_tiny:
            assert f" --seeds {' '.join(map(str, together))} --together stack --config runs/" in command
    assert tune()[0] == 0  # what is finished is adopted


@pytest.mark.parametrize(
    "pruner",
    [
        {"name": "median", "num_startup_trials": 2, "num_warmup_evaluations": 0},
        {"name": "successive_halving", "min_evaluations": 1, "reduction_factor": 2},
    ],
    ids=lambda pruner: pruner["name"],
)
def test_pruned_trials(pruner: dict[str, Any], box: Any, tune: Callable[..., tuple[int, str, str]]) -> None:
    # The last two are the upside down of the first two, so their validation AUC is below one half.
    box.tuner({"mood": ["fine", "inverted"], "learning_rate": [0.02, 0.021], "epochs": 4}, pruner=pruner)
    status, out, err = tune()
    assert status == 0, err
    records = box.records()
    states = [(record.values["mood"], record.state) for record in records]
    assert states[:1] == [("fine", "complete")] and set(states[2:]) == {("inverted", "pruned")}
    for record in records:
        run_dir = next(box.runs.glob(f"*/{record.expid}/seed_*"))
        told = [json.loads(line)["AUC"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert record.curve == told and (len(told) < 4) is (record.state == "pruned")
        assert (run_dir / "DONE").exists() is (record.state == "complete")
        assert (record.objective is None) is (record.state == "pruned")
    for record in records[2:]:
        count = len(record.curve)
        said = f"pruned at {record.curve[-1]:.6f} after {count} evaluation{'s' if count > 1 else ''} ("
        assert f"{record.expid}: {said}" in err
    again = tune()
    assert again[0] == 0 and "started on" not in again[2] and again[1] == out


def test_a_timeout_ends_the_sweep_and_more_time_continues_it(
    box: Any, tune: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    space = {"learning_rate": {"low": 0.001, "high": 0.1, "log": True}}
    box.tuner(space, sampler="random", timeout=2)
    monkeypatch.setattr(engine_module.Engine, "_is_over", lambda self: len(self.store.records()) >= 3)
    status, _, err = tune(slots=2)
    assert status == 0 and "random, trials for 2 s, on cpu, cpu" in err
    assert [record.state for record in box.records()] == ["complete"] * 3  # what ran was finished
    first = box.records()
    monkeypatch.undo()
    store = box.store()
    assert store.seconds_used() > 0
    store.set(f"alive {store.instance}", 100.0)  # the time is spent
    store.close()
    status, _, err = tune(slots=2)
    assert status == 0 and "started on" not in err and box.records() == first
    box.tuner(space, sampler="random", timeout=10_000, num_trials=5)
    assert tune(slots=2)[0] == 0
    records = box.records()
    assert records[:3] == first and [record.state for record in records] == ["complete"] * 5
    assert len({record.values["learning_rate"] for record in records}) == 5


def test_data_is_built_once_for_all_trials_that_share_it(box: Any, tune: Callable[..., tuple[int, str, str]]) -> None:
    box.tuner({"learning_rate": [0.01, 0.02], "min_categr_count": [1, 2]})
    assert tune(slots=2)[0] == 0
    records = box.records()
    folders = sorted(path.parent.name for path in (box.folder / "data").glob("*/manifest.json"))
    assert len(folders) == 2 and folders[0] == "tiny_ctr" and folders[1].startswith("tiny_ctr_")
    logs = {name: path.joinpath("train.log").read_text() for name, path in box.run_dirs("train.log").items()}
    assert len(logs) == 4
    for folder in folders:
        assert sum(f"Built {box.folder / 'data' / folder}: " in log for log in logs.values()) == 1
    hashes = {
        record.values["min_categr_count"]: json.loads((Path(record.seeds[0].run_dir) / "data_hash.json").read_text())
        for record in records
    }
    assert len(set(hashes.values())) == 2 == len({(r.values["min_categr_count"], len(r.seeds)) for r in records})


@pytest.mark.parametrize("is_finished", [True, False], ids=["finished", "at its last checkpoint"])
def test_a_trial_that_was_at_its_end_keeps_its_curve(
    is_finished: bool, box: Any, tune: Callable[..., tuple[int, str, str]]
) -> None:
    """A kill between the last evaluation and the store's record of it."""
    box.tuner({"learning_rate": [0.01, 0.02], "epochs": 3})
    assert tune(slots=2)[0] == 0
    before = [(record.expid, record.objective, record.seeds, record.curve) for record in box.records()]
    (box.runs / "sweeps" / "sweep" / "journal.log").unlink()
    for run_dir in box.run_dirs().values():
        if not is_finished:
            (run_dir / "DONE").unlink()
            (run_dir / "report.json").unlink()
    status, _, err = tune(slots=2)
    assert status == 0
    assert ("2 finished runs of this sweep were taken from their run directories" in err) is is_finished
    after = [(record.expid, record.objective, record.seeds, record.curve) for record in box.records()]
    assert [entry[:2] for entry in after] == [entry[:2] for entry in before]
    assert not is_finished or [entry[2] for entry in after] == [entry[2] for entry in before]
    assert [entry[3] for entry in after] == [entry[3] for entry in before]


def test_fewer_trials_than_were_begun(box: Any, tune: Callable[..., tuple[int, str, str]]) -> None:
    """num_trials may change; a trial that was interrupted and is not asked for any more must not be waited for."""
    box.tuner({"learning_rate": [0.01, 0.02, 0.03]}, num_trials=3)
    assert tune()[0] == 0
    store = box.store()
    claims = [store.claim(5), store.claim(5)]
    for claim in claims:
        store.release(claim.trial_id)
    store.close()
    assert [record.state for record in box.records()] == ["complete"] * 3 + ["waiting"] * 2
    command = box.start()
    try:
        command.until_it_says("continued: ")
        assert command.wait(60) == 0, command.text
    finally:
        command.kill()
