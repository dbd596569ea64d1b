# SPDX-License-Identifier: Apache-2.0
"""The state of a sweep in an Optuna study, which any number of processes share.

Every setting has one number. A process claims a number either by creating the study's next trial, which a store counts
atomically, or by setting a waiting trial to running, which succeeds for one process only. A trial whose owner is gone is
set back to waiting. Finished trials are never touched again, so a sweep that is killed anywhere goes on where it was.
"""

from __future__ import annotations

import dataclasses
import math
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import filelock
import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from ctrbench.errors import ConfigError, CtrbenchError
from ctrbench.tuner.records import Claim, Outcome, SeedResult, TrialRecord, objective_of
from ctrbench.tuner.storage import JOURNAL, first_line, open_storage, patiently, shown_url

T = TypeVar("T")
# A process on another machine says that it lives this often, and counts as gone when it was silent for so long.
HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 120.0
# An owner must have been gone for so long: longer than it takes a new one to say its name.
SUSPECT_SECONDS = 2.0
_STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


class Store:
    """One process's view of the shared state.

    Args:
        name: of the study.
        folder: of the sweep on this machine.
        url: of any Optuna storage; by default a journal file in `folder`.
        direction: max or min.
        pruner: decides by the curves of the other trials.
        stale_seconds: silence after which a process on another machine counts as gone.
        fresh: forget what an earlier sweep of this name left.

    Raises:
        ConfigError: the store cannot be reached.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        url: str | None,
        direction: str,
        pruner: optuna.pruners.BasePruner,
        stale_seconds: float = STALE_SECONDS,
        fresh: bool = False,
    ):
        self.url, self.folder, self.stale_seconds = url, folder, stale_seconds
        self.instance = f"{socket.gethostname()}/{uuid.uuid4().hex[:12]}"
        self._started = time.monotonic()
        self._last_heartbeat = -1e9
        self._seen: dict[str, tuple[Any, float]] = {}
        self._mine: set[int] = set()
        self._suspects: dict[tuple[int, str], float] = {}
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            self.storage: BaseStorage = open_storage(url, folder, fresh)
            if fresh and name in {study.study_name for study in self.storage.get_all_studies()}:
                optuna.delete_study(study_name=name, storage=self.storage)
            self.study = optuna.create_study(
                storage=self.storage,
                study_name=name,
                direction="maximize" if direction == "max" else "minimize",
                pruner=pruner,
                load_if_exists=True,
            )
        except CtrbenchError:
            raise
        except Exception as error:  # every driver has errors of its own
            raise ConfigError(f"--storage {shown_url(url)}: cannot be reached: {first_line(error)}") from error
        self.study_id = self.storage.get_study_id_from_name(name)
        self._alive_lock = filelock.FileLock(self._alive_file(self.instance))
        self._alive_lock.acquire()

    def close(self) -> None:
        """Give up the claim to be alive. The file stays if it has to tell others that this process is gone."""
        self._alive_lock.release()
        try:
            trials = self.storage.get_all_trials(self.study_id, deepcopy=False)
        except Exception:  # a store that is lost has been reported
            return
        if not any(trial.state == TrialState.RUNNING and _owner(trial) == self.instance for trial in trials):
            self._alive_file(self.instance).unlink(missing_ok=True)

    def agree(self, key: str, value: Any) -> Any:
        """The study's value of `key`: what the first process said, which is this one if there is none yet."""
        known = self._attributes()
        if key not in known:
            self._do(self.study.set_user_attr, key, value)
            known = self._attributes()  # another process may have said something else at the same moment
        return known[key]

    def get(self, key: str) -> Any:
        """The study's value of `key`, or None."""
        return self._attributes().get(key)

    def set(self, key: str, value: Any) -> None:
        """Set the study's value of `key`."""
        self._do(self.study.set_user_attr, key, value)

    def heartbeat(self, force: bool = False) -> None:
        """Tell the others that this process lives; cheap when it was told lately."""
        now = time.monotonic()
        if force or now - self._last_heartbeat >= min(HEARTBEAT_SECONDS, self.stale_seconds / 4):
            self._last_heartbeat = now
            self.set(f"alive {self.instance}", round(now - self._started, 3))

    def seconds_used(self) -> float:
        """Seconds that earlier commands spent on this sweep in this folder, for its timeout."""
        mine = f"alive {self.instance}"
        attributes = self._attributes()
        spent = [v for k, v in attributes.items() if k.startswith("alive ") and k != mine]
        return float(sum(spent)) if self.url is None else 0.0

    def trials(self) -> list[FrozenTrial]:
        """All trials of the study, by number of creation."""
        return self._do(self.storage.get_all_trials, self.study_id, deepcopy=False)

    def claim(self, num_settings: float) -> Claim | None:
        """Take a setting that nobody runs: an interrupted one first, else the next new one; None when there is none."""
        trials = self.trials()
        done: set[int] = set()  # numbers that an earlier trial runs or has finished
        for trial, number in _numbered(trials):
            is_lost = trial.state == TrialState.RUNNING and _owner(trial) == self.instance
            if is_lost and trial._trial_id not in self._mine:
                # The store took a claim, but its answer did not come through.
                return self._claimed(trial._trial_id, number, _values(trial))
            if trial.state == TrialState.WAITING and number < num_settings and self._take(trial):
                if number not in done:
                    return self._claimed(trial._trial_id, number, _values(trial))
                self.discard(trial._trial_id)  # two processes asked for the same retry
            elif trial.state != TrialState.FAIL:
                done.add(number)
        if _num_settings(trials) >= num_settings:
            return None
        template = create_trial(state=TrialState.RUNNING, user_attrs=self._place())
        trial_id = self._do(self.storage.create_new_trial, self.study_id, template)
        number = next(n for trial, n in _numbered(self.trials()) if trial._trial_id == trial_id)
        if number >= num_settings:  # another process took the last one at the same moment
            self.discard(trial_id)
            return None
        return self._claimed(trial_id, number, None)

    def _claimed(self, trial_id: int, number: int, values: dict[str, Any] | None) -> Claim:
        self._mine.add(trial_id)
        return Claim(trial_id, number, values)

    def _take(self, trial: FrozenTrial) -> bool:
        try:
            taken = self._do(self.storage.set_trial_state_values, trial._trial_id, TrialState.RUNNING)
        except UpdateFinishedTrialError:
            return False
        if taken:
            for key, value in self._place().items():
                self._set(trial._trial_id, key, value)
        return bool(taken) and self.owns(trial._trial_id)

    def owns(self, trial_id: int) -> bool:
        """Whether a trial is still this process's to run."""
        trial = self._do(self.storage.get_trial, trial_id)
        return trial.state == TrialState.RUNNING and _owner(trial) == self.instance

    def release(self, trial_id: int) -> None:
        """Give a running trial back, for this or another process to go on with."""
        self._mine.discard(trial_id)
        self._give_back(trial_id, self.instance)

    def recover(self) -> list[int]:
        """Give back the trials of processes that are gone; their numbers.

        A trial is given back when its owner was gone at an earlier look too, so that one that has just changed hands,
        and does not yet name its new owner, is left alone.
        """
        now, given_back = time.monotonic(), []
        running = [t for t in self.trials() if t.state == TrialState.RUNNING]
        owners = {_owner(trial) for trial in running}
        gone = {owner for owner in owners if owner != self.instance and self._is_gone(owner)}
        orphans = {(trial._trial_id, _owner(trial)): trial for trial in running if _owner(trial) in gone}
        self._suspects = {key: self._suspects.get(key, now) for key in orphans}
        for (trial_id, owner), since in self._suspects.items():
            if now - since >= SUSPECT_SECONDS and self._give_back(trial_id, owner):
                given_back.append(orphans[trial_id, owner].number)
        return given_back

    def _give_back(self, trial_id: int, owner: str) -> bool:
        """Set a trial to waiting, if it still is its owner's to run."""
        trial = self._do(self.storage.get_trial, trial_id)
        if trial.state != TrialState.RUNNING or _owner(trial) != owner:
            return False
        try:
            self._do(self.storage.set_trial_state_values, trial_id, TrialState.WAITING)
        except UpdateFinishedTrialError:
            return False
        return True

    def _is_gone(self, owner: str) -> bool:
        """Whether a process is known to have ended: by its lock on this machine, by its silence on another."""
        path = self._alive_file(owner)
        if owner.split("/")[0] == socket.gethostname() and path.exists():
            try:
                with filelock.FileLock(path, timeout=0):
                    return True
            except filelock.Timeout:
                return False
        beat = self.get(f"alive {owner}")
        last, since = self._seen.get(owner, (None, 0.0))
        if owner not in self._seen or beat != last:
            self._seen[owner] = (beat, time.monotonic())
            return False
        return time.monotonic() - since > self.stale_seconds

    def describe(
        self,
        trial_id: int,
        index: int,
        expid: str,
        values: dict[str, Any],
        sampled: Mapping[str, tuple[Any, BaseDistribution]],
    ) -> None:
        """Record what a claimed trial is: its experiment, its values, and the same in Optuna's form."""
        known = self._do(self.storage.get_trial, trial_id)
        for key, (value, distribution) in sampled.items():
            if key not in known.params:
                internal = distribution.to_internal_repr(value)
                self._do(self.storage.set_trial_param, trial_id, key, internal, distribution)
        setting = {"index": index, "expid": expid, "values": values}
        if known.user_attrs.get("setting") != setting:
            self._set(trial_id, "setting", setting)

    def is_hopeless(self, trial_id: int, curve: list[float]) -> bool:
        """Record the curve so far and ask the pruner whether to give the trial up; also one that another process has now."""
        if not self.owns(trial_id):
            return True
        self._record_curve(trial_id, curve)
        trial = self._do(self.storage.get_trial, trial_id)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bool(self._do(self.study.pruner.prune, self.study, trial))

    def complete(self, trial_id: int, outcome: Outcome) -> bool:
        """Record a finished trial; False if it is no longer this process's."""
        return self._conclude(trial_id, TrialState.COMPLETE, outcome, objective_of(outcome.seeds))

    def prune(self, trial_id: int, outcome: Outcome) -> bool:
        """Record a trial that was given up."""
        return self._conclude(trial_id, TrialState.PRUNED, outcome, outcome.curve[-1])

    def fail(self, trial_id: int, outcome: Outcome) -> bool:
        """Record a trial that failed."""
        return self._conclude(trial_id, TrialState.FAIL, outcome, None)

    def discard(self, trial_id: int) -> None:
        """Forget a claim for which there is no setting."""
        self._set(trial_id, "surplus", True)
        self._finish(trial_id, TrialState.FAIL)

    def revive(self, num_settings: float, is_failed_retried: bool) -> int:
        """Let settings be run that were discarded but are asked for now, and once more those that failed; their count."""
        by_number: dict[int, list[FrozenTrial]] = {}
        for trial, number in _numbered(self.trials()):
            by_number.setdefault(number, []).append(trial)
        revived = 0
        for number, trials in by_number.items():
            last = next((trial for trial in reversed(trials) if not trial.user_attrs.get("surplus")), None)
            is_wanted = num_settings < math.inf if last is None else last.state == TrialState.FAIL and is_failed_retried
            if is_wanted and number < num_settings:
                setting = {key: value for key, value in trials[0].user_attrs.items() if key == "setting"}
                template = create_trial(state=TrialState.WAITING, user_attrs={**setting, "retry_of": number})
                self._do(self.storage.create_new_trial, self.study_id, template)
                revived += 1
        return revived

    def _conclude(self, trial_id: int, state: TrialState, outcome: Outcome, value: float | None) -> bool:
        if not self.owns(trial_id):
            return False
        self._set(trial_id, "result", {**dataclasses.asdict(outcome), "finished": time.time()})
        return self._finish(trial_id, state, None if value is None else [value])

    def _record_curve(self, trial_id: int, curve: list[float]) -> None:
        known = self._do(self.storage.get_trial, trial_id).intermediate_values
        for step, value in enumerate(curve, 1):  # the first rung of successive halving is evaluation 1
            if step not in known:
                self._do(self.storage.set_trial_intermediate_value, trial_id, step, value)

    def _finish(self, trial_id: int, state: TrialState, values: list[float] | None = None) -> bool:
        try:
            self._do(self.storage.set_trial_state_values, trial_id, state, values)
        except UpdateFinishedTrialError:
            return False
        return True

    def has_unfinished(self, num_settings: float) -> bool:
        """Whether a setting that is asked for runs somewhere, or waits to be run."""
        unfinished = (TrialState.RUNNING, TrialState.WAITING)
        return any(t.state in unfinished and number < num_settings for t, number in _numbered(self.trials()))

    def records(self) -> list[TrialRecord]:
        """The settings that were claimed so far, by number; of a setting that was retried, its last trial."""
        by_number: dict[int, FrozenTrial] = {}
        for trial, number in _numbered(self.trials()):
            if not trial.user_attrs.get("surplus"):
                by_number[number] = trial
        return [_record(number, trial) for number, trial in sorted(by_number.items())]

    def _place(self) -> dict[str, Any]:
        return {"owner": self.instance, "host": socket.gethostname(), "started": time.time()}

    def _set(self, trial_id: int, key: str, value: Any) -> None:
        self._do(self.storage.set_trial_user_attr, trial_id, key, value)

    def _alive_file(self, instance: str) -> Path:
        folder = self.folder / "alive"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{instance.split('/')[1]}.lock"

    def _attributes(self) -> dict[str, Any]:
        found: dict[str, Any] = self._do(lambda: self.study.user_attrs)
        return found

    def _do(self, action: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call something of the storage, again and again while it cannot be reached."""
        return patiently(lambda: action(*args, **kwargs), shown_url(self.url) or str(self.folder / JOURNAL))


def _numbered(trials: list[FrozenTrial]) -> list[tuple[FrozenTrial, int]]:
    """Each trial with the number of its setting: its rank among those that are no retries."""
    numbered, following = [], 0
    for trial in sorted(trials, key=lambda trial: trial.number):
        retried = trial.user_attrs.get("retry_of")
        if retried is None:
            numbered.append((trial, following))
            following += 1
        else:
            numbered.append((trial, int(retried)))
    return numbered


def _num_settings(trials: list[FrozenTrial]) -> int:
    return sum("retry_of" not in trial.user_attrs for trial in trials)


def _owner(trial: FrozenTrial) -> str:
    return str(trial.user_attrs.get("owner"))


def _values(trial: FrozenTrial) -> dict[str, Any] | None:
    setting = trial.user_attrs.get("setting")
    return None if setting is None else dict(setting["values"])


def _record(number: int, trial: FrozenTrial) -> TrialRecord:
    attributes = trial.user_attrs
    setting, result = attributes.get("setting", {}), attributes.get("result", {})
    curve = [value for _, value in sorted(trial.intermediate_values.items())]
    return TrialRecord(
        index=setting.get("index", number),
        expid=setting.get("expid", ""),
        state=_STATES[trial.state],
        values=dict(setting.get("values", {})),
        objective=trial.value if trial.state == TrialState.COMPLETE else None,
        curve=result.get("curve") or curve,
        seeds=[SeedResult(**seed) for seed in result.get("seeds", [])],
        error=result.get("error"),
        host=attributes.get("host", ""),
        device=result.get("device", ""),
        started=attributes.get("started"),
        finished=result.get("finished"),
    )
