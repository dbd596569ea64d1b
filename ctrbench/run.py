# SPDX-License-Identifier: Apache-2.0
"""One experiment -> one run directory with its weights, log, curve and report."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fuxictr.pytorch.torch_utils import get_device, seed_everything

import ctrbench
from ctrbench.batches import Batches, ResidentData, fits, load_items
from ctrbench.config import Experiment, load_run
from ctrbench.determinism import deterministic_operators, promise
from ctrbench.embedding import embedding_parameters
from ctrbench.environment import describe_environment, git_commit, peak_memory, reset_peak_memory
from ctrbench.errors import ConfigError, DataError
from ctrbench.evidence import seal
from ctrbench.features import FeatureMap, load_feature_map
from ctrbench.files import shown_path, write_json, write_text
from ctrbench.hooks import own_hooks
from ctrbench.memory import bytes_per_parameter, check_tables
from ctrbench.preprocess import DataFolder, build_dataset, expected_hash
from ctrbench.profiling import write_profile
from ctrbench.run_directory import append_result, can_resume, clear, exclusive
from ctrbench.runlog import RunLog, as_json, watch
from ctrbench.streaming import StreamedBatches
from ctrbench.throughput import DataClock, Times, describe_speed
from ctrbench.trainer import Trainer
from ctrbench.validation import tasks_of
from ctrbench.zoo import build_model, load_model_class, own_data_loader, source_hash

logger = logging.getLogger(__name__)
SPLIT_TITLES = {"train": "Train", "valid": "Validation", "test": "Test"}


@dataclasses.dataclass(frozen=True)
class Session:
    """What a process that runs many experiments adds to each of them.

    Attributes:
        data: keeps splits on the device from one run to the next.
        on_evaluation: called after each evaluation with the curve so far; an exception of it ends the run.
        should_stop: asked after every training step; when it says so, the run saves a checkpoint and raises `InterruptedRunError`.
        is_quiet: say nothing on the terminal.
        patience: seconds to wait for another process that is running the same experiment.
        notes: further entries of report.json.
        on_trainer: called with the trainer of a run before it trains.
        title: of a run beside which others run in this process, in threads of their own; its log says what its thread says.
    """

    data: ResidentData = dataclasses.field(default_factory=ResidentData)
    on_evaluation: Callable[[list[dict[str, Any]]], None] = lambda history: None
    should_stop: Callable[[], bool] = lambda: False
    is_quiet: bool = False
    patience: float = 0.0
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    on_trainer: Callable[[Trainer], None] = lambda trainer: None
    title: str = ""


def run(
    experiment: Experiment,
    gpu: int = -1,
    fresh: bool = False,
    command: str = "",
    session: Session | None = None,
    profile: bool = False,
) -> dict[str, Any]:
    """Train, validate and test one experiment.

    An unfinished run of the same configuration and data in the same run directory is continued from its last checkpoint;
    a finished one is run anew.

    Args:
        experiment: what to run.
        gpu: index of the GPU; -1 is the CPU.
        fresh: do not continue an unfinished run.
        command: how the run was started, for the report.
        session: of a process that runs many experiments.
        profile: write profile.md and trace.json, on further steps after the last evaluation.

    Returns:
        The content of report.json.

    Raises:
        CtrbenchError: bad input or a run that cannot go on, as one clear line.
        InterruptedRunError: the session asked to stop.
    """
    started = time.perf_counter()
    check_gpu(gpu)
    git_commit(experiment.root)  # whatever is committed while the run goes on
    session = session or Session()
    settings = experiment.training
    verbose = 0 if session.is_quiet else settings.verbose
    with RunLog(verbose, session.title) as log, deterministic_operators(settings.deterministic, gpu, settings.compile):
        reset_peak_memory(gpu)
        logger.info("ctrbench version: %s", ctrbench.__version__)
        logger.info("Params: %s", as_json({**experiment.flat(), "gpu": gpu, "model_id": experiment.expid}))
        seed_everything(settings.seed)
        data = build_dataset(experiment.dataset, root=experiment.root, task=settings.task)
        data_seconds = time.perf_counter() - started
        feature_map, trainer = prepare(experiment, data, gpu, session=session)
        # What can fail comes before anything of an earlier run is removed.
        _ = trainer.built_step
        batches = {
            split: open_batches(experiment, data, feature_map, split, trainer, split != "train", session.data)
            for split in data.splits
        }
        _check_labels(experiment, data, feature_map, batches)
        run_dir = experiment.run_dir
        with exclusive(run_dir, session.patience):
            is_resumed = not fresh and can_resume(experiment, data)
            clear(run_dir, keep_progress=is_resumed)
            log.open(run_dir / "train.log", append=is_resumed)
            write_text(run_dir / "config.yaml", experiment.to_yaml())
            write_json(run_dir / "data_hash.json", data.data_hash)
            parameters = count_parameters(trainer)
            logger.info("Total number of parameters: %d.", parameters["total"])
            report, times = _train_and_test(experiment, trainer, batches, run_dir, is_resumed)
            report["timings"].update(data_seconds=data_seconds, total_seconds=time.perf_counter() - started)
            report["peak_memory"] = peak_memory(trainer.device)
            report["speed"] = describe_speed(trainer, batches["train"], times, is_thorough=profile)
            if profile:
                write_profile(run_dir, trainer, batches["train"], report)
            report.update(
                parameters=parameters,
                environment=describe_environment(experiment.root, trainer.device),
                data_hash=data.data_hash,
                config_hash=experiment.config_hash,
                settings_hash=experiment.settings_hash,
                model_hash=source_hash(experiment.zoo),
                determinism=promise(trainer.device, settings.deterministic, session.notes.get("stack"), is_resumed),
                command=command,
                is_resumed=is_resumed,
                **session.notes,
            )
            logger.info("Determinism: %s", report["determinism"])
            logger.info("Report: %s", shown_path(run_dir / "report.json"))
            log.close_file()  # its hash goes into the report
            append_result(experiment, report, command)
            seal(run_dir, report, experiment.root / settings.model_root)
    return report


def prepare(
    experiment: Experiment, data: DataFolder, gpu: int, run_dir: Path | None = None, session: Session | None = None
) -> tuple[FeatureMap, Trainer]:
    """The feature map and a trainer with an untrained model on its device."""
    settings = experiment.training
    session = session or Session()
    flat = experiment.flat()
    feature_map = load_feature_map(data.feature_map_file, settings.dataset_id, flat)
    # A run that is only looked at needs neither gradients nor the optimizer's state.
    per_parameter = bytes_per_parameter(settings.optimizer) if run_dir is None else 4
    check_tables(feature_map, get_device(gpu), experiment.source, per_parameter)
    if data.items_file is not None:
        items_file, device = data.items_file, get_device(gpu)
        feature_map.item_table = session.data.get(
            data.data_hash,
            ("items", tuple(feature_map.features), device),
            lambda: load_items(items_file, feature_map, device),
        )
    logger.info("Feature specs: %s", as_json(feature_map.features))
    model_class = load_model_class(experiment.zoo, settings.model)
    params = experiment.constructor_params(gpu)
    model = build_model(model_class, feature_map, params, experiment.source)
    torch.set_num_threads(_num_threads(settings.batch_size, feature_map))
    run_dir = run_dir or experiment.run_dir

    def write_curve(history: list[dict[str, Any]]) -> None:
        write_text(run_dir / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in history))
        session.on_evaluation(history)

    clock = DataClock(watch if settings.verbose and not session.is_quiet and not session.title else None)
    loader = own_data_loader(experiment.zoo)
    stop = session.should_stop
    trainer = Trainer(model, settings, run_dir, clock, write_curve, should_stop=stop, params=params, data_loader=loader)
    session.on_trainer(trainer)
    return feature_map, trainer


def open_batches(
    experiment: Experiment,
    data: DataFolder,
    feature_map: FeatureMap,
    split: str,
    trainer: Trainer,
    in_order: bool = True,
    resident: ResidentData | None = None,
) -> Batches:
    """One split on the trainer's device, in file order and large batches, or as training wants it.

    `resident` keeps it there for later runs.

    Raises:
        DataError: the dataset has no such split.
    """
    if split not in data.splits:
        raise DataError(
            f"{data.path}: no {split} split; it has {', '.join(data.splits)}: set {split}_data in dataset_config"
        )
    settings = experiment.training
    shuffle = settings.shuffle and not in_order

    def load() -> Batches:
        path, has_labels = data.splits[split], split != "test"
        settled = (path, feature_map, settings.batch_size, shuffle, settings.seed, trainer.device, has_labels)
        if cache == "auto" and not fits(path, feature_map, trainer.device, has_labels):
            logger.warning(
                "%s does not fit %s: it is streamed, and shuffled within %d rows (shuffle_buffer)",
                *(shown_path(path), trainer.device, settings.shuffle_buffer),
            )
            return StreamedBatches(*settled, buffer_rows=settings.shuffle_buffer)
        if cache == "stream":
            return StreamedBatches(*settled, buffer_rows=settings.shuffle_buffer)
        return Batches.from_file(*settled)

    cache = settings.device_cache
    columns = (*feature_map.features, *feature_map.labels)
    key = (split, columns, trainer.device, cache, settings.shuffle_buffer)
    kept = trainer.adapt((resident or ResidentData()).get(data.data_hash, key, load))
    size = trainer.evaluation_rows if in_order else settings.batch_size
    batches = kept.ordered(size, shuffle, settings.seed)
    logger.info("%s samples: total/%d, blocks/%d", SPLIT_TITLES[split], batches.num_rows, batches.num_blocks)
    return batches


def load_trained(run_dir: Path, gpu: int = -1) -> tuple[Experiment, DataFolder, FeatureMap, Trainer]:
    """The best model of a finished run, with its data.

    Raises:
        ConfigError: `run_dir` holds no run.
        DataError: the data changed since, or the weights are missing or damaged.
    """
    check_gpu(gpu)
    experiment = load_run(run_dir)
    data = _data_of(experiment, run_dir)
    feature_map, trainer = prepare(experiment, data, gpu, run_dir)
    if not (run_dir / "DONE").exists():
        logger.warning("%s: the run is not finished; these are its best weights so far", run_dir)
    trainer.load_best()
    return experiment, data, feature_map, trainer


def _data_of(experiment: Experiment, run_dir: Path) -> DataFolder:
    """The data that a run was trained on; data of other runs is rebuilt only when that gives it back."""
    trained_on = _trained_on(run_dir / "report.json")
    dataset, task = experiment.dataset, experiment.training.task
    expected = expected_hash(dataset, root=experiment.root, task=task) if trained_on else None
    if expected in (None, trained_on):
        data = build_dataset(dataset, root=experiment.root, task=task)
        expected = data.data_hash
    if trained_on not in (expected, None):
        raise DataError(
            f"{experiment.root / dataset.data_root / dataset.dataset_id}: not the data that {run_dir} was trained on "
            f"(hash {str(expected)[:12]}, then {str(trained_on)[:12]}): restore the raw files and settings, or run the "
            "experiment again"
        )
    return data


def _trained_on(report_file: Path) -> str | None:
    """The data hash of a report; None where there is none yet."""
    try:
        return str(json.loads(report_file.read_text(encoding="utf-8"))["data_hash"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{report_file}: damaged: run the experiment again") from error


def check_gpu(gpu: int) -> None:
    """Refuse a GPU that does not exist, where FuxiCTR would silently use the CPU."""
    count = torch.cuda.device_count() if gpu >= 0 else 0
    if gpu < -1 or (gpu >= max(count, 0) and gpu >= 0):
        have = f"{count} GPU{'s' if count != 1 else ''}" + (f", 0 to {count - 1}" if count else "")
        raise ConfigError(f"--gpu {gpu}: no such GPU, this machine has {have}: use --gpu -1 for the CPU")


def count_parameters(trainer: Trainer) -> dict[str, int]:
    """Trainable parameters: in embedding tables, in the network, and in total."""
    total = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    embedding = sum(p.numel() for p in embedding_parameters(trainer.model))
    return {"total": total, "embedding": embedding, "network": total - embedding}


def _check_labels(
    experiment: Experiment, data: DataFolder, feature_map: FeatureMap, batches: dict[str, Batches]
) -> None:
    """Refuse to train or validate a binary task on labels of one class."""
    tasks = zip(feature_map.labels, tasks_of(experiment.training.task), strict=False)
    binary = [label for label, task in tasks if task == "binary_classification"]
    for split, label in itertools.product(("train", "valid"), binary):
        if split in batches:
            values = batches[split].column(label)
            if bool((values == values[0]).all()):
                raise DataError(
                    f"{data.splits[split]}: every '{label}' of the {split} split is {float(values[0]):g}: it needs rows of "
                    "both classes"
                )


def _train_and_test(
    experiment: Experiment, trainer: Trainer, batches: dict[str, Batches], run_dir: Path, resume: bool
) -> tuple[dict[str, Any], Times]:
    train, valid = batches["train"], batches.get("valid")
    if valid is None:
        logger.warning(
            "No validation split: training for all %d epochs without early stopping", experiment.training.epochs
        )
    progress = trainer.fit(train, valid, resume)
    metrics: dict[str, Any] = {}
    started = time.perf_counter()
    for split, title in (
        ("valid", "****** Validation evaluation ******"),
        ("test", "******** Test evaluation ********"),
    ):
        if split in batches and set(trainer.evaluator.labels) <= set(batches[split].names):
            logger.info(title)
            metrics[split] = trainer.evaluate(batches[split])
    final_seconds = time.perf_counter() - started
    rows = progress.epoch * train.num_rows + min(progress.batch * train.batch_size, train.num_rows)
    evaluate_seconds = progress.evaluate_seconds + final_seconds
    evaluated = sum(batches[split].num_rows for split in metrics)
    times = Times(progress.train_seconds, evaluate_seconds, progress.total_steps, rows, evaluated, final_seconds)
    report = {
        "expid": experiment.expid,
        "model": experiment.training.model,
        "dataset_id": experiment.training.dataset_id,
        "seed": experiment.training.seed,
        "metrics": metrics,
        "best_value": progress.best_value,
        "best_epoch": progress.best_epoch,
        "epochs": progress.epoch + (1 if progress.is_stopped else 0),
        "rows": {split: b.num_rows for split, b in batches.items()},
        "timings": {
            "train_seconds": progress.train_seconds,
            "evaluate_seconds": evaluate_seconds,
        },
        "train_rows_per_second": rows / max(progress.train_seconds, 1e-9),
        "uses_fast_path": trainer.uses_fast_path,
        "own_hooks": own_hooks(trainer.model),
    }
    return report, times


def _num_threads(batch_size: int, feature_map: FeatureMap) -> int:
    # Below this many activations per layer a second thread costs more in hand-over than it computes. The rule looks at
    # nothing but the experiment and the cores, so that a repeated run adds in the same order.
    is_small = batch_size * feature_map.sum_emb_out_dim() < 1 << 17
    return 1 if is_small else available_threads()


@functools.cache
def available_threads() -> int:
    """Threads that torch had when the process began: a small run before this one may have set fewer."""
    return min(torch.get_num_threads(), len(os.sched_getaffinity(0)))
