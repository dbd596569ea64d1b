# SPDX-License-Identifier: Apache-2.0
"""Hostile inputs: names that lead out of a folder, YAML tags that build objects, pickles, archives with links, HTML in names.

Every input would leave the file `mark` if it were run, or write outside of its folder if it could.
"""

from __future__ import annotations

import io
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from soak_kills import make_raw
from soak_outcome import ROOT, Outcome, one_line, timed

from ctrbench.cli import main
from ctrbench.errors import CtrbenchError
from ctrbench.yamlfile import dump_yaml, load_yaml

ESCAPES = (
    "../outside",
    "../../outside",
    "/{outside}",
    "a/../../../outside",
    "..",
    ".",
    "a\\b",
    "a\0b",
    "x" * 300,
    "a\nb",
    "",
)
SCRIPT = "<img src=x onerror=alert(1)>"
_ZOO = Path("model_zoo") / "DCNv3"


class Runs:
    """Leaves `mark` when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


class Box:
    """A private repository in a folder around which nothing may appear."""

    def __init__(self, folder: Path, raw: Path):
        self.outer, self.folder, self.raw = folder, folder / "a" / "b" / "repository", raw
        self.mark = folder / "a" / "mark"
        ignored = shutil.ignore_patterns("__pycache__", "tuner_config")
        shutil.copytree(ROOT / _ZOO, self.folder / _ZOO, ignore=ignored)
        (self.folder / "config" / "dataset_config").mkdir(parents=True)
        self.model = {n: load_yaml(ROOT / _ZOO / "config" / "model_config.yaml")[n] for n in ("Base", "DCNv3_tiny")}
        self.dataset = dict(load_yaml(ROOT / "config" / "dataset_config" / "tiny_ctr.yaml")["tiny_ctr"])
        self.dataset |= {
            f"{split}_data": str(raw / "tiny_ctr" / f"{split}.csv") for split in ("train", "valid", "test")
        }
        self.model["DCNv3_tiny"] = {**self.model["DCNv3_tiny"], "epochs": 1, "verbose": 0}
        self.write()

    def write(self) -> None:
        """The configuration as it is now."""
        (self.folder / _ZOO / "config" / "model_config.yaml").write_text(dump_yaml(self.model))
        (self.folder / "config" / "dataset_config" / "tiny_ctr.yaml").write_text(dump_yaml({"tiny_ctr": self.dataset}))

    def main(self, *words: str) -> tuple[int, str]:
        """Exit status and output of a command."""
        text = io.StringIO()
        with redirect_stdout(text), redirect_stderr(text):
            status = main([*words])
        return status, text.getvalue()

    def run(self, expid: str = "DCNv3_tiny", *words: str) -> None:
        """`ctrbench run`; a refusal is raised."""
        status, text = self.main("run", "--zoo", str(self.folder / _ZOO), "--expid", expid, *words)
        if status:
            raise CtrbenchError(text)

    def outside(self) -> list[str]:
        """What lies outside of the repository, and the mark."""
        found = [
            p for p in self.outer.rglob("*") if not p.is_relative_to(self.folder) and not self.folder.is_relative_to(p)
        ]
        return [str(path.relative_to(self.outer)) for path in found]


Case = tuple[str, Callable[[Box], None]]


def soak(seed: int, folder: Path, count: int | None = None) -> Outcome:
    """Try every hostile input, or the first `count` of them; each must be refused in one clear message, or do nothing.

    Args:
        seed: not used: the inputs are always the same.
        folder: an empty one.
        count: how many.
    """
    del seed
    outcome = Outcome("hostile inputs", "0 are executed, 0 files appear outside of the folder")
    raw = make_raw(folder / "raw", rows=120)
    with timed(outcome):
        for number, (name, attack) in enumerate(list(cases())[:count]):
            box = Box(folder / f"box_{number}", raw)
            before = set(box.outside())
            try:
                attack(box)
                how, failure = "harmless", None
            except CtrbenchError:
                how, failure = "refused", None
            except BaseException as error:
                how, failure = "failed", one_line(error)
            if box.mark.exists():
                how, failure = "failed", "it was executed"
            elif appeared := sorted(set(box.outside()) - before):
                how, failure = "failed", f"outside of the folder: {', '.join(appeared[:5])}"
            outcome.add(how, failure and f"{name}: {failure}")
            shutil.rmtree(box.outer)
    return outcome


def cases() -> Iterator[Case]:
    """The inputs, with their names."""
    yield from _names()
    yield from _texts()
    yield from _files()
    yield from _archives()
    yield from _pages()


def _refused(status_and_text: tuple[int, str], *wanted: str) -> None:
    status, text = status_and_text
    if status != 2 or "Traceback" in text or not all(word in text for word in wanted):
        raise AssertionError(f"status {status}: {text[-300:]}")
    raise CtrbenchError(text)


def _names() -> Iterator[Case]:
    def expid(name: str) -> Callable[[Box], None]:
        def attack(box: Box) -> None:
            box.model[name.format(outside=box.outer / "outside")] = box.model["DCNv3_tiny"]
            box.write()
            box.run(name.format(outside=box.outer / "outside"))

        return attack

    def dataset_id(name: str) -> Callable[[Box], None]:
        def attack(box: Box) -> None:
            named = name.format(outside=box.outer / "outside")
            path = box.folder / "config" / "dataset_config" / "other.yaml"
            path.write_text(dump_yaml({named: box.dataset}))
            box.model["DCNv3_tiny"] = {**box.model["DCNv3_tiny"], "dataset_id": named}
            box.write()
            box.run()

        return attack

    def sweep(name: str, flag: str) -> Callable[[Box], None]:
        def attack(box: Box) -> None:
            path = box.folder / "tuner.yaml"
            keys = {"base_config": str(_ZOO / "config"), "base_expid": "DCNv3_tiny", "dataset_id": "tiny_ctr"}
            path.write_text(dump_yaml({**keys, "tuner_space": {"net_dropout": [0.1]}}))
            named = name.format(outside=box.outer / "outside")
            _refused(box.main("tune", "--config", str(path), flag, named), "names a folder")

        return attack

    for name in ESCAPES:
        yield f"expid {name[:12]!r}", expid(name)
    for name in ESCAPES[:9]:
        yield f"dataset_id {name[:12]!r}", dataset_id(name)
    for name in ("../outside", "/{outside}", "x" * 300):
        yield f"sweep {name[:12]!r}", sweep(name, "--name")
    yield "tag '../outside'", sweep("../../outside", "--tag")
    for key in ("model_root", "data_root", "train_data"):
        for value in ("a\0b", "x" * 300):
            yield f"{key} {value[:4]!r}", _setting(key, value)

    def model(box: Box) -> None:
        evil = box.outer / "a" / "evil" / "src"
        evil.mkdir(parents=True)
        evil.joinpath("__init__.py").write_text(f"from pathlib import Path\nPath({str(box.mark)!r}).touch()\n")
        box.model["DCNv3_tiny"] = {**box.model["DCNv3_tiny"], "model": "../../../evil"}
        config = box.folder / "benchmarks" / "config"
        config.mkdir(parents=True)
        (config / "model_config.yaml").write_text(dump_yaml(box.model))
        try:
            _refused(box.main("check", "--config", str(config), "--expid", "DCNv3_tiny"), "no model folder")
        finally:
            shutil.rmtree(evil.parent)

    yield "model '../../../evil'", model


def _setting(key: str, value: str) -> Callable[[Box], None]:
    def attack(box: Box) -> None:
        holder = box.dataset if key in ("data_root", "train_data") else box.model["DCNv3_tiny"]
        holder[key] = value
        box.write()
        box.run()
        raise AssertionError("it was accepted")

    return attack


def _texts() -> Iterator[Case]:
    """YAML tags, and texts where FuxiCTR evaluates Python."""
    tags = (
        "!!python/object/apply:pathlib.Path.touch [{path}]",
        "!!python/object/apply:os.system ['touch {mark}']",
        "!!python/object/new:subprocess.Popen [[touch, {mark}]]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/object:ctrbench.config.Experiment {{}}",
    )

    def tagged(tag: str, file: str) -> Callable[[Box], None]:
        def attack(box: Box) -> None:
            path = box.folder / file
            text = path.read_text() if path.exists() else ""
            path.write_text(f"{text}\nx: {tag.format(path=box.mark, mark=box.mark)}\n")
            if file == "tuner.yaml":
                _refused(box.main("tune", "--config", str(path)))
            box.run()
            raise AssertionError("it was accepted")

        return attack

    for tag in tags:
        yield f"{tag.split()[0]} in model_config.yaml", tagged(tag, "model_zoo/DCNv3/config/model_config.yaml")
    yield "a tag in dataset_config", tagged(tags[1], "config/dataset_config/tiny_ctr.yaml")
    yield "a tag in a tuner file", tagged(tags[1], "tuner.yaml")

    def option(box: Box) -> None:
        box.run("DCNv3_tiny", "--set", f"name={tags[1].format(mark=box.mark)}")

    yield "a tag in --set", option
    code = "__import__('os').system('touch {mark}')"

    def evaluated(key: str, text: str) -> Callable[[Box], None]:
        def attack(box: Box) -> None:
            value = text.format(mark=box.mark)
            if key in ("feature_encoder", "preprocess"):
                box.dataset["feature_cols"][0] = {**box.dataset["feature_cols"][0], key: value}
            else:
                box.model["DCNv3_tiny"][key] = [value] if key == "metrics" else value
            box.write()
            box.run()
            raise AssertionError("it was accepted")

        return attack

    for key, text in (
        ("feature_encoder", code),
        ("feature_encoder", f"nn.Linear(1, {code})"),
        ("feature_encoder", "layers.__class__.__mro__"),
        ("preprocess", code),
        ("embedding_regularizer", f"l2({code})"),
        ("optimizer", code),
        ("loss", code),
        ("monitor", code),
        ("metrics", f"NDCG(k={code})"),
    ):
        yield f"{key} {text[:16]!r}", evaluated(key, text)


def _files() -> Iterator[Case]:
    """Pickles under other names."""

    def weights(name: str) -> Callable[[Box], None]:
        def attack(box: Box) -> None:
            from ctrbench.checkpoint import load_checkpoint, load_weights

            path = box.folder / name
            path.write_bytes(pickle.dumps(Runs(box.mark)))
            load_checkpoint(path) if name.endswith(".ckpt") else load_weights(path, torch.nn.Linear(1, 1))
            raise AssertionError("it was accepted")

        return attack

    for name in ("best.safetensors", "last.ckpt", "x.model", "x.pt"):
        yield f"a pickle named {name}", weights(name)

    def in_zip(name: str) -> Callable[[Box], None]:
        def attack(box: Box) -> None:
            from ctrbench.checkpoint import load_checkpoint, load_weights

            path = box.folder / name
            torch.save({"weight": Runs(box.mark)}, path)
            load_checkpoint(path) if name.endswith(".ckpt") else load_weights(path, torch.nn.Linear(1, 1))
            raise AssertionError("it was accepted")

        return attack

    for name in ("last.ckpt", "x.model"):
        yield f"torch.save of an object as {name}", in_zip(name)

    def pretrained(box: Box) -> None:
        path = box.folder / "emb.npz"
        np.savez(path, key=np.array([Runs(box.mark)], dtype=object), value=np.zeros((1, 4)))
        column = {"name": "device", "active": True, "dtype": "str", "type": "categorical"}
        box.dataset["feature_cols"] = [{**column, "pretrained_emb": str(path), "pretrain_dim": 4}]
        box.write()
        box.run()
        raise AssertionError("it was accepted")

    yield "objects in a pretrained npz", pretrained

    def journal(box: Box) -> None:
        path = box.folder / "data" / "tiny_ctr" / "feature_vocab.json"
        path.parent.mkdir(parents=True)
        path.write_bytes(pickle.dumps(Runs(box.mark)))
        path.with_name("manifest.json").write_bytes(pickle.dumps(Runs(box.mark)))
        box.run()  # built anew

    yield "pickles named feature_vocab.json and manifest.json", journal


def _archives() -> Iterator[Case]:
    def found(box: Box, path: Path) -> None:
        from ctrbench.datasets.archives import copy_members, find

        members = find(path, {"train.csv": ["train.csv"]}, "download it again")
        copy_members(members, box.folder / "out")

    def zipped(name: str, is_link: bool = False) -> Callable[[Box], None]:
        def attack(box: Box) -> None:
            path = box.folder / "raw.zip"
            with zipfile.ZipFile(path, "w") as archive:
                entry = zipfile.ZipInfo(name)
                entry.external_attr = 0o120777 << 16 if is_link else 0
                archive.writestr(entry, str(box.outer / "outside"))
            found(box, path)
            raise AssertionError("it was accepted")

        return attack

    def tarred(name: str, kind: bytes = tarfile.REGTYPE) -> Callable[[Box], None]:
        def attack(box: Box) -> None:
            path = box.folder / "raw.tar"
            with tarfile.open(path, "w") as archive:
                member = tarfile.TarInfo(name)
                member.type, member.linkname, member.size = kind, "/etc/passwd", 3 if kind == tarfile.REGTYPE else 0
                archive.addfile(member, io.BytesIO(b"a,b"))
            found(box, path)
            raise AssertionError("it was accepted")

        return attack

    for name in ("../../outside/train.csv", "/outside/train.csv", "..\\..\\train.csv"):
        yield f"zip member {name}", zipped(name)
    yield "a link in a zip", zipped("train.csv", is_link=True)
    yield "tar member ../../outside/train.csv", tarred("../../outside/train.csv")
    for kind, what in ((tarfile.SYMTYPE, "a link"), (tarfile.LNKTYPE, "a hard link"), (tarfile.CHRTYPE, "a device")):
        yield f"{what} in a tar", tarred("train.csv", kind)


def _pages() -> Iterator[Case]:
    """Markup in names must come out as text."""

    def inspected(box: Box) -> None:
        path, page = box.folder / "raw.csv", box.folder / "page.html"
        pl.DataFrame({"label": [0, 1] * 4, SCRIPT: [SCRIPT, "b"] * 4, "x": [f"</script>{SCRIPT}"] * 8}).write_csv(path)
        status, text = box.main("inspect", str(path), "--label", "label", "--output", str(page))
        assert status == 0, text
        _check_escaped(page)

    yield "markup in columns and tokens, ctrbench inspect", inspected

    def leaderboard(box: Box) -> None:
        with _working_in(box.folder):
            box.model[SCRIPT] = box.model["DCNv3_tiny"]
            box.write()
            box.run(SCRIPT)
            status, text = box.main("leaderboard", "runs", "--output", "board")
        assert status == 0, text
        for page in (box.folder / "board").glob("*.html"):
            _check_escaped(page)

    yield "markup in an expid, ctrbench leaderboard", leaderboard


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    import os

    here = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


def _check_escaped(page: Path) -> None:
    text = page.read_text()
    assert "onerror=alert(1)" in text, f"{page.name} does not show the name"
    assert "<img src=x" not in text and "</script><img" not in text, f"{page.name} holds markup from a name"
