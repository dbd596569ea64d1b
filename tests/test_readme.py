# SPDX-License-Identifier: Apache-2.0
"""The README says what is true: its commands run in a copy of the repository, its links and options exist."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import load_script

from ctrbench.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("clone") / "ctrbench"
    skip = shutil.ignore_patterns(".venv", ".git", "runs", "raw", "*_cache", "__pycache__", "*.h5", "build")
    shutil.copytree(ROOT, target, ignore=skip)
    for built in (target / "data").iterdir():
        if built.is_dir() and built.name != "prepare":
            shutil.rmtree(built)
    return target


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command.partition("#")[0])
    # The copy's package, with this environment's interpreter.
    if words[0] == "ctrbench":
        words = ["python", "-c", "import sys; from ctrbench.cli import main; sys.exit(main())", *words[1:]]
    words[0] = sys.executable
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_commands_for_an_environment_of_your_own(copy: Path) -> None:
    block = next(block for block in BLOCKS if block.startswith("pip install -e ."))
    for command in block.strip().splitlines()[1:]:
        done = run(command, copy)
        assert done.returncode == 0, (command, done.stderr)
    assert re.search(r"SDCNv3_tiny +\| 2024", done.stdout)
    assert (copy / "runs" / "tiny_ctr" / "SDCNv3_tiny" / "seed_2024" / "DONE").exists()
    table = README.partition("## Commands")[2].partition("Bad input")[0]
    for command in (
        "evaluate RUN_DIR --split test",
        "predict RUN_DIR --output FILE.csv",
        "interpret RUN_DIR --rows 0 1 2",
    ):
        assert f"`ctrbench {command}`" in table
        done = run(f"ctrbench {command}".replace("RUN_DIR", "runs/tiny_ctr/SDCNv3_tiny/seed_2024"), copy)
        assert done.returncode == 0, (command, done.stderr)
    left = {path.name for path in (copy / "runs" / "tiny_ctr" / "SDCNv3_tiny" / "seed_2024").iterdir()}
    listed = re.findall(r"^[├└]── (\S+)", README, flags=re.MULTILINE)
    assert listed and set(listed) <= left


def test_the_error_that_the_readme_shows(copy: Path) -> None:
    shown = next(line for line in README.splitlines() if line.startswith("error: "))
    done = run("python model_zoo/SDCNv3/run_expid.py --expid SDCNv3_tiny --set embeding_dim=64", copy)
    assert done.returncode == 2
    assert shown.partition("embeding_dim")[2] in done.stderr


def test_make_targets_exist() -> None:
    for target in re.findall(r"^make (\w+)", "\n".join(BLOCKS), flags=re.MULTILINE):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_links_and_paths_exist() -> None:
    for page in (ROOT / "README.md", ROOT / "data" / "README.md", *(ROOT / "model_zoo").glob("*/README.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page}: {link}"


def test_scripts_that_the_readme_names_exist() -> None:
    for script in set(re.findall(r"(?:model_zoo|data|benchmarks)/[\w/]+\.py", README)):
        assert (ROOT / script).is_file(), script


def test_the_speed_tables_are_those_of_the_results() -> None:
    script = load_script(ROOT / "benchmarks" / "speed" / "fill_readme.py")
    page = (ROOT / "benchmarks" / "speed" / "README.md").read_text(encoding="utf-8")
    assert script.filled(page) == page
    ratios = re.findall(r"\*\*([\d.]+x)\*\*", page)
    shown = README.partition("| what | against |")[2].partition("## Tests")[0]
    assert ratios and all(ratio in shown for ratio in ratios)


def test_the_tables_of_sweeps_name_every_key_and_option() -> None:
    from ctrbench.tuner.schema import TunerConfig

    section = README.partition("## Sweeps")[2].partition("## Commands")[0]
    keys = {field.alias or name for name, field in TunerConfig.model_fields.items()}
    assert {key for key in keys if f"`{key}`" not in section} == set()
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as shown:
        main(["tune", "--help"])
    options = set(re.findall(r"--[a-z]+(?:-[a-z]+)*", shown.getvalue())) - {"--help", "--config", "--gpu"}
    assert {option for option in options if f"`{option}" not in section} == set()
