# SPDX-License-Identifier: Apache-2.0
"""TPE with pruning finds on MovieLens-1M what random search finds, for the same training. Slow, and needs the archive."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RAW = Path(os.environ.get("CTRBENCH_RAW", ROOT.parent / "shared" / "data")) / "ml-1m" / "ml-1m.zip"


@pytest.mark.slow
@pytest.mark.skipif(not RAW.is_file(), reason=f"{RAW} is not there: set CTRBENCH_RAW to a folder with ml-1m/ml-1m.zip")
def test_samplers_on_movielens(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "tuner_samplers.py"
    command = [sys.executable, str(script), "--raw", str(RAW), "--repeats", "1", "--output", str(tmp_path / "samplers")]
    subprocess.run(command, check=True)
    report = json.loads((tmp_path / "samplers.json").read_text())
    best = {}
    for method, [trials] in report["sweeps"].items():
        assert sum(trial["epochs"] for trial in trials) <= report["epochs"]
        best[method] = max(trial["objective"] for trial in trials if trial["state"] == "complete")
    pruned = [trial for trial in report["sweeps"]["tpe with pruning"][0] if trial["state"] == "pruned"]
    assert pruned and min(best.values()) > 0.83 and best["tpe with pruning"] > best["random"] - 0.002
    assert (tmp_path / "samplers.md").read_text().count("|") > 15
