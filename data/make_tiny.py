# SPDX-License-Identifier: Apache-2.0
"""Write the synthetic data sets, in seconds: `tiny_ctr` (below) and `tiny_mm` (make_tiny_mm.py).

    python data/make_tiny.py [--seed 2024]
    python data/make_tiny.py --dataset tiny_ctr [--output data/raw/tiny_ctr] [--rows 6000] [--seed 2024]
    python data/make_tiny.py --dataset tiny_mm [--output data/raw/tiny_mm] [--rows 32000] [--items 600] [--tags 60]

On tiny_ctr a model with feature crosses must beat one without. It has train.csv, valid.csv and test.csv (4:1:1):

| column | type | values |
|---|---|---|
| label | label | 0 or 1, 47% positive |
| user_id, item_id | categorical | long-tailed: some occur once, some only in valid or test |
| category, device, weekday, slot | categorical | 8, 4, 7 and 5 values; device is missing in 3% of rows, slot in 2% |
| price, age | numeric | missing in 5% and 10% of the rows |
| history | sequence | categories separated by '^', 0 to 12 of them (12% empty, 21% above the 6 that are kept) |

What is planted: logit = 2.0 a[device, category] + 1.6 b[weekday, slot] + 0.6 price * age (both standardised)
+ 1.6 (category is among the first 6 of history, centred) + 0.3 (u[user_id] + v[item_id]) + 0.5 c[category] - 0.25.
The tables a and b have rank one, unit variance and mean zero along both axes, so neither field tells anything without
the other. Bayes AUC (of the true probabilities, before values go missing): 0.902, on the default test split 0.911.
Logistic regression stays at 0.645 there; DCNv3_tiny reaches 0.856, SDCNv3_tiny 0.864.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ctrbench.errors import CtrbenchError, DataError
from ctrbench.files import atomic_path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also for whoever loads this file by its path
import make_tiny_mm

OUTPUT = Path(__file__).resolve().parent / "raw" / "tiny_ctr"
NUM_USERS, NUM_ITEMS, NUM_CATEGORIES, NUM_DEVICES, NUM_SLOTS = 500, 400, 8, 4, 5
KEPT_HISTORY, LONGEST_HISTORY = 6, 12


def make_tiny_ctr(output: Path, rows: int = 6000, seed: int = 2024) -> dict[str, int]:
    """Write train.csv, valid.csv and test.csv into `output`.

    Args:
        output: the folder, created when it is missing.
        rows: total over the three files.
        seed: the same seed and rows give the same bytes.

    Returns:
        The rows of each file.

    Raises:
        DataError: fewer than 60 rows.
    """
    if rows < 60:
        raise DataError(f"{output}: --rows: 60 are the fewest that make three useful files, got {rows}")
    frame, _ = generate(rows, seed)
    cuts = {"train": (0, rows * 4 // 6), "valid": (rows * 4 // 6, rows * 5 // 6), "test": (rows * 5 // 6, rows)}
    for split, (start, end) in cuts.items():
        with atomic_path(output / f"{split}.csv") as partial:
            frame.slice(start, end - start).write_csv(partial)
    return {split: end - start for split, (start, end) in cuts.items()}


def generate(rows: int, seed: int) -> tuple[pl.DataFrame, np.ndarray]:
    """The table and, for each row, the probability that its label was drawn with."""
    # The effects come from a stream of their own, so that they are the same for any number of rows.
    rng, effects = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    user, item = _long_tailed(rng, NUM_USERS, rows), _long_tailed(rng, NUM_ITEMS, rows)
    category = effects.integers(0, NUM_CATEGORIES, NUM_ITEMS)[item]
    device, weekday, slot = (rng.integers(0, n, rows) for n in (NUM_DEVICES, 7, NUM_SLOTS))
    price, age = rng.standard_normal(rows), rng.standard_normal(rows)
    length = rng.integers(1, LONGEST_HISTORY + 1, rows) * (rng.random(rows) > 0.12)
    length = np.where(rng.random(rows) < 0.5, np.minimum(length, KEPT_HISTORY), length)
    history = rng.integers(0, NUM_CATEGORIES, (rows, LONGEST_HISTORY))
    kept = np.arange(LONGEST_HISTORY) < np.minimum(length, KEPT_HISTORY)[:, None]
    seen = ((history == category[:, None]) & kept).any(1)
    logit = (
        2.0 * _interaction(effects, NUM_DEVICES, NUM_CATEGORIES)[device, category]
        + 1.6 * _interaction(effects, 7, NUM_SLOTS)[weekday, slot]
        + 0.6 * price * age
        + 1.6 * (seen - seen.mean())
        + 0.3 * (effects.standard_normal(NUM_USERS)[user] + effects.standard_normal(NUM_ITEMS)[item])
        + 0.5 * effects.standard_normal(NUM_CATEGORIES)[category]
    )
    probability = 1 / (1 + np.exp(0.25 - logit))
    label = (rng.random(rows) < probability).astype(np.int8)
    tokens = history.astype(str)
    frame = pl.DataFrame(
        {
            "label": label,
            "user_id": np.char.add("u", user.astype(str)),
            "item_id": np.char.add("i", item.astype(str)),
            "category": np.char.add("c", category.astype(str)),
            "device": _missing(rng, np.array(["phone", "tablet", "desktop", "tv"])[device], 0.03),
            "weekday": weekday,
            "slot": _missing(rng, np.char.add("s", slot.astype(str)), 0.02),
            "price": _missing(rng, np.round(np.exp(2 + 0.5 * price), 2), 0.05),
            "age": _missing(rng, np.round(40 + 12 * age, 1), 0.10),
            "history": ["^".join("c" + token for token in row[:n]) for row, n in zip(tokens, length, strict=True)],
        }
    )
    return frame, probability


def _long_tailed(rng: np.random.Generator, size: int, rows: int) -> np.ndarray:
    weight = 1 / np.arange(1, size + 1) ** 0.9
    return rng.choice(size, rows, p=weight / weight.sum())


def _interaction(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A table of rank one, mean zero along both axes and unit variance: an interaction without main effects."""
    rows, columns = (vector - vector.mean() for vector in (rng.standard_normal(height), rng.standard_normal(width)))
    table = np.outer(rows, columns)
    scaled: np.ndarray = table / table.std()
    return scaled


def _missing(rng: np.random.Generator, values: np.ndarray, share: float) -> pl.Series:
    return pl.select(pl.when(pl.Series(rng.random(len(values)) >= share)).then(pl.Series(values))).to_series()


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the synthetic data sets.")
    parser.add_argument("--dataset", choices=[*MAKERS, "all"], default="all")
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--output", type=Path, help="folder for the files of one data set")
    parser.add_argument("--rows", type=int, help="rows of all splits together")
    parser.add_argument("--items", type=int, help="items of tiny_mm")
    parser.add_argument("--tags", type=int, help="tags of tiny_mm")
    options = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    dataset = options.pop("dataset")
    try:
        for name in MAKERS if dataset == "all" else [dataset]:
            _make(name, dataset, options)
    except CtrbenchError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _make(name: str, dataset: str, options: dict[str, Any]) -> None:
    """Write one data set and say what it holds; `dataset` is what was asked for."""
    make, output, accepted = MAKERS[name]
    if dataset == "all" and (wrong := options.keys() - {"seed"}):
        raise DataError(
            f"--{sorted(wrong)[0]}: is meant for one data set: add --dataset {' or --dataset '.join(MAKERS)}"
        )
    if wrong := options.keys() - accepted:
        raise DataError(f"--{sorted(wrong)[0]}: {name} has no such option: leave it out, or use --dataset tiny_mm")
    settings = {"output": output, **options}
    counts = make(**settings)
    print(f"{settings['output']}: " + ", ".join(f"{split} {count:,} rows" for split, count in counts.items()))


# What writes each data set, its default folder and its options.
MAKERS = {
    "tiny_ctr": (make_tiny_ctr, OUTPUT, {"output", "rows", "seed"}),
    "tiny_mm": (make_tiny_mm.make_tiny_mm, make_tiny_mm.OUTPUT, {"output", "rows", "items", "tags", "seed"}),
}


if __name__ == "__main__":
    sys.exit(main())
