# SPDX-License-Identifier: Apache-2.0
"""Planted cheats: each is shown as unproven with its reason, and `ctrbench verify` ends with status 1 and says it.

The forgers know the project: where it matters they renew every hash and the line of the ledger.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from small_repository import SmallRepository, edit_report, report_of, reseal

from ctrbench.checkpoint import load_checkpoint, save_state
from ctrbench.cli import main
from ctrbench.evidence import WEIGHTS
from ctrbench.files import sha256_of_file, write_json
from ctrbench.leaderboard import rebuild
from ctrbench.run import load_trained, open_batches

Shown = Callable[..., str]


@pytest.fixture(autouse=True)
def built_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of a folder's data holds for one command."""
    monkeypatch.setattr(rebuild, "_found", {})


@dataclasses.dataclass(frozen=True)
class Cheat:
    """A cheat and how it shows.

    Attributes:
        plant: does it in a repository; returns what is to be verified.
        table: the reason below the leaderboard, before anybody verified anything; None where only an evaluation shows it.
        verify: what `ctrbench verify` says.
        after: the reason below the leaderboard once it was verified.
    """

    plant: Callable[[SmallRepository], Path]
    table: str | None
    verify: str
    after: str | None = None


NOT_ITS_FIGURES = "its weights do not give the reported figures"


# Weights


def flip_bytes(repository: SmallRepository) -> Path:
    run_dir = repository.run_dir("LR_tiny", 1)
    weights = bytearray((run_dir / WEIGHTS).read_bytes())
    weights[-3] ^= 0x40
    (run_dir / WEIGHTS).write_bytes(weights)
    return run_dir


def swap_weights(repository: SmallRepository) -> Path:
    run_dir = repository.run_dir("LR_tiny", 1)
    shutil.copy(repository.run_dir("LR_tiny", 2) / WEIGHTS, run_dir / WEIGHTS)
    return run_dir


def swap_weights_and_renew_all_hashes(repository: SmallRepository) -> Path:
    run_dir = swap_weights(repository)
    reseal(run_dir, repository)
    return run_dir


def evaluate(run_dir: Path) -> dict[str, dict[str, float]]:
    """The true figures of the weights in a run directory."""
    experiment, data, feature_map, trainer = load_trained(run_dir)
    return {
        split: trainer.evaluate(open_batches(experiment, data, feature_map, split, trainer))
        for split in ("valid", "test")
    }


def take_the_last_epoch(repository: SmallRepository) -> Path:
    """Its weights, its true figures, all hashes and the ledger renewed: the curve alone tells."""
    run_dir = repository.run_dir("FM_tiny", 1)
    save_state(run_dir / WEIGHTS, load_checkpoint(run_dir / "last.ckpt")["model"])
    edit_report(run_dir, metrics=evaluate(run_dir))
    reseal(run_dir, repository)
    return run_dir


# Data


def change_labels(repository: SmallRepository) -> Path:
    path = repository.raw / "test.csv"
    head, *rows = path.read_text().splitlines()
    assert head.startswith("label,")
    path.write_text("\n".join([head, *("1" + row[1:] if i < 20 else row for i, row in enumerate(rows))]) + "\n")
    return repository.run_dir("LR_tiny", 1)


def write_column(path: Path, name: str, values: np.ndarray) -> None:
    """Put values into a built split, with the checksum that belongs to them."""
    with h5py.File(path, "r+") as stored:
        stored[name][...] = values
        stored[name].attrs["crc32"] = np.uint32(zlib.crc32(np.ascontiguousarray(stored[name][()]).data))


def built(repository: SmallRepository, split: str) -> Path:
    return repository.folder / "data" / "tiny_ctr" / f"{split}.h5"


def change_the_built_labels(repository: SmallRepository) -> Path:
    with h5py.File(built(repository, "test")) as stored:
        label = stored["label"][()]
    write_column(built(repository, "test"), "label", 1 - label)
    return repository.run_dir("LR_tiny", 1)


def train_on_the_test_rows(repository: SmallRepository) -> Path:
    """A train.h5 with the test rows in it: the report has the hash of the raw files, and its weights its figures."""
    with h5py.File(built(repository, "test")) as stored:
        columns = {name: stored[name][()] for name in stored}
    for name, values in columns.items():
        write_column(built(repository, "train"), name, np.concatenate([values] * 4))
    return repository.train("LR_tiny", 4, "epochs=30", "early_stop_patience=30", "monitor=logloss", "monitor_mode=min")


def choose_by_the_test_split(repository: SmallRepository) -> Path:
    return repository.train("LR_tiny", 4, "valid_data=./data/raw/tiny_ctr/test.csv")


# Reports and the other files


def raise_a_metric(repository: SmallRepository) -> Path:
    run_dir = repository.run_dir("LR_tiny", 1)
    metrics = report_of(run_dir)["metrics"]
    edit_report(run_dir, metrics={**metrics, "test": {**metrics["test"], "AUC": 0.99}})
    return run_dir


def raise_a_metric_and_seal(repository: SmallRepository) -> Path:
    run_dir = raise_a_metric(repository)
    reseal(run_dir)
    return run_dir


def raise_a_metric_and_edit_the_ledger(repository: SmallRepository) -> Path:
    run_dir = raise_a_metric(repository)
    reseal(run_dir, repository)
    return run_dir


def claim_less_time_and_seal(repository: SmallRepository) -> Path:
    """What no evaluation of weights can tell."""
    run_dir = repository.run_dir("LR_tiny", 1)
    edit_report(run_dir, timings={**report_of(run_dir)["timings"], "train_seconds": 0.01})
    reseal(run_dir)
    return run_dir


def edit(name: str, before: str, after: str) -> Callable[[SmallRepository], Path]:
    def plant(repository: SmallRepository) -> Path:
        path = repository.run_dir("LR_tiny", 1) / name
        text = path.read_text()
        assert before in text
        path.write_text(text.replace(before, after))
        return path.parent

    return plant


def edit_the_configuration_and_seal(repository: SmallRepository) -> Path:
    run_dir = edit("config.yaml", "embedding_regularizer: 0.002", "embedding_regularizer: 0.0")(repository)
    reseal(run_dir, repository)
    return run_dir


def forget_the_data_and_renew_all_hashes(repository: SmallRepository) -> Path:
    run_dir = repository.run_dir("LR_tiny", 1)
    report = report_of(run_dir)
    write_json(run_dir / "report.json", {key: value for key, value in report.items() if key != "data_hash"})
    reseal(run_dir, repository)
    return run_dir


def verify_by_hand(repository: SmallRepository) -> Path:
    """A verification.json that nobody's evaluation wrote."""
    run_dir = raise_a_metric_and_edit_the_ledger(repository)
    report = report_of(run_dir)
    forged = {"report": sha256_of_file(run_dir / "report.json"), "weights": report["evidence"][WEIGHTS]}
    write_json(run_dir / "verification.json", {**forged, "is_equal": True, "metrics": report["metrics"]})
    return run_dir


# Seeds


def remove_a_bad_seed(repository: SmallRepository) -> Path:
    auc = {seed: report_of(repository.run_dir("LR_tiny", seed))["metrics"]["test"]["AUC"] for seed in (1, 2, 3)}
    worst = min(auc, key=auc.__getitem__)
    assert worst == 1
    shutil.rmtree(repository.run_dir("LR_tiny", worst))
    return repository.run_dir("LR_tiny", 2)


def draw_until_it_pleases(repository: SmallRepository) -> Path:
    """Another start of the same seed, by a change to the model that was undone afterwards."""
    path = repository.folder / "model_zoo" / "LR" / "src" / "LR.py"
    text = path.read_text()
    assert "self.reset_parameters()\n" in text
    path.write_text(
        text.replace("self.reset_parameters()\n", "self.reset_parameters()\n        self.reset_parameters()\n")
    )
    before = report_of(repository.run_dir("LR_tiny", 1))["metrics"]
    run_dir = repository.train("LR_tiny", 1)
    assert report_of(run_dir)["metrics"] != before
    path.write_text(text)
    return run_dir


CHEATS = {
    "weights, bytes flipped": Cheat(flip_bytes, "LR_tiny (seed 1): best.safetensors was altered after the run",
                                    "best.safetensors was altered after the run"),
    "weights of another run": Cheat(swap_weights, "LR_tiny (seed 1): best.safetensors was altered after the run",
                                    "best.safetensors was altered after the run"),
    "weights of another run, all hashes renewed": Cheat(
        swap_weights_and_renew_all_hashes, None, r"test AUC is reported as 0\.\d{6}, but its weights give 0\.\d{6}",
        f"LR_tiny (seed 1): {NOT_ITS_FIGURES}"),
    "weights of another epoch, all hashes renewed": Cheat(
        take_the_last_epoch,
        r"FM_tiny (seed 1): its weights are not those of the best validation: 0.541868, but the curve reached 0.561594",
        r"its weights are not those of the best validation: 0\.541868, but the curve reached 0\.561594"),
    "test labels changed": Cheat(change_labels, "its data are others now",
                                 r"its data are others now \(\w{12}\) than it was trained on \(\w{12}\): restore the raw"),
    "labels of the built test split changed": Cheat(
        change_the_built_labels, None, r"\S*data/tiny_ctr/test\.h5 is not what the raw files give: delete \S+data/tiny_ctr, it",
        "test.h5 is not what the raw files give"),
    "trained on the test rows": Cheat(
        train_on_the_test_rows, None, r"\S*data/tiny_ctr/train\.h5 is not what the raw files give: delete \S+data/tiny_ctr, it",
        "train.h5 is not what the raw files give"),
    "best epoch chosen on test": Cheat(choose_by_the_test_split, "valid_data is test_data, so it chose its best epoch by it",
                                       "valid_data is test_data, so it chose its best epoch by it"),
    "a metric raised": Cheat(raise_a_metric, "LR_tiny (seed 1): report.json was altered after the run",
                             "report.json was altered after the run"),
    "a metric raised and sealed": Cheat(raise_a_metric_and_seal, "LR_tiny: seed 1 is not in ledger.jsonl",
                                        "seed 1 is not in ledger.jsonl"),
    "a metric raised, all hashes renewed": Cheat(
        raise_a_metric_and_edit_the_ledger, None, r"test AUC is reported as 0\.990000, but its weights give 0\.410000",
        f"LR_tiny (seed 1): {NOT_ITS_FIGURES}"),
    "a training time lowered and sealed": Cheat(claim_less_time_and_seal, "LR_tiny: seed 1 is not in ledger.jsonl",
                                                "seed 1 is not in ledger.jsonl"),
    "the data's hash left out, all hashes renewed": Cheat(
        forget_the_data_and_renew_all_hashes, "trained on other data",
        r"its data are others now \(\w{12}\) than it was trained on \(None\)"),
    "the curve edited": Cheat(edit("metrics.jsonl", '"AUC": 0.5', '"AUC": 0.7'),
                              "LR_tiny (seed 1): metrics.jsonl was altered after the run",
                              "metrics.jsonl was altered after the run"),
    "the configuration edited": Cheat(edit("config.yaml", "seed: 1", "seed: 11"),
                                      "LR_tiny (seed 1): config.yaml was altered after the run",
                                      "config.yaml was altered after the run"),
    "the configuration edited, all hashes renewed": Cheat(
        edit_the_configuration_and_seal, "config.yaml does not have the hash that the report names",
        "config.yaml does not have the hash that the report names"),
    "the log edited": Cheat(edit("train.log", "Save best model", "Saved"),
                            "LR_tiny (seed 1): train.log was altered after the run", "train.log was altered after the run"),
    "a bad seed removed": Cheat(remove_a_bad_seed, "LR_tiny: ledger.jsonl also has seed 1, which is left out here",
                                "ledger.jsonl also has seed 1, which is left out here"),
    "a seed run until it pleased": Cheat(draw_until_it_pleases, "LR_tiny: seed 1 was run until it had 2 different results",
                                         "seed 1 was run until it had 2 different results"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_is_caught(name: str, repository: SmallRepository, shown: Shown) -> None:
    cheat = CHEATS[name]
    run_dir = cheat.plant(repository)
    expid = run_dir.parent.name
    before = shown(0, "leaderboard", repository.runs)
    if cheat.table is not None:
        assert status_of(before, expid) == "unproven"
        assert any(line.startswith("- unproven: ") and cheat.table in line for line in before.splitlines()), before
    else:
        assert "unproven" not in before.split("\n\n")[0] or "different settings" in before
    told = shown(1, "verify", run_dir)
    assert re.match(rf"^{re.escape(str(run_dir))}: UNPROVEN: (.*; )?{cheat.verify}", told) and told.count("\n") == 1, (
        told
    )
    after = shown(0, "leaderboard", repository.runs)
    reason = cheat.after or cheat.table
    assert reason is not None and status_of(after, expid) == "unproven"
    assert any(line.startswith("- unproven: ") and reason in line for line in after.splitlines()), after


def status_of(text: str, expid: str) -> str:
    """The last cell of an experiment's line."""
    [line] = [line for line in text.splitlines() if line.startswith(f"| {expid} ")]
    return line.strip("| ").split("|")[-1].strip()


def test_the_honest_runs_beside_a_cheat_are_proven(repository: SmallRepository, shown: Shown) -> None:
    run_dir = swap_weights_and_renew_all_hashes(repository)
    told = shown(1, "verify", repository.runs).splitlines()
    assert len(told) == 6
    for line in told:
        is_cheat = line.startswith(f"{run_dir}: ")
        assert ("UNPROVEN: valid AUC is reported as" in line) is is_cheat and (
            ": proven: valid AUC 0." in line
        ) is not is_cheat
    text = shown(0, "leaderboard", repository.runs)
    assert status_of(text, "FM_tiny") == "proven" and status_of(text, "LR_tiny") == "unproven"


def test_a_verification_that_is_written_by_hand(repository: SmallRepository, shown: Shown) -> None:
    """It lasts until somebody verifies."""
    run_dir = verify_by_hand(repository)
    assert "UNPROVEN" in shown(1, "verify", run_dir)
    assert f"- unproven: LR_tiny (seed 1): {NOT_ITS_FIGURES}." in shown(0, "leaderboard", repository.runs)


def test_seeds_that_a_suite_lacks(repository: SmallRepository, shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the ledger was cleaned: the suite had said which seeds would be run."""
    monkeypatch.chdir(repository.folder)
    run_dir = repository.run_dir("LR_tiny", 1)
    digest = sha256_of_file(run_dir / "report.json")
    shutil.rmtree(run_dir)
    repository.write_ledger([entry for entry in repository.ledger() if entry["report"] != digest])
    assert "unproven" not in shown(0, "leaderboard", "runs")
    text = shown(0, "leaderboard", "runs", "--suite", "small")
    assert status_of(text, "LR_tiny") == "unproven" and "- unproven: LR_tiny: seeds of the suite are missing." in text
    assert "- missing: LR_tiny on tiny_ctr, seed 1." in text


def test_a_curve_that_is_forged_too(repository: SmallRepository, shown: Shown) -> None:
    """Weights of another epoch with a curve to match: evaluation cannot tell, training anew does."""
    run_dir = take_the_last_epoch(repository)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    top = lines[-1]["AUC"]
    forged = [{**line, "AUC": min(line["AUC"], top)} for line in lines]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in forged))
    reseal(run_dir, repository)
    assert ": proven: " in shown(0, "verify", run_dir)
    told = shown(1, "verify", "--retrain", run_dir)
    assert re.search(r": UNPROVEN: .*test AUC is reported as 0\.\d{6}, but training it anew gives 0\.586800", told)
    assert status_of(shown(0, "leaderboard", repository.runs), "FM_tiny") == "unproven"


def test_training_on_the_test_rows_shows_when_it_is_trained_anew(repository: SmallRepository, shown: Shown) -> None:
    """Once the forged data are gone, the weights give what they are said to give."""
    run_dir = train_on_the_test_rows(repository)
    shutil.rmtree(repository.folder / "data" / "tiny_ctr")
    assert ": proven: " in shown(0, "verify", run_dir)
    assert "but training it anew gives" in shown(1, "verify", "--retrain", run_dir)


def test_a_cheat_in_the_model_shows_when_it_is_trained_anew(repository: SmallRepository, shown: Shown) -> None:
    run_dir = swap_weights_and_renew_all_hashes(repository)
    metrics = evaluate(run_dir)
    edit_report(run_dir, metrics=metrics)
    (run_dir / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "AUC": metrics["valid"]["AUC"]}) + "\n")
    reseal(run_dir, repository)
    assert ": proven: " in shown(0, "verify", run_dir)
    assert "but training it anew gives" in shown(1, "verify", "--retrain", run_dir)


def test_a_report_of_other_data_is_no_rival(repository: SmallRepository, shown: Shown, tmp_path: Path) -> None:
    """Trained on easier data and copied among the others: shown, but not ranked above them."""
    easy = repository.copy(tmp_path / "easy")
    for split in ("train", "valid", "test"):
        path = easy.raw / f"{split}.csv"
        head, *rows = path.read_text().splitlines()
        position = head.split(",").index("price")
        cells = [row.split(",") for row in rows]
        easier = [[*c[:position], c[0], *c[position + 1 :]] for c in cells]
        path.write_text("\n".join([head, *(",".join(c) for c in easier)]) + "\n")
    for seed in (1, 2, 3):
        shutil.rmtree(repository.run_dir("LR_tiny", seed))
        shutil.copytree(easy.train("LR_tiny", seed, "learning_rate=0.1"), repository.run_dir("LR_tiny", seed))
        assert report_of(repository.run_dir("LR_tiny", seed))["metrics"]["test"]["AUC"] > 0.9
    repository.write_ledger([*repository.ledger(), *(e for e in easy.ledger() if e["expid"] == "LR_tiny")])
    text = shown(0, "leaderboard", repository.runs)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split()[1] for line in lines[1:]] == ["FM_tiny", "LR_tiny"]
    assert "- unproven: LR_tiny: trained on other data (" in text and "against best" not in text
    assert main(["verify", str(repository.run_dir("LR_tiny", 1))]) == 1


def test_every_kind_of_figure_is_compared(repository: SmallRepository, shown: Shown) -> None:
    """A figure that the weights cannot give is no better than a wrong one."""
    run_dir = repository.run_dir("LR_tiny", 1)
    metrics: dict[str, Any] = report_of(run_dir)["metrics"]
    for changed, told in (
        (
            {**metrics, "test": {**metrics["test"], "logloss": metrics["test"]["logloss"] - 2e-6}},
            "test logloss is reported as",
        ),
        ({**metrics, "test": {**metrics["test"], "gAUC": 0.9}}, "test gAUC is reported, but cannot be computed again"),
        ({**metrics, "test2": {"AUC": 0.9}}, "no test2 split"),
    ):
        edit_report(run_dir, metrics=changed)
        reseal(run_dir, repository)
        assert told in shown(1, "verify", run_dir)
