# SPDX-License-Identifier: Apache-2.0
"""What backs a run: its seal, the ledger of its model_root, and what contradicts it."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_repository import SmallRepository, edit_report, report_of, reseal

from ctrbench.errors import CtrbenchError, DataError
from ctrbench.evidence import (
    FILES,
    WEIGHTS,
    append_to_ledger,
    data_problem,
    find_ledger,
    ledger_problems,
    problems_of,
    read_ledger,
    read_report,
    weights_problem,
)
from ctrbench.files import sha256_of_file
from ctrbench.yamlfile import dump_yaml, load_yaml


def problems(run_dir: Path) -> list[str]:
    return problems_of(run_dir, read_report(run_dir))


# The seal


def test_a_run_is_sealed_and_entered_in_the_ledger(finished: SmallRepository) -> None:
    assert len(finished.ledger()) == 6
    for expid, seed in (("LR_tiny", 1), ("FM_tiny", 3)):
        run_dir = finished.run_dir(expid, seed)
        report = report_of(run_dir)
        assert report["evidence"] == {name: sha256_of_file(run_dir / name) for name in FILES} and WEIGHTS in FILES
        digest = sha256_of_file(run_dir / "report.json")
        assert (run_dir / "DONE").read_text() == digest + "\n"
        [entry] = [e for e in finished.ledger() if e["report"] == digest]
        kept = ("dataset_id", "expid", "seed", "settings_hash", "data_hash", "model_hash", "metrics")
        assert {key: entry[key] for key in kept} == {key: report[key] for key in kept} and entry.keys() == {
            *kept, "time", "report",
        }  # fmt: skip
        assert problems(run_dir) == [] and weights_problem(run_dir, report) is None
        assert data_problem(run_dir, report) is None
        assert find_ledger(run_dir) == finished.runs / "ledger.jsonl"


@pytest.mark.parametrize("name", ["config.yaml", "train.log", "metrics.jsonl"])
def test_a_file_that_is_altered_or_missing(repository: SmallRepository, name: str) -> None:
    run_dir = repository.run_dir("LR_tiny", 1)
    with (run_dir / name).open("a") as stream:
        stream.write("\n")
    assert problems(run_dir) == [f"{name} was altered after the run"]
    (run_dir / name).unlink()
    assert problems(run_dir) == [f"{name} is missing"]


def test_weights_that_are_altered_or_missing(repository: SmallRepository) -> None:
    run_dir = repository.run_dir("LR_tiny", 1)
    weights = bytearray((run_dir / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (run_dir / WEIGHTS).write_bytes(weights)
    assert weights_problem(run_dir, report_of(run_dir)) == "best.safetensors was altered after the run"
    (run_dir / WEIGHTS).unlink()  # a copy without the weights is an honest one
    assert weights_problem(run_dir, report_of(run_dir)) is None and problems(run_dir) == []


def test_a_report_that_is_edited_or_has_no_seal(repository: SmallRepository) -> None:
    run_dir = repository.run_dir("LR_tiny", 1)
    unfinished = ["it has no hashes of its files: it is unfinished or of an earlier version"]
    edit_report(run_dir, epochs=3)
    assert problems(run_dir) == ["report.json was altered after the run"]
    (run_dir / "DONE").write_bytes(b"\xff")
    assert problems(run_dir) == ["report.json was altered after the run"]
    (run_dir / "DONE").unlink()
    assert problems(run_dir) == unfinished
    (run_dir / "DONE").touch()
    edit_report(run_dir, evidence=None)
    assert problems(run_dir) == unfinished


def test_a_configuration_of_another_run(repository: SmallRepository) -> None:
    run_dir = repository.run_dir("LR_tiny", 1)
    path = run_dir / "config.yaml"
    content = load_yaml(path)
    path.write_text(dump_yaml({**content, "training": {**content["training"], "epochs": 9}}))
    reseal(run_dir)
    assert problems(run_dir) == ["config.yaml does not have the hash that the report names"]
    shutil.copy(repository.run_dir("LR_tiny", 2) / "config.yaml", path)
    reseal(run_dir)
    assert problems(run_dir) == ["config.yaml is of another run"]
    path.write_text("training: 5")
    reseal(run_dir)
    [told] = problems(run_dir)
    assert told.startswith(f"{path}: damaged: ") and told.endswith(": run the experiment again")


def test_weights_of_another_epoch_than_the_best(repository: SmallRepository) -> None:
    """The curve says what the best validation was; a report with another one does not have its weights."""
    run_dir = repository.run_dir("FM_tiny", 1)
    curve = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    best, other = max(r["AUC"] for r in curve), curve[-1]["AUC"]
    assert best == report_of(run_dir)["metrics"]["valid"]["AUC"] > other + 1e-3
    metrics = report_of(run_dir)["metrics"]
    edit_report(run_dir, metrics={**metrics, "valid": {**metrics["valid"], "AUC": other}})
    reseal(run_dir)
    line = f"its weights are not those of the best validation: {other:.6f}, but the curve reached {best:.6f}"
    assert problems(run_dir) == [line]


@pytest.mark.parametrize(
    "changes",
    [
        {"monitor": {"AUC": 1, "logloss": -1}},
        {"monitor": "logloss", "monitor_mode": "min"},
        {"save_best_only": False},
        {"monitor": "gAUC", "metrics": ["AUC"]},
    ],
)
def test_whatever_is_monitored(finished: SmallRepository, changes: dict[str, Any], tmp_path: Path) -> None:
    repository = finished.copy(tmp_path / "repository")
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    if "gAUC" in str(changes):
        overrides.append("group_id=user_id")
    run_dir = repository.train("LR_tiny", 9, "epochs=3", *overrides)
    assert problems(run_dir) == []


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("valid_data", "valid_data is test_data, so it chose its best epoch by it"),
        ("train_data", "train_data is test_data, so it trained on it"),
    ],
)
def test_a_split_that_is_the_test_split(repository: SmallRepository, key: str, told: str) -> None:
    run_dir = repository.train("LR_tiny", 9, f"{key}=data/raw/../raw/tiny_ctr/test.csv")
    assert problems(run_dir) == [told]


def test_data_that_changed(repository: SmallRepository) -> None:
    run_dir = repository.run_dir("LR_tiny", 1)
    report = report_of(run_dir)
    before = report["data_hash"][:12]
    with (repository.raw / "test.csv").open("a") as stream:
        stream.write((repository.raw / "valid.csv").read_text().splitlines()[1] + "\n")
    told = data_problem(run_dir, report)
    assert told is not None and told.startswith("its data are others now (")
    assert told.endswith(f") than it was trained on ({before})") and before not in told[:40]
    assert data_problem(run_dir, report, is_built=True) == told
    shutil.rmtree(repository.folder / "data" / "tiny_ctr")
    assert data_problem(run_dir, report, is_built=True) is None and data_problem(run_dir, report) == told


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "{}", "5", "null", "[" * 9999, '{"metrics": {}}', None,
        {"seed": "1"}, {"seed": None}, {"metrics": []}, {"metrics": {"test": 0.5}}, {"metrics": {"test": {"AUC": "0.5"}}},
        {"metrics": {"test": {"AUC": None}}}, {"parameters": 5}, {"parameters": {}}, {"expid": 5}, {"data_hash": None},
        {"settings_hash": 5}, {"environment": "x"}, {"epochs": "8"}, {"timings": 2},
    ],
)  # fmt: skip
def test_a_damaged_report(repository: SmallRepository, content: Any) -> None:
    path = repository.run_dir("LR_tiny", 1) / "report.json"
    if isinstance(content, dict):
        edit_report(path.parent, **content)
    elif content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(DataError, match=r"seed_1/report\.json: missing or damaged: run the experiment again$"):
        read_report(path.parent)


# The ledger


def entry(**values: Any) -> dict[str, Any]:
    known = {"dataset_id": "d", "expid": "X", "settings_hash": "s", "data_hash": "h", "seed": 1, "report": "r"}
    return {**known, "metrics": {"test": {"AUC": 0.5}}, **values}


def add_many(path: Path, first: int) -> None:
    for number in range(first, first + 20):
        append_to_ledger(path, entry(seed=number))


def test_a_ledger_that_many_processes_write(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    path = tmp_path / "ledger.jsonl"
    processes = [context.Process(target=add_many, args=(path, 20 * i)) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert sorted(e["seed"] for e in read_ledger(path)) == list(range(40))


def test_a_ledger_whose_writer_died(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    append_to_ledger(path, entry(seed=1))
    with path.open("a") as stream:
        stream.write(json.dumps(entry(seed=2))[:40])
    append_to_ledger(path, entry(seed=3))
    with path.open("ab") as stream:
        lines = [b"5", b"[]", b"{}", b"\xff\xfe", b"", json.dumps(entry(seed="4")).encode(), b'{"report": "x"}']
        stream.write(b"\n".join([*lines, b""]))
    append_to_ledger(path, entry(seed=5))
    assert [e["seed"] for e in read_ledger(path)] == [1, 3, 5]


def test_a_ledger_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(
        CtrbenchError, match=r"ledger\.jsonl: the disk is full .*: free some space and run the same command"
    ):
        append_to_ledger(tmp_path / "ledger.jsonl", entry())
    monkeypatch.undo()
    (tmp_path / "folder").mkdir()
    with pytest.raises(CtrbenchError, match=r"folder: cannot be written: "):
        append_to_ledger(tmp_path / "folder", entry())


def test_where_a_ledger_is_looked_for(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "data" / "expid" / "seed_1"
    run_dir.mkdir(parents=True)
    assert find_ledger(run_dir) is None
    (tmp_path / "ledger.jsonl").touch()
    assert find_ledger(run_dir) == tmp_path / "ledger.jsonl"
    (tmp_path / "runs" / "ledger.jsonl").touch()
    assert find_ledger(run_dir) == tmp_path / "runs" / "ledger.jsonl"


class Runs:
    """Runs of one experiment and their ledger, as little of them as the ledger's checks look at."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ledger = folder, folder / "ledger.jsonl"
        self.found: dict[int, tuple[Path, dict[str, Any]]] = {}

    def add(self, seed: int, auc: float = 0.5, **values: Any) -> None:
        """A run that is entered in the ledger; of several with one seed the last stays."""
        run_dir = self.folder / f"seed_{seed}"
        run_dir.mkdir(exist_ok=True)
        report = entry(seed=seed, metrics={"test": {"AUC": auc}}, **values)
        report.pop("report")
        (run_dir / "report.json").write_text(json.dumps(report))
        append_to_ledger(self.ledger, {**report, "report": sha256_of_file(run_dir / "report.json")})
        self.found[seed] = run_dir, report

    def problems(self, *seeds: int, others: tuple[int, ...] = ()) -> list[str]:
        """What the ledger says if these are shown."""
        return ledger_problems([self.found[s] for s in seeds], self.ledger, [self.found[s][1] for s in others])


@pytest.fixture
def made(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def test_seeds_that_are_all_shown(made: Runs) -> None:
    made.add(1)
    made.add(2)
    made.add(2)  # the same result again, as after --fresh
    for other in ({"expid": "Y"}, {"dataset_id": "e"}, {"settings_hash": "t"}, {"data_hash": "i"}):
        append_to_ledger(made.ledger, entry(seed=9, **other))
    assert made.problems(1, 2) == [] and made.problems(1, others=(2,)) == []


def test_a_seed_that_is_left_out(made: Runs) -> None:
    for seed in (1, 2, 10, 4):
        made.add(seed)
    assert made.problems(1, 2) == ["ledger.jsonl also has seed 4, 10, which is left out here"]
    assert made.problems(1, others=(2, 4)) == ["ledger.jsonl also has seed 10, which is left out here"]


def test_a_seed_that_was_drawn_until_it_pleased(made: Runs) -> None:
    made.add(1, 0.5)
    made.add(1, 0.6)
    made.add(1, 0.7)
    made.add(2)
    assert made.problems(1, 2) == ["seed 1 was run until it had 3 different results"]
    assert made.problems(2, others=(1,)) == []


def test_a_run_that_is_not_entered(made: Runs) -> None:
    made.add(1)
    (made.found[1][0] / "report.json").write_text("{}")
    assert made.problems(1) == ["seed 1 is not in ledger.jsonl"]
    assert ledger_problems([made.found[1]], None) == ["there is no ledger.jsonl around them"]


def test_a_sweep_that_chose_the_setting(made: Runs) -> None:
    """Its seeds stand apart only where none of them is shown."""
    made.add(1, sweep="S")
    made.add(2, sweep="S")
    made.add(3)
    made.add(4)
    assert made.problems(3, 4) == [] and made.problems(1, 2, 3, 4) == []
    assert made.problems(1, 3, 4) == ["ledger.jsonl also has seed 2, which is left out here"]
    assert made.problems(1, 2, 3) == ["ledger.jsonl also has seed 4, which is left out here"]
