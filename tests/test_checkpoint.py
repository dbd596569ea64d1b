# SPDX-License-Identifier: Apache-2.0
"""Weights and training states on disk: what is written comes back exactly, and damage is named."""

from __future__ import annotations

import pickle
import random
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from ctrbench.checkpoint import (
    CheckpointSchedule,
    check_weights,
    checksum,
    load_checkpoint,
    load_weights,
    random_state,
    restore_random_state,
    save_checkpoint,
    save_state,
    save_weights,
)
from ctrbench.errors import DataError

CPU = torch.device("cpu")


class Net(nn.Module):
    """Two embeddings that are views of one table, a tied layer and a buffer, as merged models have them."""

    def __init__(self, seed: int, width: int = 4):
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Parameter(torch.randn(7, width))
        self.head = nn.Sequential(nn.Linear(width, 3), nn.BatchNorm1d(3))
        self.tied = self.head[0]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        state["user.weight"], state["item.weight"] = state["table"][:3], state["table"][3:]
        del state["table"]
        return state

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        state = dict(state_dict)
        state["table"] = torch.cat([state.pop("user.weight"), state.pop("item.weight")])
        return super().load_state_dict(state, *args, **kwargs)


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_weights_come_back_exactly(tmp_path: Path) -> None:
    net, other = Net(0), Net(1)
    net.head[1].running_mean += 0.5
    path = tmp_path / "deep" / "best.safetensors"
    save_weights(path, net)
    assert not same(net, other)
    load_weights(path, other)
    assert same(net, other) and torch.equal(net.table, other.table)
    assert [p.name for p in path.parent.iterdir()] == ["best.safetensors"]


def test_saving_changes_nothing_and_replaces_what_was_there(tmp_path: Path) -> None:
    net, path = Net(0), tmp_path / "best.safetensors"
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    path.write_bytes(b"old")
    save_weights(path, net)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert net.tied is net.head[0] and net.table.requires_grad
    load_weights(path, Net(1))


@pytest.mark.parametrize("suffix", ["model", "pt", "ckpt"])
def test_a_checkpoint_of_fuxictr(tmp_path: Path, suffix: str) -> None:
    net, other, path = Net(0), Net(1), tmp_path / f"DCN_avazu.{suffix}"
    torch.save(net.state_dict(), path)  # as BaseModel.save_weights
    load_weights(path, other)
    assert same(net, other)


def test_missing_weights(tmp_path: Path) -> None:
    for name in ("best.safetensors", "x.model"):
        with pytest.raises(DataError, match=rf"{name}: no such file$"):
            load_weights(tmp_path / name, Net(0))


def test_weights_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    save_weights(path, nn.Linear(2, 2))
    with pytest.raises(DataError, match=r'weights of another model or feature map: Missing key.*"0\.weight"'):
        load_weights(path, nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(DataError, match=r"weights of another model or feature map: size mismatch for weight: "):
        load_weights(path, nn.Linear(3, 2))


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_is_run_from_a_file(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch.save({"weight": Evil(mark)}, tmp_path / "a.model")
    (tmp_path / "b.model").write_bytes(pickle.dumps(Evil(mark)))
    for name in ("a.model", "b.model"):
        with pytest.raises(DataError, match="not a readable checkpoint, damaged or truncated"):
            load_weights(tmp_path / name, Net(0))
        with pytest.raises(DataError, match="damaged checkpoint: delete it, or start over with --fresh"):
            load_checkpoint(tmp_path / name)
    assert not mark.exists()


@pytest.mark.parametrize("value", [[torch.zeros(1)], 3, None, "text", {1: torch.zeros(1)}], ids=repr)
def test_a_file_of_something_else(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "x.model")
    with pytest.raises(DataError, match="not a state_dict, which maps names of parameters to tensors"):
        load_weights(tmp_path / "x.model", Net(0))
    if not isinstance(value, dict):
        with pytest.raises(DataError, match="not a checkpoint: delete it, or start over with --fresh"):
            load_checkpoint(tmp_path / "x.model")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["best.safetensors", "x.model", "last.ckpt"])
def test_truncated_and_damaged_files(tmp_path: Path, name: str) -> None:
    net, path = Net(0), tmp_path / name

    def read() -> None:
        load_checkpoint(path) if name == "last.ckpt" else load_weights(path, Net(1))

    if name == "best.safetensors":
        save_weights(path, net)
    else:
        save_checkpoint(path, net.state_dict())
    whole = path.read_bytes()
    for length in range(0, len(whole), 23):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=name):
            read()
    texts = [bytes([first]) + b"ello, world\n" for first in range(256)]
    for text in texts + [b"\x80\x02" + text for text in texts]:
        path.write_bytes(text)
        with pytest.raises(DataError, match=name):
            read()
    dice = random.Random(0)
    expected = net.state_dict()
    for _ in range(200):  # none goes unseen where there is a checksum, and none ends in anything but a DataError
        flipped = bytearray(whole)
        flipped[dice.randrange(len(whole))] ^= dice.randrange(1, 256)
        path.write_bytes(flipped)
        other = Net(1)
        try:
            state = load_checkpoint(path) if name == "last.ckpt" else load_weights(path, other)
        except DataError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert name != "last.ckpt"
            if name == "best.safetensors":  # a byte that says nothing, such as a blank that pads the header
                assert state is None and all(torch.equal(x, expected[n]) for n, x in other.state_dict().items())


def flip_last(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_flip_among_the_numbers_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    save_weights(path, Net(0))
    check_weights(path)
    flip_last(path)
    message = r"best\.safetensors: damaged, its checksum does not match: run the experiment again with --fresh$"
    with pytest.raises(DataError, match=message):
        load_weights(path, Net(0))
    with pytest.raises(DataError, match=message):
        check_weights(path)
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, {"model": torch.arange(100000.0)})
    content = bytearray(path.read_bytes())
    content[200000] ^= 1  # zip has a checksum of its own, which torch does not look at
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"its checksum does not match: delete it, or start over with --fresh$"):
        load_checkpoint(path)


def test_files_of_earlier_versions(tmp_path: Path) -> None:
    net, other = Net(0), Net(1)
    copies = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    safetensors.torch.save_file(copies, tmp_path / "best.safetensors")
    load_weights(tmp_path / "best.safetensors", other)
    check_weights(tmp_path / "best.safetensors")
    assert same(net, other)
    torch.save({"progress": {"epoch": 3}, "model": copies}, tmp_path / "last.ckpt")
    loaded = load_checkpoint(tmp_path / "last.ckpt")
    assert loaded["progress"] == {"epoch": 3} and torch.equal(loaded["model"]["head.0.bias"], net.head[0].bias)


def test_equal_weights_are_equal_files(tmp_path: Path) -> None:
    state = {
        "b": torch.ones(2, 3),
        "a": torch.zeros(0),
        "c": torch.tensor(2.5),
        "d": torch.ones(3, dtype=torch.bfloat16),
    }
    save_state(tmp_path / "x.safetensors", state)
    save_state(tmp_path / "y.safetensors", dict(reversed(state.items())))
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_what_a_checksum_is_of() -> None:
    state = {"a": torch.arange(6.0), "b": torch.ones(2)}
    changes = [
        {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)},
        {"a": torch.arange(6.0).view(torch.int32), "b": torch.ones(2)},
        {"c": torch.arange(6.0), "b": torch.ones(2)},
        {"a": torch.arange(6.0), "b": torch.ones(3)},
        {"a": -torch.arange(6.0), "b": torch.ones(2)},
    ]
    found = {checksum(changed) for changed in changes}
    assert len(found) == 5 and checksum(state) not in found
    assert checksum(dict(reversed(state.items()))) == checksum(state)
    assert checksum({"a": torch.arange(12.0).view(2, 6)[:, ::2]}) == checksum(
        {"a": torch.tensor([[0.0, 2, 4], [6, 8, 10]])}
    )


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a readable checkpoint"):
        load_weights(tmp_path, Net(0))
    with pytest.raises(DataError, match="damaged checkpoint"):
        load_checkpoint(tmp_path)


def test_training_state(tmp_path: Path) -> None:
    net = Net(0)
    optimizer = torch.optim.Adam(net.parameters())
    net.table.sum().backward()
    optimizer.step()
    state = {
        "progress": {"epoch": 3, "best_value": None, "is_stopped": False, "history": [{"AUC": 0.75}]},
        "model": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": random_state(CPU),
    }
    path = tmp_path / "run" / "last.ckpt"
    save_checkpoint(path, state)
    loaded = load_checkpoint(path)
    assert loaded["progress"] == state["progress"]
    assert loaded["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"], state["optimizer"]["state"][0]["exp_avg"])
    assert all(torch.equal(loaded["model"][name], tensor) for name, tensor in state["model"].items())
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


def test_when_a_checkpoint_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("ctrbench.checkpoint.time", types.SimpleNamespace(monotonic=lambda: now))
    assert not any(CheckpointSchedule(None, None).is_due(step) for step in range(1, 10))
    assert [step for step in range(1, 10) if CheckpointSchedule(4, None).is_due(step)] == [4, 8]
    schedule = CheckpointSchedule(None, 30.0)
    now += 29.9
    assert not schedule.is_due(1)
    now += 0.2
    assert schedule.is_due(2) and schedule.is_due(3)  # until it is written
    schedule.restart()
    assert not schedule.is_due(4)
    now += 30.0
    assert schedule.is_due(5)


def draw() -> list[Any]:
    values = [random.random(), random.gauss(0, 1), random.randrange(10**9)]
    values += [np.random.rand(), np.random.randn(), int(np.random.randint(10**9))]
    return values + torch.rand(5).tolist() + torch.randn(3).tolist() + [int(torch.randint(10**9, ()))]


def test_random_state_through_a_file(tmp_path: Path) -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    draw()  # leaves half of a pair of normals in python's and in numpy's generator
    save_checkpoint(tmp_path / "last.ckpt", {"random": random_state(CPU)})
    expected = [draw(), draw()]
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    assert draw() != expected[0]
    restore_random_state(load_checkpoint(tmp_path / "last.ckpt")["random"], CPU)
    assert [draw(), draw()] == expected


def test_taking_the_random_state_draws_nothing() -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    expected = draw()
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    random_state(CPU)
    assert draw() == expected
