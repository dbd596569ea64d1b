# SPDX-License-Identifier: Apache-2.0
"""The same seed on the same machine gives the same bits, also with several threads, and the report says what holds."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, load_script

from ctrbench import determinism
from ctrbench.cli import main
from ctrbench.config import Experiment, load_experiment
from ctrbench.determinism import WORKSPACE, deterministic_operators, promise
from ctrbench.errors import ModelCodeError, TrainingError
from ctrbench.evidence import read_report
from ctrbench.files import write_json
from ctrbench.run import load_trained, run
from ctrbench.trainer import Trainer

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(scope="module")
def tiny_mm_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of tiny_mm."""
    folder = tmp_path_factory.mktemp("raw") / "tiny_mm"
    load_script(ROOT / "data" / "make_tiny.py")
    sys.modules["make_tiny_mm"].make_tiny_mm(folder, rows=6000)
    return folder


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setattr("ctrbench.run._num_threads", lambda batch_size, feature_map: 2)
    yield
    torch.set_num_threads(before)


def open_experiment(overrides: list[str], expid: str, *more: str, mm: Path | None = None) -> Experiment:
    zoo = ROOT / "model_zoo" / expid.split("_")[0]
    if mm is not None:
        files = [f"{split}_data={mm / split}.parquet" for split in ("train", "valid", "test")]
        overrides = [*overrides, *files, f"item_info={mm / 'item_info.parquet'}"]
    return load_experiment(zoo / "config", expid, zoo, [*overrides, "epochs=1", *more])


def run_twice(experiment: Experiment, gpu: int = -1) -> dict[str, Any]:
    """Compare weights and metrics of two runs; the report of the second."""
    weights, reports = [], []
    for _ in range(2):
        reports.append(run(experiment, gpu, fresh=True))
        weights.append(load_trained(experiment.run_dir)[3].model.state_dict())
    assert reports[0]["metrics"] == reports[1]["metrics"]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    return reports[1]


@pytest.mark.parametrize(
    ("expid", "more"),
    [
        ("SDCNv3_tiny", ("batch_size=1000", "embedding_dim=16")),
        ("DCNv3_tiny", ("batch_size=1000", "embedding_dim=16")),
        ("SDCNv3_tiny", ("batch_size=1000", "embedding_dim=16", "speed=plain")),
        ("QIN_tiny_mm", ("attention=softmax",)),
        ("DIN_tiny_mm", ()),  # its threads add up the gradient of x[rows]
    ],
)
def test_several_threads_give_the_same_bits(
    tiny_overrides: list[str], tiny_mm_raw: Path, two_threads: None, expid: str, more: tuple[str, ...]
) -> None:
    mm = tiny_mm_raw if expid.endswith("_mm") else None
    experiment = open_experiment(tiny_overrides, expid, *more, mm=mm)
    report = run_twice(experiment)
    assert report["environment"]["threads"] == 2 and report["determinism"] == "bitwise: same machine and threads (2)"
    assert "Determinism: bitwise: same machine and threads (2)" in (experiment.run_dir / "train.log").read_text()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("expid", "more"),
    [
        ("SDCNv3_tiny", ()),
        ("SDCNv3_tiny", ("cuda_graph=true",)),
        ("SDCNv3_tiny", ("compile=true",)),
        ("QIN_tiny_mm", ("attention=softmax",)),
        ("DIN_tiny_mm", ()),
    ],
)
def test_a_gpu_gives_the_same_bits_when_it_is_asked(
    tiny_overrides: list[str], tiny_mm_raw: Path, expid: str, more: tuple[str, ...]
) -> None:
    mm = tiny_mm_raw if expid.endswith("_mm") else None
    plain = run(open_experiment(tiny_overrides, expid, *more, mm=mm), gpu=0)
    assert plain["determinism"] == "none: set deterministic: true"
    report = run_twice(open_experiment(tiny_overrides, expid, "deterministic=true", *more, mm=mm), gpu=0)
    assert report["determinism"] == "bitwise: same GPU model and versions"


@pytest.mark.parametrize(
    ("device", "is_asked", "stack", "is_resumed", "said"),
    [
        (CPU, False, None, True, f"bitwise: same machine and threads ({torch.get_num_threads()})"),
        (
            CPU,
            True,
            {"seeds": [1, 2]},
            False,
            f"machine and threads ({torch.get_num_threads()}), seeds [1, 2] together",
        ),
        (CPU, False, {"seeds": [1, 2]}, True, "none: seeds that are trained together go on from different steps"),
        (GPU, True, None, False, "bitwise: same GPU model and versions"),
        (GPU, False, None, False, "none: set deterministic: true"),
        (GPU, False, {"seeds": [1, 2]}, True, "none: set deterministic: true"),
    ],
)
def test_what_is_promised(device: torch.device, is_asked: bool, stack: Any, is_resumed: bool, said: str) -> None:
    assert said in promise(device, is_asked, stack, is_resumed)


def settings_of_torch() -> tuple[Any, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        determinism._memory.fill_uninitialized_memory,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
    )


@pytest.mark.parametrize("is_asked", [False, True])
def test_torch_is_left_as_it_was(is_asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = settings_of_torch()
    with pytest.raises(KeyError), deterministic_operators(is_asked, -1):
        assert settings_of_torch() == (True, not is_asked, is_asked, True, False, *before[5:])
        raise KeyError
    assert settings_of_torch() == before


def test_runs_in_threads_share_the_setting() -> None:
    before, first_ends, second_runs = settings_of_torch(), threading.Event(), threading.Event()

    def first() -> None:
        with deterministic_operators(True, -1):
            second_runs.wait()
        first_ends.set()

    thread = threading.Thread(target=first)
    thread.start()
    with deterministic_operators(True, -1):
        second_runs.set()
        first_ends.wait()
        assert settings_of_torch() != before  # the one that began first has ended
    thread.join()
    assert settings_of_torch() == before


def test_a_gpu_gets_work_space_of_a_fixed_size(monkeypatch: pytest.MonkeyPatch) -> None:
    before = settings_of_torch()
    for found, is_asked, expected in [
        (None, False, ":4096:8"),  # a run after this one may ask
        (None, True, ":4096:8"),
        (":16:8", True, ":16:8"),
        (":0:0", True, ":4096:8"),
        (":0:0", False, ":0:0"),
    ]:
        monkeypatch.delenv(WORKSPACE, raising=False)
        if found is not None:
            monkeypatch.setenv(WORKSPACE, found)
        with deterministic_operators(is_asked, 0):
            assert os.environ[WORKSPACE] == expected
            assert torch.are_deterministic_algorithms_enabled() is is_asked
    monkeypatch.setenv(WORKSPACE, "kept")
    with deterministic_operators(True, -1):
        assert os.environ[WORKSPACE] == "kept"
    assert settings_of_torch() == before


def put(values: torch.Tensor) -> torch.Tensor:
    """An operator without a deterministic form, also on a CPU."""
    return values.clone().put_(torch.tensor([0]), values[:1])


@pytest.mark.filterwarnings("ignore:put_ does not have a deterministic implementation")
def test_an_operator_without_a_deterministic_form(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Trainer.step

    def with_put(self: Trainer, batch: Any) -> torch.Tensor:
        put(torch.ones(3))
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", with_put)
    command = ["run", "--zoo", str(ROOT / "model_zoo" / "LR"), "--expid", "LR_tiny"]
    command += [word for value in [*tiny_overrides, "epochs=1"] for word in ("--set", value)]
    assert main([*command, "--set", "deterministic=true"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: deterministic: true: torch has no deterministic form of put_: set deterministic: false"
    )
    assert main(command) == 0


def test_what_torch_says_is_found_by_its_cause() -> None:
    with pytest.raises(TrainingError, match="no deterministic form of put_: set"), deterministic_operators(True, -1):
        try:
            put(torch.ones(3))
        except RuntimeError as error:
            raise ModelCodeError("src/Model.py:3: Model fails in epoch 1, batch 1") from error
    says = (
        "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or ..., but this "
        "operation is not deterministic because it uses CuBLAS and you have CUDA >= 10.2. To enable deterministic "
    )
    with (
        pytest.raises(TrainingError, match="start a new process with CUBLAS_WORKSPACE_CONFIG=:4096:8"),
        deterministic_operators(True, -1),
    ):
        raise RuntimeError(says)
    with pytest.raises(RuntimeError, match="something else"), deterministic_operators(True, -1):
        raise RuntimeError("something else")


def test_reports_of_earlier_versions(tiny_overrides: list[str]) -> None:
    experiment = open_experiment(tiny_overrides, "LR_tiny")
    report = run(experiment)
    assert read_report(experiment.run_dir)["determinism"] == report["determinism"]
    earlier = {key: value for key, value in report.items() if key != "determinism"}
    write_json(experiment.run_dir / "report.json", earlier)
    assert read_report(experiment.run_dir) == earlier


def test_earlier_runs_keep_their_hash(tiny_overrides: list[str]) -> None:
    plain, same, asked = (
        open_experiment(tiny_overrides, "LR_tiny", *more)
        for more in ((), ("deterministic=false",), ("deterministic=true",))
    )
    assert plain.config_hash == same.config_hash != asked.config_hash
    assert "deterministic: false" in plain.to_yaml()
