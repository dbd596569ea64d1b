# SPDX-License-Identifier: Apache-2.0
"""The page of a sweep: its figures are the records', its text is escaped, and it copes with odd sweeps."""

from __future__ import annotations

import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ctrbench.tuner.charts import (
    best_so_far,
    brief,
    cut,
    exact,
    key_axis,
    linear_ticks,
    log_ticks,
    number,
    spaced,
    visible_range,
)
from ctrbench.tuner.page import render_page, write_page
from ctrbench.tuner.records import SeedResult, SweepSummary, TrialRecord, objective_of

VOID = {"meta", "link", "br", "wbr", "hr", "img", "input"}


class Page(HTMLParser):
    """A parsed page: its elements as (name, attributes, text), and whether every element was closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[int] = []
        self.feed(html)
        assert not self.open, [self.elements[i][0] for i in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for i in self.open:
            self.elements[i][2].append(data)

    def texts(self, tag: str, **wanted: str) -> list[str]:
        """The text of each element of that name and attributes (a class may be one of several)."""
        found = []
        for name, attributes, text in self.elements:
            words = {key: (attributes.get(key) or "").split() for key in wanted}
            if name == tag and all(value in words[key] for key, value in wanted.items()):
                found.append(" ".join("".join(text).split()))
        return found

    def rows(self) -> dict[str, list[str]]:
        """Trial number -> cells of its row."""
        rows: dict[str, list[str]] = {}
        for name, attributes, text in self.elements:
            if name == "tr":
                cells = rows.setdefault(attributes.get("id") or "", [])
            elif name == "td":
                cells.append(" ".join("".join(text).split()))
        return {key.removeprefix("trial-"): cells for key, cells in rows.items() if key}


def seed_result(value: float, seed: int = 1, seconds: float = 10.0) -> SeedResult:
    metrics = {"valid": {"AUC": value}, "test": {"AUC": value - 0.01, "logloss": 0.5 - value / 10}}
    return SeedResult(seed, metrics, value, 2, 3, seconds, 1.0, seconds + 5, f"runs/{seed}")


def complete(index: int, values: dict[str, Any], *results: float, finished: float | None = None) -> TrialRecord:
    seeds = [seed_result(result, seed) for seed, result in enumerate(results, start=1)]
    curve = [results[0] - 0.02, results[0]]
    end = 1000.0 + index if finished is None else finished
    return TrialRecord(
        index, f"exp_{index}", "complete", values, objective_of(seeds), curve, seeds, None, "h", "cpu", end - 50, end
    )


def unfinished(index: int, state: str, values: dict[str, Any], **fields: Any) -> TrialRecord:
    return TrialRecord(index, f"exp_{index}", state, values, **fields)


def sweep_of(trials: list[TrialRecord], **fields: Any) -> SweepSummary:
    given = {
        "name": "lr sweep",
        "base_expid": "SDCNv3_tiny",
        "dataset_id": "tiny_ctr",
        "objective": "validation AUC",
        "direction": "max",
        "sampler": "random",
        "log_keys": frozenset({"lr"}),
        "importance": {},
        "trials": trials,
        "rerun_command": "run_expid.py --expid exp_1",
    }
    return SweepSummary(**{**given, **fields})


def small_sweep(**fields: Any) -> SweepSummary:
    trials = [
        complete(0, {"lr": 1e-3, "units": [400, 400], "seed": 7}, 0.80),
        complete(1, {"lr": 1e-2, "units": [], "seed": 7}, 0.91, 0.93),
        unfinished(2, "pruned", {"lr": 0.1, "units": [400], "seed": 7}, curve=[0.6, 0.61], started=5.0, finished=25.5),
        unfinished(3, "failed", {"lr": 1.0, "units": [16], "seed": 7}, error="no memory <on> GPU & more"),
        complete(4, {"lr": 5e-3, "units": [400], "seed": 7}, 0.85),
        unfinished(5, "running", {"lr": 0.5, "units": [400], "seed": 7}),
    ]
    return sweep_of(trials, **fields)


def test_the_figures_are_those_of_the_records() -> None:
    sweep = small_sweep()
    html = render_page(sweep)
    page = Page(html)
    rows = page.rows()
    assert list(rows) == ["1", "4", "0", "2", "3", "5"]  # by objective, then pruned, failed, running
    spread = statistics.stdev([0.91, 0.93])
    assert rows["1"] == [
        "2", "exp_1", "complete", f"0.920000 ± {spread:.6f}", f"0.910000 ± {spread:.6f}",
        f"0.408000 ± {spread / 10:.6f}", "0.01", "[]", "7", "2", "3", "22.0",
    ]  # fmt: skip
    assert rows["0"] == [
        "1", "exp_0", "complete", "0.800000", "0.790000", "0.420000", "1e-3", "[400, 400]", "7", "1", "3", "11.0",
    ]  # fmt: skip
    assert rows["2"] == ["3", "exp_2", "pruned", "–", "–", "–", "0.1", "[400]", "7", "–", "–", "20.5"]
    assert page.texts("tr", **{"class": "error"}) == ["no memory <on> GPU & more"]
    assert page.texts("dd") == [f"0.920000 ± {spread:.6f}", f"0.910000 ± {spread:.6f}", f"0.408000 ± {spread / 10:.6f}"]
    assert "3 complete 1 pruned 1 failed 1 running" in page.texts("div", **{"class": "counts"})
    assert "run_expid.py --expid exp_1" in page.texts("code")
    assert {"lr = 0.01", "units = []", "seed = 7"} <= set(page.texts("code"))
    for text in (sweep.name, sweep.base_expid, sweep.dataset_id, sweep.sampler, "higher is better"):
        assert text in html


def test_parallel_coordinates_leave_out_failed_trials_and_keys_of_one_value() -> None:
    html = render_page(small_sweep())
    drawing = html[html.index('class="wide"') : html.index("</svg>")]
    assert re.findall(r'href="#trial-(\d)"', drawing) == ["2", "0", "4", "1"]  # the best on top
    assert re.findall(r'class="t (\w+)"', drawing) == ["pruned", "c0", "c4", "best"]
    assert ">lr</text>" in drawing and ">units</text>" in drawing and ">seed</text>" not in drawing
    assert "exp_1\nvalidation AUC 0.920000\nlr = 0.01\nunits = []\nseed = 7</title>" in drawing
    points = [path.count("L") for path in re.findall(r'<path d="([^"]*)"></path></a>', drawing)]
    assert points == [1, 2, 2, 2]  # the pruned trial has no objective to go to


def test_best_so_far_goes_by_time_of_finishing() -> None:
    values: dict[str, Any] = {"lr": 1e-3}
    trials = [complete(0, values, 0.9, finished=300), complete(1, values, 0.8, finished=100)]
    trials += [unfinished(2, "pruned", values, started=150.0, finished=200.0)]
    sweep = sweep_of(trials)
    looks = {0: "best", 1: "c0", 2: "pruned"}
    for against, where in (("trials", [0, 1 / 2, 1]), ("seconds", [11 / 72, 61 / 72, 1])):
        chart = best_so_far(sweep, looks, against)
        assert chart is not None
        found = dict(re.findall(r'(?s)href="#trial-(\d)".*?(?:cx="|<path d="M)([\d.]+)', chart.svg))
        (begin, end), *_ = re.findall(r'd="M([\d.]+) [\d.]+H([\d.]+)"', chart.svg)
        shares = [(float(found[i]) - float(begin)) / (float(end) - float(begin)) for i in "120"]
        assert shares == pytest.approx(where, abs=1e-3)
        step = re.search(r'd="M([\d.]+) ([\d.]+)H([\d.]+)V([\d.]+)H([\d.]+)" class="best-so-far"', chart.svg)
        assert step and float(step[4]) < float(step[2])  # up


def test_lower_is_better() -> None:
    page = Page(render_page(small_sweep(direction="min", objective="validation logloss")))
    assert list(page.rows())[:3] == ["0", "4", "1"]
    assert page.texts("h2")[0] == "Best trial: exp_0"
    assert any("lower is better" in text for text in page.texts("div"))


def test_importance() -> None:
    page = Page(render_page(small_sweep(importance={"lr": 0.75, "units": 0.25})))
    assert page.texts("div", **{"class": "bars"}) == ["lr 75.0% units 25.0%"]
    assert any("at least a few complete trials" in text for text in Page(render_page(small_sweep())).texts("p"))


def test_text_is_escaped() -> None:
    evil = "</title></svg><script>alert('\"1\"')</script>&amp;"
    values: list[dict[str, Any]] = [{evil: evil, "k": [evil]}, {evil: "b", "k": None}]
    trials = [complete(0, values[0], 0.8), complete(1, values[1], 0.9)]
    trials = [TrialRecord(**{**vars(trial), "expid": evil}) for trial in trials]
    trials += [unfinished(2, "failed", values[0], error=evil)]
    words = dict.fromkeys(("name", "base_expid", "dataset_id", "objective", "rerun_command"), evil)
    html = render_page(sweep_of(trials, importance={evil: 1.0}, **words))
    page = Page(html)
    assert "<script" not in html and "alert('" not in html
    assert page.texts("h1") == [evil] and page.texts("pre")[0] == evil


def test_nothing_is_loaded_and_nothing_runs() -> None:
    html = render_page(small_sweep(importance={"lr": 1.0}))
    assert "http" not in html and "//" not in html and "@import" not in html and "url(" not in html
    assert "<script" not in html and not re.search(r"\son\w+=", html)
    page = Page(html)
    links = [
        str(value) for _, attributes, _ in page.elements for k, value in attributes.items() if k in ("href", "src")
    ]
    assert all(link.startswith("#trial-") or link == "data:," for link in links)
    targets = {attributes.get("id") for _, attributes, _ in page.elements}
    assert {link[1:] for link in links if link[0] == "#"} <= targets


@pytest.mark.parametrize(
    "trials",
    [
        [],
        [unfinished(0, "waiting", {"lr": 0.1})],
        [unfinished(0, "pruned", {"lr": 0.1}, curve=[0.5]), unfinished(1, "failed", {}, error="x")],
        [complete(0, {"lr": 0.1, "u": None}, 0.9)],
        [complete(i, {"lr": i, "u": [i] * i}, 0.9) for i in range(5)],  # equal objectives; 0 has no logarithm
        [complete(i, {"u": "x" * 300 + str(i), f"k{i % 2}" + "y" * 200: True}, 0.9 + i * 1e-9) for i in range(40)],
        [complete(0, {"lr": float("inf")}, 0.9), complete(1, {"lr": 1}, 0.8), complete(2, {"lr": "auto"}, 0.8)],
        [unfinished(0, "pruned", {"lr": 1}, curve=[0.5, float("nan"), float("inf"), 0.6])],
        [unfinished(0, "pruned", {"lr": 1}, curve=[float("nan")])],
    ],
    ids=["none", "waiting", "no complete one", "one", "equal", "long", "infinite", "diverged", "only nan"],
)
@pytest.mark.parametrize("direction", ["max", "min"])
def test_odd_sweeps(trials: list[TrialRecord], direction: str) -> None:
    html = render_page(sweep_of(trials, direction=direction, rerun_command=None))
    page = Page(html)
    assert len(page.rows()) == len(trials)
    coordinates = " ".join(re.findall(r' (?:d|x|y|cx|cy|viewBox)="([^"]*)"', html))
    assert not re.search(r"nan|inf|e-", coordinates)
    if not any(trial.objective for trial in trials):
        assert "No best trial yet" in page.texts("h2")


def test_many_trials_and_keys(tmp_path: Path) -> None:
    trials = [
        complete(
            i, {f"key_{k}": (i * (k + 3)) % 17 / 10 if k % 2 else [i % (k + 2)] for k in range(15)}, 0.8 + i / 5000
        )
        for i in range(500)
    ]
    write_page(tmp_path / "sub" / "page.html", sweep_of(trials))
    html = (tmp_path / "sub" / "page.html").read_text(encoding="utf-8")
    assert len(Page(html).rows()) == 500
    assert len(html) < 3_000_000
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["page.html"]


def test_labels_do_not_overlap_on_an_axis() -> None:
    html = render_page(sweep_of([complete(i, {"lr": 10 ** (-i / 9), "u": f"v{i}"}, 0.8 + i / 99) for i in range(60)]))
    drawing = html[html.index('class="wide"') : html.index("</svg>")]
    columns: dict[str, list[float]] = {}
    for x, y in re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="">', drawing):
        columns.setdefault(x, []).append(float(y))
    assert len(columns) == 3
    for places in columns.values():
        assert all(abs(a - b) >= 12 for a, b in zip(sorted(places), sorted(places)[1:], strict=False))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-3, "1e-3"),
        (0.90812, "0.9081"),
        (256, "256"),
        (0, "0"),
        (0.0, "0"),
        (1.0, "1"),
        (3.14159e-4, "3.142e-4"),
        (-2.5e-7, "-2.5e-7"),
        (12345, "12345"),
        (12345.6, "12346"),
        (3e7, "3e7"),
        (10_000_000, "1e7"),
        (0.05, "0.05"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def test_values_as_text() -> None:
    assert [exact(v) for v in (None, True, "a", [400, 400], 0.1234567)] == [
        "null",
        "true",
        "a",
        "[400, 400]",
        "0.1234567",
    ]
    assert [brief(v) for v in (None, True, "a", [400, 400], 0.1234567)] == ["null", "true", "a", "[400, 400]", "0.1235"]
    assert cut("abcdefghij", 10) == "abcdefghij"
    assert cut("abcdefghijk", 5) == "ab…jk"


def test_ticks() -> None:
    assert linear_ticks(0.9, 0.91, 5) == [
        (pytest.approx(v), t)
        for v, t in [
            (0.9, "0.900"),
            (0.902, "0.902"),
            (0.904, "0.904"),
            (0.906, "0.906"),
            (0.908, "0.908"),
            (0.91, "0.910"),
        ]
    ]
    assert [text for _, text in linear_ticks(1, 3, whole=True)] == ["1", "2", "3"]
    assert linear_ticks(5, 5) == [(5, "5")]
    assert [text for _, text in log_ticks(1e-5, 1e-2)] == ["1e-5", "1e-4", "1e-3", "0.01"]
    assert [text for _, text in log_ticks(1e-3, 6e-3)] == ["1e-3", "2e-3", "5e-3"]
    assert spaced([(0.0, "a"), (0.01, "b"), (0.5, "c"), (0.99, "d"), (1.0, "e")], 0.05) == [
        (0.0, "a"), (0.5, "c"), (1.0, "e")
    ]  # fmt: skip


def test_axis_of_a_key() -> None:
    place, ticks = key_axis([1e-4, 1e-3, 1e-2], log=True)
    assert place(1e-3) == pytest.approx(0.5) and [text for _, text in ticks] == ["1e-4", "1e-3", "0.01"]
    place, _ = key_axis([0, 10, 5], log=True)  # 0 has no logarithm
    assert place(5) == 0.5
    place, ticks = key_axis([[16], [8], [400, 400]])
    assert ticks == [(pytest.approx(1 / 6), "[8]"), (pytest.approx(0.5), "[16]"), (pytest.approx(5 / 6), "[400, 400]")]
    assert place([16]) == 0.5
    place, ticks = key_axis([True, None, False])
    assert sorted(text for _, text in ticks) == ["false", "null", "true"]


def test_far_outliers_do_not_flatten_a_chart_and_are_counted() -> None:
    values = [0.9 + i / 1000 for i in range(12)]
    assert visible_range([*values, 0.5], "max") == (0.9, values[-1])
    assert visible_range([*values, 0.99], "max") == (0.9, 0.99)  # on the good side it is the news
    assert visible_range([*values, 2.0], "min") == (0.9, values[-1])
    assert visible_range([0.5, 0.9, 0.9], "max") == (0.5, 0.9)
    assert visible_range([0.5] + [0.9] * 9, "max") == (0.5, 0.9)
    trials = [complete(i, {"lr": i + 1}, value) for i, value in enumerate([*values, 0.5])]
    assert "1 value lies far beyond the axis" in render_page(sweep_of(trials))
