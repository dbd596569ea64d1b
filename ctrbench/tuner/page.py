# SPDX-License-Identifier: Apache-2.0
"""A sweep as one self-contained HTML page: charts from charts.py as SVG, words and tables in page.html.j2.

The page loads nothing and runs no script, so that it can be mailed, archived and opened from a file.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ctrbench.charts import brief, cut, exact
from ctrbench.files import write_text
from ctrbench.tuner.charts import (
    STATES,
    best_first,
    best_so_far,
    parallel_coordinates,
    seconds_of,
    validation_curves,
)
from ctrbench.tuner.records import SweepSummary, TrialRecord

SHADES = 9  # classes c0 (worst) to c8 (best) of page.html.j2


def write_page(path: Path, sweep: SweepSummary) -> None:
    """Write the page of `sweep` to `path`, atomically.

    Args:
        path: the HTML file.
        sweep: what to show; it may have no finished trial.
    """
    write_text(path, render_page(sweep))


def render_page(sweep: SweepSummary) -> str:
    """The HTML of `sweep`'s page."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(exact=exact, brief=brief, cut=cut)
    best, looks = sweep.best, _looks(sweep)
    trials = sorted(sweep.trials, key=best_first(sweep))
    keys = list(dict.fromkeys(key for trial in sweep.trials for key in trial.values))
    metrics = list(dict.fromkeys(name for t in trials for seed in t.seeds for name in seed.metrics.get("test", {})))
    return environment.get_template("page.html.j2").render(
        sweep=sweep,
        best=best and _row(best, keys, metrics),
        counts={state: sum(trial.state == state for trial in trials) for state in STATES},
        better="higher is better" if sweep.direction == "max" else "lower is better",
        shades=range(SHADES),
        parallel=parallel_coordinates(sweep, looks),
        by_trial=best_so_far(sweep, looks, against="trials"),
        by_seconds=best_so_far(sweep, looks, against="seconds"),
        curves=validation_curves(sweep, looks),
        keys=keys,
        metrics=metrics,
        rows=[_row(trial, keys, metrics) for trial in trials],
    )


def _looks(sweep: SweepSummary) -> dict[int, str]:
    """Trial -> classes of its marks: a shade by the rank of the objective, which no outlier can squeeze; or pruned."""
    done = [t for t in sweep.trials if t.state == "complete" and t.objective is not None]
    levels = sorted({t.objective or 0.0 for t in done}, reverse=sweep.direction == "max")  # the best first
    shade = {level: round((SHADES - 1) * (1 - i / max(len(levels) - 1, 1))) for i, level in enumerate(levels)}
    looks = {t.index: "pruned" for t in sweep.trials if t.state == "pruned"}
    looks |= {t.index: f"c{shade[t.objective or 0.0]}" for t in done}
    return looks | ({sweep.best.index: "best"} if sweep.best else {})


def _row(trial: TrialRecord, keys: list[str], metrics: list[str]) -> dict[str, Any]:
    """What the table shows of a trial."""
    tests = [[s.metrics["test"][m] for s in trial.seeds if m in s.metrics.get("test", {})] for m in metrics]
    spread = _spread([seed.best_value for seed in trial.seeds])
    return {
        "trial": trial,
        "values": [(key, trial.values[key]) if key in trial.values else None for key in keys],
        "objective": "–" if trial.objective is None else f"{trial.objective:.6f}{spread}",
        "tests": [f"{statistics.fmean(values):.6f}{_spread(values)}" if values else "–" for values in tests],
        "epochs": f"{statistics.fmean(seed.epochs for seed in trial.seeds):.3g}" if trial.seeds else "–",
        "seconds": f"{seconds_of(trial):.1f}" if seconds_of(trial) else "–",
    }


def _spread(values: list[float]) -> str:
    return f" ± {statistics.stdev(values):.6f}" if len(values) > 1 else ""
