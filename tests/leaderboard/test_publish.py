# SPDX-License-Identifier: Apache-2.0
"""What a leaderboard leaves in a folder, and the evidence that goes into a repository."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, load_script
from small_repository import SEEDS, SmallRepository, report_of

from ctrbench.cli import main
from ctrbench.evidence import WEIGHTS, read_ledger
from ctrbench.leaderboard.collect import VERIFICATION, collect
from ctrbench.leaderboard.gaps import find_gaps
from ctrbench.leaderboard.publish import EVIDENCE, copy_evidence, moved_to, write_board
from ctrbench.leaderboard.records import Board, Status
from ctrbench.leaderboard.table import comparisons_to_csv, explanations, to_csv, to_markdown
from ctrbench.suite import load_suite
from ctrbench.yamlfile import dump_yaml

NAMES = ["leaderboard.md", "leaderboard.csv", "comparisons.csv", "leaderboard.html"]


def test_the_files_of_a_board(repository: SmallRepository) -> None:
    shutil.rmtree(repository.run_dir("LR_tiny", 2))
    board = dataclasses.replace(collect(repository.runs), title="Title", command="ctrbench leaderboard runs")
    folder = repository.folder / "out" / "deep"
    paths = write_board(board, folder)
    assert [path.relative_to(folder).as_posix() for path in paths] == NAMES
    assert sorted(path.name for path in folder.iterdir()) == sorted(NAMES)
    expected = [
        "# Title",
        "",
        "Made by `ctrbench leaderboard runs`.",
        "",
        to_markdown(board),
        "",
        *explanations(board),
        "",
    ]
    assert paths[0].read_text() == "\n".join(expected) and explanations(board)
    assert paths[1].read_text() == to_csv(board) and paths[2].read_text() == comparisons_to_csv(board)
    assert "Title" in paths[3].read_text()
    write_board(dataclasses.replace(board, command=""), folder)
    assert paths[0].read_text().startswith(f"# Title\n\n{to_markdown(board)[:20]}")


def test_the_command_writes_them(
    repository: SmallRepository, shown: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository.folder)
    look_at = repository.run_dir("FM_tiny", 1)
    text = shown(0, "leaderboard", "runs", "--suite", "small", "--output", "out", "--look-at", look_at)
    assert text.splitlines()[-4:] == [f"out/{name}" for name in NAMES]
    assert (repository.folder / "out" / "leaderboard.md").read_text().startswith("# small\n")


def test_a_folder_that_cannot_be_written(
    finished: SmallRepository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["leaderboard", str(finished.runs), "--output", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/file/leaderboard.md: cannot be written: ") and error.count("\n") == 1
    assert main(["leaderboard", str(finished.runs), "--look-at", str(finished.run_dir("LR_tiny", 1))]) == 2
    assert capsys.readouterr().err == "error: --look-at: shown on the page only: name its folder with --output\n"


# Evidence


def state_of(board: Board) -> dict[str, Status]:
    return {row.expid: row.status for table in board.tables for row in table.rows}


def test_evidence_is_copied_without_the_weights(repository: SmallRepository) -> None:
    assert main(["verify", str(repository.runs)]) == 0
    board = collect(repository.runs)
    folder = repository.folder / "benchmarks" / "leaderboard"
    copy_evidence(board, folder)
    for expid in ("LR_tiny", "FM_tiny"):
        for seed in SEEDS:
            copied, original = folder / "tiny_ctr" / expid / f"seed_{seed}", repository.run_dir(expid, seed)
            assert {path.name for path in copied.iterdir()} == set(EVIDENCE) and WEIGHTS not in EVIDENCE
            assert all((copied / name).read_bytes() == (original / name).read_bytes() for name in EVIDENCE)
    assert read_ledger(folder / "ledger.jsonl") == [
        e for expid in [row.expid for row in board.tables[0].rows] for e in repository.ledger() if e["expid"] == expid
    ]
    # it stands by itself
    again = collect(folder)
    assert state_of(board) == dict.fromkeys(("LR_tiny", "FM_tiny"), Status.PROVEN)
    assert state_of(again) == dict.fromkeys(("LR_tiny", "FM_tiny"), Status.RECORDED)
    assert to_markdown(again) == to_markdown(board).replace("proven  ", "recorded")
    assert all(run.verification for row in again.tables[0].rows for run in row.runs)
    moved = moved_to(board, folder)
    assert {run.folder for row in moved.tables[0].rows for run in row.runs} == {
        run.folder for row in again.tables[0].rows for run in row.runs
    }
    assert to_markdown(moved) == to_markdown(board)


def test_evidence_that_is_copied_again(repository: SmallRepository) -> None:
    """The files follow the runs; no line of the ledger comes twice, and none goes."""
    folder = repository.folder / "published"
    copy_evidence(collect(repository.runs), folder)
    before = read_ledger(folder / "ledger.jsonl")
    copy_evidence(collect(repository.runs), folder)
    assert read_ledger(folder / "ledger.jsonl") == before and len(before) == 6
    stale = folder / "tiny_ctr" / "LR_tiny" / "seed_1" / VERIFICATION
    stale.touch()
    run_dir = repository.train("LR_tiny", 1)  # the same once more: another report
    copy_evidence(collect(repository.runs), folder)
    assert len(read_ledger(folder / "ledger.jsonl")) == 7 and not stale.exists()
    assert sorted(path.name for path in folder.iterdir()) == ["ledger.jsonl", "tiny_ctr"]
    assert report_of(folder / "tiny_ctr" / "LR_tiny" / "seed_1") == report_of(run_dir)
    assert state_of(collect(folder))["LR_tiny"] is Status.RECORDED


def test_a_seed_that_was_left_out_shows_there_too(repository: SmallRepository) -> None:
    shutil.rmtree(repository.run_dir("LR_tiny", 2))
    folder = repository.folder / "published"
    copy_evidence(collect(repository.runs), folder)
    rows = {row.expid: row for row in collect(folder).tables[0].rows}
    assert rows["LR_tiny"].problems == ("ledger.jsonl also has seed 2, which is left out here",)
    assert not (folder / "tiny_ctr" / "LR_tiny" / "seed_2").exists() and rows["FM_tiny"].problems == ()
    assert not (folder / "tiny_ctr" / "FM_tiny" / "seed_1" / VERIFICATION).exists()


def test_the_page_of_a_benchmark(repository: SmallRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    """What benchmarks/reproduce_ml_1m.py writes into the repository, of these runs instead of MovieLens-1M's."""
    script = load_script(ROOT / "benchmarks" / "reproduce_ml_1m.py")
    folder = repository.folder / "benchmarks" / "leaderboard" / "tiny_ctr"
    monkeypatch.setattr(script, "OUTPUT", folder)
    entries = [{"of": name, "metrics": {"AUC": auc}, "source": "paper"} for name, auc in (("FM", 0.9), ("LR", 0.6))]
    (repository.folder / "benchmarks").mkdir()
    content = {"sources": {"paper": "the paper"}, "results": {"tiny_ctr": entries}}
    (repository.folder / "benchmarks" / "published.yaml").write_text(dump_yaml(content))
    assert main(["verify", str(repository.runs)]) == 0
    suite = load_suite("small", repository.folder)
    board = collect(repository.runs, suite)
    script.publish(dataclasses.replace(board, title="Tiny", command="a command"))
    expected = ["FM_tiny", "LR_tiny", "README.md", *NAMES[1:]]  # README.md has what leaderboard.md has
    assert sorted(path.name for path in folder.iterdir()) == sorted(expected)
    page = (folder / "README.md").read_text()
    assert page.startswith("# Tiny\n") and to_markdown(board) in page and "Made by `a command`" in page
    [gap] = find_gaps(board.tables[0])
    assert f"| the paper | FM_tiny - LR_tiny | +0.3000 | {gap.ours.difference:+.6f} (" in page
    assert f"| {gap.verdict} |" in page and '"device": "cpu"' in page
    again = collect(folder, suite)
    assert again.missing == () and state_of(again) == dict.fromkeys(("LR_tiny", "FM_tiny"), Status.RECORDED)
