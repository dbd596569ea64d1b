# SPDX-License-Identifier: Apache-2.0
"""The page of a leaderboard: its figures are the records', drawn where they belong, and it copes with odd boards.

The file is not called test_page.py: pytest tells test files apart by their names alone, and the tuner has one.
"""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ctrbench.charts import Box, label_boxes
from ctrbench.leaderboard.charts import interval_column, short_names
from ctrbench.leaderboard.curve_charts import learning_curves
from ctrbench.leaderboard.detail_charts import calibration_error, wilson_interval
from ctrbench.leaderboard.page import p_text, render_page, seeds_text, size_text, write_page
from ctrbench.leaderboard.published import verdict
from ctrbench.leaderboard.records import Board, Details, Published, Row, Run, Status, Table
from ctrbench.leaderboard.statistics import compare, summarize

VOID = {"meta", "link", "br", "wbr", "hr", "img", "input"}
EVIL = "</title></svg></script><script>alert('\"1\"')</script>&amp;"
SEEDS = (2024, 2025, 2026, 2027, 2028)
# What 17 models reach on MovieLens-1M, about: test AUC, parameters, seconds.
MODELS = {
    "QNNAlpha": (0.90862, 371_120, 410.0), "SDCNv3": (0.90803, 201_696, 185.3), "DCNv3": (0.90709, 169_093, 114.3),
    "FinalMLP": (0.90655, 402_330, 205.1), "GDCN": (0.90641, 455_861, 160.9), "EulerNet": (0.90613, 161_900, 244.6),
    "xDeepFM": (0.90583, 310_112, 690.2), "MaskNet": (0.90561, 820_410, 233.7), "DNN": (0.90544, 204_369, 115.3),
    "DCNv2": (0.90538, 260_711, 98.1), "AutoIntPlus": (0.90501, 240_005, 301.8), "FCN": (0.90466, 201_696, 141.0),
    "DeepFM": (0.90432, 181_033, 92.4), "DCN": (0.90387, 171_025, 83.9), "AFNPlus": (0.90218, 1_640_200, 388.0),
    "FM": (0.88041, 99_121, 40.2), "LR": (0.80297, 9_021, 12.7),
}  # fmt: skip


class Page(HTMLParser):
    """A parsed page: its elements as (name, attributes, text), and whether every element was closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[int] = []
        self.feed(html)
        self.close()
        assert not self.open, [self.elements[i][0] for i in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        if tag == "div":  # a line of its own
            self.handle_data(" ")
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for i in self.open:
            self.elements[i][2].append(data)

    def texts(self, tag: str, class_: str = "") -> list[str]:
        """The text of each element of that name that has all of these classes."""
        wanted = set(class_.split())
        found = [(a, text) for name, a, text in self.elements if name == tag]
        return [" ".join("".join(text).split()) for a, text in found if wanted <= set((a.get("class") or "").split())]

    def rows(self, anchor: str = "t1") -> dict[str, list[str]]:
        """Experiment -> cells of its row in the table of a dataset."""
        rows: dict[str, list[str]] = {}
        cells: list[str] | None = None
        for name, attributes, text in self.elements:
            if name == "tbody":
                cells = [] if re.fullmatch(rf"{anchor}-\d+", attributes.get("id") or "") else None
            elif name == "td" and cells is not None:
                cells.append(" ".join("".join(text).split()))
                if attributes.get("class") == "name":
                    rows[attributes.get("data-value") or ""] = cells
        return rows

    def classes(self, anchor: str = "t1") -> list[str]:
        """Classes of the rows of a dataset's table, by place."""
        return [
            a.get("class") or ""
            for name, a, _ in self.elements
            if name == "tbody" and re.fullmatch(rf"{anchor}-\d+", a.get("id") or "")
        ]


def run_of(
    dataset: str,
    expid: str,
    seed: int,
    metrics: dict[str, dict[str, float]],
    curve: Sequence[float] = (),
    **fields: Any,
) -> Run:
    """A run whose report says these things; `fields` replace its own, report entries among them."""
    name = next(iter(metrics.get("valid", {"AUC": 0})), "AUC")
    lines = [
        {"epoch": i, "step": 145 * i, "train_loss": 0.5 - i / 100, "learning_rate": 1e-3, name: value}
        for i, value in enumerate(curve, 1)
    ]
    report: dict[str, Any] = {
        "expid": expid, "model": expid.partition("_")[0], "dataset_id": dataset, "seed": seed, "metrics": metrics,
        "best_epoch": max(range(len(curve)), key=lambda i: curve[i]) + 1 if curve else 1, "epochs": len(curve) or 1,
        "timings": {"train_seconds": 100.0 + seed % 10}, "parameters": {"total": 1000},
        "environment": {"device_name": "AMD EPYC", "device": "cpu", "threads": 2, "torch": "2.13.0+cpu",
                        "git_commit": "4caaafc12509ca54d6533f629563ff4c04689920-dirty"},
        "data_hash": "13acd229b858" + "0" * 52, "config_hash": "932bd5da64ee" + "1" * 52,
        "command": f"python model_zoo/run_expid.py --expid {expid} --gpu -1",
    }  # fmt: skip
    known = {field.name for field in dataclasses.fields(Run)}
    given = {"folder": Path("elsewhere") / dataset / expid / f"seed_{seed}", "status": Status.PROVEN, "curve": lines}
    report |= {key: value for key, value in fields.items() if key not in known}
    return Run(**{**given, **{k: v for k, v in fields.items() if k in known}, "report": report})


def row_of(runs: Sequence[Run], metric: str = "AUC", split: str = "test", **fields: Any) -> Row:
    """The row of some runs."""
    names = {(s, n) for run in runs for s, values in run.report["metrics"].items() for n in values}
    found = {(s, n): {r.seed: v for r in runs if (v := r.metric(s, n)) is not None} for s, n in names}
    summaries = {key: summarize(values) for key, values in found.items()}
    first = runs[0].report
    published = fields.get("published")
    given = {
        "dataset_id": first["dataset_id"], "expid": first["expid"], "model": first["model"], "label": first["expid"],
        "runs": tuple(runs), "summaries": summaries, "status": Status.PROVEN, "problems": (), "published": published,
        "verdict": verdict(summaries.get((split, metric)), published, metric),
    }  # fmt: skip
    return Row(**{**given, **fields})


def table_of(rows: Sequence[Row], dataset: str = "ML_1M", metric: str = "AUC", split: str = "test") -> Table:
    """The table of some rows, which are in order."""
    values = {r.expid: s.values for r in rows if r.is_comparable and (s := r.summary(split, metric))}
    return Table(dataset, metric, split, tuple(rows), tuple(compare(values)), "13acd229b858" + "0" * 52)


def realistic_table(dataset: str = "ML_1M", seeds: Sequence[int] = SEEDS) -> Table:
    """17 models, of mixed states."""
    chance = random.Random(1)
    source = "BARS, github.com/reczoo/BARS (2023)"
    rows = []
    for place, (model, (auc, parameters, seconds)) in enumerate(MODELS.items()):
        runs = []
        for seed in seeds:
            best = auc + chance.gauss(0, 0.00042)
            end = chance.randint(11, 18)
            rise = [best - 0.004 - 0.042 * math.exp(-i / 3.1) + chance.gauss(0, 0.0003) for i in range(end + 2)]
            rise[end - 1] = best - 0.0036
            rise[end:] = [best - 0.0042 - chance.random() / 2000 for _ in rise[end:]]
            metrics = {
                "valid": {"AUC": rise[end - 1], "logloss": 1.21 - best},
                "test": {"AUC": best, "logloss": 1.208 - best},
            }
            checked = {"is_equal": True, "time": "2025-11-26T08:15:31Z", "bootstrap": {
                "split": "test", "metric": "AUC", "level": 0.95, "low": best - 0.00098, "high": best + 0.00101}}  # fmt: skip
            runs.append(run_of(
                dataset, f"{model}_{dataset}", seed, metrics, rise, parameters={"total": parameters},
                timings={"train_seconds": seconds * chance.uniform(0.9, 1.1)}, best_epoch=end,
                status=Status.PROVEN if place % 4 else Status.RECORDED, verification=checked if place % 4 else None,
            ))  # fmt: skip
        fields: dict[str, Any] = {"status": Status.PROVEN if place % 4 else Status.RECORDED}
        if model in ("SDCNv3", "DCNv3", "DNN", "DCNv2", "FM", "MaskNet", "FinalMLP"):
            offset = chance.choice([0.0003, -0.0011, 0.0014])
            flags = ("measured on another split of the data",)
            fields["published"] = Published({"AUC": round(auc + offset, 6)}, source, flags if model != "FM" else ())
        if model in ("GDCN", "AFNPlus"):
            why = (
                "seed 2026: train.log was altered after the run"
                if model == "GDCN"
                else "seeds of the suite are missing"
            )
            fields |= {
                "status": Status.UNPROVEN,
                "problems": (why, "ledger.jsonl also has seed 2031, which is left out here"),
            }
        rows.append(row_of(runs, **fields))
    rows.sort(key=lambda row: -row.summaries["test", "AUC"].mean)
    strange = [
        run_of(dataset, f"DNN_{dataset}_old", s, {"valid": {"AUC": 0.9031}, "test": {"AUC": 0.9099 + s / 1e7}})
        for s in seeds
    ]
    why = "trained on other data (77aa01bc23de) than the dataset's other rows (13acd229b858)"
    rows.append(row_of(strange, status=Status.UNPROVEN, problems=(why,), is_comparable=False))
    return table_of(rows, dataset)


def realistic_details(num_fields: int = 7, layers: int = 3) -> Details:
    """A run looked at closely."""
    chance = random.Random(2)
    known = ("user_id", "item_id", "gender", "age", "occupation", "zip_code", "genre_0_1", "genre_2_3")
    fields = tuple(known[i] if i < len(known) and num_fields <= len(known) else f"C{i + 1}" for i in range(num_fields))
    rates = [0.002 + (i / 20) ** 2 for i in range(20)]
    bins = [{"predicted": p, "observed": min(p * chance.uniform(0.93, 1.1), 1.0), "rows": 1000} for p in rates]
    importance = [abs(chance.gauss(0, 0.03)) - 0.001 for _ in fields]
    pairs = [[0.0] * num_fields for _ in fields]
    for i in range(num_fields):
        for k in range(i):
            pairs[i][k] = pairs[k][i] = chance.gauss(0, 0.004)
    matrices = {
        f"LCN layer {n + 1}": [[abs(chance.gauss(0.4, 0.3)) for _ in fields] for _ in fields] for n in range(layers)
    }
    run = realistic_table().rows[1].runs[0]
    return Details(run, "AUC", 0.908551, 20_000, fields, bins, importance, pairs, matrices)


def board_of(*tables: Table, **fields: Any) -> Board:
    return Board(**{"title": "main", "command": "ctrbench leaderboard runs", **fields, "tables": tables})


@pytest.fixture(scope="module")
def table() -> Table:
    return realistic_table()


@pytest.fixture(scope="module")
def html(table: Table) -> str:
    board = board_of(table, missing=("DIN_ML_1M on ML_1M, seed 2024",))
    return render_page(board, Path("boards"), realistic_details())


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_every_number_of_the_table_is_there(table: Table, page: Page) -> None:
    rows = page.rows()
    assert list(rows) == [row.label for row in table.rows]
    for rank, row in enumerate(table.rows, 1):
        cells = rows[row.label]
        main, valid = row.summaries["test", "AUC"], row.summaries["valid", "AUC"]
        assert cells[0] == (str(rank) if row.is_comparable else "–")
        assert cells[1].startswith(row.label) and ("★ best" in cells[1]) == (rank == 1)
        assert cells[2] == f"{main.mean:.6f} ± {main.deviation:.6f} {main.low:.6f} – {main.high:.6f}"
        pair = table.against_best(row)
        expected = "–" if pair is None else p_text(pair.adjusted_p) + (" ≈ best" if pair.adjusted_p > 0.05 else "")
        assert cells[4] == expected
        if row.published:
            marks = "12" if row.published.flags else "1"
            assert cells[5] == f"{row.published.metrics['AUC']:g}{marks} {row.verdict}"
        else:
            assert cells[5] == "–"
        assert cells[6].split()[1] == row.status.value and cells[7] == "2024–2028"
        assert cells[8] == f"{valid.mean:.6f}"
        logloss = row.summary("test", "logloss")
        assert cells[9] == (f"{logloss.mean:.6f}" if logloss else "–")
        assert cells[10:12] == [f"{row.parameters:,}", f"{row.mean_of('timings', 'train_seconds'):,.1f}"]
        assert all(problem in page.texts("li") for problem in row.problems)


def test_words_around_the_table(html: str, page: Page) -> None:
    assert page.texts("h1") == ["main"] and page.texts("h2")[0] == "ML_1M"
    assert page.texts("pre") == ["ctrbench leaderboard runs"]
    headline = page.texts("p", "headline")[0]
    assert (
        headline.startswith("Best: QNNAlpha_ML_1M with 0.908")
        and "Not distinguishable from it: SDCNv3_ML_1M," in headline
    )
    assert page.texts("p", "warning") == [
        "! 1 cell of the suite has no finished run: see below.",
        "! 3 of 18 experiments are unproven. ! 1 was trained on other data and has no rank.",
    ]
    items = page.texts("li")
    assert "Published in BARS, github.com/reczoo/BARS (2023)" in items
    assert "measured on another split of the data" in items and "DIN_ML_1M on ML_1M, seed 2024" in items
    assert "90 runs: device_name AMD EPYC, device cpu, threads 2, torch 2.13.0+cpu" in items


def test_rows_look_different_by_their_state(table: Table, page: Page) -> None:
    classes = page.classes()
    assert classes[0] == "best" and "tied" in classes[1] and classes[-1] == "unproven strange"
    for row, look in zip(table.rows, classes, strict=True):
        assert ("unproven" in look) == (row.status is Status.UNPROVEN)
    assert page.texts("div", "other") == ["other data: not comparable"]


def test_intervals_are_drawn_where_they_belong(table: Table, html: str) -> None:
    column = interval_column(table)
    assert column is not None and column.hidden == 2  # FM and LR are far off
    drawings = re.findall(r'<td class="drawn"><svg.*?</svg>', html, re.DOTALL)
    assert len(drawings) == len(table.rows)
    scale = column.scale
    for row, drawing in zip(table.rows, drawings, strict=True):
        main = row.summaries["test", "AUC"]
        places = {}
        for name, value in (("mean", main.mean), ("low", main.low), ("high", main.high)):
            assert value is not None
            places[name] = 10 + 210 * min(max((value - scale.low) / (scale.high - scale.low), 0), 1)
        if main.mean < scale.low:
            assert 'class="mean out"' in drawing and 'class="whisker"' not in drawing
            continue
        circle = re.search(r'<circle cx="([\d.]+)" cy="14" r="4" class="mean">', drawing)
        whisker = re.search(r'<path d="M([\d.]+) 14H([\d.]+)', drawing)
        assert circle and whisker
        found = [float(whisker[1]), float(circle[1]), float(whisker[2])]
        assert found == pytest.approx([places["low"], places["mean"], places["high"]], abs=0.06)
        seeds = [float(x) for x in re.findall(r'<circle cx="([\d.]+)" cy="22"', drawing)]
        assert seeds == pytest.approx([column.at(v) for v in main.values.values()], abs=0.06)
        published = re.search(r'<path d="M([\d.]+) 7V26', drawing)
        assert bool(published) == bool(row.published)
        if published and row.published:
            assert float(published[1]) == pytest.approx(column.at(row.published.metrics["AUC"]), abs=0.06)
        low, high = table.rows[0].summaries["test", "AUC"].low, table.rows[0].summaries["test", "AUC"].high
        band = re.search(r'<rect x="([\d.]+)" y="0" width="([\d.]+)"', drawing)
        assert band and low is not None and high is not None
        assert float(band[1]) == pytest.approx(column.at(low), abs=0.06)
        assert float(band[2]) == pytest.approx(column.at(high) - column.at(low), abs=0.06)


def test_one_wide_interval_does_not_set_the_scale() -> None:
    values = {"A_x": (0.9, 0.9001), "B_x": (0.899, 0.8991), "C_x": (0.898, 0.8981), "D_x": (0.880, 0.915)}
    rows = [row_of([run_of("x", e, s, {"test": {"AUC": v}}) for s, v in enumerate(vs)]) for e, vs in values.items()]
    column = interval_column(table_of(rows, "x"))
    assert column is not None and rows[3].summaries["test", "AUC"].high - rows[3].summaries["test", "AUC"].low > 0.4  # type: ignore[operator]
    assert column.scale.high - column.scale.low < 0.02
    drawing = column.draw(rows[3].summaries["test", "AUC"], None, "")
    assert 'd="M10.0 14H220.0"' in drawing  # from end to end, without caps


def test_points_lie_at_their_costs_and_names(table: Table, html: str) -> None:
    charts = re.findall(r'<svg viewBox="0 0 640 430".*?</svg>', html, re.DOTALL)
    assert [re.search(r'aria-label="([^"]*)"', c)[1] for c in charts] == [  # type: ignore[index]
        "test AUC against training time in seconds", "test AUC against trainable parameters"
    ]  # fmt: skip
    for chart, cost in zip(
        charts, (lambda r: r.mean_of("timings", "train_seconds"), lambda r: r.parameters), strict=True
    ):
        places = {}
        for i, mark in re.findall(r'(?s)<a href="#t1-(\d+)" class="p [^"]*" tabindex="-1">(.*?)</a>', chart):
            x = re.search(r'<(?:circle cx|rect x)="([\d.]+)"', mark) or re.search(r'<path d="M([\d.]+) [\d.]+h10', mark)
            assert x, mark
            places[int(i)] = float(x[1])
        assert len(places) == 18
        order = sorted(range(17), key=lambda i: cost(table.rows[i]))  # the square of the last is drawn from its corner
        assert [places[i] for i in order] == sorted(places[i] for i in range(17))
        texts = re.findall(r"<text [^>]*>([^<]*)</text></a>", chart)
        assert {"QNNAlpha", "SDCNv3", "LR ↓ 0.803", "DNN_ML_1M_old"} <= set(texts)


def test_labels_keep_clear_of_each_other_and_of_points() -> None:
    chance = random.Random(3)
    points = [(300 + 60 * chance.gauss(0, 1), 200 + 40 * chance.gauss(0, 1)) for _ in range(17)]
    widths = [30 + 50 * chance.random() for _ in points]
    area = Box(0, 0, 640, 400)
    boxes = label_boxes(points, widths, area)
    assert [box.right - box.left for box in boxes] == pytest.approx(widths)
    for i, box in enumerate(boxes):
        assert box.overlap(area) == pytest.approx(widths[i] * 14)
        assert sum(box.overlap(other) for k, other in enumerate(boxes) if k != i) == 0
        assert sum(box.overlap(Box(x - 4, y - 4, x + 4, y + 4)) for x, y in points) == 0
    assert boxes == label_boxes(points, widths, area)


def test_learning_curves(table: Table, page: Page) -> None:
    found = learning_curves(table, "t1")
    assert found is not None and found.metric == "validation AUC"
    assert [panel.name for panel in found.panels] == short_names(table)[:-1]  # the last one has no curve
    assert {panel.name for panel in found.panels if panel.is_own} == {"FM", "LR"}
    for panel, row in zip(found.panels, table.rows, strict=False):
        assert [pick[:2] for pick in panel.picks] == [(run.seed, run.report["best_epoch"]) for run in row.runs]
        assert [pick[2] for pick in panel.picks] == [run.metric("valid", "AUC") for run in row.runs]
        assert panel.svg.count('class="curve"') == 5 and panel.svg.count('class="pick"') == 5
        assert ("<use" in panel.svg) != panel.is_own
    assert len(page.texts("figcaption")) == 17 + 3


def test_learning_curves_of_other_logs() -> None:
    # two evaluations in each epoch
    run = run_of("x", "A_x", 1, {"test": {"AUC": 0.9}}, best_epoch=2)
    lines = [{"epoch": (i + 1) // 2, "step": 50 * i, "AUC": v} for i, v in enumerate((0.5, 0.6, 0.8, 0.7), 1)]
    found = learning_curves(table_of([row_of([dataclasses.replace(run, curve=lines)])], "x"), "t1")
    assert found is not None and found.panels[0].picks == [(1, 1.5, 0.8)] and found.panels[0].epochs == "1.5"
    # another metric, or the training loss alone
    for name, words in (("gAUC", "validation gAUC"), ("train_loss", "training loss")):
        lines = [{"epoch": i, name: v} for i, v in enumerate((0.5, 0.6, float("nan")), 1)]
        found = learning_curves(table_of([row_of([dataclasses.replace(run, curve=lines)])], "x"), "t1")
        assert found is not None and found.metric == words
    assert learning_curves(table_of([row_of([run])], "x"), "t1") is None


def test_pairs(table: Table, html: str, page: Page) -> None:
    lines = re.findall(r'(?s)<tr><th class="num">(\d+)</th><th class="name"[^>]*>.*?</tr>', html)
    assert lines == [str(i) for i in range(1, 18)]
    matrix = html[html.index('<table class="matrix">') :]
    cells = re.findall(r'<td class="([^"]*)"(?: title="([^"]*)")?>([^<]*)</td>', matrix[: matrix.index("</table>")])
    assert len(cells) == 17 * 17
    by_title = {title.partition("\n")[0]: (look, title, text) for look, title, text in cells if title}
    assert len(by_title) == 17 * 16
    for c in table.comparisons:
        look, title, text = by_title[f"{c.first} − {c.second}"]
        turned = by_title[f"{c.second} − {c.first}"]
        assert float(text) == pytest.approx(c.difference / 0.001, abs=0.051) and float(turned[2]) == -float(text)
        assert f"{c.difference:+.6f}, 95% interval {c.low:+.6f} to {c.high:+.6f}" in title
        assert f"{-c.difference:+.6f}, 95% interval {-c.high:+.6f} to {-c.low:+.6f}" in turned[1]
        assert bool(look) == bool(turned[0]) == (c.adjusted_p <= 0.05)
        if look:
            assert (look.startswith("up"), turned[0].startswith("down")) == (c.difference > 0,) * 2
    told = sum(c.adjusted_p <= 0.05 for c in table.comparisons)
    assert any(f"over all 136 pairs (p ≤ 0.05; {told} are)" in text for text in page.texts("p", "note"))


def test_of_a_loss_less_is_better() -> None:
    values = {"A_x": (0.30, 0.31, 0.305), "B_x": (0.4, 0.41, 0.4045)}
    rows = [
        row_of([run_of("x", e, s, {"test": {"logloss": v}}) for s, v in enumerate(vs)], "logloss")
        for e, vs in values.items()
    ]
    html = render_page(board_of(table_of(rows, "x", "logloss")), Path("."))
    page = Page(html)
    assert any("lower is better" in text for text in page.texts("h3"))
    assert re.search(r'<td class="up d\d" title="A_x − B_x\n-0.09', html)
    assert [len(cells) for cells in page.rows().values()] == [9, 9]  # logloss has no second column


def test_evidence_of_each_run(tmp_path: Path) -> None:
    checked = {"time": "2025-11-26T08:15:31Z", "bootstrap": {"metric": "AUC", "low": 0.8, "high": 0.9}}
    runs = []
    for seed in (1, 2, 3):
        folder = tmp_path / "runs #1" / f"seed_{seed}"
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(f'{{"seed": {seed}}}')
        (folder / "train.log").write_text("log")
        runs.append(run_of("x", "A_x", seed, {"test": {"AUC": 0.85}}, [0.7, 0.8], folder=folder))
    runs[0] = dataclasses.replace(runs[0], verification=checked)
    runs[2] = dataclasses.replace(runs[2], status=Status.UNPROVEN, problems=("train.log was altered after the run",))
    # copies beside the page: of the second run, and of another one under the third one's name
    for seed, content in ((2, '{"seed": 2}'), (3, '{"seed": 33}')):
        copy = tmp_path / "boards" / "x" / "A_x" / f"seed_{seed}"
        copy.mkdir(parents=True)
        (copy / "report.json").write_text(content)
    target = tmp_path / "boards" / "board.html"
    write_page(target, board_of(table_of([row_of(runs)], "x")))
    html = target.read_text(encoding="utf-8")
    page = Page(html)
    addresses = [
        str(a["href"]) for name, a, _ in page.elements if name == "a" and str(a.get("href")).endswith((".json", ".log"))
    ]
    assert addresses == [
        "../runs%20%231/seed_1/report.json", "../runs%20%231/seed_1/train.log",
        "x/A_x/seed_2/report.json", "../runs%20%231/seed_2/train.log",
        "../runs%20%231/seed_3/report.json", "../runs%20%231/seed_3/train.log",
    ]  # fmt: skip
    text = " ".join(page.texts("table", "evidence")[0].split())
    for words in (
        "0.800000 – 0.900000", "2025-11-26T08:15:31Z", "2 of 2", "932bd5da64ee", "13acd229b858", "4caaafc12509-dirty",
        "python model_zoo/run_expid.py --expid A_x --gpu -1", "! unproven", "train.log was altered after the run",
    ):  # fmt: skip
        assert words in text
    assert [p.name for p in target.parent.iterdir() if p.is_file()] == ["board.html"]  # nothing partial is left


def test_details(html: str, page: Page) -> None:
    details = realistic_details()
    assert "A closer look: SDCNv3_ML_1M on ML_1M, seed 2024" in page.texts("h2")
    rows = sum(b["rows"] for b in details.calibration)
    error = sum(b["rows"] * abs(b["predicted"] - b["observed"]) for b in details.calibration) / rows
    assert calibration_error(details) == pytest.approx(error)
    assert any(text.endswith(f"Expected calibration error: {error:.6f}") for text in page.texts("p", "note"))
    order = sorted(range(7), key=lambda i: -details.importance[i])
    bars = page.texts("div", "bars")[0]
    assert bars == " ".join(f"{details.fields[i]} {details.importance[i]:.6f}" for i in order)
    assert html.count("rows\npredicted") == 20
    chart = html[html.index('aria-label="Interactions of field pairs"') :]
    titles = re.findall(r"<title>([^<]*)</title></rect>", chart[: chart.index("</svg>")])
    assert len(titles) == 7 * 6 and titles[0].startswith(f"{details.fields[order[0]]}, {details.fields[order[1]]}: ")
    assert sum(v < 0 for line in details.interactions for v in line) == chart[: chart.index("</svg>")].count(
        'class="n"'
    )
    assert [text.split()[:3] for text in page.texts("figcaption")[-3:]] == [["LCN", "layer", str(i)] for i in (1, 2, 3)]


def test_interval_of_a_rate() -> None:
    assert wilson_interval(0.0, 50) == (0.0, pytest.approx(0.0713, abs=1e-4))
    assert wilson_interval(0.3, 100) == pytest.approx((0.2189, 0.3958), abs=1e-4)
    assert wilson_interval(0.3, 0) == (0.0, 1.0)


def test_text_is_escaped() -> None:
    runs = [
        run_of(EVIL, EVIL, s, {"valid": {EVIL: 0.7}, "test": {EVIL: 0.8 + s / 100}}, [0.6, 0.7], command=EVIL, config_hash=EVIL,
               environment={EVIL: EVIL, "git_commit": EVIL}, model=EVIL, problems=(EVIL,), status=Status.UNPROVEN)
        for s in (1, 2, 3)
    ]  # fmt: skip
    first = row_of(
        runs, EVIL, problems=(EVIL,), status=Status.UNPROVEN, published=Published({EVIL: 0.8}, EVIL, (EVIL,))
    )
    second = dataclasses.replace(first, expid="b" + EVIL, label="b" + EVIL)
    details = dataclasses.replace(
        realistic_details(2), run=runs[0], fields=(EVIL, "b"), metric=EVIL, layers={EVIL: [[1.0]]}
    )
    board = board_of(table_of([first, second], EVIL, EVIL), title=EVIL, command=EVIL, missing=(EVIL,))
    html = render_page(board, Path("."), details)
    page = Page(html)
    assert html.count("<script") == 1 and "alert('" not in html
    assert page.texts("h1") == [EVIL] and page.texts("pre") == [EVIL]
    assert list(page.rows()) == [EVIL, "b" + EVIL]


def test_nothing_is_loaded(html: str, page: Page) -> None:
    assert "http:" not in html and "https:" not in html and "@import" not in html and "url(" not in html
    assert not re.search(r"\son\w+=", html)
    names = {name for name, _, _ in page.elements}
    assert not names & {"img", "iframe", "object", "embed", "audio", "video", "base", "form"}
    links = [str(v) for _, a, _ in page.elements for k, v in a.items() if k in ("href", "src", "xlink:href")]
    targets = [a["id"] for _, a, _ in page.elements if "id" in a]
    assert len(set(targets)) == len(targets)
    assert {link[1:] for link in links if link[0] == "#"} <= set(targets)
    assert {link for link in links if link[0] != "#"} == {"data:,"}
    policy = next(a["content"] for _, a, _ in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none'")


def odd_boards() -> dict[str, tuple[Board, Details | None]]:
    nan = float("nan")
    auc = {"valid": {"AUC": 0.8}, "test": {"AUC": 0.8}}
    one = row_of([run_of("x", "A_x", 1, auc, [0.7, 0.8])])
    long = "y" * 300 + "_" + "z" * 100
    longs = [
        row_of([run_of(long, f"{long}{i}", s, {"test": {"AUC": 0.8 + i / 100 + s / 1000}}, [0.7, 0.8], folder=Path("nowhere"))
                for s in (1, 2, 3)])
        for i in range(3)
    ]  # fmt: skip
    bare = run_of("x", "A_x", 1, {"valid": {"AUC": 0.8}})
    for key in ("environment", "command", "config_hash", "data_hash", "best_epoch", "timings"):
        del bare.report[key]
    details = realistic_details(3)
    nan_pairs = [[nan] * 3 for _ in range(3)]
    return {
        "one run": (board_of(table_of([one], "x")), None),
        "one seed": (board_of(realistic_table(seeds=[7])), None),
        "no tables": (board_of(), None),
        "no test split": (
            board_of(table_of([row_of([run_of("x", e, s, {"valid": {"AUC": 0.8 + s / 100}}, [0.7, 0.8]) for s in (1, 2)])
                               for e in ("A_x", "B_x")], "x", "AUC", "valid")), None),
        "some without test": (board_of(table_of([one, row_of([run_of("x", "B_x", 1, {"valid": {"AUC": 0.9}})])], "x")), None),
        "another metric": (
            board_of(table_of([row_of([run_of("x", "A_x", s, {"test": {"MSE": 3.5 + s}}) for s in (1, 2)], "MSE")], "x", "MSE")),
            None),
        "nan": (
            board_of(table_of([row_of([run_of("x", e, s, {"test": {"AUC": v, "logloss": nan}}, [nan, 0.5, nan]) for s in (1, 2)])
                               for e, v in (("A_x", 0.8), ("B_x", nan))], "x")),
            dataclasses.replace(details, calibration=[{"predicted": nan, "observed": nan, "rows": 3}], value=nan,
                                importance=[nan] * 3, interactions=nan_pairs, layers={"a": nan_pairs, "b": [[1.0]]})),
        "only nan": (board_of(table_of([row_of([run_of("x", "A_x", 1, {"test": {"AUC": nan}}, [nan])])], "x")), None),
        "bare report": (board_of(table_of([row_of([bare])], "x")), None),
        "equal": (board_of(table_of([row_of([run_of("x", e, s, auc, [0.8, 0.8]) for s in (1, 2, 3)]) for e in "ABC"], "x")), None),
        "all strange": (board_of(table_of([dataclasses.replace(one, is_comparable=False)], "x")), None),
        "long names": (board_of(table_of(longs, long), title=long, command=long, missing=(long,)),
                       dataclasses.replace(details, fields=(long, "b", "c"))),
        "ten datasets": (board_of(*(table_of([one], f"x{i}") for i in range(10))), None),
        "40 fields": (board_of(table_of([one], "x")), realistic_details(40, 6)),
        "no field": (
            board_of(table_of([one], "x")),
            dataclasses.replace(details, fields=(), calibration=[], importance=[], interactions=[], layers={})),
    }  # fmt: skip


@pytest.mark.parametrize("name", odd_boards())
def test_odd_boards(name: str) -> None:
    board, details = odd_boards()[name]
    html = render_page(board, Path("."), details)
    page = Page(html)
    for i, table in enumerate(board.tables, 1):
        assert len(page.rows(f"t{i}")) == len(table.rows)
    coordinates = " ".join(re.findall(r' (?:d|x|y|cx|cy|r|width|height|viewBox|transform|style)="([^"]*)"', html))
    assert not re.search(r"nan|inf|\de-", coordinates)
    if not any(t.comparisons for t in board.tables):
        assert 'class="matrix"' not in html and "p (Holm)" not in html
    if len(board.tables) > 1:
        assert len(page.texts("nav")[0].split(" experiment")) == len(board.tables) + 1
    if name == "one seed":
        assert any("No experiment has several seeds" in text for text in page.texts("p"))
    if name == "nan":
        assert page.rows()["B_x"][2] == "not a number ± not a number"
    if name == "some without test":
        assert page.rows()["B_x"][2] == "–"


def test_names_without_what_all_have_in_common(table: Table) -> None:
    assert short_names(table)[:2] == ["QNNAlpha", "SDCNv3"] and short_names(table)[-1] == "DNN_ML_1M_old"
    rows = [row_of([run_of("tiny_ctr", e, 1, {"test": {"AUC": 0.8}})]) for e in ("A_tiny", "B_tiny")]
    assert short_names(table_of(rows, "tiny_ctr")) == ["A", "B"]
    assert short_names(table_of(rows[:1], "tiny_ctr")) == ["A_tiny"]
    rows = [row_of([run_of("x", e, 1, {"test": {"AUC": 0.8}})]) for e in ("A_x", "A")]
    assert short_names(table_of(rows, "x")) == ["A_x", "A"]


def test_values_as_text() -> None:
    assert [p_text(p) for p in (0.0001, 0.0494, 1.0, float("nan"))] == ["< 0.001", "0.049", "1.000", "–"]
    assert [size_text(n) for n in (796, 201_696, 1_640_200, 2e9)] == ["796", "201.7k", "1.64M", "2G"]
    assert [seeds_text(s) for s in ([1], [1, 2], [1, 2, 3], [1, 3, 4])] == ["1", "1, 2", "1–3", "1, 3, 4"]
