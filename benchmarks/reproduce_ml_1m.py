# SPDX-License-Identifier: Apache-2.0
"""From ml-1m.zip to a table of test AUC: DCNv3 and SDCNv3 on MovieLens-1M, the published settings, several seeds.

    python benchmarks/reproduce_ml_1m.py --raw PATH/ml-1m.zip --seeds 2024 2025 2026

Runs what is not finished in runs/ML_1M/, then copies every report and curve to benchmarks/leaderboard/ML_1M/ and
computes ML_1M.md beside it from these reports. Takes 5 to 10 minutes a model and seed on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from ctrbench.config import load_experiment
from ctrbench.files import write_text
from ctrbench.leaderboard import read_reports, summarize, to_markdown

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "benchmarks" / "leaderboard"
# Test AUC of the authors' logs, one run each on a split of their own that is not available (model READMEs).
PUBLISHED = {"SDCNv3_ML_1M": 0.907562, "DCNv3_ML_1M": 0.905912}
# What a run on the default split must reach in the mean over seeds.
FLOOR = {"SDCNv3_ML_1M": 0.9035, "DCNv3_ML_1M": 0.9025}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw", type=Path, help="ml-1m.zip; not needed when data/raw/ML_1M is prepared")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2024, 2025, 2026])
    parser.add_argument("--gpu", type=int, default=-1)
    arguments = parser.parse_args()
    if not (ROOT / "data" / "raw" / "ML_1M" / "train.csv").is_file():
        if arguments.raw is None:
            parser.error("--raw PATH/ml-1m.zip is needed once, see data/README.md")
        _call("data/prepare/ml_1m.py", "--raw", str(arguments.raw.resolve()))
    for seed in arguments.seeds:
        for expid in PUBLISHED:
            _run(expid, seed, arguments.gpu)
    print(publish(arguments.seeds))
    return 0


def publish(seeds: list[int]) -> str:
    """Copy reports and curves into the repository and write the table; returns the table."""
    reports = [
        report
        for report in read_reports(ROOT / "runs" / "ML_1M")
        if report["expid"] in PUBLISHED and report["seed"] in seeds
    ]
    for report in reports:
        target = OUTPUT / "ML_1M" / report["expid"] / f"seed_{report['seed']}"
        target.mkdir(parents=True, exist_ok=True)
        for name in ("report.json", "metrics.jsonl"):
            shutil.copyfile(Path(report["run_dir"]) / name, target / name)
    text = _page(reports)
    write_text(OUTPUT / "ML_1M.md", text)
    return text


def _page(reports: list[dict[str, Any]]) -> str:
    lines = [
        "# MovieLens-1M",
        "",
        f"Made by `{shlex.join(['python', 'benchmarks/reproduce_ml_1m.py', '--raw', 'PATH/ml-1m.zip'])}` from the reports",
        "in `ML_1M/`; the best epoch is chosen on the validation split alone. Split: `data/prepare/ml_1m.py`, seed 2018.",
        "",
        to_markdown(summarize(reports)),
        "",
    ]
    for expid, published in PUBLISHED.items():
        values = [r["metrics"]["test"]["AUC"] for r in reports if r["expid"] == expid]
        mean = statistics.fmean(values)
        lines.append(
            f"- {expid}: mean test AUC {mean:.6f} over {len(values)} seeds, published {published:.6f} on another split "
            f"({mean - published:+.6f})."
        )
    lines += ["", "| experiment | seed | test AUC | test logloss | best epoch | rows/s | commit | data hash |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for r in sorted(reports, key=lambda r: (r["expid"], r["seed"])):
        test, commit = r["metrics"]["test"], str(r["environment"]["git_commit"])
        lines.append(
            f"| {r['expid']} | {r['seed']} | {test['AUC']:.6f} | {test['logloss']:.6f} | {r['best_epoch']} | "
            f"{r['train_rows_per_second']:,.0f} | {commit[:12]} | {r['data_hash'][:12]} |"
        )
    machines = sorted({json.dumps(_machine(r), sort_keys=True) for r in reports})
    lines += ["", "Machine and versions:", "", "```", *machines, "```", ""]
    return "\n".join(lines)


def _machine(report: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in report["environment"].items() if key != "git_commit"}


def _run(expid: str, seed: int, gpu: int) -> None:
    zoo = ROOT / "model_zoo" / expid.split("_")[0]
    experiment = load_experiment(zoo / "config", expid, zoo, seed=seed)
    report = experiment.run_dir / "report.json"
    is_done = (experiment.run_dir / "DONE").exists()
    if is_done and json.loads(report.read_text(encoding="utf-8"))["config_hash"] == experiment.config_hash:
        return
    _call(f"{zoo.relative_to(ROOT)}/run_expid.py", "--expid", expid, "--seed", str(seed), "--gpu", str(gpu))


def _call(script: str, *arguments: str) -> None:
    print("$", shlex.join(["python", script, *arguments]), flush=True)
    subprocess.run([sys.executable, script, *arguments], cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main())
