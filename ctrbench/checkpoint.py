# SPDX-License-Identifier: Apache-2.0
"""Weights and training state on disk: written atomically, read without running anything they contain."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from ctrbench.errors import DataError
from ctrbench.files import atomic_path


def save_weights(path: Path, model: nn.Module) -> None:
    """Write the model's `state_dict` as safetensors, under the names of the released checkpoints."""
    save_state(path, model.state_dict())


def save_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a `state_dict` as safetensors."""
    # Clones, because parts of a merged table share memory, which the format refuses.
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    with atomic_path(path) as partial:
        safetensors.torch.save_file(copies, partial)


def load_weights(path: Path, model: nn.Module) -> None:
    """Load a `state_dict` strictly, from safetensors or from a FuxiCTR checkpoint (`.model`, `.pt`).

    Raises:
        DataError: the file is missing, damaged, or of another model (with the names that differ).
    """
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except Exception as error:  # an unpickler raises anything on damaged bytes
        raise DataError(f"{path}: not a readable checkpoint, damaged or truncated: run the experiment again") from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise DataError(f"{path}: not a state_dict, which maps names of parameters to tensors")
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise DataError(f"{path}: weights of another model or feature map: {first}") from error


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a training state of tensors, numbers, texts, lists and dicts."""
    with atomic_path(path) as partial, partial.open("wb") as stream:
        torch.save(state, stream)  # to a stream, because torch's own file writer does not say why it failed


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a training state.

    Raises:
        DataError: damaged, with the remedy.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler raises anything on damaged bytes
        raise DataError(f"{path}: damaged checkpoint: delete it, or start over with --fresh") from error
    if not isinstance(state, dict):
        raise DataError(f"{path}: not a checkpoint: delete it, or start over with --fresh")
    return state


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
