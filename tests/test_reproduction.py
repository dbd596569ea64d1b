# SPDX-License-Identifier: Apache-2.0
"""MovieLens-1M from the raw archive to the level of the published AUC; hours on two CPU cores, so the figures that are in
the repository are checked against the reports beside them.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, load_script

from ctrbench.evidence import problems_of, read_report
from ctrbench.leaderboard.collect import collect
from ctrbench.suite import load_suite

FOLDER = ROOT / "benchmarks" / "leaderboard" / "ML_1M"
SEEDS = [2024, 2025, 2026, 2027, 2028]


@pytest.fixture(scope="module")
def published() -> dict[str, dict[str, Any]]:
    """The lines of the published leaderboard by expid."""
    if not (FOLDER / "README.md").is_file():
        pytest.skip(f"{FOLDER}/README.md is not there yet: benchmarks/reproduce_ml_1m.py writes it")
    with (FOLDER / "leaderboard.csv").open(encoding="utf-8") as stream:
        return {line["expid"]: line for line in csv.DictReader(stream)}


def reports_of(expid: str) -> dict[int, dict[str, Any]]:
    """The reports of an experiment by seed, as they lie in the repository."""
    found = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob(f"{expid}/seed_*/report.json"))
    ]
    return {report["seed"]: report for report in found}


@pytest.mark.reproduction
def test_the_means_reach_the_published_level(raw_data: Path) -> None:
    archive = raw_data / "ml-1m" / "ml-1m.zip"
    if not archive.is_file():
        pytest.skip(f"{archive} is not there")
    script = ROOT / "benchmarks" / "reproduce_ml_1m.py"
    subprocess.run([sys.executable, str(script), "--raw", str(archive), "--gpu", "-1", "-1"], check=True)
    assert (FOLDER / "README.md").is_file()


def test_the_figures_in_the_repository_come_from_reports(published: dict[str, dict[str, Any]]) -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    hashes = set()
    for expid, line in published.items():
        reports = reports_of(expid)
        assert list(reports) == SEEDS and line["seeds"] == " ".join(map(str, SEEDS))
        values = [report["metrics"]["test"]["AUC"] for report in reports.values()]
        mean, deviation = statistics.fmean(values), statistics.stdev(values)
        assert (float(line["mean"]), float(line["deviation"])) == pytest.approx((mean, deviation), abs=1e-12)
        assert f"| {mean:.6f} ± {deviation:.6f} |" in page and f"| {expid} " in page
        hashes |= {report["data_hash"] for report in reports.values()}
    assert hashes == {next(iter(published.values()))["data_hash"]}
    means = [float(line["mean"]) for line in published.values()]
    assert means == sorted(means, reverse=True)


def test_they_reach_the_published_level(published: dict[str, dict[str, Any]]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for expid, floor in load_script(ROOT / "benchmarks" / "reproduce_ml_1m.py").FLOOR.items():
        values = [report["metrics"]["test"]["AUC"] for report in reports_of(expid).values()]
        assert statistics.fmean(values) >= floor
        assert f"{statistics.fmean(values):.6f} ± {statistics.stdev(values):.6f}" in readme


def test_the_evidence_in_the_repository_is_whole(published: dict[str, dict[str, Any]]) -> None:
    """Every run of the suite is there, sealed, entered in the ledger, and as the suite's settings are now."""
    for expid in published:
        for seed in SEEDS:
            run_dir = FOLDER / expid / f"seed_{seed}"
            assert problems_of(run_dir, read_report(run_dir)) == [], run_dir
    suite = load_suite("ml_1m", ROOT)
    assert {expid for _, expid, _ in suite.experiments} <= set(published)
    board = collect(FOLDER)
    assert {row.expid for row in board.tables[0].rows} == set(published)
    for row in board.tables[0].rows:  # the data of whoever runs this may be others
        assert [problem for problem in row.problems if "its data are others now" not in problem] == []
    # Weights stay where they were made: a row some of whose runs came without theirs is recorded.
    assert {line["status"] for line in published.values()} <= {"proven", "recorded"}
