# SPDX-License-Identifier: Apache-2.0
"""Ceilings: what is measured, that it is measured once, and that a bad cache is no obstacle."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ctrbench import ceilings as module
from ctrbench.ceilings import Ceilings, cache_file, ceilings, measure, measure_copy, measure_product

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Measurements of milliseconds, stored nowhere that matters."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(module, "PRODUCT_ROWS", {"cpu": (16, 64)})
    monkeypatch.setattr(module, "SECONDS", 0.002)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The precisions that were measured."""
    seen: list[str] = []

    def counted(device: torch.device, precision: str) -> Ceilings:
        seen.append(precision)
        return measure(device, precision)

    monkeypatch.setattr(module, "measure", counted)
    return seen


def test_both_rates_follow_from_the_shortest_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "best_seconds", lambda *_: 1e-5)
    assert measure_copy(CPU) == pytest.approx(2 * (1 << 16) / 1e-5)
    assert measure_product(CPU, "fp32") == pytest.approx(2 * 64**3 / 1e-5)


def test_a_product_that_is_slow_already_is_not_made_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "best_seconds", lambda *_: 1.0)
    assert measure_product(CPU, "bf16") == 2 * 16**3


def test_the_shortest_of_at_least_three_calls_counts() -> None:
    calls: list[int] = []
    seconds = module.best_seconds(lambda: calls.append(1), CPU, seconds=0.0)
    assert len(calls) == 1 + module.MIN_REPEATS and 0 <= seconds < 0.1


def test_measuring_leaves_precision_and_random_numbers_alone() -> None:
    torch.manual_seed(1)
    state, precision = torch.get_rng_state(), torch.get_float32_matmul_precision()
    found = measure(CPU, "tf32")
    assert 0 < found.bytes_per_second < math.inf and 0 < found.flops_per_second < math.inf
    assert torch.equal(state, torch.get_rng_state()) and torch.get_float32_matmul_precision() == precision


def test_measured_once_for_each_precision_and_number_of_threads(count: list[str]) -> None:
    assert ceilings(CPU, may_measure=False) is None and not cache_file().exists()
    first = ceilings(CPU)
    assert ceilings(CPU) == first == ceilings(CPU, may_measure=False)
    assert ceilings(CPU, "bf16") != first and count == ["fp32", "bf16"]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert ceilings(CPU, may_measure=False) is None
    finally:
        torch.set_num_threads(threads)
    assert ceilings(CPU, "bf16") is not None and count == ["fp32", "bf16"]


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_file() == tmp_path / "cache" / "ctrbench" / "ceilings.json"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_file() == tmp_path / "home" / ".cache" / "ctrbench" / "ceilings.json"


@pytest.mark.parametrize(
    "damage",
    [
        lambda stored: "not json",
        lambda stored: json.dumps([stored]),
        lambda stored: json.dumps(dict.fromkeys(stored, 5)),
        lambda stored: json.dumps({key: {**entry, "more": 1} for key, entry in stored.items()}),
        lambda stored: json.dumps({key: {**entry, "bytes_per_second": -1.0} for key, entry in stored.items()}),
        lambda stored: json.dumps({key: {**entry, "flops_per_second": "fast"} for key, entry in stored.items()}),
    ],
)
def test_a_damaged_cache_is_measured_anew(damage: Any, count: list[str]) -> None:
    ceilings(CPU)
    cache_file().write_text(damage(json.loads(cache_file().read_text())))
    assert ceilings(CPU, may_measure=False) is None
    found = ceilings(CPU)
    assert found is not None and len(count) == 2
    assert ceilings(CPU, may_measure=False) == found


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert isinstance(ceilings(CPU), Ceilings)


def test_a_device_without_memory_for_it_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Ceilings:
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(module, "measure", full)
    assert ceilings(CPU) is None


def test_a_precision_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="precision must be one of fp32, tf32, bf16, got 'fp8'"):
        measure(CPU, "fp8")
