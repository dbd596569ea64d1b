# SPDX-License-Identifier: Apache-2.0
"""The state that processes share: who may run a setting, what is taken over, and what a store survives.

The same tests run on a journal file and on SQLite here, and on PostgreSQL in test_postgresql.py.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import StorageInternalError
from optuna.pruners import NopPruner
from optuna.storages._rdb import models
from optuna.trial import TrialState

from ctrbench.errors import ConfigError, CtrbenchError
from ctrbench.tuner import storage as storage_module
from ctrbench.tuner.records import Outcome, SeedResult
from ctrbench.tuner.storage import JOURNAL, patiently, shown_url
from ctrbench.tuner.store import SUSPECT_SECONDS, Store

DISTRIBUTION = CategoricalDistribution([8, 16])
# A process that takes part in a sweep: it waits for the file `go`, then does what it is told and prints JSON.
PROCESS = """
import json, sys, time
from pathlib import Path
from optuna.pruners import NopPruner
from ctrbench.tuner.store import SUSPECT_SECONDS, Store
what, folder, url, number = sys.argv[1], Path(sys.argv[2]), sys.argv[3] or None, int(sys.argv[4])
store = Store("s", folder, url, "max", NopPruner(), 120.0)
print("ready", flush=True)
while not (folder / "go").exists():
    time.sleep(0.002)
claimed = []
if what == "claim":
    while (claim := store.claim(number)) is not None:
        claimed.append(claim.number)
elif what == "hold":
    claimed = [store.claim(number).number]
    print(json.dumps(claimed), flush=True)
    sys.stdin.read()
elif what == "recover":
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and any(r.state != "complete" for r in store.records()):
        store.recover()
        while (claim := store.claim(number)) is not None:
            claimed.append(claim.number)
            from ctrbench.tuner.records import Outcome
            store._conclude(claim.trial_id, __import__("optuna").trial.TrialState.COMPLETE, Outcome("cpu"), 0.5)
        time.sleep(0.01)
print(json.dumps(claimed), flush=True)
store.close()
"""


def result(seed: int = 2024, value: float = 0.75) -> SeedResult:
    metrics = {"valid": {"AUC": value, "logloss": 0.5}, "test": {"AUC": value / 3, "logloss": 0.1 + 0.2}}
    return SeedResult(seed, metrics, value, 1, 2, 1.5, 0.25, 2.0, "/somewhere/seed_2024")


def outcome(value: float = 0.75) -> Outcome:
    return Outcome("cpu", [0.5, value], [result(value=value)])


def run_processes(what: str, folder: Path, url: str | None, number: int, count: int) -> list[list[int]]:
    """What each of `count` processes claimed that begin at the same moment."""
    (folder / "go").unlink(missing_ok=True)
    command = [sys.executable, "-c", PROCESS, what, str(folder), url or "", str(number)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        (folder / "go").touch()
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count
    return [json.loads(output) for output in outputs]


def states(store: Store) -> dict[int, str]:
    return {number: record.state for number, record in enumerate(store.records())}


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def looked_before(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next look of `store` show what is there now, as if it had been taken just before what comes next."""
    trials = store.trials
    answers = [copy.deepcopy(trials())]
    monkeypatch.setattr(store, "trials", lambda: answers.pop() if answers else trials())


class StoreContract:
    """What every kind of store must do. A subclass says in `url` where it is."""

    @pytest.fixture
    def url(self, tmp_path: Path) -> str | None:
        raise NotImplementedError

    @pytest.fixture
    def make(self, tmp_path: Path, url: str | None) -> Iterator[Callable[..., Store]]:
        """Makes the store of one more process."""
        made: list[Store] = []

        def new(
            host: str | None = None, folder: Path = tmp_path, stale_seconds: float = 120.0, fresh: bool = False
        ) -> Store:
            with pytest.MonkeyPatch.context() as patch:
                if host is not None:
                    patch.setattr("socket.gethostname", lambda: host)
                made.append(Store("s", folder, url, "max", NopPruner(), stale_seconds, fresh))
            return made[-1]

        yield new
        for store in made:
            store.close()

    # Claims

    def test_processes_that_claim_at_once_get_every_number_once(
        self, tmp_path: Path, url: str | None, make: Callable[..., Store]
    ) -> None:
        store = make()
        claimed = run_processes("claim", tmp_path, url, 16, 3)
        assert sorted(n for numbers in claimed for n in numbers) == list(range(16))
        assert len(store.records()) == 16 and store.claim(16) is None
        # More trials may have been made at the last moment; they are marked and do not count.
        assert all(t.user_attrs.get("surplus") for t in store.trials()[16:])

    def test_threads_that_claim_at_once_get_every_number_once(self, make: Callable[..., Store]) -> None:
        stores, claimed = [make() for _ in range(4)], list[int]()

        def claim_all(store: Store) -> None:
            while (claim := store.claim(12)) is not None:
                claimed.append(claim.number)

        threads = [threading.Thread(target=claim_all, args=(store,)) for store in stores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert sorted(claimed) == list(range(12))

    def test_the_last_setting_taken_by_two_at_once(
        self, make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = make(), make()
        looked_before(second, monkeypatch)
        assert first.claim(1) is not None
        assert second.claim(1) is None
        assert states(first) == {0: "running"} and len(first.trials()) == 2
        assert first.claim(1) is None and first.claim(2) is None  # that number was used up; `revive` brings it back
        assert first.revive(1, False) == 0
        assert first.revive(2, False) == 1 and first.revive(2, False) == 0
        claim = second.claim(2)
        assert claim is not None and claim.number == 1 and first.claim(2) is None

    def test_settings_are_claimed_in_order_and_no_more_than_there_are(self, make: Callable[..., Store]) -> None:
        store = make()
        claims = [store.claim(3) for _ in range(5)]
        assert [None if c is None else (c.number, c.values) for c in claims] == [
            (0, None), (1, None), (2, None), None, None,
        ]  # fmt: skip
        endless = store.claim(math.inf)
        assert endless is not None and endless.number == 3

    def test_a_trial_that_is_given_back_is_claimed_first_and_by_one_process(
        self, tmp_path: Path, url: str | None, make: Callable[..., Store]
    ) -> None:
        store = make()
        claims = [store.claim(6) for _ in range(3)]
        for claim in claims:
            assert claim is not None
            store.describe(claim.trial_id, claim.number, f"X_{claim.number}", {"dim": 8}, {"dim": (8, DISTRIBUTION)})
        store.release(claims[1].trial_id)  # type: ignore[union-attr]
        assert states(store) == {0: "running", 1: "waiting", 2: "running"}
        claimed = run_processes("claim", tmp_path, url, 3, 3)
        assert sorted(n for numbers in claimed for n in numbers) == [1]
        assert make().claim(3) is None and store.records()[1].values == {"dim": 8}

    def test_a_waiting_trial_keeps_its_values(self, make: Callable[..., Store]) -> None:
        first, second = make(), make()
        claim = first.claim(1)
        assert claim is not None
        first.describe(claim.trial_id, 0, "X", {"dim": 16}, {"dim": (16, DISTRIBUTION)})
        first.release(claim.trial_id)
        again = second.claim(1)
        assert again == dataclasses.replace(claim, values={"dim": 16})
        second.describe(claim.trial_id, 0, "X", {"dim": 16}, {"dim": (16, DISTRIBUTION)})  # once more does no harm
        assert first.release(claim.trial_id) is None and states(first) == {0: "running"}  # not its own any more

    # Results

    def test_a_result_comes_back_to_the_last_digit(self, make: Callable[..., Store]) -> None:
        store = make()
        claim = store.claim(1)
        assert claim is not None
        store.describe(claim.trial_id, 0, "X_001", {"dim": 8}, {"dim": (8, DISTRIBUTION)})
        value = 0.1 + 0.2
        runs = [result(1, value), result(2, 1 / 3)]
        assert store.complete(claim.trial_id, Outcome("gpu 3", [0.25, value], runs))
        [record] = make().records()
        assert (record.state, record.expid, record.values, record.device) == ("complete", "X_001", {"dim": 8}, "gpu 3")
        assert record.objective == (value + 1 / 3) / 2 and record.seeds == runs and record.curve == [0.25, value]
        assert record.started is not None and record.finished is not None and record.started <= record.finished

    def test_a_result_of_a_trial_that_was_taken_over_is_refused(self, make: Callable[..., Store]) -> None:
        lost, other = make(), make()
        claim = lost.claim(1)
        assert claim is not None
        lost._alive_lock.release()  # as if it were killed; the object lives on as a process that was only asleep
        assert other.recover() == []
        time.sleep(SUSPECT_SECONDS)
        assert other.recover() == [0]
        again = other.claim(1)
        assert again is not None and again.trial_id == claim.trial_id
        assert not lost.owns(claim.trial_id) and other.owns(claim.trial_id)
        assert not lost.complete(claim.trial_id, outcome(0.9)) and not lost.fail(claim.trial_id, Outcome("", error="x"))
        assert states(other) == {0: "running"}
        assert other.complete(claim.trial_id, outcome(0.8))
        assert not other.complete(claim.trial_id, outcome(0.7)) and not other.prune(claim.trial_id, outcome(0.7))
        assert lost.records()[0].objective == 0.8

    def test_an_evaluation_of_a_trial_that_was_taken_over_and_finished(self, make: Callable[..., Store]) -> None:
        """A process that slept, as a laptop does, goes on with a trial that is done."""
        lost, other = make(), make()
        claim = lost.claim(1)
        assert claim is not None and not lost.is_hopeless(claim.trial_id, [0.5])
        other._give_back(claim.trial_id, lost.instance)
        assert other.claim(1) is not None and other.complete(claim.trial_id, outcome(0.8))
        assert lost.is_hopeless(claim.trial_id, [0.5, 0.6])  # there is no point in going on
        assert not lost.prune(claim.trial_id, Outcome("cpu", [0.5, 0.6])) and states(lost) == {0: "complete"}

    def test_states(self, make: Callable[..., Store]) -> None:
        store = make()
        claims = [store.claim(4) for _ in range(4)]
        ids = [claim.trial_id for claim in claims if claim is not None]
        assert store.complete(ids[0], outcome()) and store.prune(ids[1], Outcome("cpu", [0.5, 0.4]))
        assert store.fail(ids[2], Outcome("cpu", [0.5], error="it broke"))
        assert states(store) == {0: "complete", 1: "pruned", 2: "failed", 3: "running"}
        assert [record.objective for record in store.records()] == [0.75, None, None, None]
        assert (store.records()[1].curve, store.records()[2].error) == ([0.5, 0.4], "it broke")

    # Processes that are gone

    def test_a_killed_owner_on_this_machine_is_noticed_and_a_living_one_left_alone(
        self, tmp_path: Path, url: str | None, make: Callable[..., Store]
    ) -> None:
        (tmp_path / "go").touch()
        command = [sys.executable, "-c", PROCESS, "hold", str(tmp_path), url or "", "2"]
        holders = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) for _ in range(2)
        ]
        try:
            held = []
            for process in holders:
                assert process.stdout is not None and process.stdout.readline() == "ready\n"
                held += json.loads(process.stdout.readline())
            store = make()
            assert [store.recover() for _ in range(3)] == [[], [], []]
            holders[0].kill()
            holders[0].wait()
            assert store.recover() == []  # the first look
            time.sleep(SUSPECT_SECONDS)
            assert store.recover() == [held[0]] and store.recover() == []
            assert states(store)[held[0]] == "waiting" and states(store)[held[1]] == "running"
            claim = store.claim(2)
            assert claim is not None and claim.number == held[0] and store.claim(2) is None
        finally:
            for process in holders:
                process.kill()

    def test_several_that_take_over_at_once_run_every_trial_once(
        self, tmp_path: Path, url: str | None, make: Callable[..., Store]
    ) -> None:
        dead = make()
        assert [dead.claim(12) is not None for _ in range(12)] == [True] * 12
        dead._alive_lock.release()
        claimed = run_processes("recover", tmp_path, url, 12, 2)
        assert {n for numbers in claimed for n in numbers} == set(range(12))
        assert set(states(make()).values()) == {"complete"} and len(make().trials()) == 12

    @pytest.mark.parametrize("where", ["another machine", "another folder of this one"])
    def test_an_owner_elsewhere_is_given_up_after_its_silence_only(
        self, where: str, tmp_path: Path, url: str | None, make: Callable[..., Store]
    ) -> None:
        if where == "another machine":
            other = make(host="elsewhere")
            other._alive_lock.release()  # which says nothing about a process on another machine
            other._alive_file(other.instance).unlink()
        elif url is None:
            pytest.skip("a journal lies in the folder")
        else:
            other = make(folder=tmp_path / "elsewhere")
        store = make(stale_seconds=1.0)
        claim = other.claim(1)
        assert claim is not None
        started = time.monotonic()
        beats = 0
        while time.monotonic() - started < 2.0:  # twice as long as its silence may last
            other.heartbeat(force=True)
            assert store.recover() == []
            beats += 1
            time.sleep(0.02)
        silent, taken = time.monotonic(), list[int]()

        def is_taken() -> bool:
            taken.extend(store.recover())
            return bool(taken)

        until(is_taken)
        assert taken == [0] and time.monotonic() - silent > 0.9
        assert states(store) == {0: "waiting"} and not other.complete(claim.trial_id, outcome())

    def test_a_heartbeat_is_cheap_when_it_was_given_lately(self, make: Callable[..., Store]) -> None:
        store = make()
        store.heartbeat()
        first = store.get(f"alive {store.instance}")
        store.heartbeat()
        assert store.get(f"alive {store.instance}") == first is not None
        store.heartbeat(force=True)
        assert store.get(f"alive {store.instance}") >= first

    def test_close_gives_the_lock_up(self, make: Callable[..., Store]) -> None:
        store = make()
        assert store._alive_file(store.instance).exists()
        store.close()
        assert not store._alive_file(store.instance).exists()

    # What a sweep agrees on

    def test_the_first_process_decides(self, make: Callable[..., Store]) -> None:
        first, second = make(), make()
        assert first.get("spec") is None
        assert first.agree("spec", {"a": [1, None, 0.1]}) == {"a": [1, None, 0.1]} == second.agree("spec", "other")
        second.set("spec", 3)
        assert first.get("spec") == 3

    def test_fresh_forgets(self, make: Callable[..., Store]) -> None:
        store = make()
        store.claim(1)
        store.agree("nonce", "")
        store.close()
        again = make(fresh=True)
        assert again.records() == [] and again.get("nonce") is None and again.claim(1) is not None

    # Trials that are run again

    def test_failed_trials_are_retried_when_asked_and_the_last_trial_counts(self, make: Callable[..., Store]) -> None:
        store = make()
        claims = [store.claim(3) for _ in range(3)]
        for claim in claims:
            assert claim is not None
            store.describe(claim.trial_id, claim.number, f"X_{claim.number}", {"dim": 8}, {"dim": (8, DISTRIBUTION)})
            if claim.number == 1:
                store.fail(claim.trial_id, Outcome("cpu", error="once"))
            else:
                store.complete(claim.trial_id, outcome())
        assert store.revive(3, False) == 0 and store.claim(3) is None
        assert store.revive(3, True) == 1
        assert store.revive(3, True) == 0  # it waits already
        assert states(store) == {0: "complete", 1: "waiting", 2: "complete"}
        again = store.claim(3)
        assert again is not None and again.number == 1 and again.values == {"dim": 8}
        assert again.trial_id != claims[1].trial_id  # type: ignore[union-attr]
        store.describe(again.trial_id, 1, "X_1", {"dim": 8}, {"dim": (8, DISTRIBUTION)})
        assert store.complete(again.trial_id, outcome(0.9)) and store.claim(3) is None
        assert [(r.expid, r.state, r.objective) for r in make().records()] == [
            ("X_0", "complete", 0.75), ("X_1", "complete", 0.9), ("X_2", "complete", 0.75),
        ]  # fmt: skip
        following = store.claim(4)
        assert following is not None and following.number == 3  # the retry took no number

    def test_settings_that_were_surplus_come_back_when_there_are_more(self, make: Callable[..., Store]) -> None:
        store = make()
        claim = store.claim(2)
        assert claim is not None
        store.discard(claim.trial_id)
        assert store.records() == [] and store.revive(math.inf, True) == 0
        assert store.revive(0, True) == 0 and store.revive(2, False) == 1
        claims = [store.claim(2), store.claim(2), store.claim(2)]
        assert [c.number for c in claims if c is not None] == [0, 1]

    def test_two_processes_that_revive_at_once_revive_once(
        self, make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = make(), make()
        claim = first.claim(1)
        assert claim is not None
        first.fail(claim.trial_id, Outcome("cpu", error="once"))
        looked_before(second, monkeypatch)
        assert first.revive(1, True) == 1
        second.revive(1, True)
        claims = [first.claim(1), second.claim(1), first.claim(1)]
        assert sum(c is not None for c in claims) == 1

    # Answers that are lost

    @pytest.mark.parametrize("method", ["create_new_trial", "set_trial_state_values"])
    def test_a_claim_whose_answer_was_lost(
        self, method: str, make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A server that stops after a commit, before its answer: the call is repeated, and its effect with it."""
        store = make()
        if method == "set_trial_state_values":
            first = store.claim(1)
            assert first is not None
            store.release(first.trial_id)
        action, failures = getattr(store.storage, method), iter([StorageInternalError("gone")])

        def lossy(*args: Any, **kwargs: Any) -> Any:
            answer = action(*args, **kwargs)
            if (failure := next(failures, None)) is not None:
                raise failure
            return answer

        monkeypatch.setattr(store.storage, method, lossy)
        claims = [claim for claim in (store.claim(1), store.claim(1)) if claim is not None]
        running = {trial._trial_id for trial in store.trials() if trial.state.name == "RUNNING"}
        # What is this process's in the store, it must know of: nobody takes it over as long as it lives.
        assert {claim.trial_id for claim in claims} == running


class TestJournal(StoreContract):
    """A file in the sweep's folder."""

    @pytest.fixture
    def url(self, tmp_path: Path) -> str | None:
        return None

    def test_an_incomplete_last_line_is_left_out(
        self, tmp_path: Path, make: Callable[..., Store], caplog: pytest.LogCaptureFixture
    ) -> None:
        store = make()
        assert store.claim(2) is not None and store.claim(2) is not None
        store.close()
        path = tmp_path / JOURNAL
        whole = path.read_bytes()
        for tail in (b'{"op_code":6,"trial', b"\0" * 100, b'{"op_code":\n', b"\0\0\n\0\0"):
            path.write_bytes(whole + tail)
            again = make()
            assert len(again.records()) == 2 and again.claim(2) is None
            assert f"{path}: its last entry was incomplete and is left out" in caplog.text
            again.claim(3)
            again.close()
            assert len(make().records()) == 3  # what was written afterwards is read
            path.write_bytes(whole)
            caplog.clear()
        # Any number of bytes of the last line.
        last = whole[:-1].rfind(b"\n") + 1
        for end in range(last, len(whole)):
            path.write_bytes(whole[:end])
            make().close()
            assert path.read_bytes()[: len(whole[:last])] == whole[:last]

    def test_damage_in_the_middle_is_one_clear_error(self, tmp_path: Path, make: Callable[..., Store]) -> None:
        make().claim(1)
        path = tmp_path / JOURNAL
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[:1], b"rubbish\n", *lines[1:]]))
        with pytest.raises(ConfigError) as caught:
            make()
        assert caught.value.problems == [f"{path}: damaged in line 2: restore it, or start over with --fresh"]

    def test_fresh_starts_over_from_a_damaged_journal(self, tmp_path: Path, make: Callable[..., Store]) -> None:
        make().claim(1)
        path = tmp_path / JOURNAL
        path.write_bytes(b"rubbish\n" + path.read_bytes())
        assert make(fresh=True).records() == []

    def test_a_writer_that_dies_within_a_line_does_not_harm_those_that_run(
        self, tmp_path: Path, make: Callable[..., Store]
    ) -> None:
        store = make()
        store.claim(3)
        with (tmp_path / JOURNAL).open("ab") as stream:
            stream.write(b'{"op_code":8,"trial_id":0,"user')  # a full disk, or a kill between two pages
        store.claim(3)
        store.claim(3)
        assert len(make().records()) == 3

    def test_seconds_that_earlier_commands_used(self, make: Callable[..., Store]) -> None:
        first = make()
        first.set(f"alive {first.instance}", 12.5)
        second = make()
        assert second.seconds_used() == 12.5
        second.heartbeat(force=True)
        assert second.seconds_used() == 12.5 and make().seconds_used() >= 12.5


class TestSqlite(StoreContract):
    """A URL, here of an SQLite file."""

    @pytest.fixture
    def url(self, tmp_path: Path) -> str | None:
        return f"sqlite:///{tmp_path / 'store.db'}"

    def test_two_that_take_a_waiting_trial_at_the_same_moment(
        self, make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """SQLite locks no rows, so that two could read that it waits before either says that it runs."""
        stores = [make(), make()]
        claim = stores[0].claim(1)
        assert claim is not None
        stores[0].release(claim.trial_id)
        trials = [store.trials()[0] for store in stores]
        both_have_read, find = threading.Barrier(2), models.TrialModel.find_or_raise_by_id

        def find_together(trial_id: int, session: Any, for_update: bool = False) -> Any:
            found = find(trial_id, session, for_update)
            if for_update:
                with suppress(threading.BrokenBarrierError):
                    both_have_read.wait(2)  # a store that locks lets only one come here
            return found

        monkeypatch.setattr(models.TrialModel, "find_or_raise_by_id", find_together)
        taken = []

        def take(store: Store, trial: Any) -> None:
            taken.append(store.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING))

        threads = [threading.Thread(target=take, args=pair) for pair in zip(stores, trials, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(taken) == [False, True]

    def test_an_empty_database_that_is_opened_by_several_at_once(self, tmp_path: Path) -> None:
        errors: list[Exception] = []
        for number in range(6):
            begin, url = threading.Barrier(4), f"sqlite:///{tmp_path / f'{number}.db'}"

            def open_it(begin: threading.Barrier = begin, url: str = url) -> None:
                begin.wait()
                try:
                    Store("s", tmp_path, url, "max", NopPruner()).close()
                except Exception as error:
                    errors.append(error)

            threads = [threading.Thread(target=open_it) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(120)
        assert errors == []

    def test_seconds_of_other_machines_do_not_count(self, make: Callable[..., Store]) -> None:
        first = make()
        first.set(f"alive {first.instance}", 12.5)
        assert make().seconds_used() == 0.0


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("store.db", "--storage store.db: not a URL: use one as postgresql+psycopg://user@host/database or sqlite:///"),
        ("nosuch://x/y", "--storage nosuch://x/y: cannot be reached: "),
        ("sqlite:////no/such/folder/x.db", "--storage sqlite:////no/such/folder/x.db: cannot be reached: "),
        (
            "postgresql+psycopg://me:secret@127.0.0.1:1/x?connect_timeout=2",
            "--storage postgresql+psycopg://me@127.0.0.1:1/x?connect_timeout=2: cannot be reached: ",
        ),
    ],
)
def test_a_store_that_cannot_be_reached(url: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Store("s", tmp_path, url, "max", NopPruner())
    [problem] = caught.value.problems
    assert problem.startswith(message) and "secret" not in problem and "\n" not in problem


def test_patiently_tries_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    errors = iter([StorageInternalError("one\ntwo"), OSError("three"), StorageInternalError("four")])

    def action() -> int:
        if (error := next(errors, None)) is not None:
            raise error
        return 7

    assert patiently(action, "here") == 7 and pauses == [0.5, 1.0, 2.0]
    assert [record.getMessage() for record in caplog.records] == [
        f"The store does not answer ({what}), trying again" for what in ("one", "three", "four")
    ]
    with pytest.raises(KeyError):
        patiently(lambda: {}["x"], "here")  # a mistake is no outage


def test_patiently_gives_up_with_the_password_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("s", tmp_path, None, "max", NopPruner())
    store.url = "postgresql+psycopg://me:secret@host:5432/sweeps"
    monkeypatch.setattr(storage_module, "PATIENCE_SECONDS", 0.2)

    def lost(*_: Any) -> None:
        raise StorageInternalError("An exception is raised") from OSError("connection refused\n\nmore")

    monkeypatch.setattr(store.storage, "get_all_trials", lambda *_, **__: lost())
    started = time.monotonic()
    with pytest.raises(CtrbenchError) as caught:
        store.trials()
    assert str(caught.value) == (
        "--storage postgresql+psycopg://me@host:5432/sweeps: lost for 0 s: connection refused: finished runs are kept; "
        "the same command goes on"
    )
    assert 0.2 < time.monotonic() - started < 30
    store.close()


def test_shown_url() -> None:
    assert (
        shown_url("postgresql://u:p@ss@h/d") == "postgresql://u@h/d" and shown_url("sqlite:///x.db") == "sqlite:///x.db"
    )
    assert shown_url(None) is None and shown_url("mysql://h/d") == "mysql://h/d"
