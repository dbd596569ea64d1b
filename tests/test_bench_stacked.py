# SPDX-License-Identifier: Apache-2.0
"""Suites that train the seeds of an experiment together, as they do on GPUs; here on the CPU, which is told to."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from small_repository import SEEDS, SmallRepository, report_of
from test_bench import Moods, bench, few, finished, moods, repository  # noqa: F401 (fixtures)

from ctrbench.cli import main
from ctrbench.seeds import SLOT_CELLS, is_faster_stacked


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctrbench.bench.is_stacked", lambda experiment, gpus: True)


@pytest.mark.usefixtures("together")
def test_seeds_are_trained_together(
    finished: SmallRepository,  # noqa: F811
    repository: SmallRepository,  # noqa: F811
    bench: Callable[..., str],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.rmtree(repository.runs)
    text = bench(0, "small", "--gpu", "-1", "-1")
    assert "[6/6] " in text and text.count(" s on cpu, 3 seeds together)\n") == 6
    for model in ("LR", "FM"):
        for seed in SEEDS:
            report, alone = (report_of(of.run_dir(f"{model}_tiny", seed)) for of in (repository, finished))
            assert report["stack"]["seeds"] == list(SEEDS) and report["config_hash"] == alone["config_hash"]
            for split, metrics in alone["metrics"].items():
                assert report["metrics"][split] == pytest.approx(metrics, abs=1e-4)
    assert "6 of them finished, 0 to do" in bench(0)
    assert main(["verify", "--retrain", str(repository.run_dir("FM_tiny", 2))]) == 0
    assert ": proven: " in capsys.readouterr().out
    # the command of a report, by hand
    before = report_of(repository.run_dir("FM_tiny", 2))
    words = shlex.split(before["command"])
    assert words == shlex.split(
        "ctrbench run --zoo model_zoo/FM --seeds 1 2 3 --together stack --expid FM_tiny --gpu -1"
    )
    assert main(words[1:]) == 0
    assert report_of(repository.run_dir("FM_tiny", 2))["metrics"] == before["metrics"]


@pytest.mark.usefixtures("together")
def test_no_slot_is_left_without_work(
    repository: SmallRepository,  # noqa: F811
    bench: Callable[..., str],  # noqa: F811
) -> None:
    shutil.rmtree(repository.runs)
    bench(0, "small", "--gpu", "-1", "-1", "-1")
    assert all("stack" not in report_of(done.parent) for done in repository.runs.glob("*/*/*/DONE"))
    shutil.rmtree(repository.run_dir("FM_tiny", 2))  # one is no stack
    assert "FM_tiny, seed 2" in bench(0)
    assert "stack" not in report_of(repository.run_dir("FM_tiny", 2))


@pytest.mark.usefixtures("together")
def test_what_fails_together_is_run_apart(moods: Moods, bench: Callable[..., str]) -> None:  # noqa: F811
    moods.suite({"broken": {}, "out_of_memory": {}, "fine": {}}, [1, 2])
    text = bench(1, "moody")
    source = moods.zoo / "src" / "__init__.py"
    reason = re.search(
        rf"Moody_broken, seeds 1, 2: {re.escape(str(source))}:\d+: Moody fails .*: LookupError: .*", text
    )
    assert reason is not None and reason[0].endswith(": what is missing is run one seed after the other")
    assert "Moody_out_of_memory, seeds 1, 2: out of memory: what is missing is run one seed after the other\n" in text
    ending = text[text.index("4 failed, the same command tries them again:\n") :].splitlines()[1:]
    assert [line.split(": ")[0] for line in ending] == [
        f"  Moody_{mood}, seed {seed}" for mood in ("broken", "out_of_memory") for seed in (1, 2)
    ]
    assert all(line.endswith("LookupError: broken on purpose") for line in ending[:2])
    assert set(moods.repository.marks()) == {"Moody_fine/seed_1", "Moody_fine/seed_2"}


def test_when_seeds_are_trained_together() -> None:
    def experiment(batch_size: int, deterministic: bool = False) -> Any:
        columns = [SimpleNamespace(active=True, type="categorical", embedding_dim=None)] * 8
        training = SimpleNamespace(batch_size=batch_size, deterministic=deterministic)
        return SimpleNamespace(
            training=training, model_params={"embedding_dim": 16}, dataset=SimpleNamespace(feature_cols=columns)
        )

    largest = SLOT_CELLS // 128
    assert is_faster_stacked(experiment(largest), -1) and not is_faster_stacked(experiment(largest + 1), -1)
    assert is_faster_stacked(experiment(1 << 20), 0) and not is_faster_stacked(experiment(64, deterministic=True), 0)
