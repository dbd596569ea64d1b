# SPDX-License-Identifier: Apache-2.0
"""Arguments that several commands share, and the experiments that they name."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_experiment_arguments(parser: argparse.ArgumentParser, expid_default: str | None) -> None:
    """Which experiment, where and how.

    Args:
        parser: of the command.
        expid_default: of the script of a model folder, which has no option that names the folder; None elsewhere.
    """
    parser.add_argument("--config", help="configuration folder; default: the model folder's own")
    parser.add_argument("--expid", default=expid_default, help="experiment, a section of model_config.yaml")
    parser.add_argument("--gpu", type=int, default=-1, help="GPU index; -1 is the CPU")
    parser.add_argument("--seed", type=int, help="instead of the configured seed")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a configured value; repeat it for more of them",
    )
    parser.add_argument("--fresh", action="store_true", help="do not continue an unfinished run")
    parser.add_argument(
        "--profile", action="store_true", help="write profile.md and trace.json: where a step's time goes"
    )
    if expid_default is None:
        parser.add_argument("--zoo", type=Path, help="model folder; default: found by the experiment's name")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Which finished run, which of its splits, and where."""
    parser.add_argument("run_dir", type=Path, help="run directory, as runs/<dataset_id>/<expid>/seed_<seed>")
    splits = ("train", "valid", "test")
    parser.add_argument("--split", choices=splits, default="test", help="rows to read; default: test")
    parser.add_argument("--gpu", type=int, default=-1, help="GPU index; -1 is the CPU")


def locate(arguments: argparse.Namespace) -> tuple[Path, Path | None, list[str]]:
    """The configuration folder, the model folder where it is known, and the experiments that are asked for.

    Raises:
        ConfigError: nothing says which, or no model folder has the experiment.
    """
    from ctrbench.sections import list_expids

    zoo = arguments.zoo
    if arguments.config:
        config_dir = Path(arguments.config)
    elif zoo:
        config_dir = zoo / "config"
    else:
        config_dir, zoo = _search(arguments.expid)
    return config_dir, zoo, [arguments.expid] if arguments.expid else list_expids(config_dir)


def _search(expid: str | None) -> tuple[Path, Path]:
    from ctrbench.errors import ConfigError, did_you_mean
    from ctrbench.sections import list_expids

    if expid is None:
        raise ConfigError("--expid, --zoo or --config is needed: ctrbench run --expid SDCNv3_tiny")
    here = Path.cwd()
    around = (here, *here.parents, Path(__file__).resolve().parents[2])
    root = next((folder for folder in around if (folder / "model_zoo").is_dir()), here)
    known: list[str] = []
    for zoo in sorted((root / "model_zoo").glob("*")):
        if (zoo / "src").is_dir() and (zoo / "config").is_dir():
            expids = list_expids(zoo / "config")
            if expid in expids:
                return zoo / "config", zoo
            known += expids
    raise ConfigError(f"--expid {expid}: no model folder in {root / 'model_zoo'} has it{did_you_mean(expid, known)}")
