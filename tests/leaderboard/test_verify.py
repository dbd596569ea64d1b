# SPDX-License-Identifier: Apache-2.0
"""`ctrbench verify`: honest runs are proven, and whatever keeps a run from being evaluated is said in one line."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from small_repository import SEEDS, SmallRepository, edit_report, report_of, reseal

from ctrbench.cli import main
from ctrbench.config import load_run
from ctrbench.errors import ConfigError
from ctrbench.evidence import WEIGHTS
from ctrbench.files import sha256_of_file
from ctrbench.leaderboard import rebuild
from ctrbench.leaderboard import verify as module
from ctrbench.leaderboard.collect import VERIFICATION, read_run
from ctrbench.leaderboard.rebuild import altered_files
from ctrbench.leaderboard.records import Status
from ctrbench.leaderboard.statistics import bootstrap_auc
from ctrbench.leaderboard.verify import Verdict, calibration, differences, find_runs, verify
from ctrbench.run import load_trained, open_batches
from ctrbench.yamlfile import dump_yaml, load_yaml

Shown = Callable[..., str]
Refused = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def built_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of a folder's data holds for one command."""
    monkeypatch.setattr(rebuild, "_found", {})


def verification_of(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / VERIFICATION).read_text())
    return found


def test_an_honest_run(repository: SmallRepository, shown: Shown) -> None:
    run_dir = repository.run_dir("FM_tiny", 2)
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    text = shown(0, "verify", run_dir)
    report = report_of(run_dir)
    metrics = report["metrics"]
    figures = ", ".join(f"{s} {n} {v:.6f}" for s, values in metrics.items() for n, v in values.items())
    assert text == f"{run_dir}: proven: {figures}\n"
    found = verification_of(run_dir)
    assert found["metrics"] == metrics and found["is_equal"] and not found["is_retrained"] and found["problems"] == []
    assert found["report"] == sha256_of_file(run_dir / "report.json")
    assert found["weights"] == sha256_of_file(run_dir / WEIGHTS)
    assert found["environment"]["torch"] == torch.__version__
    run = read_run(run_dir)
    assert run.status is Status.PROVEN and run.verification == found
    after = {path.name: path.read_bytes() for path in run_dir.iterdir() if path.name != VERIFICATION}
    assert after == before  # it only reads
    assert not list((repository.folder / "data").glob(".verify_*"))


def test_the_figures_are_those_of_scikit_learn(repository: SmallRepository, tmp_path: Path) -> None:
    """The stored weights' predictions of the raw test rows, by another way than the evaluation."""
    run_dir = repository.run_dir("FM_tiny", 1)
    output = tmp_path / "predictions.csv"
    assert main(["predict", str(run_dir), "--data", str(repository.raw / "test.csv"), "--output", str(output)]) == 0
    frame = pl.read_csv(output)
    label, score = frame["label"].to_numpy(), frame["y_pred"].to_numpy()
    assert main(["verify", str(run_dir)]) == 0
    found = verification_of(run_dir)
    assert found["metrics"]["test"]["AUC"] == pytest.approx(roc_auc_score(label, score), abs=1e-9)
    assert found["metrics"]["test"]["logloss"] == pytest.approx(log_loss(label, score), abs=1e-6)
    low, high = bootstrap_auc(label.astype(float), score, seed=0)
    bootstrap = found["bootstrap"]
    assert {k: bootstrap[k] for k in ("split", "metric", "level")} == {"split": "test", "metric": "AUC", "level": 0.95}
    assert (bootstrap["low"], bootstrap["high"]) == pytest.approx((low, high), abs=1e-9)
    assert low < found["metrics"]["test"]["AUC"] < high
    assert sum(b["rows"] for b in found["calibration"]) == 100 and len(found["calibration"]) == 20


def test_calibration() -> None:
    generator = np.random.default_rng(0)
    score = generator.random(1003)
    label = (generator.random(1003) < score).astype(float)
    bins = calibration(label, score)
    assert [b["rows"] for b in bins] == [51] * 3 + [50] * 17
    order = np.argsort(score)
    first = order[:51]
    assert bins[0]["predicted"] == pytest.approx(score[first].mean()) and bins[0]["observed"] == label[first].mean()
    assert all(a["predicted"] <= b["predicted"] for a, b in itertools.pairwise(bins))
    assert len(calibration(label[:5], score[:5])) == 5


@pytest.mark.parametrize("expid", ["LR_tiny", "FM_tiny"])
def test_training_anew_gives_the_same_to_the_last_bit(expid: str, repository: SmallRepository, shown: Shown) -> None:
    run_dir = repository.run_dir(expid, 3)
    (run_dir / WEIGHTS).unlink()
    line = f"{run_dir}: UNPROVEN: best.safetensors is not here: copy it here, or train the run anew with --retrain\n"
    assert shown(1, "verify", run_dir) == line and not (run_dir / VERIFICATION).exists()
    threads = torch.get_num_threads()
    assert ": proven: " in shown(0, "verify", run_dir, "--retrain")
    assert torch.get_num_threads() == threads
    found = verification_of(run_dir)
    assert found["metrics"] == report_of(run_dir)["metrics"] and found["is_retrained"] and found["is_equal"]
    run = read_run(run_dir)
    assert run.status is Status.RECORDED and run.verification == found and run.problems == ()


def test_training_anew_leaves_the_run_and_says_nothing_of_its_own(repository: SmallRepository, capfd: Any) -> None:
    run_dir = repository.run_dir("LR_tiny", 1)
    before = {path: path.read_bytes() for path in sorted(repository.runs.rglob("*")) if path.is_file()}
    assert main(["verify", "--retrain", str(run_dir)]) == 0
    output = capfd.readouterr()
    assert output.out.count("\n") == 1 and output.err == ""
    after = {path: path.read_bytes() for path in sorted(repository.runs.rglob("*")) if path.is_file()}
    after.pop(run_dir / VERIFICATION)
    assert {path.name for path in after.keys() - before.keys()} <= {"ledger.jsonl.lock", ".lock"}
    assert {path: content for path, content in after.items() if path in before} == before


def test_all_runs_below_some_folders(repository: SmallRepository, shown: Shown) -> None:
    lr, fm = repository.runs / "tiny_ctr" / "LR_tiny", repository.run_dir("FM_tiny", 1)
    text = shown(0, "verify", lr, fm, lr / "seed_1")
    assert [line.split(": ")[0] for line in text.splitlines()] == [*(str(lr / f"seed_{s}") for s in SEEDS), str(fm)]
    assert all(": proven: " in line for line in text.splitlines())


def test_where_there_is_no_run(repository: SmallRepository, refused: Refused) -> None:
    assert refused("verify", repository.folder / "nowhere") == [f"{repository.folder}/nowhere: no finished run there"]
    run_dir = repository.run_dir("LR_tiny", 1)
    (run_dir / "DONE").unlink()
    assert refused("verify", repository.runs / "tiny_ctr" / "FM_tiny", run_dir) == [f"{run_dir}: no finished run there"]
    with pytest.raises(ConfigError, match="no finished run there"):
        find_runs([run_dir])


def test_a_gpu_that_does_not_exist(finished: SmallRepository, refused: Refused) -> None:
    [told] = refused("verify", finished.run_dir("LR_tiny", 1), "--gpu", "99")
    assert told.startswith("--gpu 99: no such GPU, this machine has ") and told.endswith(": use --gpu -1 for the CPU")


def test_a_damaged_report_is_told_and_the_others_go_on(repository: SmallRepository, shown: Shown) -> None:
    path = repository.run_dir("FM_tiny", 1) / "report.json"
    path.write_text("{")
    text = shown(1, "verify", repository.runs / "tiny_ctr" / "LR_tiny", path.parent)
    assert text.count(": proven: ") == 3
    assert text.endswith(f"{path.parent}: UNPROVEN: {path}: missing or damaged: run the experiment again\n")


def test_raw_data_that_are_missing(repository: SmallRepository, shown: Shown) -> None:
    """Built data do without them; where these are gone too, nothing can be evaluated."""
    run_dir = repository.run_dir("LR_tiny", 1)
    shutil.rmtree(repository.raw)
    assert ": proven: " in shown(0, "verify", run_dir)
    shutil.rmtree(repository.folder / "data" / "tiny_ctr")
    text = shown(1, "verify", run_dir)
    assert text.count("\n") == 1 and "UNPROVEN: dataset_config: tiny_ctr.train_data: " in text and "train.csv" in text
    assert text == shown(1, "verify", run_dir, "--retrain")


def test_data_that_are_not_built_are_built(repository: SmallRepository, shown: Shown) -> None:
    run_dir = repository.run_dir("LR_tiny", 1)
    shutil.rmtree(repository.folder / "data" / "tiny_ctr")
    assert ": proven: " in shown(0, "verify", run_dir)
    path = repository.raw / "train.csv"
    path.write_text(path.read_text().replace("\n0,", "\n1,", 1))
    shutil.rmtree(repository.folder / "data" / "tiny_ctr")
    for options in ((), ("--retrain",)):
        assert "UNPROVEN: its data are others now (" in shown(1, "verify", run_dir, *options)
    assert not (repository.folder / "data" / "tiny_ctr").exists()


def test_a_model_folder_that_is_broken(repository: SmallRepository, shown: Shown) -> None:
    """Its error, in one line; the runs of other models go on."""
    source = repository.folder / "model_zoo" / "LR" / "src" / "LR.py"
    text = source.read_text()
    paths = (repository.run_dir("LR_tiny", 1), repository.run_dir("FM_tiny", 1))
    source.write_text(text.replace("from torch import Tensor\n", "from torch import Tensor\nimport no_such_module\n"))
    first, second = shown(1, "verify", *paths).splitlines()
    assert first.startswith(f"{paths[0]}: UNPROVEN: ") and "no_such_module" in first and ": proven: " in second


def test_a_model_that_fails(repository: SmallRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise LookupError("broken on purpose\nat length")

    monkeypatch.setattr(module, "load_trained", fail)
    run_dir = repository.run_dir("LR_tiny", 1)
    assert verify(run_dir) == Verdict(run_dir, ("LookupError: broken on purpose",), {})


def test_a_model_folder_that_changed_since(repository: SmallRepository, shown: Shown) -> None:
    """Weights that no longer fit, or that give something else."""
    run_dir = repository.run_dir("LR_tiny", 1)
    source = repository.folder / "model_zoo" / "LR" / "src" / "LR.py"
    text = source.read_text()
    source.write_text(text.replace("self.output_activation(logit)", "self.output_activation(2 * logit)"))
    assert "test logloss is reported as 0." in shown(1, "verify", run_dir)


@pytest.mark.parametrize(
    ("reported", "found", "told"),
    [
        ({"test": {"AUC": 0.5}}, {"test": {"AUC": 0.5 + 9e-7}}, []),
        (
            {"test": {"AUC": 0.5}},
            {"test": {"AUC": 0.5 + 2e-6}},
            ["test AUC is reported as 0.500000, but its weights give 0.500002"],
        ),
        ({"test": {"MSE": 5e6}}, {"test": {"MSE": 5e6 + 4}}, []),
        ({"test": {"AUC": math.nan}}, {"test": {"AUC": math.nan}}, []),
        (
            {"test": {"AUC": 0.5}},
            {"test": {"AUC": math.nan}},
            ["test AUC is reported as 0.500000, but its weights give nan"],
        ),
        (
            {"test": {"AUC": math.nan}},
            {"test": {"AUC": 0.5}},
            ["test AUC is reported as nan, but its weights give 0.500000"],
        ),
        ({"test": {"AUC": 0.5}}, {"valid": {"AUC": 0.5}}, ["test AUC is reported, but cannot be computed again"]),
        ({}, {"valid": {"AUC": 0.5}}, []),
    ],
)
def test_differences(reported: Any, found: Any, told: list[str]) -> None:
    assert differences(reported, found) == told


def test_metrics_that_are_not_the_default(repository: SmallRepository, shown: Shown) -> None:
    metrics = "metrics=[AUC, logloss, gAUC, NDCG(k=3)]"
    run_dir = repository.train("LR_tiny", 9, metrics, "group_id=weekday")
    assert list(report_of(run_dir)["metrics"]["test"]) == ["AUC", "logloss", "gAUC", "NDCG(k=3)"]
    assert "test NDCG(k=3) 0." in shown(0, "verify", run_dir)


def test_a_run_without_a_validation_split(repository: SmallRepository, shown: Shown) -> None:
    run_dir = repository.train("LR_tiny", 7, "valid_data=", "epochs=2")
    assert "valid" not in report_of(run_dir)["metrics"]
    assert ": proven: test AUC 0." in shown(0, "verify", run_dir)


def test_a_run_without_test_labels(repository: SmallRepository, shown: Shown) -> None:
    path = repository.raw / "test.csv"
    pl.read_csv(path, infer_schema=False).drop("label").write_csv(path)
    run_dir = repository.train("LR_tiny", 7, "epochs=2")
    text = shown(0, "verify", run_dir)
    assert ": proven: valid AUC 0." in text and "test" not in text.split(": proven: ")[1]
    assert "bootstrap" not in verification_of(run_dir)


def test_one_seed_of_several(repository: SmallRepository, shown: Shown) -> None:
    """The seeds beside it are there, so that none is left out."""
    assert ": proven: " in shown(0, "verify", repository.run_dir("LR_tiny", 2))
    alone = repository.folder / "elsewhere" / "runs" / "tiny_ctr" / "LR_tiny" / "seed_2"
    shutil.copytree(repository.run_dir("LR_tiny", 2), alone)
    assert f"{alone}: UNPROVEN: there is no ledger.jsonl around them" in shown(1, "verify", alone)


# Built data


def test_only_what_raw_files_give_is_compared(repository: SmallRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = load_run(repository.run_dir("LR_tiny", 1))
    folder = repository.folder / "data" / "tiny_ctr"
    assert altered_files(experiment) == []
    (folder / "test.h5").write_bytes(b"")
    assert altered_files(experiment) == []  # known of this folder
    monkeypatch.setattr(rebuild, "_found", {})
    remedy = f"delete {folder}, it is built again"
    assert altered_files(experiment) == [f"{folder}/test.h5 is not what the raw files give: {remedy}"]
    monkeypatch.setattr(rebuild, "_found", {})
    (folder / "test.h5").unlink()
    (folder / "feature_map.json").write_text("{}")
    assert [line.split(" is not ")[0] for line in altered_files(experiment)] == [
        f"{folder}/feature_map.json",
        f"{folder}/test.h5",
    ]
    monkeypatch.setattr(rebuild, "_found", {})
    (folder / "manifest.json").unlink()
    assert altered_files(experiment) == []


def test_the_same_values_in_other_bytes(repository: SmallRepository) -> None:
    """Another version of HDF5 may have written them."""
    path = repository.folder / "data" / "tiny_ctr" / "test.h5"
    with h5py.File(path) as stored:
        columns = {name: (stored[name][()], dict(stored[name].attrs)) for name in stored}
        attributes = dict(stored.attrs)
    path.unlink()
    with h5py.File(path, "w") as again:
        again.attrs.update(attributes)
        for name in reversed(columns):
            again.create_dataset(name, data=columns[name][0]).attrs.update(columns[name][1])
    assert altered_files(load_run(repository.run_dir("LR_tiny", 1))) == []


def test_ready_h5_data_are_their_own_source(repository: SmallRepository, shown: Shown) -> None:
    path = repository.folder / "config" / "dataset_config" / "tiny_ctr.yaml"
    content = load_yaml(path)
    files = {f"{split}_data": split for split in ("train", "valid", "test")}
    path.write_text(dump_yaml({"tiny_ctr": {**content["tiny_ctr"], "data_format": "h5", **files}}))
    (repository.folder / "data" / "tiny_ctr" / "manifest.json").unlink()
    run_dir = repository.train("FM_tiny", 8)
    assert ": proven: " in shown(0, "verify", run_dir)
    with h5py.File(repository.folder / "data" / "tiny_ctr" / "test.h5", "r+") as stored:
        stored["label"][...] = 1 - stored["label"][()]
        stored["label"].attrs["crc32"] = np.uint32(zlib.crc32(stored["label"][()].data))
    assert "tiny_ctr: not the data that " in shown(1, "verify", run_dir)


def test_a_folder_of_published_evidence(repository: SmallRepository, shown: Shown) -> None:
    """A copy of a run elsewhere in the repository finds the model folder and the data."""
    place = repository.folder / "benchmarks" / "leaderboard"
    shutil.copytree(repository.runs / "tiny_ctr" / "LR_tiny", place / "tiny_ctr" / "LR_tiny")
    shutil.copy(repository.runs / "ledger.jsonl", place)
    assert shown(0, "verify", place).count(": proven: ") == 3
    (place / "tiny_ctr" / "LR_tiny" / "seed_1" / WEIGHTS).unlink()
    assert "is not here: copy it here" in shown(1, "verify", place)


def test_verify_takes_the_configured_metrics_alone(
    repository: SmallRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name in a report is no order to compute it."""
    run_dir = repository.run_dir("LR_tiny", 1)
    metrics = report_of(run_dir)["metrics"]
    edit_report(run_dir, metrics={**metrics, "test": {**metrics["test"], "no_such_metric": 0.5}})
    reseal(run_dir, repository)
    assert verify(run_dir).problems == ("test no_such_metric is reported, but cannot be computed again",)
    experiment, data, feature_map, trainer = load_trained(run_dir)
    batches = open_batches(experiment, data, feature_map, "test", trainer)
    assert trainer.evaluate(batches) == metrics["test"]
