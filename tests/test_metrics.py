# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import multiprocessing
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from ctrbench.errors import ConfigError, DataError
from ctrbench.metrics import evaluate_metrics, parse_metrics

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]


def one(name, y, p, group=None):
    group = None if group is None else torch.as_tensor(group)
    return evaluate_metrics(torch.as_tensor(y), torch.as_tensor(p), [name], group)[name]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", [None, 1000, 7, 1])
def test_auc_and_logloss_agree_with_scikit_learn(levels, dtype, device):
    rng = np.random.default_rng(0)
    y = (rng.random(20_000) < 0.2).astype(np.float32)
    p = rng.random(20_000)
    p = (p if levels is None else np.floor(p * levels) / levels + 1e-3).clip(0, 1).astype(dtype)
    got = evaluate_metrics(torch.tensor(y, device=device), torch.tensor(p, device=device), ["AUC", "logloss"])
    assert got["AUC"] == pytest.approx(roc_auc_score(y, p), abs=1e-12)
    assert got["logloss"] == pytest.approx(log_loss(y, p.astype(np.float64)), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=40))
def test_auc_counts_pairs(rows):
    y, p = np.array([r[0] for r in rows]), np.array([r[1] / 5 for r in rows])
    wins = (p[y][:, None] > p[~y][None]).sum() + 0.5 * (p[y][:, None] == p[~y][None]).sum()
    pairs = y.sum() * (~y).sum()
    got = one("AUC", y.astype(np.float32), p)
    assert math.isnan(got) if pairs == 0 else got == pytest.approx(wins / pairs, abs=1e-14)


def test_auc_is_unchanged_by_row_order_and_monotone_maps():
    rng = np.random.default_rng(1)
    y, p = rng.integers(0, 2, 999).astype(np.float32), np.round(rng.random(999), 2)
    order = rng.permutation(999)
    assert one("AUC", y, p) == one("AUC", y[order], p[order]) == one("AUC", y, p**3)


def test_logloss_is_clipped_at_certain_predictions():
    y, p = np.array([1.0, 0.0, 1.0, 0.0]), np.array([0.0, 1.0, 1.0, 0.0])
    assert one("logloss", y, p) == pytest.approx(log_loss(y, p), abs=1e-12)
    assert one("binary_crossentropy", y, p) == one("logloss", y, p)
    assert one("logloss", np.ones(2), np.full(2, 0.5)) == pytest.approx(math.log(2))  # one class is no problem here


def test_undefined_figures_are_nan():
    assert math.isnan(one("AUC", [1.0, 1.0], [0.1, 0.2]))
    assert math.isnan(one("AUC", [0.0, 0.0], [0.1, 0.2]))
    assert math.isnan(one("gAUC", [1.0, 1.0, 0.0], [0.1, 0.2, 0.3], [1, 1, 2]))
    assert math.isnan(one("avgAUC", [1.0, 1.0, 0.0], [0.1, 0.2, 0.3], [1, 1, 2]))
    empty, no_group = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    names = ["AUC", "logloss", "gAUC", "avgAUC", "MRR", "NDCG@3", "MSE"]
    assert all(math.isnan(v) for v in evaluate_metrics(empty, empty, names, no_group).values())


def test_a_prediction_that_is_not_a_number_never_gives_a_figure():
    names = ["AUC", "logloss", "gAUC", "MRR", "NDCG@3"]
    y, p, group = torch.tensor([0.0, 1, 0, 1]), torch.tensor([0.1, math.nan, 0.3, 0.4]), torch.tensor([0, 0, 1, 1])
    assert all(math.isnan(v) for v in evaluate_metrics(y, p, names, group).values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows, groups", [(3000, 200), (3000, 1), (50, 49)])
def test_group_metrics_agree_with_fuxictr(rows, groups, device):
    oracle = pytest.importorskip("fuxictr.metrics")
    rng = np.random.default_rng(2)
    y = (rng.random(rows) < 0.3).astype(np.float64)
    p = rng.permutation(rows) / rows  # no ties: FuxiCTR leaves their order in MRR and NDCG to the sort
    group = rng.integers(0, groups, rows) * 7 - 3
    names = ["gAUC", "avgAUC", "MRR", "NDCG(k=10)", "NDCG(k=1)", "NDCG(3)"]
    functions = [oracle.gAUC, oracle.avgAUC, oracle.MRR, oracle.NDCG(k=10), oracle.NDCG(k=1), oracle.NDCG(3)]
    expected = fuxictr_average(functions, y, p, group)
    got = evaluate_metrics(*(torch.tensor(a, device=device) for a in (y, p)), names, torch.tensor(group, device=device))
    assert list(got) == names
    assert list(got.values()) == pytest.approx(expected, abs=1e-11)  # its denominators carry + 1e-12
    assert one("NDCG@10", y, p, group) == one("NDCG(k=10)", y, p, group)


def fuxictr_average(functions, y, p, group):
    """What FuxiCTR's evaluate_metrics computes, without its process pool."""
    results = [[f(y[group == g], p[group == g]) for f in functions] for g in np.unique(group)]
    pairs = np.array([[v if isinstance(v, tuple) else (v, 1) for v in row] for row in results], dtype=np.float64)
    total = pairs.sum(0)
    return list(total[:, 0] / total[:, 1])


@pytest.mark.skipif(multiprocessing.cpu_count() < 2, reason="FuxiCTR opens a pool of cpu_count() // 2 processes")
def test_all_metrics_agree_with_fuxictr_end_to_end():
    oracle = pytest.importorskip("fuxictr.metrics")
    rng = np.random.default_rng(3)
    y, p, group = (rng.random(400) < 0.4).astype(np.float64), rng.permutation(400) / 400, rng.integers(0, 30, 400)
    names = ["AUC", "logloss", "gAUC", "avgAUC", "MRR", "NDCG(k=10)"]
    expected = dict(oracle.evaluate_metrics(y, p, names, group))
    got = evaluate_metrics(torch.tensor(y), torch.tensor(p), names, torch.tensor(group))
    assert got == pytest.approx(expected, abs=1e-11)


def test_tied_scores_inside_groups():
    rng = np.random.default_rng(4)
    y, p, group = (rng.random(2000) < 0.5).astype(np.float64), rng.integers(0, 4, 2000) / 4, rng.integers(0, 150, 2000)
    usable = [g for g in np.unique(group) if 0 < y[group == g].mean() < 1]
    aucs = [roc_auc_score(y[group == g], p[group == g]) for g in usable]
    sizes = [(group == g).sum() for g in usable]
    assert one("gAUC", y, p, group) == pytest.approx(np.average(aucs, weights=sizes), abs=1e-12)
    assert one("avgAUC", y, p, group) == pytest.approx(np.mean(aucs), abs=1e-12)
    # Of tied rows the later one ranks first.
    assert one("MRR", [1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0, 0, 0]) == pytest.approx(1 / 3)


def test_groups_without_a_positive_count_as_zero_in_mrr_and_ndcg():
    y, p, group = [1.0, 0.0, 0.0, 0.0], [0.9, 0.1, 0.8, 0.2], [5, 5, 6, 6]
    assert one("MRR", y, p, group) == one("NDCG@2", y, p, group) == 0.5


def test_regression_metrics():
    y, p = [1.0, 2.0, 4.0], [1.0, 0.0, 5.0]
    assert one("MSE", y, p) == pytest.approx(5 / 3)
    assert one("MAE", y, p) == pytest.approx(1.0)


def test_no_metrics_and_integer_labels():
    assert evaluate_metrics(torch.ones(2), torch.ones(2), []) == {}
    assert one("AUC", np.array([0, 1, 1]), np.array([0.1, 0.2, 0.3])) == 1.0


def test_parse_metrics_keeps_order_and_drops_repeats():
    assert parse_metrics(["logloss", "AUC", "logloss"]) == ["logloss", "AUC"]
    assert parse_metrics(["NDCG@5", "NDCG(k=5)", "gAUC"], group_id="user_id") == ["NDCG@5", "NDCG(k=5)", "gAUC"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("auc", r"metrics: unknown metric 'auc' \(did you mean 'AUC'\?\); known: AUC, logloss"),
        ("logloss2", r"unknown metric 'logloss2' \(did you mean 'logloss'\?\)"),
        ("NDCG", r"unknown metric 'NDCG' \(did you mean 'NDCG@10'\?\)"),
        ("NDCG@0", r"unknown metric 'NDCG@0'"),
        ("NDCG.__class__ and print('run') or gAUC", "unknown metric"),
        (3, "unknown metric 3"),
    ],
)
def test_unknown_metric(name, message):
    with pytest.raises(ConfigError, match=message):
        parse_metrics([name], group_id="user_id")


@pytest.mark.parametrize("name", ["gAUC", "avgAUC", "MRR", "NDCG@10", "NDCG(k=10)"])
def test_group_metric_without_group_id(name):
    with pytest.raises(ConfigError, match="is computed within groups: set group_id"):
        parse_metrics(["AUC", name])
    with pytest.raises(ConfigError, match="set group_id"):
        evaluate_metrics(torch.ones(2), torch.ones(2), [name])


def test_every_problem_is_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        parse_metrics(["acc", "gAUC", "AUC"])
    assert len(caught.value.problems) == 2


def test_tensors_of_different_lengths():
    with pytest.raises(DataError, match=r"must be 1-D and of one length, got \[\(3,\), \(2,\)\]"):
        evaluate_metrics(torch.ones(3), torch.ones(2), ["AUC"])
    with pytest.raises(DataError, match="1-D"):
        evaluate_metrics(torch.ones(3, 1), torch.ones(3, 1), ["AUC"])


@pytest.mark.parametrize("levels", [None, 50, 1])
@pytest.mark.parametrize("kind", ["int32", "int64 with negative ids", "ids too far apart to pack", "float"])
def test_sorted_keys_give_what_sorted_rows_give(levels, kind):
    rng = np.random.default_rng(5)
    y, p = (rng.random(5000) < 0.3).astype(np.float32), rng.normal(size=5000).astype(np.float32)
    if levels is not None:
        p = np.round(p * levels) / levels * (1 if levels > 1 else 0)
    p[:200] = np.repeat([0.0, -0.0], 100)  # one score
    group = rng.integers(-40, 40, 5000)
    group = {"int32": group.astype(np.int32), "float": group / 7}.get(kind, group * (2**40 if "apart" in kind else 1))
    names = ["AUC", "gAUC", "avgAUC"]
    keys = evaluate_metrics(torch.tensor(y), torch.tensor(p.astype(np.float32)), names, torch.tensor(group))
    rows = evaluate_metrics(torch.tensor(y), torch.tensor(p.astype(np.float64)), names, torch.tensor(group))
    assert keys == pytest.approx(rows, abs=1e-14)
    assert keys["AUC"] == pytest.approx(roc_auc_score(y, p), abs=1e-12)


def test_scores_and_labels_are_left_as_they_were():
    y, p, group = torch.tensor([1.0, 0, 1, 0]), torch.tensor([-0.5, 0.5, 0.2, -0.1]), torch.tensor([3, 3, 2, 2])
    copies = y.clone(), p.clone(), group.clone()
    evaluate_metrics(y, p, ["AUC", "gAUC", "MRR"], group)
    assert all(torch.equal(mine, copy) for mine, copy in zip((y, p, group), copies, strict=True))


def test_many_groups_take_no_time():
    rng = torch.Generator().manual_seed(0)
    y, p = torch.randint(0, 2, (300_000,), generator=rng).float(), torch.rand(300_000, generator=rng)
    group = torch.randint(0, 30_000, (300_000,), generator=rng)
    start = time.perf_counter()
    got = evaluate_metrics(y, p, ["AUC", "logloss", "gAUC", "MRR", "NDCG@10"], group)
    assert time.perf_counter() - start < 5
    assert got["AUC"] == pytest.approx(0.5, abs=5e-3) and got["gAUC"] == pytest.approx(0.5, abs=5e-3)


def test_a_long_name_is_cut_in_the_message() -> None:
    with pytest.raises(ConfigError) as raised:
        parse_metrics(["a" * 10_000])
    assert "unknown metric 'aaaa" in str(raised.value) and len(str(raised.value)) < 500
