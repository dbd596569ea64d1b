# SPDX-License-Identifier: Apache-2.0
"""Run the soaks and write what they found to benchmarks/reliability.md and .json.

    python tests/soak/summary.py [--kills 100] [--configs 2000] [--damage 500] [--full-disk 20] [--cost 3] [--seed 1]
                                 [--only NAME ...] [--output benchmarks/reliability]
    python tests/soak/summary.py --only cost --ml-1m FOLDER

The first leaves out nothing; `--ml-1m` adds the cost of a run of DCNv3_ML_1M on the prepared dataset in FOLDER (train.csv,
valid.csv, test.csv), and runs of it to those that are killed. With `--only` the figures of the others stay as they were.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

ML_1M = "ML-1M"
SOAKS = ("kills", "configs", "damage", "hostile", "full_disk", "cost")


def main(argv: list[str] | None = None) -> int:
    """Run what is asked for; 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in (("kills", 100), ("configs", 2000), ("damage", 500), ("full-disk", 20), ("cost", 3)):
        parser.add_argument(f"--{name}", type=int, default=count, help=f"how many (default: {count})")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=SOAKS, default=list(SOAKS))
    parser.add_argument("--ml-1m", type=Path, help="folder of the prepared MovieLens-1M, for the cost of a real run")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).resolve().parents[2] / "benchmarks" / "reliability"
    )
    options = parser.parse_args(argv)
    stored = options.output.with_suffix(".json")
    known: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {}
    for name in options.only:
        with tempfile.TemporaryDirectory(prefix="ctrbench_soak_") as folder:
            outcome = _soak(name, options, Path(folder))
        words = [word for word in sys.argv[1:] if not word.startswith(("--output", "/"))]
        command = shlex.join(["python", "tests/soak/summary.py", *words])
        known[name] = {**outcome, "seed": options.seed, "command": command, "machine": platform.machine()}
        failures = outcome["failures"]
        print(
            f"{outcome['title']}: {outcome['count']} in {outcome['seconds']:.0f} s, {len(failures)} broken promises",
            flush=True,
        )
        print("".join(f"  {line}\n" for line in failures), end="", flush=True)
        from ctrbench.files import write_json, write_text

        write_json(stored, known)
        write_text(options.output.with_suffix(".md"), to_markdown(known))
    return 1 if any(known[name]["failures"] for name in options.only) else 0


def _soak(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import importlib

    module = importlib.import_module(f"soak_{name}")
    if name == "hostile":
        found: dict[str, Any] = module.soak(options.seed, folder).to_dict()
        return found
    if name == "kills" and options.ml_1m:
        os.environ[module.ML_1M] = str(options.ml_1m.resolve())  # which the processes that are killed read too
        module = importlib.reload(module)
    outcome = module.soak(getattr(options, name), options.seed, folder)
    if name == "cost" and options.ml_1m:
        real = _cost_on_ml_1m(module, options.ml_1m, folder)
        outcome.notes += [f"{ML_1M}, three epochs: {note}" for note in real.notes if note.startswith("run")]
        outcome.failures += [f"{ML_1M}: {failure}" for failure in real.failures]
    found = outcome.to_dict()
    return found


def _cost_on_ml_1m(module: Any, raw: Path, folder: Path) -> Any:
    from soak_kills import SIDES

    SIDES[ML_1M] = ("DCNv3_ML_1M", ())
    return module.soak(1, 2024, folder / "ml_1m", side=ML_1M, overrides=(*_ml_1m_files(raw), "epochs=3"), limit=0.03)


def _ml_1m_files(raw: Path) -> list[str]:
    return [f"{split}_data={raw.resolve() / split}.csv" for split in ("train", "valid", "test")]


def to_markdown(known: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# Reliability",
        "",
        "What was done to runs, configurations and files, and how often a promise was broken. Written by "
        "`python tests/soak/summary.py`;",
        "SECURITY.md and the README say what is promised.",
        "",
        "| soak | times | broken promises | promise | results |",
        "|---|---|---|---|---|",
    ]
    for name in SOAKS:
        if name in known:
            found = known[name]
            results = "; ".join(f"{how}: {count}" for how, count in found["results"].items())
            is_judged = name != "cost" or any(ML_1M in note for note in found["notes"])
            broken = str(len(found["failures"])) if is_judged else "not measured (--ml-1m)"
            cells = [found["title"], f"{found['count']:,}", broken, found["promise"], results]
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    for name in SOAKS:
        if name in known:
            found = known[name]
            lines += ["", f"## {found['title'][0].upper()}{found['title'][1:]}", ""]
            lines.append(f"`{found['command']}` (seed {found['seed']}, {found['seconds']:.0f} s, {found['machine']})")
            lines += ["", *(f"- {note}" for note in found["notes"])] if found["notes"] else []
            lines += ["", *(f"- broken: {line}" for line in found["failures"])] if found["failures"] else []
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
