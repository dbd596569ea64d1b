# SPDX-License-Identifier: Apache-2.0
"""Whether `compile: true` and `precision: bf16` leave the test AUC of DCNv3 on MovieLens-1M where it is, over eight seeds.

    python data/prepare/ml_1m.py --raw PATH/ml-1m.zip
    python benchmarks/speed/accuracy.py --output benchmarks/speed/results/accuracy.json

The published configuration, trained to its early stopping in each form: as it runs by default, compiled, and with matrix
products in bfloat16. Runs take turns on one-thread processes, one for each core, and go on where they were stopped. About forty
minutes on two CPU cores, most of it bfloat16, which a CPU without units for it computes slowly.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measure import ROOT, describe, environment, markdown, write_report

from ctrbench.config import load_experiment
from ctrbench.leaderboard.statistics import compare, summarize

EXPID = "DCNv3_ML_1M"
ZOO = ROOT / "model_zoo" / "DCNv3"
DEFAULT = "default"
# What each form sets; the costliest first, so that no process waits for another in the end.
FORMS = {"precision: bf16": ["precision=bf16"], "compile: true": ["compile=true"], DEFAULT: []}
METRICS = ("AUC", "logloss")


def words_of(form: str, seed: int) -> list[str]:
    """The `key=value` texts of a run."""
    folder = "".join(letter if letter.isalnum() else "_" for letter in form)
    return [*FORMS[form], f"seed={seed}", f"model_root=runs/accuracy/{folder}"]


def train(form: str, seed: int, run_dir: Path) -> dict[str, Any]:
    """The report of one run, which is made unless it is there."""
    if not (run_dir / "DONE").exists():
        words = [word for value in words_of(form, seed) for word in ("--set", value)]
        command = [sys.executable, str(ZOO / "run_expid.py"), "--expid", EXPID, "--gpu", "-1", *words]
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{done.stderr[-2000:]}")
    report: dict[str, Any] = json.loads((run_dir / "report.json").read_text())
    print(f"  {form}, seed {seed}: test AUC {report['metrics']['test']['AUC']:.6f}", file=sys.stderr, flush=True)
    return report


def run_all(seeds: list[int], processes: int) -> dict[str, Any]:
    """Every form with every seed."""
    jobs = list(itertools.product(FORMS, seeds))
    folders = [load_experiment(ZOO / "config", EXPID, overrides=words_of(*job)).run_dir for job in jobs]
    with ThreadPoolExecutor(processes) as pool:
        done = pool.map(lambda job, folder: train(*job, folder), jobs, folders)
        reports = dict(zip(jobs, done, strict=True))
    forms = {form: [_kept(seed, reports[form, seed]) for seed in seeds] for form in FORMS}
    machine = environment(["torch", "fuxictr", "numpy"])
    commits = sorted({str(report["environment"].get("git_commit")) for report in reports.values()})
    hashes = sorted({report["data_hash"] for report in reports.values()})
    return {"expid": EXPID, "machine": machine, "commits": commits, "data_hashes": hashes, "forms": forms}


def _kept(seed: int, report: dict[str, Any]) -> dict[str, Any]:
    test, valid = report["metrics"]["test"], report["metrics"]["valid"]
    keys = ("config_hash", "model_hash", "epochs", "best_epoch")
    figures = {"seed": seed, **{f"test_{name}": test[name] for name in METRICS}, "valid_AUC": valid["AUC"]}
    return {**figures, **{key: report[key] for key in keys}, "train_seconds": report["timings"]["train_seconds"]}


def to_markdown(result: dict[str, Any]) -> str:
    """The table for the README of this folder."""
    by_form = {
        form: {name: {run["seed"]: run[f"test_{name}"] for run in runs} for name in METRICS}
        for form, runs in result["forms"].items()
    }
    means = {form: {name: summarize(values[name]) for name in METRICS} for form, values in by_form.items()}
    auc = {form: means[form]["AUC"] for form in means}
    count = len(auc[DEFAULT].values)
    error = (auc[DEFAULT].deviation or 0.0) / count**0.5
    lines = []
    for form in (DEFAULT, *(form for form in FORMS if form != DEFAULT)):
        line = [
            form,
            *(f"{means[form][name].mean:.6f}" for name in METRICS),
            f"{(auc[form].deviation or 0) / count**0.5:.6f}",
        ]
        if form == DEFAULT:
            lines.append([*line, "", "", ""])
            continue
        (paired,) = compare({form: by_form[form]["AUC"], DEFAULT: by_form[DEFAULT]["AUC"]})
        is_within = "yes" if abs(paired.difference) <= error else "no"
        interval = f"{paired.low:+.6f} to {paired.high:+.6f}"
        lines.append([*line, f"{paired.difference:+.6f}", interval, is_within])
    header = ["form", "test AUC", "logloss", "standard error of AUC", "difference", "95% interval", "within it"]
    head = f"{result['expid']}, {count} seeds, means; {describe(result['machine'])}."
    foot = (
        f"Runs of commit {', '.join(commit[:7] for commit in result['commits'])}. The difference is that of the mean AUC to the "
        "default form's, its interval that of a paired t test over the seeds; the last column says whether it is within the "
        "standard error of the default form's mean."
    )
    return f"{head}\n\n{markdown(header, lines)}\n\n{foot}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(2024, 2032)))
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    result = run_all(options.seeds, options.processes)
    write_report(options.output, result)
    print(to_markdown(result))


if __name__ == "__main__":
    main()
