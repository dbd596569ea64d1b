# SPDX-License-Identifier: Apache-2.0
"""Fill the disk at random points of a build, a run and a sweep: what is finished stays, the message names the disk, and the
same command goes on once there is room.

Where the system lets a process have a file system of its own (Linux with user namespaces), the disk is a small tmpfs that
really is full, for every library. Elsewhere, or with `is_real=False`, the calls that put a file on disk fail from a random one on.
"""

from __future__ import annotations

import ctypes
import errno
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from soak_kills import make_raw, result_of, unfinished_files
from soak_outcome import CONTEXT, ROOT, Outcome, one_line, timed

STAGES = ("build", "train", "sweep")
PATIENCE = 540.0
_ROOM = 64 << 20
_NEWNS, _NEWUSER, _REMOUNT, _PRIVATE = 0x20000, 0x10000000, 32, 1 << 18 | 1 << 14


def soak(count: int, seed: int, folder: Path, is_real: bool = True, stages: tuple[str, ...] = STAGES) -> Outcome:
    """Fill the disk so many times, in turn of each stage.

    Args:
        count: how many.
        seed: of the points.
        folder: an empty one.
        is_real: whether to try for a file system of its own.
        stages: which of build, train and sweep.
    """
    outcome = Outcome("full disks", "nothing finished is lost, the message names the disk, the same command goes on")
    with timed(outcome):
        make_raw(folder / "raw", rows=600)
        receiver, sender = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_fill_all, args=(folder, count, seed, is_real, stages, sender))
        process.start()
        sender.close()
        try:
            while receiver.poll(PATIENCE):
                message = receiver.recv()
                if isinstance(message, str):
                    outcome.notes.append(message)
                else:
                    outcome.add(*message)
        except EOFError:
            pass
        process.kill()
        process.join()
        for number in range(outcome.count, count):
            outcome.add("failed", f"point {number}: the process ended or hung (status {process.exitcode})")
    return outcome


def _fill_all(folder: Path, count: int, seed: int, is_real: bool, stages: tuple[str, ...], sender: Any) -> None:
    import torch

    from ctrbench.tuner import storage

    torch.set_num_threads(1)
    storage.PATIENCE_SECONDS = 1.0  # a store that is lost for good
    is_real = is_real and _own_mounts()
    sender.send("a tmpfs that is full" if is_real else "calls that put a file on disk fail from a random one on")
    disks = {True: _Tmpfs, False: _Failing}
    place = folder / "disk"
    place.mkdir()
    needed: dict[str, int] = {}
    for number in range(count):
        stage, dice = stages[number % len(stages)], random.Random(seed * 1009 + number)
        try:
            if stage not in needed:
                needed[stage] = _measure(stage, folder, place, disks[is_real])
            how, failure = _fill_once(stage, folder, place, disks[is_real], dice, needed[stage])
        except BaseException as error:
            how, failure = "failed", one_line(error)
        sender.send((f"{stage}: {how}", failure and f"point {number} ({stage}): {failure}"))
    sender.close()


def _measure(stage: str, folder: Path, place: Path, disk_type: type[Any]) -> int:
    """What a stage takes of a disk in all."""
    with disk_type(place) as disk:
        _setup(stage, folder, place)
        disk.limit(None)
        before = disk.used()
        status, text = _command(stage, folder, place)
        assert status == 0, text
        return int(disk.used() - before)


def _fill_once(
    stage: str, folder: Path, place: Path, disk_type: type[Any], dice: random.Random, needed: int
) -> tuple[str, str | None]:
    with disk_type(place) as disk:
        _setup(stage, folder, place)
        disk.limit(dice.random() * needed)
        status, text = _command(stage, folder, place)
        if found := unfinished_files(place / "runs"):
            return "failed", f"after the failure: {found}"
        if "Traceback" in text:
            return "failed", f"a traceback: {text[-600:]!r}"
        if status != 0 and not any(word in text for word in ("the disk is full", "No space left")):
            return "failed", f"the message does not name the disk (status {status}): {text[-400:]!r}"
        finished = _finished(place)
        disk.limit(None)
        again, text_again = _command(stage, folder, place, "--retry-failed" if stage == "sweep" else "")
        if again != 0:
            return "failed", f"the same command with room ends with status {again}: {text_again[-400:]!r}"
        lost = [name for name, mark in finished.items() if _finished(place).get(name) != mark]
        if lost and (stage == "sweep" or status != 0):
            return "failed", f"finished and lost or repeated: {', '.join(lost)}"
        if stage == "train":
            result_of(place / "runs")
        return ("stopped, then went on" if status else "there was room enough"), None


def _setup(stage: str, folder: Path, place: Path) -> None:
    """A repository; for training and sweeps with the data built."""
    ignored = shutil.ignore_patterns("__pycache__", "tuner_config")
    (place / "config" / "dataset_config").mkdir(parents=True)
    shutil.copytree(ROOT / "model_zoo" / "LR", place / "model_zoo" / "LR", ignore=ignored)
    shutil.copy(ROOT / "config" / "dataset_config" / "tiny_ctr.yaml", place / "config" / "dataset_config")
    if stage != "build":
        if not (folder / "built").exists():
            _command("build", folder, place)
            shutil.copytree(place / "data", folder / "built")
        else:
            shutil.copytree(folder / "built", place / "data")
        shutil.rmtree(place / "runs", ignore_errors=True)


def _command(stage: str, folder: Path, place: Path, flag: str = "") -> tuple[int, str]:
    """A stage's command, in this process; status and output."""
    from ctrbench.cli import main

    files = {f"{split}_data": str(folder / "raw" / "tiny_ctr" / f"{split}.csv") for split in ("train", "valid", "test")}
    if stage == "sweep":
        from ctrbench.yamlfile import dump_yaml, load_yaml

        section = load_yaml(ROOT / "config" / "dataset_config" / "tiny_ctr.yaml")["tiny_ctr"]
        keys = {
            "base_config": str(place / "model_zoo" / "LR" / "config"),
            "base_expid": "LR_tiny",
            "dataset_id": "tiny_ctr",
        }
        space = {"learning_rate": [0.01, 0.02, 0.03, 0.04], "epochs": [2], "verbose": [0]}
        tuner = folder / "sweep.yaml"
        tuner.write_text(dump_yaml({**keys, "tuner_space": space}))
        (place / "config" / "dataset_config" / "tiny_ctr.yaml").write_text(
            dump_yaml({"tiny_ctr": {**section, **files}})
        )
        words = ["tune", "--config", str(tuner), "--zoo", str(place / "model_zoo" / "LR"), *([flag] if flag else [])]
    else:
        values = [f"{key}={value}" for key, value in files.items()]
        values += [f"model_root={place / 'runs'}", f"data_root={place / 'data'}", "verbose=0", "epochs=3"]
        words = ["run", "--zoo", str(place / "model_zoo" / "LR"), "--expid", "LR_tiny"]
        words += [word for value in values for word in ("--set", value)]
    text = io.StringIO()
    with redirect_stdout(text), redirect_stderr(text):
        status = main(words)
    return status, text.getvalue()


def _finished(place: Path) -> dict[str, str]:
    """What is finished, and what would show that it was done again."""
    found = {str(path.relative_to(place)): path.read_text() for path in place.glob("runs/*/*/*/DONE")}
    for manifest in place.glob("data/*/manifest.json"):
        found[str(manifest.relative_to(place))] = json.loads(manifest.read_text())["data_hash"]
    return found


class _Tmpfs:
    """A file system in memory, of a size that changes."""

    def __init__(self, place: Path):
        self.place = place

    def __enter__(self) -> _Tmpfs:
        _mount(b"tmpfs", self.place, b"tmpfs", 0, f"size={_ROOM}".encode())
        return self

    def __exit__(self, *_: object) -> None:
        _libc().umount2(str(self.place).encode(), 2)

    def used(self) -> int:
        return shutil.disk_usage(self.place).used

    def limit(self, room: float | None) -> None:
        """So many bytes more than now, or room enough."""
        size = _ROOM if room is None else (self.used() + int(room)) // 4096 * 4096 + 4096
        _mount(b"tmpfs", self.place, b"tmpfs", _REMOUNT, f"size={size}".encode())


class _Failing:
    """A folder in which `ctrbench.files` can put nothing on disk from some call on."""

    def __init__(self, place: Path):
        self.place, self.calls, self.allowed = place, 0, float("inf")

    def __enter__(self) -> _Failing:
        from ctrbench import files

        self._sync: Callable[[Path], None] = files.sync

        def sync(path: Path) -> None:
            self.calls += 1
            if self.calls > self.allowed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._sync(path)

        files.sync = sync
        return self

    def __exit__(self, *_: object) -> None:
        from ctrbench import files

        files.sync = self._sync
        for path in self.place.iterdir():
            shutil.rmtree(path)

    def used(self) -> int:
        return self.calls

    def limit(self, room: float | None) -> None:
        self.allowed = float("inf") if room is None else self.calls + int(room)


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _mount(source: bytes, target: Path, kind: bytes, flags: int, options: bytes | None) -> None:
    if _libc().mount(source, str(target).encode(), kind, flags, options):
        raise OSError(ctypes.get_errno(), "mount")


def _own_mounts() -> bool:
    """Whether this process could be given mounts of its own."""
    user, group = os.getuid(), os.getgid()
    try:
        if _libc().unshare(_NEWUSER | _NEWNS):
            return False
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        _mount(b"none", Path("/"), b"none", _PRIVATE, None)
    except (OSError, AttributeError):
        return False
    return True
