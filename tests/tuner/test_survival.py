# SPDX-License-Identifier: Apache-2.0
"""Sweeps that are stopped, killed and shared by machines: nothing is lost, nothing is done twice."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, load_script

from ctrbench.cli import main
from ctrbench.yamlfile import dump_yaml, load_yaml

kill_test = load_script(ROOT / "benchmarks" / "tuner_kill_test.py")
Sandbox, Command = kill_test.Sandbox, kill_test.Command


@pytest.fixture(scope="session")
def few_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_ctr with 600 rows."""
    folder = tmp_path_factory.mktemp("few") / "tiny_ctr"
    load_script(ROOT / "data" / "make_tiny.py").make_tiny_ctr(folder, rows=600)
    return folder


@pytest.fixture
def box(tmp_path: Path, few_rows: Path) -> Iterator[Any]:
    yield Sandbox(tmp_path / "box", few_rows)


@pytest.fixture
def started() -> Iterator[list[Any]]:
    """Commands that are ended with the test."""
    commands: list[Any] = []
    yield commands
    for command in commands:
        command.kill()


def evaluated(box: Any) -> int:
    """Runs that came to an evaluation."""
    return sum(path.stat().st_size > 0 for path in box.run_dirs("last.ckpt").values() for path in [path / "last.ckpt"])


# Stopping


@pytest.mark.parametrize("how", ["Ctrl-C", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_a_stopped_sweep_goes_on_from_its_checkpoints(how: str, box: Any, started: list[Any]) -> None:
    box.tuner({"mood": "slow", "learning_rate": [0.01, 0.02, 0.03], "batch_size": 64, "epochs": 20})
    command = box.start()
    started.append(command)
    command.until(lambda: evaluated(box) == 2)  # of two slots
    workers = command.workers
    if how == "Ctrl-C":
        command.signal(signal.SIGINT)  # a terminal sends it to every process
    else:
        command.process.terminate()
    assert command.wait() == 130, command.text
    assert "stopping: running trials write a checkpoint; once more to stop at once" in command.text
    assert command.text.rstrip().endswith("stopped: the same command goes on where it was")
    assert "Traceback" not in command.text and not any(map(kill_test.is_running, workers))
    assert not box.run_dirs() and len(box.run_dirs("last.ckpt")) == 2
    assert [record.state for record in box.records()] == ["waiting", "waiting"]
    steps = {name: resume_step(path) for name, path in box.run_dirs("last.ckpt").items()}
    (box.place / "hurry").touch()
    again = box.start()
    started.append(again)
    assert again.wait() == 0, again.text
    assert [record.state for record in box.records()] == ["complete"] * 3
    for name, run_dir in box.run_dirs().items():
        report = json.loads((run_dir / "report.json").read_text())
        assert report["is_resumed"] is (name in steps)
        if name in steps:
            assert f", step {steps[name]}\n" in (run_dir / "train.log").read_text()
    assert set(box.rows().values()) == {1}


def resume_step(run_dir: Path) -> int:
    """Steps in a run's checkpoint."""
    from ctrbench.checkpoint import load_checkpoint

    return int(load_checkpoint(run_dir / "last.ckpt")["progress"]["total_steps"])


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_second_signal_ends_at_once(number: int, box: Any, started: list[Any]) -> None:
    box.tuner({"mood": "stuck", "learning_rate": [0.01, 0.02], "epochs": 3})
    command = box.start()
    started.append(command)
    command.until(lambda: len(list(box.place.glob("stuck_*"))) == 2)
    workers = command.workers
    assert len(workers) == 2
    command.signal(number) if number == signal.SIGINT else command.process.send_signal(number)
    command.until_it_says("once more to stop at once")
    time.sleep(0.3)
    assert command.process.poll() is None  # it waits for the checkpoints of workers that do not hear it
    begun = time.monotonic()
    command.signal(number) if number == signal.SIGINT else command.process.send_signal(number)
    assert command.wait() == 128 + number, command.text
    assert time.monotonic() - begun < 2
    until(lambda: not any(map(kill_test.is_running, workers)))
    (box.place / "hurry").touch()
    again = box.start()
    started.append(again)
    assert again.wait() == 0, again.text
    assert [record.state for record in box.records()] == ["complete"] * 2 and set(box.rows().values()) == {1}
    assert all(json.loads((d / "report.json").read_text())["is_resumed"] for d in box.run_dirs().values())


def until(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("is_slow", [False, True], ids=["while all load", "while the fork server loads"])
def test_ctrl_c_while_the_workers_start(is_slow: bool, box: Any, started: list[Any]) -> None:
    box.tuner({"learning_rate": [0.01, 0.02]})
    command = box.start()
    started.append(command)
    command.until(lambda: command.fork_server is not None)
    server = command.fork_server
    os.kill(server, signal.SIGSTOP)  # so that it loads as long as this wants
    if is_slow:
        command.until_it_says("sweep: grid, 2 trials")
        command.until(lambda: "pipe_read" in stack(command.process.pid) or not kill_test.is_running(server))
    command.signal(signal.SIGINT)
    os.kill(server, signal.SIGCONT)
    assert command.wait() == 130, command.text
    assert "Traceback" not in command.text
    until(lambda: not kill_test.is_running(server))
    assert not box.run_dirs()
    again = box.start()
    started.append(again)
    assert again.wait() == 0, again.text


def test_a_fork_server_that_is_killed_while_it_loads(box: Any, started: list[Any]) -> None:
    box.tuner({"learning_rate": [0.01, 0.02]})
    command = box.start()
    started.append(command)
    command.until(lambda: command.fork_server is not None)
    server = command.fork_server
    os.kill(server, signal.SIGSTOP)
    command.until_it_says("sweep: grid, 2 trials")
    command.until(lambda: "pipe_read" in stack(command.process.pid))
    os.kill(server, signal.SIGKILL)
    assert command.wait() == 0, command.text


def stack(pid: int) -> str:
    """Where in the kernel a process waits."""
    try:
        return Path(f"/proc/{pid}/wchan").read_text()
    except OSError:
        return ""


# Killing


def test_workers_end_with_the_process_that_started_them(box: Any, started: list[Any]) -> None:
    box.tuner({"mood": "slow", "learning_rate": [0.01, 0.02], "batch_size": 64, "epochs": 50})
    command = box.start()
    started.append(command)
    command.until(lambda: evaluated(box) == 2)
    processes = [*command.workers, command.fork_server]
    os.kill(command.process.pid, signal.SIGKILL)
    until(lambda: not any(map(kill_test.is_running, processes)))


def test_a_killed_sweep_ends_as_an_unbroken_one(tmp_path: Path, few_rows: Path) -> None:
    figures = kill_test.kill_test(tmp_path, few_rows, trials=8, kills=5, seed=3, epochs=2)
    assert (figures["complete"], figures["kills"]) == (8, 5)


@pytest.mark.slow
def test_a_sweep_that_is_killed_thirty_times(tmp_path: Path, tiny_raw: Path) -> None:
    figures = kill_test.kill_test(tmp_path, tiny_raw, trials=40, kills=30, seed=1)
    assert (figures["complete"], figures["kills"]) == (40, 30)


# Several machines


def machines(tmp_path: Path, rows: Path, space: dict[str, Any]) -> list[Any]:
    """Two sandboxes in folders of their own, with the same tuner file."""
    boxes = [Sandbox(tmp_path / name, rows) for name in ("here", "there")]
    for box in boxes:
        # The sandboxes' signals would make the model's keys differ, and so the sweep.
        path = box.folder / "model_zoo" / "Moody" / "config" / "model_config.yaml"
        sections = load_yaml(path)
        sections["Base"]["place"] = str(boxes[0].place)
        path.write_text(dump_yaml(sections))
        box.tuner(space)
    return boxes


def check_shared(boxes: list[Any], commands: list[Any], url: str, count: int) -> None:
    """Both say the same complete result, and over both every setting was finished once."""
    records = boxes[0].records(url=url)
    assert [record.state for record in records] == ["complete"] * count
    assert [record.index for record in records] == list(range(count))
    best = [line for line in commands[0].text.splitlines() if line.startswith("best: ")]
    for command in commands:
        assert command.process.returncode == 0, command.text
        assert f"\n{count} complete\n" in command.text and best[0] in command.text
    done = [name for box in boxes for name in box.run_dirs()]
    finished = {f"{record.expid}/seed_{record.seeds[0].seed}" for record in records}
    assert set(done) == finished and len(finished) == count
    for record in records:
        [run] = record.seeds
        assert Path(run.run_dir, "DONE").exists()


def share(boxes: list[Any], url: str, started: list[Any], *arguments: str) -> list[Any]:
    """Start the sweep in both folders."""
    commands = [box.start("--storage", url, *arguments, slots=1) for box in boxes]
    started += commands
    return commands


def test_two_machines_share_a_sweep(tmp_path: Path, few_rows: Path, started: list[Any]) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    boxes = machines(tmp_path, few_rows, {"mood": "slow", "learning_rate": [0.01, 0.02, 0.03, 0.04, 0.05, 0.06]})
    run_shared(boxes, url, started, 6)


def run_shared(boxes: list[Any], url: str, started: list[Any], count: int) -> None:
    commands = share(boxes, url, started)
    for command in commands:
        assert command.wait() == 0, command.text
    check_shared(boxes, commands, url, count)
    done = [name for box in boxes for name in box.run_dirs()]
    assert len(done) == count  # none on both
    assert all(box.run_dirs() for box in boxes), "one of them did nothing"
    results = [(box.runs / "sweeps" / "sweep" / "results.csv").read_text().splitlines() for box in boxes]
    assert len(results[0]) == len(results[1]) == count + 1


def test_the_other_machine_takes_over(tmp_path: Path, few_rows: Path, started: list[Any]) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    space = {"mood": "slow", "learning_rate": [0.01, 0.02, 0.03, 0.04], "batch_size": 64, "epochs": 30}
    boxes = machines(tmp_path, few_rows, space)
    commands = share(boxes, url, started, "--stale-after", "3")
    commands[0].until(lambda: evaluated(boxes[0]) == 1)
    commands[1].until(lambda: evaluated(boxes[1]) == 1)
    commands[0].kill()
    (boxes[0].place / "hurry").touch()
    assert commands[1].wait() == 0, commands[1].text
    assert "the process that ran it is gone: it goes on here" in commands[1].text
    check_shared(boxes, commands[1:], url, 4)
    # The one that was killed, started again, shows the same.
    [again] = share(boxes[:1], url, started, "--stale-after", "3")
    assert again.wait() == 0, again.text
    assert "started on" not in again.text
    check_shared(boxes, [commands[1], again], url, 4)


def test_other_data_on_the_second_machine(tmp_path: Path, few_rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    here, there = machines(tmp_path, few_rows, {"learning_rate": [0.01, 0.02, 0.03]})
    here.tuner({"learning_rate": [0.01, 0.02, 0.03]}, num_trials=2)
    assert main(here.command("--storage", url)[1:]) == 0
    with (there.raw / "train.csv").open("a") as stream:
        stream.write((there.raw / "train.csv").read_text().splitlines()[-1] + "\n")
    capsys.readouterr()
    assert main(there.command("--storage", url)[1:]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: tiny_ctr: the data of this machine (")
    assert last.endswith("): copy the same raw files here, or start over with --fresh")
    assert [record.state for record in here.records(url=url)] == ["complete", "complete", "waiting"]
    # The first machine goes on.
    here.tuner({"learning_rate": [0.01, 0.02, 0.03]})
    assert main(here.command("--storage", url)[1:]) == 0
    assert [record.state for record in here.records(url=url)] == ["complete"] * 3
    # Another sweep of that name is refused.
    there.tuner({"learning_rate": [0.01, 0.04]})
    capsys.readouterr()
    assert main(there.command("--storage", url)[1:]) == 2
    assert "the store holds another sweep named 'sweep' (tuner_space.learning_rate was [0.01, 0.02, 0.03], is [" in (
        capsys.readouterr().err
    )
