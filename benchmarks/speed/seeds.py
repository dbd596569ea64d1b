# SPDX-License-Identifier: Apache-2.0
"""Time several seeds of SDCNv3 trained at once against one seed: in one stack, in parallel processes, one after the other.

    python benchmarks/speed/seeds.py --output benchmarks/speed/results/seeds.json

Generated data of MovieLens-1M's shape. "one" is one seed's training steps at its best number of threads, "fuxictr, one" the
same steps by the installed FuxiCTR. The others train all seeds for as many steps each: "stacked" as `ctrbench run --seeds`
with a stack does, "processes" as `ctrbench bench --gpu -1 -1` does, in one process of one thread for each core, "in turn" in
one process. Start-up, evaluation and the data's loading are outside the clock. Every figure comes from a process of its own,
the forms take turns, and medians count.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import ROOT, describe, environment, markdown, run_worker, spread, use_cores, work, write_report
from shapes import SHAPES, Shape, make_model, read_columns, write_columns

CORES = 2
WARM_UP_STEPS = 3
SMALL = {"embedding_dim": 4, "num_deep_cross_layers": 2, "num_shallow_cross_layers": 2}
# By name: rows of a batch, steps that are timed, and what differs from the published model.
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "SDCNv3, B = 4096": (4096, 40, {}),
    "SDCNv3, B = 128": (128, 80, {}),
    "SDCNv3 with D = 4 and 2 + 2 layers, B = 128": (128, 120, SMALL),
}
# By form: threads of torch in each process.
FUXICTR = "fuxictr, one"
FORMS = {"one": (1, 2), FUXICTR: (1, 2), "stacked": (1, 2), "in turn": (1,), "processes": (1,)}


def shape_of_case(case: str) -> Shape:
    """MovieLens-1M's shape with what a case changes."""
    batch_size, _, changes = CASES[case]
    shape = SHAPES["ML_1M"]
    return dataclasses.replace(shape, batch_size=batch_size, params={**shape.params, **changes})


class Seed:
    """One seed's trainer, its batches and the state of its random generators.

    Args:
        case: a key of CASES.
        data: .npz of the columns.
        seed: of the order; the weights make no difference here.
    """

    def __init__(self, case: str, data: Path, seed: int):
        from ctrbench.batches import Batches
        from ctrbench.stacked_inputs import RandomState
        from ctrbench.trainer import Trainer

        shape = shape_of_case(case)
        self.trainer = Trainer(*make_model(shape))
        self.trainer.model.train()
        self.state = RandomState(self.trainer.device)
        self.batches = iter(Batches(read_columns(data), shape.batch_size, shuffle=True, seed=seed))

    def train(self, steps: int) -> None:
        """Take `steps` steps alone."""
        for _ in range(steps):
            float(self.trainer.step(next(self.batches)))


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """One figure, in the process of a worker: seconds by the clock, and of all processors together."""
    form, case, data = settings["form"], settings["case"], Path(settings["data"])
    steps, count = CASES[case][1], 1 if form == "one" else settings["num_seeds"]
    if form == "processes":
        return measure_processes(case, data, count)
    if form == FUXICTR:
        return measure_fuxictr(case, data, steps)
    seeds = [Seed(case, data, seed) for seed in range(1, count + 1)]
    if form == "stacked":
        return measure_stack(seeds, steps)
    for seed in seeds:
        seed.train(WARM_UP_STEPS)
    watch = Stopwatch()
    for seed in seeds:
        seed.train(steps)
    return watch.read()


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """By the clock, and of all processors that worked for this process: the latter is less disturbed by others."""
        seconds, cpu_seconds = self._started
        return {"seconds": time.perf_counter() - seconds, "cpu_seconds": time.process_time() - cpu_seconds}


def measure_fuxictr(case: str, data: Path, steps: int) -> dict[str, float]:
    """`steps` steps of one seed by FuxiCTR, whose batches are in place already."""
    from sides import Fuxictr

    side = Fuxictr(shape_of_case(case), {"device": "cpu", "train_file": str(data), "eval_file": str(data)})
    side.model.train()
    batches, watch = iter(side.resident(data, shuffle=True)), Stopwatch()
    for step in range(WARM_UP_STEPS + steps):
        if step == WARM_UP_STEPS:
            watch = Stopwatch()
        side.step(next(batches))
    return watch.read()


def measure_stack(seeds: list[Seed], steps: int) -> dict[str, float]:
    """`steps` steps of all seeds in a stack."""
    from ctrbench.stacked import Stack

    stack, states = Stack([seed.trainer for seed in seeds]), [seed.state for seed in seeds]
    watch = Stopwatch()
    for step in range(WARM_UP_STEPS + steps):
        if step == WARM_UP_STEPS:
            watch = Stopwatch()
        losses, states = stack.step([next(seed.batches) for seed in seeds], states)
        losses.tolist()
    return watch.read()


def measure_processes(case: str, data: Path, count: int) -> dict[str, float]:
    """From the moment that all processes are ready until they have trained all seeds."""
    context = multiprocessing.get_context("spawn")
    barrier, taken = context.Barrier(CORES + 1, timeout=600), context.Value("i", 0)
    worked = context.Value("d", 0.0)
    arguments = case, data, count, barrier, taken, worked
    processes = [context.Process(target=_train_some, args=arguments) for _ in range(CORES)]
    for process in processes:
        process.start()
    barrier.wait()
    watch = Stopwatch()
    barrier.wait()
    seconds = watch.read()["seconds"]
    for process in processes:
        process.join()
    return {"seconds": seconds, "cpu_seconds": worked.value}


def _train_some(case: str, data: Path, count: int, barrier: Any, taken: Any, worked: Any) -> None:
    sys.path.insert(0, str(ROOT))
    seeds = [Seed(case, data, seed) for seed in range(1, count + 1)]
    Seed(case, data, 0).train(WARM_UP_STEPS)
    barrier.wait()
    watch = Stopwatch()
    while True:
        with taken.get_lock():
            number, taken.value = taken.value, taken.value + 1
        if number >= count:
            break
        seeds[number].train(CASES[case][1])
    with worked.get_lock():
        worked.value += watch.read()["cpu_seconds"]
    barrier.wait()


def run_all(num_seeds: int, repeats: int, scratch: Path) -> dict[str, Any]:
    """Every figure, as often as `repeats` says, in turns."""
    data = scratch / "train.npz"
    write_columns(SHAPES["ML_1M"], max(size * (steps + WARM_UP_STEPS) for size, steps, _ in CASES.values()), data)
    jobs = [(case, form, threads) for case in CASES for form, counts in FORMS.items() for threads in counts]
    taken: dict[tuple[str, str, int], list[dict[str, float]]] = {job: [] for job in jobs}
    for _ in range(repeats):
        for case, form, threads in jobs:
            settings = {"form": form, "case": case, "data": str(data), "num_seeds": num_seeds}
            taken[case, form, threads].append(run_worker(Path(__file__).resolve(), settings, threads, 600, 1.0))
            figures = taken[case, form, threads][-1]
            shown = f"{figures['seconds']:.2f} s, {figures['cpu_seconds']:.2f} s of processors"
            print(f"  {case}: {form}, {threads} threads: {shown}", file=sys.stderr, flush=True)
    cases = {}
    for case, (size, steps, _) in CASES.items():
        found: dict[str, Any] = {"batch_size": size, "steps": steps}
        for kind in ("seconds", "cpu_seconds"):
            by_form = {f"{form}, {t} threads": spread(run[kind] for run in taken[c, form, t])
                       for c, form, t in jobs if c == case}  # fmt: skip
            one = min(figures["median"] for name, figures in by_form.items() if name.startswith("one,"))
            ratios = {name: figures["median"] / one for name, figures in by_form.items()}
            found |= {kind: by_form, f"{kind}_to_one_seed": ratios}
        cases[case] = found
    machine = environment(["torch", "fuxictr", "numpy"])
    return {"num_seeds": num_seeds, "repeats": repeats, "machine": machine, "cases": cases}


def to_markdown(result: dict[str, Any]) -> str:
    """The table for the README of this folder."""
    rows = []
    for case, figures in result["cases"].items():
        for name, seconds in figures["seconds"].items():
            span = f"{seconds['min']:.2f} to {seconds['max']:.2f}"
            ratios = [f"{figures[f'{kind}_to_one_seed'][name]:.2f}" for kind in ("seconds", "cpu_seconds")]
            worked = f"{figures['cpu_seconds'][name]['median']:.2f}"
            rows.append([case, name, f"{seconds['median']:.2f}", span, worked, *ratios])
    head = f"{result['num_seeds']} seeds, medians of {result['repeats']}; {describe(result['machine'])}."
    header = ["", "form", "seconds", "lowest to highest", "processor seconds", "to one seed", "processor, to one seed"]
    return "\n".join([head, "", markdown(header, rows, num_texts=2)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        sys.path.insert(0, str(ROOT))
        work(arguments.worker, measure)
        return 0
    use_cores(CORES)
    with tempfile.TemporaryDirectory() as scratch:
        result = run_all(arguments.seeds, arguments.repeats, Path(scratch))
    write_report(arguments.output, result)
    print(to_markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
