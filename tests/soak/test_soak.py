# SPDX-License-Identifier: Apache-2.0
"""The soaks: small ones with every run of the tests, whole ones with `pytest -m slow tests/soak`.

`CTRBENCH_SOAK_SEED` and `CTRBENCH_SOAK_SCALE` (1 is the whole size) change the seed and the size of the whole ones;
`python tests/soak/summary.py` runs them too and writes benchmarks/reliability.md.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import soak_configs
import soak_cost
import soak_damage
import soak_full_disk
import soak_hostile
import soak_kills
from soak_outcome import Outcome

SEED = int(os.environ.get("CTRBENCH_SOAK_SEED", "1"))
SCALE = float(os.environ.get("CTRBENCH_SOAK_SCALE", "1"))
WHOLE = {"kills": 100, "configs": 2000, "damage": 500, "full_disk": 20, "cost": 3}


def check(outcome: Outcome, count: int) -> None:
    """Nothing failed, and nothing was left out."""
    assert not outcome.failures, "\n".join(outcome.failures)
    assert outcome.count == count, outcome


def test_configs(tmp_path: Path) -> None:
    outcome = soak_configs.soak(40, SEED, tmp_path)
    check(outcome, 40)
    assert outcome.results["refused"] > 20


def test_damage(tmp_path: Path) -> None:
    check(soak_damage.soak(20, SEED, tmp_path), 20)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_hostile(tmp_path: Path) -> None:
    outcome = soak_hostile.soak(SEED, tmp_path)
    check(outcome, 67)
    assert outcome.results["refused"] >= 60


def test_kills(tmp_path: Path) -> None:
    check(soak_kills.soak(3, SEED, tmp_path), 3)


def test_full_disk(tmp_path: Path) -> None:
    check(soak_full_disk.soak(2, SEED, tmp_path, is_real=False, stages=("build", "train")), 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_whole(tmp_path: Path, name: str) -> None:
    modules = {
        "kills": soak_kills, "configs": soak_configs, "damage": soak_damage, "full_disk": soak_full_disk, "cost": soak_cost,
    }  # fmt: skip
    count = max(1, round(SCALE * WHOLE[name]))
    check(modules[name].soak(count, SEED, tmp_path), count)
