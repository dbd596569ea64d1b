# SPDX-License-Identifier: Apache-2.0
"""What a person sees while a sweep runs: lines in a log, a table on a terminal."""

from __future__ import annotations

import io
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import make_record
from rich.console import Console
from rich.live import Live

from ctrbench.tuner.display import (
    Display,
    LiveDisplay,
    duration,
    first_line,
    make_display,
    seconds_left,
    slot_cells,
    status_line,
)
from ctrbench.tuner.engine import Job
from ctrbench.tuner.slots import Slot
from ctrbench.tuner.store import Claim

MAX = SimpleNamespace(direction="max", monitor="validation AUC")
MIN = SimpleNamespace(direction="min", monitor="validation logloss")


def make_slot(number: int = 0, gpu: int = -1, is_ready: bool = True, **job: Any) -> Slot:
    slot = Slot(number, gpu, 1, Path("workers.log"), is_ready=is_ready)
    if job:
        seeds = job.pop("seeds", [2024])
        runs = [SimpleNamespace(expid="X_001_0123abcd", training=SimpleNamespace(seed=seed)) for seed in seeds]
        slot.job, slot.since = Job(Claim(0, 0, None), 0, {}, runs, **job), time.monotonic() - 10_000  # type: ignore[arg-type]
    return slot


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (10, "10 s"),
        (59.4, "59 s"),
        (60, "1 min 00 s"),
        (119.6, "2 min 00 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (100_000, "27 h 46 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_first_line() -> None:
    assert first_line("\n one\ntwo") == "one" and first_line("") == first_line(" \n") == "no message"


def test_the_lines_of_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(MAX, [make_record(0, 0.7)]) as display:  # type: ignore[arg-type]
        display.started("X_002", "gpu 1")
        display.update(list, [], 5)
        display.completed("X_002", 0.65, 12.34, "gpu 1")
        display.completed("X_003", 0.71, 0.5, "cpu")
        display.pruned("X_004", [0.5, 0.55], 3.0)
        display.pruned("X_004", [0.5], 3.0)
        display.failed("X_005", "DataError: no rows\nmore")
        display.line("[red]anything[/red]")
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert output.out == "" and all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    assert [line[9:] for line in lines] == [
        "X_002: started on gpu 1",
        "[2/5] X_002: validation AUC 0.650000 (12.3 s on gpu 1)",
        "[3/5] X_003: validation AUC 0.710000, the best so far (0.5 s on cpu)",
        "[4/5] X_004: pruned at 0.550000 after 2 evaluations (3.0 s)",
        "[5/5] X_004: pruned at 0.500000 after 1 evaluation (3.0 s)",
        "[6/5] X_005: failed: DataError: no rows",
        "[red]anything[/red]",
    ]


def test_lower_is_better_where_it_is_and_an_open_search_has_no_total(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(MIN, [make_record(0, state="failed"), make_record(1, 0.6)])  # type: ignore[arg-type]
    display.completed("X", 0.61, 1, "cpu")
    display.completed("X", 0.59, 1, "cpu")
    assert [line[9:] for line in capsys.readouterr().err.splitlines()] == [
        "[3] X: validation logloss 0.610000 (1.0 s on cpu)",
        "[4] X: validation logloss 0.590000, the best so far (1.0 s on cpu)",
    ]


def test_the_cells_of_a_slot() -> None:
    assert slot_cells(make_slot(is_ready=False), "max") == ("cpu", "starting", "", "", "", "")
    assert slot_cells(make_slot(gpu=3), "max") == ("gpu 3", "idle", "", "", "", "")
    running = make_slot(epoch=2, curve=[0.6, 0.8, 0.7])
    assert slot_cells(running, "max") == ("cpu", "X_001_0123abcd", "2", "0.700000", "0.800000", "2 h 46 min")
    assert slot_cells(running, "min")[3:5] == ("0.700000", "0.600000")
    assert slot_cells(make_slot(epoch=0), "max")[2:5] == ("", "", "")
    assert slot_cells(make_slot(seeds=[5, 6]), "max")[1] == "X_001_0123abcd seed 5"
    assert slot_cells(make_slot(seeds=[5, 6], seed=6), "max")[1] == "X_001_0123abcd seed 6"


def test_the_seed_zero() -> None:
    assert slot_cells(make_slot(seeds=[5, 0], seed=0, epoch=1), "max")[1] == "X_001_0123abcd seed 0"


def test_seconds_left() -> None:
    now = time.time()
    done = [
        make_record(0, 0.5, started=now - 100, finished=now - 90),
        make_record(1, 0.5, started=now - 90, finished=now - 60),
    ]
    assert seconds_left([], 4, 1) is None and seconds_left(done, float("inf"), 1) is None
    assert seconds_left(done, 6, 1) == pytest.approx(80)  # four more at 20 s
    assert seconds_left(done, 6, 2) == pytest.approx(40)
    running = make_record(2, state="running", started=now - 5)
    assert seconds_left([*done, running], 6, 2) == pytest.approx(37.5, abs=0.5)
    stuck = make_record(2, state="running", started=now - 500)
    assert seconds_left([*done, stuck], 3, 1) == 0.0
    failed = make_record(3, state="failed", started=now - 2, finished=now)
    assert seconds_left([failed], 4, 1) is None and seconds_left([*done, failed], 6, 1) == pytest.approx(60)
    pruned = make_record(3, state="pruned", started=now - 30, finished=now - 10)
    assert seconds_left([*done, pruned], 3, 1) == 0


def test_the_status_line() -> None:
    now = time.time()
    records = [
        make_record(0, 0.5, started=now - 30, finished=now - 10),
        make_record(1, state="pruned", started=now - 30, finished=now - 10),
        make_record(2, state="failed"),
        make_record(3, state="running"),
        make_record(4, state="waiting"),
    ]
    text = status_line(records, 7, 2, 75)
    assert text == "3 of 7 done · 1 running · 1 pruned · 1 failed · 1 waiting · 1 min 15 s · about 40 s left"
    assert status_line([], float("inf"), 1, 0.5) == "0 done · 0 running · 0.5 s"
    # the slots of other machines count as well
    others = [*records[:1], *(make_record(i, state="running") for i in range(1, 5))]
    assert status_line(others, 9, 1, 1).endswith("about 40 s left")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def live() -> LiveDisplay:
    """A live table on a terminal that keeps what was written."""
    display = LiveDisplay(MAX, [])  # type: ignore[arg-type]
    display._console = Console(file=Terminal(), record=True, force_terminal=True, width=110, highlight=False)
    display._live = Live(console=display._console, auto_refresh=False, transient=True)
    return display


def test_the_table(live: LiveDisplay) -> None:
    slots = [
        make_slot(0, 0, epoch=3, curve=[0.61, 0.72, 0.7]),
        make_slot(1, 0, seeds=[1, 2], seed=2),
        make_slot(2, 1),
        make_slot(3, -1, is_ready=False),
    ]
    records = [make_record(0, 0.75), make_record(1, 0.8), make_record(2, state="running")]
    with live as display:
        display.update(lambda: records, slots, 12)
        display.line("12 [of] them")
        display.started("X_009", "cpu")
        display.completed("X_002_0123abcd", 0.8, 3.0, "gpu 0")
    text = live._console.export_text()
    lines = [line.rstrip() for line in text.splitlines()]
    assert re.match(r"2 of 12 done · 1 running · [\d.]+ s$", lines[0]), text
    assert lines[1].split() == ["slot", "trial", "epoch", "last", "best", "time"]
    assert re.split(" {2,}", lines[2]) == ["gpu 0", "X_001_0123abcd", "3", "0.700000", "0.720000", "2 h 46 min"]
    assert re.split(" {2,}", lines[3]) == ["gpu 0", "X_001_0123abcd seed 2", "2 h 46 min"]
    assert [re.split(" {2,}", line) for line in lines[4:6]] == [["gpu 1", "idle"], ["cpu", "starting"]]
    assert lines[6].startswith("best validation AUC 0.800000: X_002_0123abcd")
    assert "12 [of] them" in text and "X_009" not in text
    assert "[1/12] X_002_0123abcd: validation AUC 0.800000, the best so far (3.0 s on gpu 0)" in text


def test_a_table_before_any_trial_is_finished(live: LiveDisplay) -> None:
    with live as display:
        display.update(list, [make_slot()], float("inf"))
    assert "no trial is finished yet" in live._console.export_text()


def test_the_table_is_not_redrawn_at_every_turn(live: LiveDisplay) -> None:
    asked = []
    with live as display:
        for _ in range(5):
            display.update(lambda: asked.append(1) or [], [], 3)
    assert len(asked) == 1 and display.num_settings == 3


def test_which_display(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(make_display(MAX, [])) is Display  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert type(make_display(MAX, [])) is LiveDisplay  # type: ignore[arg-type]
