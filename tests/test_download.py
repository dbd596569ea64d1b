# SPDX-License-Identifier: Apache-2.0
"""Downloads from a loopback server that drops connections, truncates, ignores ranges and lies about sizes."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT
from filelock import FileLock

from ctrbench.cli import main
from ctrbench.datasets import catalog
from ctrbench.datasets import download as module
from ctrbench.datasets.catalog import find_dataset
from ctrbench.datasets.description import Remote
from ctrbench.datasets.download import Policy, download, fetch
from ctrbench.errors import ConfigError, CtrbenchError, DataError

CONTENT = random.Random(1).randbytes(3_000_000)
MD5 = hashlib.md5(CONTENT).hexdigest()
PATIENT = Policy(attempts=4, progress=500_000, delay=0.5, timeout=5, sleep=lambda seconds: None)


class Server:
    """Answers each request with the next of `answers`, the last one from then on; notes the requests' headers."""

    def __init__(self):
        self.content, self.answers, self.requests = CONTENT, [well], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer.requests.append(dict(self.headers))
                answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                self.close_connection = True
                answer(self, outer.content)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/file.bin"

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def ranges(self):
        return [headers.get("Range") for headers in self.requests]


def send(handler, status, body, **headers):
    """`Content_Length` and the like replace the honest headers; None leaves one out."""
    handler.send_response(status)
    honest = {"Content_Length": len(body), "ETag": '"one"'}
    for name, value in {**honest, **headers}.items():
        if value is not None:
            handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    handler.wfile.write(body)


def well(handler, content):
    """As a good server: honours Range and If-Range."""
    wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range") or "")
    if wanted is None or handler.headers.get("If-Range") != '"one"':
        send(handler, 200, content)
    elif int(wanted[1]) >= len(content):
        send(handler, 416, b"", Content_Range=f"bytes */{len(content)}")
    else:
        start = int(wanted[1])
        send(handler, 206, content[start:], Content_Range=f"bytes {start}-{len(content) - 1}/{len(content)}")


def cut(after):
    """Honest headers, but the connection ends after some bytes."""

    def answer(handler, content):
        start = int((handler.headers.get("Range") or "bytes=0-")[6:-1])
        extra = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        send(
            handler, 206 if start else 200, content[start : start + after], Content_Length=len(content) - start, **extra
        )
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_RDWR)

    return answer


def fail(status, **headers):
    return lambda handler, content: send(handler, status, b"no", **headers)


def always(status=200, body=None, **headers):
    return lambda handler, content: send(handler, status, content if body is None else body, **headers)


@pytest.fixture
def server():
    running = Server()
    yield running
    running.close()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "raw" / "file.bin"


def remote(server, **known):
    return Remote(server.url, "file.bin", **known)


def names(target):
    return sorted(p.name for p in target.parent.iterdir() if not p.name.endswith(".lock"))


def refused(server, target, message, *, kept=(), **known):
    """The one line of the error; no file under the final name."""
    with pytest.raises(CtrbenchError, match=message) as error:
        download(remote(server, **known), target, policy=PATIENT)
    assert "\n" not in str(error.value)
    assert names(target) == sorted(kept)


PART = [".file.bin.part", ".file.bin.part.json"]


def test_a_plain_download(server, target):
    said = []
    download(remote(server, size=len(CONTENT), md5=MD5), target, policy=PATIENT, report=said.append)
    assert target.read_bytes() == CONTENT and names(target) == ["file.bin"] and server.ranges() == [None]
    assert said == [f"{target}: 3,000,000 bytes"]
    download(remote(server, size=len(CONTENT), md5=MD5), target, policy=PATIENT, report=said.append)
    assert len(server.requests) == 1 and said[-1] == f"{target}: already there"


def test_a_connection_that_drops_is_resumed(server, target):
    server.answers = [cut(1_000_000), cut(600_000), cut(0), well]
    waits, said = [], []
    policy = dataclasses.replace(PATIENT, sleep=waits.append)
    download(remote(server, md5=MD5), target, policy=policy, report=said.append)
    assert target.read_bytes() == CONTENT
    assert server.ranges() == [None, "bytes=1000000-", "bytes=1600000-", "bytes=1600000-"]
    assert waits == [0.5, 0.5, 1.0]  # the third try brought nothing
    assert "file.bin: the connection ended after 1,000,000 of 3,000,000 bytes; trying again" in said


def test_the_next_call_goes_on(server, target):
    server.answers = [cut(900_000), cut(0)]
    ended = r"the connection ended after 900,000 of 3,000,000 bytes"
    message = rf"file.bin: gave up after 4 failed attempts \({ended}\): 900,000 bytes are kept"
    refused(server, target, message, kept=PART, md5=MD5)
    server.answers = [well]
    download(remote(server, md5=MD5), target, policy=PATIENT)
    assert target.read_bytes() == CONTENT and server.ranges()[-1] == "bytes=900000-"


def test_a_file_that_changed_meanwhile_starts_over(server, target):
    def changed(handler, content):
        assert handler.headers["If-Range"] == '"one"'
        send(handler, 200, content, ETag='"two"')

    server.answers = [cut(1_000_000), changed]
    download(remote(server, md5=MD5), target, policy=PATIENT)
    assert target.read_bytes() == CONTENT


def test_a_server_without_ranges_starts_over(server, target):
    server.answers = [cut(1_000_000), always()]
    download(remote(server, md5=MD5), target, policy=PATIENT)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("tag", [None, 'W/"one"'])
def test_nothing_is_kept_that_nothing_vouches_for(server, target, tag):
    """Without a strong validator the server may give the middle of another file."""
    half = always(body=CONTENT[:1_000_000], Content_Length=len(CONTENT), ETag=tag)
    server.answers = [half, always(ETag=tag)]
    download(remote(server, md5=MD5), target, policy=PATIENT)
    assert target.read_bytes() == CONTENT and server.ranges() == [None, None]


@pytest.mark.parametrize(
    "content_range",
    ["bytes 0-2999999/3000000", "bytes 1000000-2999999/9999999", "bytes 1000000-2999999/*", "nonsense", None],
)
def test_another_range_than_asked_for(server, target, content_range):
    wrong = always(206, CONTENT[1_000_000:], Content_Range=content_range)
    server.answers = [cut(1_000_000), wrong, well]
    download(remote(server, md5=MD5), target, policy=PATIENT)
    assert target.read_bytes() == CONTENT and server.ranges() == [None, "bytes=1000000-", None]


def test_everything_is_there_already_says_416(server, target):
    """All bytes had come when the process was killed before it renamed the file."""
    target.parent.mkdir()
    (target.parent / PART[0]).write_bytes(CONTENT)
    state = {"url": server.url, "validator": '"one"', "total": len(CONTENT)}
    (target.parent / PART[1]).write_text(json.dumps(state))
    download(remote(server, md5=MD5), target, policy=PATIENT)
    assert target.read_bytes() == CONTENT and server.ranges() == ["bytes=3000000-"] and names(target) == ["file.bin"]


@pytest.mark.parametrize(
    "state", ["", "[]", "{}", '{"url": "http://other", "validator": "x", "total": 9}', '{"total": 1}']
)
def test_a_part_without_its_record_is_not_used(server, target, state):
    target.parent.mkdir()
    (target.parent / PART[0]).write_bytes(b"x" * 1000)
    (target.parent / PART[1]).write_text(state)
    download(remote(server, md5=MD5), target, policy=PATIENT)
    assert target.read_bytes() == CONTENT and server.ranges() == [None]


def test_a_size_that_is_too_large(server, target):
    server.answers = [always(Content_Length=len(CONTENT) + 7)]
    refused(server, target, r"gave up after \d failed attempts \(the connection ended after", kept=PART)


def test_a_size_that_is_too_small(server, target):
    server.answers = [always(Content_Length=1_000_000)]
    refused(
        server, target, r"file.bin: .* offers 1,000,000 bytes, the publisher's file has 3,000,000", size=len(CONTENT)
    )
    refused(
        server,
        target,
        rf"file.bin: its MD5 is \w+, the publisher's is {MD5}: .* does not offer the publisher's file",
        md5=MD5,
    )


def test_more_bytes_than_the_file_has(server, target):
    def chunked(handler, content):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for start in range(0, len(content), 100_000):
            part = content[start : start + 100_000]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        handler.wfile.write(b"0\r\n\r\n")

    server.answers = [chunked]
    kept = PART
    refused(server, target, r"sends more than the 2,000,000 bytes of the file", size=2_000_000, kept=kept)
    download(remote(server), target, policy=PATIENT)  # chunks say themselves where the file ends
    assert target.read_bytes() == CONTENT


def test_chunks_that_break_off(server, target):
    def broken(handler, content):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"%x\r\n%s" % (1_000_000, content[:500]))

    server.answers = [broken]
    refused(server, target, r"gave up after 4 failed attempts \(IncompleteRead", kept=PART)


def test_no_size_at_all(server, target):
    server.answers = [always(Content_Length=None)]
    refused(
        server,
        target,
        r"does not say how long the file is, so nobody can tell whether it is complete: download it with",
    )
    download(remote(server, size=len(CONTENT)), target, policy=PATIENT)
    assert target.read_bytes() == CONTENT


def test_a_wrong_checksum_is_tried_twice(server, target):
    wrong = bytes([CONTENT[0] ^ 1]) + CONTENT[1:]
    server.answers = [always(body=wrong), well]
    download(remote(server, md5=MD5), target, policy=PATIENT)
    target.unlink()
    server.requests.clear()
    server.answers = [always(body=wrong)]
    refused(server, target, r"its MD5 is \w{32}, the publisher's is \w{32}", md5=MD5)
    assert len(server.requests) == 2


def test_a_login_page_instead_of_an_archive(server, tmp_path):
    server.answers = [always(body=b"<html>sign in</html>")]
    with pytest.raises(
        DataError, match=r"data.zip: it is not a zip archive, or a truncated one: http.* does not offer"
    ):
        download(Remote(server.url, "data.zip"), tmp_path / "data.zip", policy=PATIENT)
    assert not (tmp_path / "data.zip").exists()


@pytest.mark.parametrize(
    "status, message",
    [
        (
            401,
            r"answers 401 .*: it wants an account or an accepted licence: sign in there, download the file and pass its path",
        ),
        (403, r"answers 403 .*: it wants an account or an accepted licence"),
        (404, r"answers 404 Not Found: look for the file on the publisher's page and pass its path as --raw"),
        (410, r"answers 410 Gone: look for the file on the publisher's page"),
    ],
)
def test_refusals(server, target, status, message):
    server.answers = [fail(status)]
    refused(server, target, message)
    assert len(server.requests) == 1


def test_a_busy_server(server, target):
    server.answers = [fail(503), fail(429), well]
    download(remote(server, md5=MD5), target, policy=PATIENT)
    server.answers, other = [fail(500)], target.with_name("other.bin")
    with pytest.raises(
        DataError, match=r"gave up after 4 failed attempts \(the server answers 500 Internal Server Error\)"
    ):
        download(remote(server), other, policy=PATIENT)


def test_nobody_answers(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/x"
    with pytest.raises(DataError, match=r"gave up after 4 failed attempts \(.*[Rr]efused"):
        download(Remote(url, "x"), tmp_path / "x", policy=PATIENT)


def test_a_server_that_falls_silent(server, target):
    release = threading.Event()

    def silent(handler, content):
        send(handler, 200, content[:1000], Content_Length=len(content))
        handler.wfile.flush()
        release.wait(10)

    server.answers = [silent, well]
    download(remote(server, md5=MD5), target, policy=dataclasses.replace(PATIENT, timeout=0.3))
    release.set()
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize(
    "location, message",
    [
        ("file:///etc/passwd", r"Redirection to url 'file:///etc/passwd' is not allowed"),
        ("ftp://127.0.0.1/x", r"it points to ftp://127.0.0.1/x, which is not safe to follow"),
    ],
)
def test_redirects_that_lead_out_of_the_web(server, target, location, message):
    server.answers = [fail(302, Location=location)]
    refused(server, target, message)


def test_redirects_are_followed(server, target):
    server.answers = [fail(302, Location="/elsewhere"), well]
    download(remote(server, md5=MD5), target, policy=PATIENT)
    assert target.read_bytes() == CONTENT


def test_other_schemes_are_not_opened(tmp_path):
    (tmp_path / "secret").write_text("x")
    with pytest.raises(DataError, match=r"secret: only http and https addresses are fetched"):
        download(Remote(f"file://{tmp_path}/secret", "x"), tmp_path / "x", policy=PATIENT)
    assert not (tmp_path / "x").exists()


def test_a_full_disk_keeps_the_part(server, target):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, before[1]))
    try:
        refused(server, target, r"file.bin: cannot be written: File too large", md5=MD5, kept=PART)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    download(remote(server, md5=MD5), target, policy=PATIENT)
    assert target.read_bytes() == CONTENT and server.ranges()[-1] == "bytes=1500000-"


def test_a_disk_that_is_too_small_is_seen_first(server, target, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 20}))
    refused(
        server,
        target,
        r"the disk is too small: 3 MiB are missing, 1 MiB are free: free some space and run the same command",
    )


def test_killed_half_way(server, target):
    """SIGKILL: no file under the final name, and the next call goes on."""
    release = threading.Event()

    def slow(handler, content):
        send(handler, 200, content[:2_000_000], Content_Length=len(content))
        handler.wfile.flush()
        release.wait(20)

    server.answers = [slow, well]
    program = (
        "import sys; from pathlib import Path; from ctrbench.datasets.description import Remote\n"
        "from ctrbench.datasets.download import download\ndownload(Remote(sys.argv[1], 'file.bin'), Path(sys.argv[2]))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, server.url, target], cwd=ROOT)
    part = target.parent / PART[0]
    while not (part.exists() and part.stat().st_size >= 1 << 20):
        assert process.poll() is None
    with pytest.raises(DataError, match=r"file.bin: another process downloads it: wait until it is done"):
        download(remote(server, md5=MD5), target, policy=PATIENT)
    process.kill()
    process.wait()
    release.set()
    assert names(target) == sorted(PART)
    size = part.stat().st_size
    download(remote(server, md5=MD5), target, policy=PATIENT)
    assert target.read_bytes() == CONTENT and server.ranges()[-1] == f"bytes={size}-"


def test_a_file_that_is_there_but_wrong(server, target):
    target.parent.mkdir()
    target.write_bytes(b"other")
    for known in ({"md5": MD5}, {"size": 3_000_000}):
        with pytest.raises(DataError, match=r"file.bin: it.*: delete it and run the same command again"):
            download(remote(server, **known), target, policy=PATIENT)
    assert target.read_bytes() == b"other" and not server.requests


def test_the_lock_is_released(server, target):
    server.answers = [fail(404)]
    with pytest.raises(DataError):
        download(remote(server), target, policy=PATIENT)
    with FileLock(target.with_name(".file.bin.lock"), timeout=0):
        pass


# --- with a dataset


def test_download_and_prepare(server, tmp_path, monkeypatch, capsys):
    """One command: fetch the archive, say the terms, prepare it."""
    dataset = find_dataset("MovielensLatest_x1", ROOT)
    buffer, text = io.BytesIO(), "label,user_id,item_id,tag_id\r\n1,5,6,7\r\n0,5,6,8\r\n"
    with zipfile.ZipFile(buffer, "w") as archive:
        for split in ("train", "valid", "test"):
            archive.writestr(f"MovielensLatest_x1/{split}.csv", text)
    server.content = buffer.getvalue()
    local = dataclasses.replace(dataset, remotes=(Remote(server.url, "MovielensLatest_x1.zip"),))
    monkeypatch.setattr(catalog, "load_catalog", lambda root: {local.dataset_id: local})
    command = [
        "prepare",
        "MovielensLatest_x1",
        "--download",
        "--raw",
        str(tmp_path / "raw"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--sample"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("MovielensLatest_x1: terms: GroupLens': research use with citation, no commercial use")
    assert (tmp_path / "out" / "test.parquet").exists() and (tmp_path / "raw" / "MovielensLatest_x1.zip").exists()


def test_datasets_that_need_the_user(tmp_path):
    with pytest.raises(
        ConfigError, match=r"KDD12: --download: It cannot be fetched without you: sign in at https://www.kaggle"
    ):
        fetch(find_dataset("KDD12", ROOT), tmp_path)
    (tmp_path / "file.zip").touch()
    with pytest.raises(ConfigError, match=r"file.zip: with --download, --raw must be a folder"):
        fetch(find_dataset("ML_1M", ROOT), tmp_path / "file.zip")


def test_every_address_is_safe():
    for dataset in catalog.load_catalog(ROOT).values():
        assert dataset.remotes or dataset.account
        assert all(r.url.startswith("https://") and re.fullmatch(r"[\w.-]+", r.name) for r in dataset.remotes)
