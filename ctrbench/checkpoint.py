# SPDX-License-Identifier: Apache-2.0
"""Weights and training state on disk: written atomically, checked when they are read, and read without running anything
they contain.

A CRC-32 goes with both, at a third of the time that a SHA-256 takes: it is to tell damage, not forgery, which is what the
hashes of `ctrbench.evidence` are for. In safetensors it is the `crc32` of the metadata, over names, types, shapes and bytes
of the tensors in the order of their names. A training state has a header before what `torch.save` writes: the magic bytes,
the length and the CRC-32 of what follows. Files of earlier versions have neither and load as they are.
"""

from __future__ import annotations

import io
import os
import random
import struct
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ctrbench.errors import DataError
from ctrbench.files import atomic_path

CHECKSUM = "crc32"
# Magic bytes, length of the payload, its CRC-32, room for later versions.
_HEADER = struct.Struct("<8sQI12x")
_MAGIC = b"CTRBCKP1"
_ZIP = b"PK\x03\x04"  # how the file of an earlier version begins
_BLOCK = 1 << 24  # bytes read at once when a checksum is verified


def save_weights(path: Path, model: nn.Module) -> None:
    """Write the model's `state_dict` as safetensors, under the names of the released checkpoints."""
    save_state(path, model.state_dict())


def save_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a `state_dict` as safetensors, with its checksum."""
    # Clones, because parts of a merged table share memory, which the format refuses.
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    # One entry only: safetensors writes several in no fixed order, and equal weights should be equal files.
    metadata = {CHECKSUM: f"{checksum(copies):08x}"}
    with atomic_path(path) as partial:
        safetensors.torch.save_file(copies, partial, metadata)


def checksum(state: Mapping[str, Tensor]) -> int:
    """CRC-32 over name, type, shape and bytes of every tensor, in the order of the names."""
    value = 0
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return value


def load_weights(path: Path, model: nn.Module) -> None:
    """Load a `state_dict` strictly, from safetensors or from a FuxiCTR checkpoint (`.model`, `.pt`).

    Raises:
        DataError: the file is missing, damaged, or of another model (with the names that differ).
    """
    state = _read_state(path)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise DataError(f"{path}: not a state_dict, which maps names of parameters to tensors")
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise DataError(f"{path}: weights of another model or feature map: {first}") from error


def check_weights(path: Path) -> None:
    """Read a safetensors file and compare its checksum, if it has one.

    Raises:
        DataError: the file is missing or damaged.
    """
    _read_state(path)


def _read_state(path: Path) -> Any:
    try:
        if path.suffix != ".safetensors":
            return torch.load(path, map_location="cpu", weights_only=True)
        with safetensors.safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            stored = (file.metadata() or {}).get(CHECKSUM)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except Exception as error:  # an unpickler raises anything on damaged bytes
        raise DataError(
            f"{path}: not a readable checkpoint, damaged or truncated: run the experiment again with --fresh"
        ) from error
    if stored is not None and stored != f"{checksum(state):08x}":
        raise DataError(f"{path}: damaged, its checksum does not match: run the experiment again with --fresh")
    return state


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a training state of tensors, numbers, texts, lists and dicts, with its checksum."""
    with atomic_path(path) as partial, partial.open("wb") as stream:
        stream.write(bytes(_HEADER.size))
        payload = _Counted(stream)
        # To a stream, because torch's own file writer does not say why it failed.
        torch.save(state, cast("IO[bytes]", payload))
        stream.seek(0)
        stream.write(_HEADER.pack(_MAGIC, payload.length, payload.crc32))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a training state.

    Raises:
        DataError: damaged, with the remedy.
    """
    try:
        with path.open("rb") as stream:
            is_whole, state = _verify(stream), None
            if is_whole:
                state = torch.load(cast("IO[bytes]", _Payload(stream)), map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler raises anything on damaged bytes
        raise DataError(f"{path}: damaged checkpoint: delete it, or start over with --fresh") from error
    if not is_whole:
        raise DataError(
            f"{path}: damaged checkpoint, its checksum does not match: delete it, or start over with --fresh"
        )
    if not isinstance(state, dict):
        raise DataError(f"{path}: not a checkpoint: delete it, or start over with --fresh")
    return state


def _verify(stream: IO[bytes]) -> bool:
    """Whether the payload is what its header says; the stream is left where it begins."""
    header = stream.read(_HEADER.size)
    if header.startswith(_ZIP):
        stream.seek(0)
        return True
    if len(header) < _HEADER.size or not header.startswith(_MAGIC) or any(header[20:]):
        raise ValueError("neither a checkpoint nor one of an earlier version")
    _, length, stored = _HEADER.unpack(header)
    found, count = 0, 0
    while block := stream.read(_BLOCK):
        found, count = zlib.crc32(block, found), count + len(block)
    stream.seek(_HEADER.size)
    return (count, found) == (length, stored)


class _Counted:
    """A stream that `torch.save` may write to; it counts the bytes and their CRC-32."""

    def __init__(self, stream: IO[bytes]):
        self._stream, self.length, self.crc32 = stream, 0, 0

    def write(self, data: Any) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        written = self._stream.write(data)
        self.length += written
        return written

    def flush(self) -> None:
        self._stream.flush()


class _Payload(io.RawIOBase):
    """The rest of a stream, from where it stands, as a file of its own."""

    def __init__(self, stream: IO[bytes]):
        self._stream, self._start = stream, stream.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._stream.seek(offset + (self._start if whence == os.SEEK_SET else 0), whence) - self._start

    def tell(self) -> int:
        return self._stream.tell() - self._start

    def readinto(self, buffer: Any) -> int:
        return int(self._stream.readinto(buffer))  # type: ignore[attr-defined]


class CheckpointSchedule:
    """When the next checkpoint of a training run is due.

    Args:
        steps: every so many steps of the run; None for never.
        seconds: at the first step after which so many have passed since the last checkpoint; None for never.
    """

    def __init__(self, steps: int | None, seconds: float | None):
        self._steps, self._seconds = steps, seconds
        self.restart()

    def restart(self) -> None:
        """Count the time from now on: training begins, or a checkpoint has just been written."""
        self._since = time.monotonic()  # a clock that nobody sets

    def is_due(self, total_steps: int) -> bool:
        """Whether a checkpoint is to be written after this step, counted from 1; the device is not waited for."""
        if self._seconds is not None:
            return time.monotonic() - self._since >= self._seconds
        return self._steps is not None and total_steps % self._steps == 0


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every random generator that training may draw from."""
    name, keys, position, has_gauss, cached = cast("tuple[str, Any, int, int, float]", np.random.get_state())
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": list(random.getstate()),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set every generator to a `random_state`."""
    torch.set_rng_state(state["torch"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
