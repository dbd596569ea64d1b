# SPDX-License-Identifier: Apache-2.0
"""The command: a tuner file and slots -> a finished sweep and its results."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import uuid
from pathlib import Path
from typing import Any

from ctrbench.errors import ConfigError
from ctrbench.files import sha256_of_value
from ctrbench.tuner.definition import Sweep, load_sweep
from ctrbench.tuner.display import Display, first_line, make_display
from ctrbench.tuner.engine import Engine, num_settings
from ctrbench.tuner.records import TrialRecord
from ctrbench.tuner.sampling import make_pruner
from ctrbench.tuner.store import STALE_SECONDS, Store
from ctrbench.yamlfile import shown


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line of a sweep.

    Attributes:
        config: the tuner file.
        gpus: a slot for each; -1 is the CPU.
        tag: run the trials whose expid contains it.
        zoo: the model folder, where the base configuration does not tell.
        name: of the sweep; by default the tuner file's.
        storage: URL of any Optuna storage; by default a file in the sweep's folder.
        fresh: start over.
        retry_failed: run failed trials once more.
        dry_run: list and check the trials, run nothing.
        stale_seconds: silence after which a process on another machine counts as gone.
    """

    config: Path
    gpus: list[int]
    tag: str | None = None
    zoo: Path | None = None
    name: str | None = None
    storage: str | None = None
    fresh: bool = False
    retry_failed: bool = False
    dry_run: bool = False
    stale_seconds: float = STALE_SECONDS


def tune(options: Options) -> int:
    """Run a sweep to its end; the exit status.

    Returns:
        0 if all trials that were run are complete or pruned, 1 if one failed, 130 if it was stopped.

    Raises:
        CtrbenchError: bad input, or a store that is lost.
    """
    if any(gpu != -1 for gpu in options.gpus):
        from ctrbench.run import check_gpu

        for gpu in dict.fromkeys(options.gpus):
            check_gpu(gpu)
    sweep = load_sweep(options.config, options.zoo, options.tag, options.name, not options.dry_run)
    if options.dry_run:
        from ctrbench.tuner.dry_run import describe

        lines, problems = describe(sweep, options.gpus)
        print("\n".join(lines))
        if problems:
            raise ConfigError(problems)
        return 0
    store = Store(
        sweep.name,
        sweep.folder,
        options.storage,
        sweep.direction,
        make_pruner(sweep.config.pruner),
        options.stale_seconds,
        options.fresh,
    )
    try:
        return _run(sweep, store, options)
    finally:
        store.close()


def _run(sweep: Sweep, store: Store, options: Options) -> int:
    if options.fresh:
        for name in ("config", "best_config", "errors"):
            shutil.rmtree(sweep.folder / name, ignore_errors=True)
    spec = sweep.spec()
    _check_same(sweep, store.agree("spec", spec), spec, options)
    # A sweep that is started over takes nothing from the run directories of the one before.
    nonce = store.agree("nonce", uuid.uuid4().hex if options.fresh else "")
    sweep_id = sha256_of_value([spec, nonce])
    revived = store.revive(num_settings(sweep), options.retry_failed)
    before = [record for record in store.records() if record.state in ("complete", "pruned", "failed")]
    with make_display(sweep, before) as display:
        _greet(display, sweep, options, before, revived)
        engine = Engine(sweep, store, options.gpus, sweep_id, display, options.fresh)
        is_complete = engine.run()
    from ctrbench.tuner.results import final_lines, write_results

    records = store.records()
    best = write_results(sweep, records, store.study, options.gpus[0])
    if engine.num_adopted:
        display.line(
            f"{engine.num_adopted} finished runs of this sweep were taken from their run directories "
            "(--fresh runs them again)"
        )
    print("\n".join(final_lines(sweep, records, best, options.gpus[0])))
    failed = [record for record in records if record.state == "failed"]
    if failed:
        print(f"{len(failed)} failed (--retry-failed runs them again):", file=sys.stderr)
        print("\n".join(f"  {r.expid}: {first_line(r.error or '')}" for r in failed), file=sys.stderr)
    if not is_complete:
        print("stopped: the same command goes on where it was", file=sys.stderr)
        return 130
    return 1 if failed else 0


def _greet(display: Display, sweep: Sweep, options: Options, before: list[TrialRecord], revived: int) -> None:
    total = num_settings(sweep)
    what = f"{total:.0f} trials" if total < float("inf") else f"trials for {sweep.config.timeout:.0f} s"
    slots = ", ".join("cpu" if gpu < 0 else f"gpu {gpu}" for gpu in options.gpus)
    seeds = f", {len(sweep.seeds)} seeds each" if len(sweep.seeds) > 1 else ""
    display.line(f"{sweep.name}: {sweep.config.sampler}, {what}{seeds}, on {slots}; {sweep.folder}")
    if before or revived:
        display.line(f"continued: {len(before)} trials were finished before, {revived} are run again")


def _check_same(sweep: Sweep, known: dict[str, Any], spec: dict[str, Any], options: Options) -> None:
    """Refuse to mix trials of different sweeps.

    Raises:
        ConfigError: with a line for each difference.
    """
    if known == spec:
        return
    before, now = _flat(known), _flat(spec)
    changes = [
        f"{key} was {shown(before.get(key))}, is {shown(now.get(key))}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    ]
    where = (options.storage and "the store") or str(sweep.folder)
    raise ConfigError(
        f"{sweep.path}: {where} holds another sweep named '{sweep.name}' ({'; '.join(changes[:4])}"
        f"{'; ...' if len(changes) > 4 else ''}): restore it, give this one its own --name, or start over with --fresh"
    )


def _flat(spec: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`tuner_space.learning_rate` -> value."""
    flat: dict[str, Any] = {}
    for key, value in spec.items():
        if isinstance(value, dict) and not value.keys() & {"low", "high"}:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return flat
