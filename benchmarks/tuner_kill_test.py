# SPDX-License-Identifier: Apache-2.0
"""Kill a sweep at random, start it again with the same command, and compare its results with those of an unbroken one.

    python benchmarks/tuner_kill_test.py [--trials 40] [--kills 30] [--seed 1] [--output benchmarks/tuner_kill_test.json]

A kill is a SIGKILL of the parent, of a worker or of the fork server, at a random moment while trials run; the kills are
spread over the whole sweep. Everything happens in a temporary folder. tests/tuner/ runs a small form of it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optuna.pruners import NopPruner

from ctrbench import cli
from ctrbench.tuner.records import TrialRecord
from ctrbench.tuner.storage import JOURNAL
from ctrbench.tuner.store import Store
from ctrbench.yamlfile import dump_yaml

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_SECONDS = 240.0
# How often which process is killed.
TARGETS = {"worker": 0.45, "parent": 0.4, "fork server": 0.15}
BASE = {
    "epochs": 1, "batch_size": 512, "embedding_dim": 8, "learning_rate": 0.01, "verbose": 0, "model_root": "./runs/",
}  # fmt: skip
# A model whose trials do what their key `mood` says, with files in `place` as signals.
MODEL = '''
import fcntl, os, signal, time
from pathlib import Path
import torch
from torch import nn
from fuxictr.pytorch.models import BaseModel
from fuxictr.pytorch.layers import FeatureEmbedding


class Moody(BaseModel):
    def __init__(self, feature_map, model_id="Moody", gpu=-1, learning_rate=1e-3, embedding_dim=8, mood="fine",
                 place="", **kwargs):
        super().__init__(feature_map, model_id=model_id, gpu=gpu, **kwargs)
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.fc = nn.Sequential(nn.Dropout(0.1), nn.Linear(feature_map.sum_emb_out_dim(), 1))
        self.mood, self.place, self.steps = mood, Path(place), 0
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs):
        if self.training:
            self.steps += 1
            getattr(self, f"do_{self.mood}")()
        x = self.embedding_layer(self.get_inputs(inputs), flatten_emb=True)
        y_pred = self.output_activation(self.fc(x))
        return {"y_pred": 1 - y_pred if self.mood == "inverted" and not self.training else y_pred}

    def once(self, name):
        """True the first time that any process asks."""
        try:
            (self.place / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def wait(self, name):
        while not (self.place / name).exists():
            time.sleep(0.005)

    def do_fine(self):
        pass

    def do_inverted(self):
        pass

    def do_broken(self):
        raise LookupError("broken on purpose")

    def do_killed(self):
        with (self.place / "deaths").open("a") as stream:
            stream.write("x")
        os.kill(os.getpid(), signal.SIGKILL)

    def do_killed_once(self):
        if self.once("killed_once"):
            os.kill(os.getpid(), signal.SIGKILL)

    def do_slow(self):
        """A twentieth of a second for a step, until there is a file `hurry`."""
        if not (self.place / "hurry").exists():
            time.sleep(0.05)

    def do_stuck(self):
        """Stand still from the second epoch on, until there is a file `hurry`."""
        if self._epoch_index > 0 and not (self.place / "hurry").exists():
            (self.place / f"stuck_{os.getpid()}").touch()
            self.wait("hurry")

    def do_out_of_memory(self):
        with (self.place / "attempts").open("a") as stream:
            stream.write("x")
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    def share(self, kind):
        self.stream = (self.place / "device").open("a")
        try:
            fcntl.flock(self.stream, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def do_neighbour(self):
        """Hold the device until the other trial has run out of memory, and a while longer."""
        if self.steps == 1 and not (self.place / "ran_out").exists():
            assert self.share(fcntl.LOCK_SH)
            (self.place / "neighbour").touch()
            self.wait("ran_out")
            time.sleep(0.5)

    def do_greedy(self):
        """Run out of memory when anything else is on the device."""
        if self.steps > 1:
            return
        if not (self.place / "ran_out").exists():
            self.wait("neighbour")
        if not self.share(fcntl.LOCK_EX):
            (self.place / "ran_out").touch()
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        (self.place / "alone").touch()
'''


class Sandbox:
    """A repository of its own: the folders Moody and SDCNv3, tiny_ctr, and whatever sweeps write.

    Args:
        folder: where it is made.
        raw: train.csv, valid.csv and test.csv.
    """

    def __init__(self, folder: Path, raw: Path):
        self.folder, self.runs, self.place = folder, folder / "runs", folder / "place"
        self.place.mkdir(parents=True)
        moody = folder / "model_zoo" / "Moody"
        (moody / "src").mkdir(parents=True)
        (moody / "config").mkdir()
        (moody / "src" / "__init__.py").write_text(MODEL)
        base = {"model": "Moody", "dataset_id": "tiny_ctr", "mood": "fine", "place": str(self.place), **BASE}
        (moody / "config" / "model_config.yaml").write_text(dump_yaml({"Base": base, "Moody_test": {}}))
        ignored = shutil.ignore_patterns("__pycache__", "tuner_config")
        shutil.copytree(ROOT / "model_zoo" / "SDCNv3", folder / "model_zoo" / "SDCNv3", ignore=ignored)
        (folder / "config" / "dataset_config").mkdir(parents=True)
        shutil.copy(ROOT / "config" / "dataset_config" / "tiny_ctr.yaml", folder / "config" / "dataset_config")
        self.raw = folder / "data" / "raw" / "tiny_ctr"
        shutil.copytree(raw, self.raw)

    def tuner(self, tuner_space: dict[str, Any], name: str = "sweep", base: str = "Moody_test", **keys: Any) -> Path:
        """Write a tuner file."""
        content = {"base_config": f"model_zoo/{base.split('_')[0]}/config", "base_expid": base, **keys}
        path = self.folder / f"{name}.yaml"
        path.write_text(dump_yaml({**content, "tuner_space": tuner_space}))
        return path

    def command(self, *arguments: str, name: str = "sweep", slots: int = 2) -> list[str]:
        """The command line of a sweep."""
        words = ["tune", "--config", str(self.folder / f"{name}.yaml"), "--gpu", *["-1"] * slots, *arguments]
        return [str(Path(sys.executable).with_name("ctrbench")), *words]

    def start(self, *arguments: str, name: str = "sweep", slots: int = 2) -> Command:
        """Run a sweep in processes of its own."""
        return Command(self.command(*arguments, name=name, slots=slots), self.folder)

    def store(self, name: str = "sweep", url: str | None = None) -> Store:
        """One more process's view of a sweep."""
        folder = self.runs / "sweeps" / name
        folder.mkdir(parents=True, exist_ok=True)
        return Store(name, folder, url, "max", NopPruner())

    def records(self, name: str = "sweep", url: str | None = None) -> list[TrialRecord]:
        """What became of the trials of a sweep."""
        store = self.store(name, url)
        try:
            return store.records()
        finally:
            store.close()

    def run_dirs(self, file: str = "DONE") -> dict[str, Path]:
        """Run directories that hold a file, by `expid/seed`."""
        return {f"{p.parents[1].name}/{p.parent.name}": p.parent for p in self.runs.glob(f"*/*/seed_*/{file}")}

    def rows(self) -> Counter[str]:
        """Rows of results.csv, which every finished run adds one to, by expid."""
        path = self.runs / "results.csv"
        lines = path.read_text().splitlines() if path.exists() else []
        return Counter(line.split("[exp_id] ")[1].split(",")[0] for line in lines)


class Command:
    """A running command, a process group of its own, with what it says in a file."""

    def __init__(self, words: list[str], folder: Path):
        self.words = words
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            words, cwd=folder, stdout=self._log, stderr=self._log, start_new_session=True, env=environment
        )

    @property
    def text(self) -> str:
        """What it said so far."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode()

    def wait(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Its exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{shlex.join(self.words)} did not end:\n{self.text}") from None

    def until(self, condition: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> None:
        """Wait for something that must happen while it runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None and not condition():
                raise AssertionError(f"ended with status {self.process.returncode}:\n{self.text}")
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"waited in vain:\n{self.text}")
            time.sleep(0.005)

    def until_it_says(self, text: str) -> None:
        """Wait for a line of it."""
        self.until(lambda: text in self.text)

    def signal(self, number: int) -> None:
        """Send a signal to all of its processes, as a terminal does."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """End all of its processes at once."""
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
        self.process.wait()

    @property
    def fork_server(self) -> int | None:
        """Its fork server, if it is there."""
        return next((p for p in children(self.process.pid) if "forkserver" in command_line(p)), None)

    @property
    def workers(self) -> list[int]:
        """Its workers."""
        server = self.fork_server
        return children(server) if server else []


def children(pid: int) -> list[int]:
    """Processes that a process started."""
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def command_line(pid: int) -> str:
    """How a process was started."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def is_running(pid: int) -> bool:
    """Whether a process is there and not only waits to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def outcomes(records: list[TrialRecord]) -> dict[str, Any]:
    """What must be the same to the last digit, by expid."""
    return {
        r.expid: (
            r.state,
            r.index,
            r.values,
            r.objective,
            r.curve,
            [(s.seed, s.metrics, s.best_value, s.best_epoch, s.epochs) for s in r.seeds],
        )
        for r in records
    }


def kill_test(folder: Path, raw: Path, trials: int, kills: int, seed: int, epochs: int = 3) -> dict[str, Any]:
    """Run a sweep twice, unbroken and with kills, and check that nothing differs.

    Returns:
        The figures of the broken sweep.

    Raises:
        AssertionError: a trial is missing, was finished twice or came out otherwise.
    """
    rng = random.Random(seed)
    boxes = [Sandbox(folder / name, raw) for name in ("unbroken", "broken")]
    for box in boxes:
        rates = [round(0.004 + 0.001 * i, 3) for i in range(trials // 2)]
        box.tuner(
            {"learning_rate": rates, "deep_net_dropout": [0.1, 0.2], "epochs": epochs, "batch_size": 256},
            base="SDCNv3_tiny",
        )
    started = time.perf_counter()
    assert cli.main(boxes[0].command()[1:]) == 0
    unbroken_seconds = time.perf_counter() - started
    box, killed, restarts, started = boxes[1], Counter[str](), 0, time.perf_counter()
    command, finished = box.start(), dict[str, tuple[int, bytes]]()
    for number in range(kills):
        # Spread over the sweep, and only while there is something to kill.
        wait_for_trials(box, command, number * (trials - 3) // kills)
        time.sleep(rng.uniform(0, 0.5))
        target = rng.choices(list(TARGETS), list(TARGETS.values()))[0]
        remember(box, finished)
        while not strike(command, target, rng):
            target = "parent"
        killed[target] += 1
        if command.process.poll() is not None:
            assert command.process.returncode in (0, -signal.SIGKILL), command.text
            restarts += 1
            command = box.start()
    assert command.wait() == 0, command.text
    seconds = time.perf_counter() - started
    remember(box, finished)
    # The same trials with the same results.
    records = box.records()
    expected, found = outcomes(boxes[0].records()), outcomes(records)
    assert len(records) == len(found) == trials and {r.state for r in records} == {"complete"}
    different = {key: (expected[key], found.get(key)) for key in expected if expected[key] != found.get(key)}
    assert not different, different
    # None twice: in the store every trial was completed once, and no finished run was ever touched again.
    entries = [json.loads(line) for line in (box.runs / "sweeps" / "sweep" / JOURNAL).read_text().splitlines()]
    completed = Counter(entry["trial_id"] for entry in entries if entry["op_code"] == 6 and entry["state"] == 1)
    assert len(completed) == trials and set(completed.values()) == {1}, completed
    assert remember(box, {}) == finished and len(finished) == trials
    resumed = sum(json.loads(report)["is_resumed"] for _, report in finished.values())
    rows = box.rows()
    assert set(rows) == {record.expid for record in records}
    return {
        "trials": trials,
        "kills": sum(killed.values()),
        "killed": dict(killed),
        "restarts": restarts,
        "complete": len(records),
        "equal_to_unbroken": True,
        "runs_that_continued_from_a_checkpoint": resumed,
        "rows_of_results_csv_beyond_one_per_trial": sum(rows.values()) - trials,
        "seconds": round(seconds, 1),
        "seconds_unbroken": round(unbroken_seconds, 1),
        "seed": seed,
    }


def wait_for_trials(box: Sandbox, command: Command, finished: int) -> None:
    """Wait until so many trials are finished and this command runs one."""
    command.until(lambda: len(box.run_dirs()) >= finished and "started on" in command.text)


def strike(command: Command, target: str, rng: random.Random) -> bool:
    """Kill one of a sweep's processes; whether there was one."""
    command_pid = command.process.pid
    candidates = {"parent": [command_pid], "worker": command.workers, "fork server": [command.fork_server or 0]}[target]
    candidates = [pid for pid in candidates if pid > 0 and is_running(pid)]
    if not candidates:
        return False
    os.kill(rng.choice(candidates), signal.SIGKILL)
    if target == "parent":
        command.process.wait()  # its workers may live a moment longer; the next command has to cope with that
    return True


def remember(box: Sandbox, finished: dict[str, tuple[int, bytes]]) -> dict[str, tuple[int, bytes]]:
    """Note when each finished run was finished and what it reported; what was noted before must still be so."""
    for name, run_dir in box.run_dirs().items():
        seen = ((run_dir / "DONE").stat().st_mtime_ns, (run_dir / "report.json").read_bytes())
        assert finished.setdefault(name, seen) == seen, f"{name} was run again"
    return finished


def main() -> None:
    """Run the test in a temporary folder and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # as in the commands that are killed
    sys.path.insert(0, str(ROOT / "data"))
    from make_tiny import make_tiny_ctr

    with tempfile.TemporaryDirectory() as folder:
        make_tiny_ctr(Path(folder) / "raw")
        figures = kill_test(Path(folder), Path(folder) / "raw", arguments.trials, arguments.kills, arguments.seed)
    words = ["python", "benchmarks/tuner_kill_test.py", *sys.argv[1:]]
    text = json.dumps({"command": shlex.join(words), **figures}, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
