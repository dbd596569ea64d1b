# SPDX-License-Identifier: Apache-2.0
"""benchmarks/published.yaml: every figure is the one that was published, and a wrong file is refused line by line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from ctrbench.errors import ConfigError
from ctrbench.leaderboard.published import PublishedResults, find_published, verdict
from ctrbench.leaderboard.records import Published, Summary
from ctrbench.leaderboard.statistics import summarize
from ctrbench.yamlfile import dump_yaml

FILE = ROOT / "benchmarks" / "published.yaml"
REFERENCE = ROOT.parent / "shared" / "reference"
# The models as papers.md calls them.
NAMES = {
    "Wide&Deep": "WideDeep", "AutoInt+": "AutoIntPlus", "AFN+": "AFNPlus", "paper v8: ECN": "DCNv3_v8",
    "paper v8: FCN (parallel)": "FCN", "paper v8: FCN (stacked)": "FCN_stacked", "QNN-alpha (KDD 2025)": "QNNAlpha",
}  # fmt: skip
DATASETS = {
    "Avazu": "Avazu_x4", "Criteo": "Criteo_x4", "ML-1M": "ML_1M", "KDD12": "KDD12", "iPinYou": "iPinYou_x1",
    "KKBox": "KKBox_x1",
}  # fmt: skip


@pytest.fixture(scope="module")
def published() -> PublishedResults:
    return PublishedResults(FILE)


def reference(name: str) -> str:
    path = REFERENCE / name
    if not path.is_file():
        pytest.skip(f"{path}, which the figures are from, is not part of this repository")
    return path.read_text(encoding="utf-8")


def table_of_papers() -> Iterator[tuple[str, str, dict[str, float]]]:
    """(dataset, model, metrics) of each cell of the table in section 3 of papers.md."""
    section = re.search(r"^## 3\..*?(?=^## 4\.)", reference("papers.md"), re.MULTILINE | re.DOTALL)
    assert section is not None
    lines = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in section[0].splitlines() if "|" in line]
    lines = [line for line in lines if len(line) == 1 + len(DATASETS) and not line[0].startswith("-")]
    assert lines[0][1:] == list(DATASETS)
    for model, *cells in lines[1:]:
        for dataset, cell in zip(DATASETS.values(), cells, strict=True):
            if cell != "-":
                logloss, auc = cell.split("/")
                yield dataset, NAMES.get(model, model), {"AUC": round(float(auc) / 100, 6), "logloss": float(logloss)}


def test_every_figure_of_the_papers_table(published: PublishedResults) -> None:
    expected = {(dataset, model): metrics for dataset, model, metrics in table_of_papers()}
    assert len(expected) == 20 * 6 - 2
    sources = {"DCNv3_v8": "fcn_v8", "FCN": "fcn_v8", "FCN_stacked": "fcn_v8", "QNNAlpha": "qnn"}
    found = {
        (dataset, entry.of): entry
        for dataset, entries in published.results.items()
        for entry in entries
        if entry.source in ("fcn_v1", "fcn_v8", "qnn")
    }
    assert {key: entry.metrics for key, entry in found.items()} == expected
    for (_, model), entry in found.items():
        assert entry.source == sources.get(model, "fcn_v1") and "truncated" in entry.flags and not entry.run


def test_every_figure_of_a_log(published: PublishedResults) -> None:
    runs = {run["source"]: run for run in json.loads(reference("published_runs.json"))["runs"]}
    seen = 0
    for dataset, entries in published.results.items():
        for entry in entries:
            if entry.source not in ("logs", "qin_logs"):
                continue
            seen += 1
            run = runs[entry.run]
            assert run["dataset"].split("_")[0] == dataset.split("_")[0] and entry.of.startswith(run["model"] + "_")
            assert entry.metrics == run["test" if run["test"] else "valid"]
            assert ("validation" in entry.flags) is (run["test"] is None) and "single_run" in entry.flags
    assert seen == 23  # all but seven depths of KDD12


def test_the_other_figures(published: PublishedResults) -> None:
    text = reference("papers.md")
    others = {
        (dataset, entry.of, entry.source): entry.metrics
        for dataset, entries in published.results.items()
        for entry in entries
        if entry.source not in ("logs", "qin_logs", "fcn_v1", "fcn_v8", "qnn")
    }
    assert "Validation AUC: DIN 0.8655; QIN 0.9701 (R = 4)" in text
    assert "ONN on Avazu_x4 at .3683/79.92" in text
    config = (ROOT / "model_zoo" / "QNNAlpha" / "config" / "model_config.yaml").read_text(encoding="utf-8")
    assert "AUC 0.908781, logloss 0.296032 (QNN_T26_ML_1M_015_c5b4d681;" in config
    assert others == {
        ("ML_1M", "QNNAlpha_ML_1M", "qnn_logs"): {"AUC": 0.908781, "logloss": 0.296032},
        ("Avazu_x4", "ONN", "bars"): {"AUC": 0.7992, "logloss": 0.3683},
        ("MicroLens_1M_x1", "DIN", "qin"): {"AUC": 0.8655},
        ("MicroLens_1M_x1", "QIN", "qin"): {"AUC": 0.9701},
    }


def test_what_has_to_be_known_of_each_dataset(published: PublishedResults) -> None:
    """The flags that are about a dataset's split stand at every figure of it."""
    of_dataset = {"ML_1M": "other_split", "KDD12": "other_split", "iPinYou_x1": "validated_on_test",
                  "MicroLens_1M_x1": "validation"}  # fmt: skip
    for dataset, entries in published.results.items():
        for entry in entries:
            for name in set(of_dataset.values()):
                assert (name in entry.flags) is (of_dataset.get(dataset) == name), (dataset, entry)
    used = {flag for entries in published.results.values() for entry in entries for flag in entry.flags}
    sources = {entry.source for entries in published.results.values() for entry in entries}
    assert used == set(published.content.flags) and sources == set(published.content.sources)


def test_an_entry_names_a_model_folder_or_an_experiment_where_there_is_one(published: PublishedResults) -> None:
    zoo = {path.name.lower(): path.name for path in (ROOT / "model_zoo").iterdir() if (path / "src").is_dir()}
    for entries in published.results.values():
        for entry in entries:
            name = re.sub(r"[^a-z0-9]", "", entry.of.lower())
            assert name not in zoo or entry.of == zoo[name], f"{entry.of} is {zoo.get(name)} here"


# Looking up


CONTENT: dict[str, Any] = {
    "sources": {"logs": "the logs", "paper": "the paper"},
    "flags": {"single": "one run each", "cut": "four digits"},
    "results": {
        "tiny_ctr": [
            {
                "of": "LR_tiny",
                "metrics": {"AUC": 0.645, "logloss": 0.6},
                "source": "logs",
                "run": "LR_7",
                "flags": ["single"],
            },
            {"of": "LR", "metrics": {"AUC": 0.64}, "source": "paper", "flags": ["cut"]},
            {"of": "LR", "metrics": {"AUC": 0.63}, "source": "logs"},
        ]
    },
}


def write(folder: Path, content: Any) -> Path:
    path = folder / "published.yaml"
    path.write_text(dump_yaml(content))
    return path


def test_an_experiment_comes_before_its_model(tmp_path: Path) -> None:
    found = PublishedResults(write(tmp_path, CONTENT))
    first = found.find("tiny_ctr", "LR_tiny", "LR")
    assert first == Published({"AUC": 0.645, "logloss": 0.6}, "the logs, run LR_7", ("one run each",))
    assert found.find("tiny_ctr", "LR_other", "LR") == Published({"AUC": 0.64}, "the paper", ("four digits",))
    assert found.find("tiny_ctr", "FM_tiny", "FM") is None and found.find("other", "LR_tiny", "LR") is None
    assert found.by_source("tiny_ctr", "LR_tiny", "LR", "AUC") == {"the logs": 0.645, "the paper": 0.64}
    assert found.by_source("tiny_ctr", "LR_other", "LR", "AUC") == {"the logs": 0.63, "the paper": 0.64}
    assert found.by_source("tiny_ctr", "LR_tiny", "LR", "logloss") == {"the logs": 0.6}
    assert found.by_source("other", "LR_tiny", "LR", "AUC") == {}


def test_the_file_of_the_repository_around_a_folder(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    write(tmp_path / "benchmarks", CONTENT)
    found = find_published(tmp_path / "runs" / "deep" / "down")
    assert found is not None and list(found.results) == ["tiny_ctr"]
    assert find_published(Path("/proc")) is None


@pytest.mark.parametrize(
    ("auc", "told"),
    [
        ({1: 0.74, 2: 0.75, 3: 0.76}, "inside, -0.0030"),
        ({1: 0.7541, 2: 0.7542, 3: 0.7543}, "above, +0.0012"),
        ({1: 0.75, 2: 0.7502, 3: 0.7501}, "below, -0.0029"),
        ({1: 0.7512}, "one seed, -0.0018"),
        ({1: 0.7534, 2: 0.7534}, "above, +0.0004"),
        ({1: 0.753, 2: 0.753}, "inside, +0.0000"),
    ],
)
def test_a_verdict(auc: dict[int, float], told: str) -> None:
    assert verdict(summarize(auc), Published({"AUC": 0.753}, "x"), "AUC") == told


def test_a_verdict_at_the_edges_of_the_interval() -> None:
    summary = Summary({}, 0.5, 0.1, 0.4, 0.6)
    for value, told in ((0.4, "inside, +0.1000"), (0.6, "inside, -0.1000"), (0.39999, "above, +0.1000")):
        assert verdict(summary, Published({"AUC": value}, "x"), "AUC") == told
    assert verdict(summary, Published({"logloss": 0.5}, "x"), "AUC") == ""
    assert verdict(summary, None, "AUC") == "" and verdict(None, Published({"AUC": 0.5}, "x"), "AUC") == ""


# Bad input


def changed(**values: Any) -> dict[str, Any]:
    return {**CONTENT, "results": {"tiny_ctr": [{"of": "LR", "metrics": {"AUC": 0.5}, "source": "logs", **values}]}}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (changed(flags=["sinlge"]), r"results\.tiny_ctr\.LR: unknown flag, got 'sinlge' \(did you mean 'single'\?\)"),
        (changed(source="log"), r"results\.tiny_ctr\.LR: unknown source, got 'log' \(did you mean 'logs'\?\)"),
        (changed(sorce="x"), r"results\.tiny_ctr\.LR\.sorce: unknown key, got 'x' \(did you mean 'source'\?\)"),
        (changed(metrics={"AUC": "x"}), r"results\.tiny_ctr\.LR\.metrics: must be a number, got 'x'"),
        (changed(metrics={}), r"results\.tiny_ctr\.LR\.metrics: must not be empty, got \{\}"),
        (changed(of=5), r"results\.tiny_ctr\.5\.of: must be a string, got 5"),
        ({**CONTENT, "flag": {}}, r"flag: unknown key, got \{\} \(did you mean 'flags'\?\)"),
        ({"results": {}}, "sources: missing, this key is required"),
        ({**CONTENT, "results": {"tiny_ctr": [5]}}, "results: must be a dictionary, got 5"),
        ({**CONTENT, "results": {"tiny_ctr": None}}, "results: must be a list, got None"),
    ],
)
def test_a_file_that_is_wrong(tmp_path: Path, content: Any, told: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(path))}: {told}$"):
        PublishedResults(path)


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    entries = [
        {"metrics": {"AUC": 0.5}, "source": "logs"},
        {"of": "FM", "metrics": {"AUC": 1}, "source": "x", "flags": ["y"]},
    ]
    path = write(tmp_path, {**CONTENT, "results": {"a": entries}})
    with pytest.raises(ConfigError) as caught:
        PublishedResults(path)
    assert caught.value.problems == [
        f"{path}: results.a.0.of: missing, this key is required",
        f"{path}: results.a.FM: unknown source, got 'x'",
        f"{path}: results.a.FM: unknown flag, got 'y'",
    ]
