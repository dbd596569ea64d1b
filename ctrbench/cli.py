# SPDX-License-Identifier: Apache-2.0
"""The console entry points: `ctrbench run|check|evaluate|predict|interpret|tune|bench|leaderboard|verify` and the scripts that are
called as FuxiCTR's: run_expid.py of every model folder, benchmarks/run_param_tuner.py.

Bad input ends with one line per problem and exit status 2; a run that Ctrl-C or SIGTERM stopped with 130 or 143.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ctrbench import __version__
from ctrbench.commands import datasets, estimate, export, inspect, prepare
from ctrbench.errors import CtrbenchError, InterruptedRunError, TrainingError
from ctrbench.signals import StopRequest, TerminatedError


def main(argv: Sequence[str] | None = None) -> int:
    """`ctrbench <command>`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="ctrbench", description="Config-first benchmarks of CTR prediction.")
    parser.add_argument("--version", action="version", version=f"ctrbench {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="train, validate and test one experiment")
    _add_experiment_arguments(run, expid_default=None)
    run.add_argument("--seeds", type=int, nargs="+", help="run the experiment with all of these seeds at once")
    run.add_argument(
        "--together",
        choices=("auto", "stack", "processes"),
        default="auto",
        help="how --seeds are run at once: in one process with stacked parameters (auto: on a GPU, and tiny models), or in "
        "a process for each core",
    )
    run.set_defaults(action=_run)

    check = commands.add_parser("check", help="validate configurations without running them")
    _add_experiment_arguments(check, expid_default=None)
    check.set_defaults(action=_check)

    evaluate = commands.add_parser("evaluate", help="metrics of a finished run on one of its splits")
    _add_run_arguments(evaluate)
    evaluate.add_argument("--metrics", nargs="+", help="metrics to compute; default: those of the configuration")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.set_defaults(action=_evaluate)

    predict = commands.add_parser("predict", help="write the predictions of a finished run")
    _add_run_arguments(predict)
    predict.add_argument("--data", type=Path, help="raw CSV or Parquet rows to score instead of a split")
    where = predict.add_mutually_exclusive_group(required=True)
    where.add_argument("--output", type=Path, help="file to write, .csv or .parquet")
    where.add_argument("--submission", type=Path, help="folder for the MMCTR challenge's prediction.csv and its zip")
    predict.add_argument("--task", default="Task2", help="the submission's column: Task2 (default) or Task1&2")
    predict.set_defaults(action=_predict)

    interpret = commands.add_parser(
        "interpret", help="plot field interactions and Self-Mask activity of a finished run"
    )
    _add_run_arguments(interpret)
    interpret.add_argument("--rows", type=int, nargs="+", default=[0, 1, 2, 3], help="rows of the split to explain")
    interpret.add_argument("--output", type=Path, help="folder of the plots; default: the run directory")
    interpret.set_defaults(action=_interpret)

    tune = commands.add_parser("tune", help="run a hyperparameter sweep")
    _add_tune_arguments(tune)
    tune.set_defaults(action=_tune)

    bench = commands.add_parser("bench", help="run what is missing of a suite of experiments")
    bench.add_argument("suite", help="a name in config/suites/, or a file")
    bench.add_argument(
        "--gpu",
        type=int,
        nargs="+",
        default=[-1],
        help="a slot for each index, repeat one for several runs on one GPU; -1 is the CPU (default: -1)",
    )
    bench.add_argument("--fresh", action="store_true", help="run finished experiments again")
    bench.add_argument("--dry-run", action="store_true", help="list what is finished and what is to do, run nothing")
    bench.set_defaults(action=_bench)

    leaderboard = commands.add_parser("leaderboard", help="tables, statistics and evidence of finished runs")
    leaderboard.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="folder of run directories")
    leaderboard.add_argument("--suite", help="only the runs of a suite; what is missing of it is said")
    leaderboard.add_argument("--output", type=Path, help="folder for leaderboard.md, .csv, comparisons.csv and .html")
    leaderboard.add_argument("--look-at", type=Path, metavar="RUN_DIR", help="run to look at closely on the page")
    leaderboard.add_argument("--gpu", type=int, default=-1, help="GPU that evaluates that run; -1 is the CPU")
    leaderboard.set_defaults(action=_leaderboard)

    verify = commands.add_parser("verify", help="evaluate stored weights again and compare with the reports")
    verify.add_argument("folders", type=Path, nargs="+", help="run directories, or folders of them")
    verify.add_argument("--gpu", type=int, default=-1, help="GPU index; -1 is the CPU")
    verify.add_argument("--retrain", action="store_true", help="train anew instead of taking the stored weights")
    verify.set_defaults(action=_verify)
    datasets.add(commands)
    prepare.add(commands)
    estimate.add(commands)
    export.add(commands)
    inspect.add(commands)
    arguments = parser.parse_args(argv)
    return _guard(lambda: arguments.action(arguments))


def run_expid(zoo: Path, argv: Sequence[str] | None = None) -> int:
    """`run_expid.py` of the model folder `zoo`, with FuxiCTR's flags and defaults; returns the exit status."""
    parser = argparse.ArgumentParser(description=f"Run one experiment of {zoo.name}.")
    parser.add_argument("--version", action="version", version=f"ctrbench {__version__}")
    _add_experiment_arguments(parser, expid_default=f"{zoo.name}_test")
    arguments = parser.parse_args(argv)
    arguments.zoo = zoo
    if arguments.config and not any(Path(arguments.config).glob("model_config*")) and (zoo / arguments.config).is_dir():
        arguments.config = zoo / arguments.config  # as FuxiCTR's scripts, which change into their own folder
    return _guard(lambda: _run(arguments))


def _add_experiment_arguments(parser: argparse.ArgumentParser, expid_default: str | None) -> None:
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


def run_param_tuner(argv: Sequence[str] | None = None) -> int:
    """`benchmarks/run_param_tuner.py`, with FuxiCTR's flags; returns the exit status."""
    parser = argparse.ArgumentParser(description="Run a hyperparameter sweep, as `ctrbench tune`.")
    parser.add_argument("--version", action="version", version=f"ctrbench {__version__}")
    _add_tune_arguments(parser)
    arguments = parser.parse_args(argv)
    return _guard(lambda: _tune(arguments))


def _add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="tuner file")
    parser.add_argument("--tag", help="run the trials whose expid contains it")
    parser.add_argument(
        "--gpu",
        type=int,
        nargs="+",
        default=[-1],
        help="a slot for each index, repeat one for several trials on one GPU; -1 is the CPU (default: -1)",
    )
    parser.add_argument("--zoo", type=Path, help="model folder; default: the one around base_config")
    parser.add_argument("--name", help="name of the sweep and of its folder; default: the tuner file's")
    parser.add_argument("--storage", metavar="URL", help="Optuna storage that machines share; default: a local file")
    parser.add_argument("--fresh", action="store_true", help="start over")
    parser.add_argument("--retry-failed", action="store_true", help="run failed trials once more")
    parser.add_argument("--dry-run", action="store_true", help="list and check the trials, run nothing")
    parser.add_argument(
        "--stale-after",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="silence after which another machine's trials are taken over (default: 120)",
    )


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, help="run directory, as runs/<dataset_id>/<expid>/seed_<seed>")
    splits = ("train", "valid", "test")
    parser.add_argument("--split", choices=splits, default="test", help="rows to read; default: test")
    parser.add_argument("--gpu", type=int, default=-1, help="GPU index; -1 is the CPU")


def _guard(action: Callable[[], int]) -> int:
    try:
        status = action()
        sys.stdout.flush()  # a reader that has gone shows here, not when the interpreter ends
        return status
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except CtrbenchError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same command continues from the last checkpoint, if there is one", file=sys.stderr)
        return 130
    except TerminatedError:
        print("terminated: the same command continues from the last checkpoint, if there is one", file=sys.stderr)
        return 143
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2


def _locate(arguments: argparse.Namespace) -> tuple[Path, Path | None, list[str]]:
    """The configuration folder, the model folder where it is known, and the experiments that are asked for."""
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
    root = next(
        (p for p in (here, *here.parents, Path(__file__).resolve().parents[1]) if (p / "model_zoo").is_dir()), here
    )
    known: list[str] = []
    for zoo in sorted((root / "model_zoo").glob("*")):
        if (zoo / "src").is_dir() and (zoo / "config").is_dir():
            expids = list_expids(zoo / "config")
            if expid in expids:
                return zoo / "config", zoo
            known += expids
    raise ConfigError(f"--expid {expid}: no model folder in {root / 'model_zoo'} has it{did_you_mean(expid, known)}")


def _run(arguments: argparse.Namespace) -> int:
    from ctrbench.config import load_experiment
    from ctrbench.errors import ConfigError

    config_dir, zoo, expids = _locate(arguments)
    if len(expids) != 1 or not arguments.expid:
        raise ConfigError(f"--expid is needed; {config_dir} has {', '.join(expids)}")
    if getattr(arguments, "seeds", None):
        return _run_seeds(arguments, config_dir, zoo)
    experiment = load_experiment(config_dir, arguments.expid, zoo, arguments.overrides, arguments.seed)
    from ctrbench.run import Session, run

    command = shlex.join(["python", *sys.argv])
    with StopRequest() as stop:
        try:
            session = Session(should_stop=stop)
            report = run(experiment, arguments.gpu, arguments.fresh, command, session, arguments.profile)
        except InterruptedRunError as error:
            print(error, file=sys.stderr)
            return stop.status
    for split, values in report["metrics"].items():
        print(f"{split:5} " + "  ".join(f"{name} {value:.6f}" for name, value in values.items()))
    print(f"everything about this run: {experiment.run_dir}")
    return 0


def _run_seeds(arguments: argparse.Namespace, config_dir: Path, zoo: Path | None) -> int:
    from ctrbench.config import load_experiment
    from ctrbench.errors import ConfigError
    from ctrbench.seeds import run_seeds

    if arguments.seed is not None or arguments.profile:
        raise ConfigError("--seeds: several runs at once, so neither --seed nor --profile goes with it")
    experiments = [
        load_experiment(config_dir, arguments.expid, zoo, arguments.overrides, seed) for seed in arguments.seeds
    ]
    command = shlex.join(["python", *sys.argv])
    results = run_seeds(experiments, arguments.gpu, arguments.fresh, command, arguments.together)
    for seed, result in zip(arguments.seeds, results, strict=True):
        if isinstance(result, dict):
            for split, values in result["metrics"].items():
                shown = "  ".join(f"{name} {value:.6f}" for name, value in values.items())
                print(f"seed {seed}: {split:5} {shown}")
    print(f"everything about these runs: {experiments[0].run_dir.parent}")
    failures = [(seed, result) for seed, result in zip(arguments.seeds, results, strict=True)
                if isinstance(result, BaseException)]  # fmt: skip
    if failures:
        if not all(isinstance(error, CtrbenchError) for _, error in failures):
            raise next(error for _, error in failures if not isinstance(error, CtrbenchError))
        raise TrainingError("\nerror: ".join(f"seed {seed}: {error}" for seed, error in failures))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from ctrbench.config import load_experiment
    from ctrbench.errors import ConfigError
    from ctrbench.estimate import construct
    from ctrbench.validation import missing_data

    config_dir, zoo, expids = _locate(arguments)
    problems: list[str] = []
    for expid in expids:
        try:
            experiment = load_experiment(
                config_dir, expid, zoo, arguments.overrides, arguments.seed, is_data_required=False
            )
            construct(experiment)
            missing = missing_data(experiment.dataset, experiment.root)
            print(f"{expid}: ok" + (f", but its data is missing: {', '.join(missing)}" if missing else ""))
        except CtrbenchError as error:
            problems += str(error).splitlines()
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from ctrbench.metrics import parse_metrics
    from ctrbench.run import load_trained, open_batches

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    experiment, data, feature_map, trainer = load_trained(arguments.run_dir, arguments.gpu)
    metrics = parse_metrics(arguments.metrics or experiment.training.metrics, feature_map.group_id)
    batches = open_batches(experiment, data, feature_map, arguments.split, trainer)
    values = trainer.evaluate(batches, metrics)
    if arguments.json:
        print(json.dumps(values))
    else:
        print("\n".join(f"{name}: {value:.6f}" for name, value in values.items()))
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from ctrbench.errors import ConfigError
    from ctrbench.predict import write_challenge_files, write_predictions

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if arguments.submission:
        if arguments.data:
            raise ConfigError("--submission: scores a split of the run's dataset, so --data does not go with it")
        folder, task = arguments.submission, arguments.task
        for path in write_challenge_files(arguments.run_dir, folder, arguments.split, task, arguments.gpu):
            print(path)
        return 0
    rows = write_predictions(arguments.run_dir, arguments.output, arguments.split, arguments.data, arguments.gpu)
    print(f"{rows} predictions: {arguments.output}")
    return 0


def _interpret(arguments: argparse.Namespace) -> int:
    from ctrbench.interpret import plot_run

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for path in plot_run(arguments.run_dir, arguments.rows, arguments.split, arguments.output, arguments.gpu):
        print(path)
    return 0


def _tune(arguments: argparse.Namespace) -> int:
    from ctrbench.tuner.slots import preload

    if not arguments.dry_run:
        preload()  # workers load torch while this process does
    from ctrbench.tuner.tune import Options, tune

    return tune(
        Options(
            config=arguments.config,
            gpus=arguments.gpu,
            tag=arguments.tag,
            zoo=arguments.zoo,
            name=arguments.name,
            storage=arguments.storage,
            fresh=arguments.fresh,
            retry_failed=arguments.retry_failed,
            dry_run=arguments.dry_run,
            stale_seconds=arguments.stale_after,
        )
    )


def _bench(arguments: argparse.Namespace) -> int:
    from ctrbench.suite import load_suite

    suite = load_suite(arguments.suite)
    if arguments.dry_run:
        from ctrbench.bench import describe

        print("\n".join(describe(suite)))
        return 0
    from ctrbench.tuner.slots import preload

    preload()
    from ctrbench.bench import Bench
    from ctrbench.run import check_gpu

    for gpu in dict.fromkeys(arguments.gpu):
        check_gpu(gpu)
    return Bench(suite, arguments.gpu, arguments.fresh).run()


def _leaderboard(arguments: argparse.Namespace) -> int:
    from ctrbench.errors import ConfigError
    from ctrbench.leaderboard.collect import collect
    from ctrbench.leaderboard.table import explanations, to_markdown

    if arguments.look_at and not arguments.output:
        raise ConfigError("--look-at: shown on the page only: name its folder with --output")
    suite = None
    if arguments.suite:
        from ctrbench.suite import load_suite

        suite = load_suite(arguments.suite)
    board = collect(arguments.folder, suite, shlex.join(["ctrbench", *sys.argv[1:]]))
    print(to_markdown(board))
    if lines := explanations(board):
        print("", *lines, sep="\n")
    if arguments.output:
        from ctrbench.leaderboard.publish import write_board

        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        for path in write_board(board, arguments.output, arguments.look_at, arguments.gpu):
            print(path)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from ctrbench.files import shown_path
    from ctrbench.leaderboard.verify import find_runs, verify

    logging.getLogger().addHandler(logging.NullHandler())  # what a run that is trained anew says is of no interest
    is_proven = True
    for run_dir in find_runs(arguments.folders):
        found = verify(run_dir, arguments.gpu, arguments.retrain)
        shown = "; ".join(found.problems) or "proven: " + ", ".join(
            f"{split} {name} {value:.6f}" for split, values in found.metrics.items() for name, value in values.items()
        )
        is_proven &= not found.problems
        print(f"{shown_path(run_dir)}: {'UNPROVEN: ' if found.problems else ''}{shown}", flush=True)
    return 0 if is_proven else 1
