# SPDX-License-Identifier: Apache-2.0
"""MovieLens-1M from the raw archive to the level of the published AUC; half an hour on two CPU cores."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, load_script


def published_reports(expid: str) -> list[dict[str, object]]:
    folder = ROOT / "benchmarks" / "leaderboard" / "ML_1M" / expid
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("seed_*/report.json"))]


@pytest.mark.reproduction
def test_the_mean_over_three_seeds_reaches_the_published_level(raw_data: Path) -> None:
    archive = raw_data / "ml-1m" / "ml-1m.zip"
    if not archive.is_file():
        pytest.skip(f"{archive} is not there")
    script = ROOT / "benchmarks" / "reproduce_ml_1m.py"
    subprocess.run([sys.executable, str(script), "--raw", str(archive)], check=True)
    test_the_figures_in_the_repository_come_from_reports_and_reach_the_level()


def test_the_figures_in_the_repository_come_from_reports_and_reach_the_level() -> None:
    script = load_script(ROOT / "benchmarks" / "reproduce_ml_1m.py")
    page = (ROOT / "benchmarks" / "leaderboard" / "ML_1M.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for expid, floor in script.FLOOR.items():
        reports = published_reports(expid)
        assert sorted(report["seed"] for report in reports) == [2024, 2025, 2026]
        assert len({report["data_hash"] for report in reports}) == 1
        values = [report["metrics"]["test"]["AUC"] for report in reports]  # type: ignore[index]
        mean = statistics.fmean(values)
        assert mean >= floor
        shown = f"{mean:.6f} ± {statistics.stdev(values):.6f}"
        assert shown in page and shown in readme
