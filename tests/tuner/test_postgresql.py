# SPDX-License-Identifier: Apache-2.0
"""Sweeps over PostgreSQL: the tests of every store, two machines, and a server that goes away for a while.

The server is one of this machine's, on a free port of the loopback interface, in a temporary folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import test_survival
from optuna.pruners import NopPruner
from test_store import StoreContract, result
from test_survival import check_shared, evaluated, machines, run_shared, share

from ctrbench.tuner.store import Outcome, Store

pytestmark = pytest.mark.slow
OWNER = "postgres"
few_rows, started = test_survival.few_rows, test_survival.started


def find_program(name: str) -> str | None:
    """A program of PostgreSQL, which Debian keeps out of PATH."""
    places = [str(folder) for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    return shutil.which(name) or next((p for folder in places if (p := shutil.which(name, path=folder))), None)


class Server:
    """A PostgreSQL server.

    Args:
        folder: of its data, which its account must be able to enter.
    """

    def __init__(self, folder: Path):
        self.folder, self.data = folder, folder / "data"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._run("initdb", "-D", str(self.data), "-A", "trust", "-U", OWNER, "--no-sync", "-E", "UTF8")
        self.start()

    def _run(self, program: str, *arguments: str) -> None:
        found = find_program(program)
        assert found is not None, program
        command = [found, *arguments]
        if os.geteuid() == 0:  # the server refuses to be root's
            command = ["runuser", "-u", OWNER, "--", *command]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, check=False, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.folder} -c max_connections=100 -c fsync=off"
        log = str(self.folder / "log")
        self._run("pg_ctl", "-D", str(self.data), "-w", "-t", "60", "-l", log, "-o", options, "start")

    def stop(self, how: str = "immediate") -> None:
        """Stop it; `immediate` is what a crash looks like to its clients and to itself."""
        self._run("pg_ctl", "-D", str(self.data), "-w", "-t", "60", "-m", how, "stop")

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"sweeps_{uuid.uuid4().hex[:12]}"
        address = f"{OWNER}@127.0.0.1:{self.port}"
        with psycopg.connect(f"postgresql://{address}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://{address}/{name}"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if find_program("initdb") is None and os.geteuid() == 0 and shutil.which("apt-get"):
        for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", "postgresql"]):
            subprocess.run(command, capture_output=True, check=False, timeout=300)
    if find_program("initdb") is None:
        pytest.skip("no PostgreSQL: initdb is not found, and apt-get cannot install it (root and a network are needed)")
    # pytest's folders belong to this account alone.
    folder = tmp_path_factory.mktemp("postgresql")
    if os.geteuid() == 0:
        folder = Path("/tmp") / f"ctrbench_postgresql_{uuid.uuid4().hex[:8]}"
        folder.mkdir()
        shutil.chown(folder, OWNER)
    running = Server(folder)
    yield running
    running.stop()
    shutil.rmtree(folder)


class TestPostgresql(StoreContract):
    """A database of its own for each test."""

    @pytest.fixture
    def url(self, server: Server) -> str | None:
        return server.new_database()

    def test_an_empty_database_that_is_opened_by_several_at_once(self, server: Server, tmp_path: Path) -> None:
        errors: list[Exception] = []
        for _ in range(5):
            begin, url = threading.Barrier(4), server.new_database()

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

    def test_a_store_outlives_a_restart_of_its_server(self, server: Server, tmp_path: Path, url: str) -> None:
        store = Store("s", tmp_path, url, "max", NopPruner())
        claim = store.claim(3)
        assert claim is not None
        server.stop()
        timer = threading.Timer(3, server.start)
        timer.start()
        assert store.complete(claim.trial_id, Outcome("cpu", error=None, curve=[0.5], seeds=[result()]))
        timer.join()
        following = store.claim(3)
        assert following is not None and following.number == 1
        assert [record.state for record in store.records()] == ["complete", "running"]
        store.close()


def test_two_machines_share_a_sweep(server: Server, tmp_path: Path, few_rows: Path, started: list[Any]) -> None:
    boxes = machines(tmp_path, few_rows, {"mood": "slow", "learning_rate": [0.01 + 0.001 * i for i in range(12)]})
    run_shared(boxes, server.new_database(), started, 12)


def test_a_server_that_restarts_in_the_middle_of_a_sweep(
    server: Server, tmp_path: Path, few_rows: Path, started: list[Any]
) -> None:
    url = server.new_database()
    space = {
        "mood": "slow",
        "learning_rate": [0.01 + 0.001 * i for i in range(10)],
        "batch_size": 64,
        "epochs": 6,
    }
    boxes = machines(tmp_path, few_rows, space)
    commands = share(boxes, url, started)
    for down in range(3):
        for command, box in zip(commands, boxes, strict=True):
            command.until(lambda box=box, down=down: len(box.run_dirs()) >= down and evaluated(box) > down)
        server.stop("immediate" if down else "fast")
        time.sleep(3)
        server.start()
    (boxes[0].place / "hurry").touch()
    for command in commands:
        assert command.wait() == 0, command.text
        assert "Traceback" not in command.text
    check_shared(boxes, commands, url, 10)
    assert sum(len(box.run_dirs()) for box in boxes) == 10


def test_a_killed_machine_and_a_restarted_server(
    server: Server, tmp_path: Path, few_rows: Path, started: list[Any]
) -> None:
    url = server.new_database()
    space = {"mood": "slow", "learning_rate": [0.01, 0.02, 0.03, 0.04], "batch_size": 64, "epochs": 30}
    boxes = machines(tmp_path, few_rows, space)
    commands = share(boxes, url, started, "--stale-after", "4")
    for command, box in zip(commands, boxes, strict=True):
        command.until(lambda box=box: evaluated(box) == 1)
    commands[0].signal(signal.SIGKILL)
    server.stop()
    time.sleep(3)
    server.start()
    (boxes[0].place / "hurry").touch()
    assert commands[1].wait() == 0, commands[1].text
    check_shared(boxes, commands[1:], url, 4)
