# SPDX-License-Identifier: Apache-2.0
"""Write `tiny_mm`, a synthetic data set in the files of the MMCTR challenge (MicroLens_1M_x1), at any size.

    python data/make_tiny.py --dataset tiny_mm [--output data/raw/tiny_mm] [--rows 32000] [--items 600] [--tags 60]

| file | columns |
|---|---|
| train, valid, test.parquet | user_id, item_id, item_seq, likes_level, views_level, label (not in test) |
| test_labels.parquet | label of the test rows, in their order; the challenge keeps it back |
| item_info.parquet | item_id from 0 (padding, all zeros), item_tags (5, zeros on the left), item_emb_d128 |

item_seq holds 100 item ids, zeros on the left and the newest last: median 6, mean 8, three quarters at most 9, 2% empty.
The splits are 6:1:1, from a million rows on 3,600,000 : 10,000 : 379,142 as in the challenge, whose full shape is
`--rows 3989142 --items 91717 --tags 11739`.

What is planted. Items lie in 20 clusters around unit vectors in 16 dimensions; item_emb_d128 is a random projection of
an item's own vector plus noise, and 70% of its tags are those of its cluster. A user has 2 to 4 clusters of interest. A
history is drawn from them and, for a share of 0 to 0.8 that differs from row to row, from all items; a target comes from
them in 90% of the rows. With n the number of history items in the cluster of the target,

    logit = 2.2 n / (1 + n / 6) + 1.6 p[likes_level, views_level] + 1.6 q[cluster, likes_level]
            + 0.3 (u[likes_level] + v[views_level] + w[cluster]) - bias

where the tables p and q have rank one, unit variance and mean zero along both axes (neither side tells anything without
the other) and bias makes 25% of the labels positive. The logit needs the number n: a mean over the history or a softmax
knows the share of matching items only, and shares differ by the noise of a row as much as by n. Unlike the challenge's,
the levels belong to the row, not to the item. Bayes AUC (of the true probabilities): 0.932, on the default test split
0.936.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
from polars.io.plugins import register_io_source

from ctrbench.errors import DataError
from ctrbench.files import atomic_path

OUTPUT = Path(__file__).resolve().parent / "raw" / "tiny_mm"
PUBLISHED_ROWS = {"train": 3_600_000, "valid": 10_000, "test": 379_142}
HISTORY, NUM_TAGS, NUM_LEVELS, EMBEDDING_DIM = 100, 5, 11, 128

# What is planted, in the terms of the docstring.
CLUSTERS, LATENT_DIM, ITEM_SPREAD, EMBEDDING_NOISE, CLUSTER_TAGS = 20, 16, 0.5, 0.5, 0.7
INTERESTS, NOISE_ITEMS, TARGET_OF_INTEREST = (2, 4), (0.0, 0.8), 0.9
COUNT_EFFECT, COUNT_SCALE, LEVELS_EFFECT, CLUSTER_LEVEL_EFFECT, MAIN_EFFECT = 2.2, 6.0, 1.6, 1.6, 0.3
POSITIVES = 0.25

ROWS_PER_USER, BLOCK_ROWS, FULL_SHAPE_ROWS = 4, 50_000, 1_000_000
SCHEMA = {
    "user_id": pl.Int32,
    "item_id": pl.Int32,
    "item_seq": pl.List(pl.Int32),
    "likes_level": pl.Int32,
    "views_level": pl.Int32,
    "label": pl.Int32,
}


@dataclass(frozen=True)
class World:
    """What all rows share.

    Attributes:
        cluster: of each item; -1 for item 0.
        by_cluster: the item ids, cluster after cluster; `start` and `size` say where each cluster lies.
        interests: (users, 4) clusters, of which the first `num_interests` count.
        levels: p. `cluster_level`: q. `main`: u, v and w, one row each.
        bias: of the logit.
    """

    cluster: np.ndarray
    by_cluster: np.ndarray
    start: np.ndarray
    size: np.ndarray
    interests: np.ndarray
    num_interests: np.ndarray
    levels: np.ndarray
    cluster_level: np.ndarray
    main: np.ndarray
    bias: float = 0.0


def make_tiny_mm(
    output: Path, rows: int = 32_000, items: int = 600, tags: int = 60, seed: int = 2024
) -> dict[str, int]:
    """Write the five files into `output`, in blocks of rows.

    Args:
        output: the folder, created when it is missing.
        rows: total over train, valid and test.
        items: without the padding item.
        tags: without the padding tag.
        seed: the same seed and sizes give the same bytes.

    Returns:
        The rows of each split.

    Raises:
        DataError: too few rows, items or tags.
    """
    for option, value, least, why in (
        ("--rows", rows, 80, "make three useful files"),
        ("--items", items, 2 * CLUSTERS, f"give each of {CLUSTERS} clusters two"),
        ("--tags", tags, CLUSTERS, f"give each of {CLUSTERS} clusters one"),
    ):
        if value < least:
            raise DataError(f"{output}: {option}: {least} are the fewest that {why}, got {value}")
    world = make_world(items, rows, seed)
    with atomic_path(output / "item_info.parquet") as partial:
        item_info(world, tags, seed).write_parquet(partial)
    counts = split_rows(rows)
    for split, count in counts.items():
        _write_split(output, split, world, count, seed)
    return counts


def split_rows(rows: int) -> dict[str, int]:
    """The rows of train, valid and test: 6:1:1, or the challenge's proportions when there are enough rows for them."""
    total = sum(PUBLISHED_ROWS.values())
    if rows < FULL_SHAPE_ROWS:
        valid = test = rows // 8
    else:
        valid, test = (round(rows * PUBLISHED_ROWS[split] / total) for split in ("valid", "test"))
    return {"train": rows - valid - test, "valid": valid, "test": test}


def make_world(items: int, rows: int, seed: int) -> World:
    """Items, users and effects; each from a random stream of its own, so that they do not hang on each other's number."""
    effects, item_rng, user_rng, sample = (np.random.default_rng([seed, stream]) for stream in range(4))
    cluster = np.concatenate([[-1], item_rng.permutation(np.arange(items) % CLUSTERS)])
    size = np.bincount(cluster[1:], minlength=CLUSTERS)
    users, (fewest, most) = max(rows // ROWS_PER_USER, 1), INTERESTS
    all_clusters = np.tile(np.arange(CLUSTERS, dtype=np.int8), (users, 1))
    world = World(
        cluster=cluster,
        by_cluster=np.argsort(cluster, kind="stable")[1:],
        start=np.cumsum(size) - size,
        size=size,
        interests=user_rng.permuted(all_clusters, axis=1)[:, :most].copy(),
        num_interests=user_rng.integers(fewest, most + 1, users),
        levels=_interaction(effects, NUM_LEVELS, NUM_LEVELS),
        cluster_level=_interaction(effects, CLUSTERS, NUM_LEVELS),
        main=effects.standard_normal((3, max(NUM_LEVELS, CLUSTERS))),
    )
    _, probability = generate(world, 20_000, sample)
    return replace(world, bias=_bias(np.log(probability) - np.log1p(-probability)))


def item_info(world: World, tags: int, seed: int) -> pl.DataFrame:
    """The item table: tags and embedding tell the cluster, each with noise."""
    rng, cluster = np.random.default_rng([seed, 4]), world.cluster[1:]
    centre = _unit(rng.standard_normal((CLUSTERS, LATENT_DIM)))
    projection = rng.standard_normal((LATENT_DIM, EMBEDDING_DIM))
    spread = ITEM_SPREAD / LATENT_DIM**0.5 * rng.standard_normal((len(cluster), LATENT_DIM))
    embedding = np.zeros((len(cluster) + 1, EMBEDDING_DIM), np.float32)
    embedding[1:] = _unit(centre[cluster] + spread) @ projection
    embedding[1:] += EMBEDDING_NOISE * rng.standard_normal((len(cluster), EMBEDDING_DIM), np.float32)

    shape, tags_each = (len(cluster), NUM_TAGS), tags // CLUSTERS
    own = 1 + cluster[:, None] * tags_each + rng.integers(0, tags_each, shape)
    tag = np.where(rng.random(shape) < CLUSTER_TAGS, own, rng.integers(1, tags + 1, shape))
    tag *= np.arange(NUM_TAGS) >= rng.integers(0, NUM_TAGS, (len(cluster), 1))
    return pl.DataFrame(
        {
            "item_id": np.arange(len(cluster) + 1, dtype=np.int32),
            "item_tags": _lists(np.concatenate([np.zeros((1, NUM_TAGS), int), tag]), pl.Int32),
            "item_emb_d128": _lists(embedding, pl.Float32),
        }
    )


def blocks(world: World, split: str, rows: int, seed: int) -> Iterator[tuple[pl.DataFrame, np.ndarray]]:
    """A split block by block, as `generate` gives it; each block has a random stream of its own."""
    for start in range(0, rows, BLOCK_ROWS):
        rng = np.random.default_rng([seed, 5, list(PUBLISHED_ROWS).index(split), start // BLOCK_ROWS])
        yield generate(world, min(BLOCK_ROWS, rows - start), rng)


def generate(world: World, rows: int, rng: np.random.Generator) -> tuple[pl.DataFrame, np.ndarray]:
    """Rows with their labels and, for each row, the probability that its label was drawn with."""
    # The square makes some users frequent, so that gAUC has users with several rows in every split.
    user = (rng.random(rows) ** 2 * len(world.num_interests)).astype(int)
    length = _history_lengths(rng, rows)
    row = np.repeat(np.arange(rows), length)  # of each history item
    noise = rng.uniform(*NOISE_ITEMS, rows)
    seen = _clusters(world, rng, user[row], 1 - noise[row])
    target = _clusters(world, rng, user, np.full(rows, TARGET_OF_INTEREST))
    count = np.bincount(row, weights=seen == target[row], minlength=rows)
    likes, views = rng.integers(0, NUM_LEVELS, (2, rows))
    logit = (
        COUNT_EFFECT * count / (1 + count / COUNT_SCALE)
        + LEVELS_EFFECT * world.levels[likes, views]
        + CLUSTER_LEVEL_EFFECT * world.cluster_level[target, likes]
        + MAIN_EFFECT * (world.main[0, likes] + world.main[1, views] + world.main[2, target])
    )
    probability = 1 / (1 + np.exp(world.bias - logit))
    history = np.zeros((rows, HISTORY), np.int32)
    history[np.arange(HISTORY) >= HISTORY - length[:, None]] = _items(world, rng, seen)
    frame = pl.DataFrame(
        {
            "user_id": user + 1,
            "item_id": _items(world, rng, target),
            "item_seq": _lists(history, pl.Int32),
            "likes_level": likes,
            "views_level": views,
            "label": rng.random(rows) < probability,
        }
    )
    return frame.cast(SCHEMA), probability


def _write_split(output: Path, split: str, world: World, rows: int, seed: int) -> None:
    labels = []

    def source(*_: object) -> Iterator[pl.DataFrame]:
        for frame, _probability in blocks(world, split, rows, seed):
            if split == "test":
                labels.append(frame.select("label"))
                frame = frame.drop("label")
            yield frame

    schema = {name: dtype for name, dtype in SCHEMA.items() if split != "test" or name != "label"}
    with atomic_path(output / f"{split}.parquet") as partial:
        register_io_source(source, schema=schema).sink_parquet(partial, row_group_size=BLOCK_ROWS)
    if labels:
        with atomic_path(output / "test_labels.parquet") as partial:
            pl.concat(labels).write_parquet(partial)


def _history_lengths(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Log-normal around 6, 1% long ones, 2% empty ones: the challenge's profile."""
    length = np.round(6 * np.exp(0.65 * rng.standard_normal(rows))).astype(int)
    length = np.where(rng.random(rows) < 0.01, rng.integers(30, HISTORY + 1, rows), length)
    lengths: np.ndarray = np.minimum(length, HISTORY) * (rng.random(rows) >= 0.02)
    return lengths


def _clusters(world: World, rng: np.random.Generator, user: np.ndarray, share: np.ndarray) -> np.ndarray:
    """One cluster for each entry of `user`: with probability `share` one of the user's interests, else any."""
    chosen = (rng.random(len(user)) * world.num_interests[user]).astype(int)
    own = world.interests[user, chosen].astype(int)
    return np.where(rng.random(len(user)) < share, own, rng.integers(0, CLUSTERS, len(user)))


def _items(world: World, rng: np.random.Generator, cluster: np.ndarray) -> np.ndarray:
    """One item of each given cluster, some more popular than others."""
    place = (rng.random(len(cluster)) ** 1.5 * world.size[cluster]).astype(int)
    items: np.ndarray = world.by_cluster[world.start[cluster] + place]
    return items


def _bias(logit: np.ndarray) -> float:
    """What to take off the logits so that the share of positive labels is as planned, by bisection."""
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        is_too_low = (1 / (1 + np.exp(middle - logit))).mean() > POSITIVES
        low, high = (middle, high) if is_too_low else (low, middle)
    return low


def _interaction(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A table of rank one, mean zero along both axes and unit variance: an interaction without main effects."""
    rows, columns = (vector - vector.mean() for vector in (rng.standard_normal(height), rng.standard_normal(width)))
    table = np.outer(rows, columns)
    scaled: np.ndarray = table / table.std()
    return scaled


def _unit(vectors: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return scaled


def _lists(values: np.ndarray, dtype: type[pl.DataType]) -> pl.Series:
    return pl.Series(values).cast(pl.List(dtype))
