# SPDX-License-Identifier: Apache-2.0
"""Damage data files: bytes flipped, files cut, columns dropped, types changed. Each is detected, or harmless by what it holds."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
from soak_kills import SIDES, make_raw, overrides_of, train
from soak_outcome import CONTEXT, ROOT, Outcome, one_line, timed

# Files that one child damages and reads before the next one starts: a crash of the interpreter costs no more than these.
PER_CHILD = 25
PATIENCE = 240.0
DETECTED, HARMLESS = "detected", "harmless, the content is the same"


def soak(count: int, seed: int, folder: Path) -> Outcome:
    """Damage so many files, each in a copy of a finished run and its data, and use them.

    Args:
        count: how many.
        seed: of the damage.
        folder: an empty one.
    """
    outcome = Outcome("damaged data files", "each is detected or harmless by checksum; none crashes the interpreter")
    with timed(outcome):
        for side in ("resident", "QIN"):
            _in_child(_prepare, folder, side)
        done = 0
        while done < count:
            numbers = list(range(done, min(count, done + PER_CHILD)))
            receiver, sender = CONTEXT.Pipe(duplex=False)
            process = CONTEXT.Process(target=_damage_some, args=(folder, seed, numbers, sender))
            process.start()
            sender.close()
            while receiver.poll(PATIENCE):
                try:
                    what, how, failure = receiver.recv()
                except EOFError:
                    break
                outcome.add(f"{what}: {how}", failure and f"file {done} ({what}): {failure}")
                done += 1
            process.kill()
            process.join()
            if done <= numbers[-1]:
                outcome.add("failed", f"file {done}: the interpreter crashed or hung (status {process.exitcode})")
                done += 1
    return outcome


def _in_child(action: Callable[..., None], *arguments: Any) -> None:
    process = CONTEXT.Process(target=action, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def _prepare(folder: Path, side: str) -> None:
    make_raw(folder / "raw", rows=300)
    train(side, folder / "raw", folder / "data", folder / "runs", ["epochs=1", "checkpoint_every=1", "eval_steps=1"])


def _damage_some(folder: Path, seed: int, numbers: list[int], sender: Any) -> None:
    for number in numbers:
        dice = random.Random(seed * 100_003 + number)
        copy = folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        side = dice.choice(("resident", "QIN"))
        name = "tiny_mm" if side == "QIN" else "tiny_ctr"
        for place in ("raw", "data", "runs"):
            shutil.copytree(folder / place / name, copy / place / name)
        what, path, reader = dice.choice(_targets(copy, side))
        how, failure = _damage_and_read(path, reader, copy, side, dice)
        sender.send((what, how, failure))
    sender.close()


def _damage_and_read(
    path: Path, reader: Callable[..., Any], folder: Path, side: str, dice: random.Random
) -> tuple[str, str | None]:
    from ctrbench.errors import CtrbenchError

    experiment = _experiment(folder, side)
    expected = reader(path, experiment)
    damage = _damage(path, dice)
    if damage is None:
        return HARMLESS, None
    try:
        found = reader(path, experiment)
    except CtrbenchError as error:
        lines = str(error).splitlines()
        is_clear = len(lines) >= 1 and all(line.strip() for line in lines) and len(str(error)) < 3000
        return DETECTED, None if is_clear else f"{damage}: an unclear message: {str(error)[:200]!r}"
    except BaseException as error:  # a Rust panic is no Exception
        return "failed", f"{damage} of {path.name}: {one_line(error)}"
    if reader is _read_raw:  # other raw files must be other data
        return DETECTED, f"{damage} of {path.name} was not noticed" if _is_same(expected, found) else None
    if _is_same(expected, found):
        return HARMLESS, None
    return "failed", f"{damage} of {path.name} was not noticed"


def _experiment(folder: Path, side: str) -> Any:
    from ctrbench.config import load_experiment

    expid = SIDES[side][0]
    zoo = ROOT / "model_zoo" / expid.split("_")[0]
    overrides = overrides_of(side, folder / "raw", folder / "data", folder / "runs")
    return load_experiment(zoo / "config", expid, zoo, [*overrides, "epochs=1", "checkpoint_every=1", "eval_steps=1"])


def _targets(folder: Path, side: str) -> list[tuple[str, Path, Callable[..., Any]]]:
    """Kind of file, file, and what reads it."""
    name = "tiny_mm" if side == "QIN" else "tiny_ctr"
    data, raw = folder / "data" / name, folder / "raw" / name
    [run_dir] = (folder / "runs" / name).glob("*/seed_*")
    targets: list[tuple[str, Path, Callable[..., Any]]] = [
        *(("H5", path, _read_h5) for path in sorted(data.glob("*.h5"))),
        *(
            (f"{path.suffix[1:].upper()} (raw)", path, _read_raw)
            for path in sorted(raw.iterdir())
            if "labels" not in path.name
        ),
        *(
            ("JSON (data)", data / name, _read_built)
            for name in ("feature_map.json", "feature_vocab.json", "manifest.json")
        ),
        *(
            ("JSON (run)", run_dir / name, _read_run)
            for name in ("report.json", "metrics.jsonl", "config.yaml", "train.log")
        ),
        *(("safetensors", run_dir / "best.safetensors", _read_weights),) * 3,
        *(("checkpoint", run_dir / "last.ckpt", _read_checkpoint),) * 2,
    ]
    return targets


def _read_h5(path: Path, experiment: Any) -> Any:
    """Every number of the split, as a run loads them."""
    from ctrbench.batches import Batches, load_items
    from ctrbench.features import load_feature_map

    feature_map = load_feature_map(path.with_name("feature_map.json"), None, experiment.flat())
    if path.name == "items.h5":
        return {name: x.numpy() for name, x in load_items(path, feature_map, "cpu").items()}
    split = Batches.from_file(path, feature_map, 64, labels_required=path.name != "test.h5")
    return {name: split.column(name).numpy() for name in split.names}


def _read_raw(path: Path, experiment: Any) -> Any:
    """What is built from the raw files: data of another hash have another name, which is how a change shows."""
    return {"data_hash": _build(experiment).data_hash}


def _read_built(path: Path, experiment: Any) -> Any:
    """The files of the dataset after a build, which replaces what is not whole; the times in the manifest aside."""
    data = _build(experiment)
    found = {name: (data.path / name).read_bytes() for name in ("feature_map.json", "feature_vocab.json")}
    return {
        **found,
        "data_hash": data.data_hash,
        "rows": data.num_rows,
        "numbers": _read_h5(data.splits["train"], experiment),
    }


def _build(experiment: Any) -> Any:
    from ctrbench.preprocess import build_dataset

    return build_dataset(experiment.dataset, root=experiment.root, task=experiment.training.task)


def _read_run(path: Path, experiment: Any) -> Any:
    """What `ctrbench verify` and the leaderboard take from a run's directory."""
    from ctrbench.errors import DataError
    from ctrbench.evidence import problems_of, read_report

    report = read_report(path.parent)
    if problems := problems_of(path.parent, report):
        raise DataError("; ".join(problems))
    return {"report": report, "curve": (path.parent / "metrics.jsonl").read_bytes()}


def _read_weights(path: Path, experiment: Any) -> Any:
    from ctrbench.checkpoint import _read_state

    return {name: tensor.clone().numpy() for name, tensor in _read_state(path).items()}


def _read_checkpoint(path: Path, experiment: Any) -> Any:
    from ctrbench.checkpoint import load_checkpoint

    state = load_checkpoint(path)
    return {"progress": state["progress"], **{name: tensor.numpy() for name, tensor in state["model"].items()}}


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_is_same(a[key], b[key]) for key in a)
    if isinstance(a, np.ndarray):
        return bool(a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))
    return bool(a == b)


def _damage(path: Path, dice: random.Random) -> str | None:
    """Damage a file in some way; None if nothing was changed."""
    special = {".h5": _damage_h5, ".parquet": _damage_parquet, ".csv": _damage_csv, ".json": _damage_json}.get(
        path.suffix
    )
    before = path.read_bytes()
    what = special(path, dice) if special is not None and dice.random() < 0.4 else _damage_bytes(path, dice)
    return what if path.read_bytes() != before else None


def _damage_bytes(path: Path, dice: random.Random) -> str:
    content = bytearray(path.read_bytes())
    at = dice.randrange(len(content))
    kind = dice.choice(("bit", "bit", "byte", "bytes", "zeros", "cut", "cut", "doubled", "emptied", "swapped"))
    if kind == "bit":
        content[at] ^= 1 << dice.randrange(8)
    elif kind == "byte":
        content[at] ^= dice.randrange(1, 256)
    elif kind == "bytes":
        for i in range(at, min(len(content), at + dice.choice((4, 64, 4096)))):
            content[i] = dice.randrange(256)
    elif kind == "zeros":
        stop = min(len(content), at + dice.choice((16, 512, 4096)))
        content[at:stop] = bytes(stop - at)
    elif kind == "cut":
        del content[at:]
    elif kind == "doubled":
        content += content[at:]
    elif kind == "emptied":
        content.clear()
    else:
        other = dice.randrange(len(content))
        content[at], content[other] = content[other], content[at]
    path.write_bytes(content)
    return kind


def _damage_h5(path: Path, dice: random.Random) -> str:
    with h5py.File(path, "r+") as file:
        name = dice.choice(list(file))
        values, attributes = file[name][()], dict(file[name].attrs)
        kind = dice.choice(
            ("column dropped", "type changed", "rows dropped", "a value changed", "as a group", "no checksum")
        )
        if kind == "a value changed":
            row = dice.randrange(len(values))
            file[name][row] = values[row] + 1
            return kind
        if kind == "no checksum":
            file[name][...] = values[::-1]
            del file[name].attrs["crc32"]
            return kind
        del file[name]
        if kind == "column dropped":
            return kind
        if kind == "as a group":
            file.create_group(name)
            return kind
        changed = {"type changed": values.astype(dice.choice(("f8", "i8", "i2", "S4"))), "rows dropped": values[:-1]}[
            kind
        ]
        file.create_dataset(name, data=changed).attrs.update(attributes)
        return kind


def _damage_parquet(path: Path, dice: random.Random) -> str:
    frame = pl.read_parquet(path)
    name = dice.choice(frame.columns)
    kind = dice.choice(("column dropped", "type changed", "missing values", "no rows", "renamed"))
    if kind == "column dropped":
        frame = frame.drop(name)
    elif kind == "type changed":
        frame = frame.with_columns(pl.Series(name, [f"x{i}" for i in range(len(frame))]))
    elif kind == "missing values":
        rows = pl.int_range(pl.len()) == dice.randrange(len(frame))
        frame = frame.with_columns(pl.when(~rows).then(pl.col(name)).alias(name))
    elif kind == "no rows":
        frame = frame.head(0)
    else:
        frame = frame.rename({name: name + "_"})
    frame.write_parquet(path)
    return kind


def _damage_csv(path: Path, dice: random.Random) -> str:
    lines = path.read_text().splitlines()
    at = dice.randrange(len(lines))
    kind = dice.choice(("cell dropped", "cell added", "cell changed", "header gone", "line repeated", "quote opened"))
    cells = lines[at].split(",")
    if kind == "cell dropped":
        cells.pop(dice.randrange(len(cells)))
    elif kind == "cell added":
        cells.insert(dice.randrange(len(cells)), "x")
    elif kind == "cell changed":
        cells[dice.randrange(len(cells))] = dice.choice(("", "nan", "2", "-1", "1e999", "\x00", "é", '"', "a" * 70000))
    elif kind == "quote opened":
        cells[0] = '"' + cells[0]
    lines[at] = ",".join(cells)
    if kind == "header gone":
        lines.pop(0)
    elif kind == "line repeated":
        lines.insert(at, lines[at])
    path.write_text("\n".join(lines) + "\n")
    return kind


def _damage_json(path: Path, dice: random.Random) -> str:
    """Other values in JSON that can be read."""
    tree = json.loads(path.read_text())
    places, queue = [], [tree]
    while queue:
        node = queue.pop()
        for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            places.append((node, key))
            queue.append(value)
    node, key = dice.choice(places)
    kind = dice.choice(("value changed", "value dropped", "number changed"))
    if kind == "value dropped":
        del node[key]
    elif kind == "number changed" and isinstance(node[key], int):
        node[key] += 1
    else:
        node[key] = dice.choice((None, 0, -1, "x", [], {}, True, 1e9))
    path.write_text(json.dumps(tree, indent=2) + "\n")
    return kind
