# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM: a checkpoint, a message, the status of the signal, and the same weights in the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctrbench.files import sha256_of_file
from ctrbench.signals import StopRequest, TerminatedError

ROOT = Path(__file__).resolve().parents[1]
# The process signals itself after so many steps: a timer would be at the mercy of the machine's load.
PROGRAM = """
import os, signal, sys
from ctrbench import trainer
from ctrbench.cli import main
number, at, argv = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
step, count = trainer.Trainer.step, 0
def counted(self, batch):
    global count
    count += 1
    if number and count == at:
        os.kill(os.getpid(), number)
    return step(self, batch)
trainer.Trainer.step = counted
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(argv))
"""


@pytest.fixture(autouse=True)
def _default_handlers() -> Iterator[None]:
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


def run(overrides: list[str], runs: Path, number: int = 0, at: int = 0) -> subprocess.CompletedProcess[str]:
    arguments = ["run", "--expid", "DCNv3_tiny", "--set", "epochs=2", "--set", f"model_root={runs}"]
    arguments += [part for text in overrides if not text.startswith("model_root") for part in ("--set", text)]
    command = [sys.executable, "-c", PROGRAM, str(number), str(at), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_goes_on_to_the_same_weights(
    tmp_path: Path, tiny_overrides: list[str], number: int, status: int
) -> None:
    whole = run(tiny_overrides, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    stopped = run(tiny_overrides, tmp_path / "stopped", number, at=3)
    assert stopped.returncode == status
    assert "stopping after this step, with a checkpoint; once more to end at once" in stopped.stderr
    assert "stopped in epoch 1, batch 3: the same command goes on from there" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    resumed = run(tiny_overrides, tmp_path / "stopped")
    assert resumed.returncode == 0, resumed.stderr
    log = next((tmp_path / "stopped").rglob("train.log")).read_text()
    assert "Resume after epoch 0, step 3" in log
    weights = [next((tmp_path / name).rglob("best.safetensors")) for name in ("whole", "stopped")]
    assert sha256_of_file(weights[0]) == sha256_of_file(weights[1])


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, TerminatedError)])
def test_before_training_and_the_second_time_a_signal_ends_at_once(number: int, error: type[BaseException]) -> None:
    with pytest.raises(error), StopRequest():
        os.kill(os.getpid(), number)
    with pytest.raises(error), StopRequest() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop() and stop.status == 128 + number
        os.kill(os.getpid(), number)


def test_handlers_are_given_back_and_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) != before
    assert stop.signal is None and signal.getsignal(signal.SIGTERM) == before


def test_outside_the_main_thread_there_are_no_handlers() -> None:
    seen = []

    def use() -> None:
        with StopRequest() as stop:
            seen.append((stop(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [(False, signal.SIG_DFL)]
