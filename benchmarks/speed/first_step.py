# SPDX-License-Identifier: Apache-2.0
"""How long a fresh process takes until its first training step is done, on tiny data that are built already."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from measure import ROOT
from shapes import shape_of, write_columns

NAMES = ("import torch", "ctrbench", "fuxictr")
BARE = "import time; started = time.perf_counter(); import torch; print(time.perf_counter() - started)"
OURS = """
import sys, time
started = time.perf_counter()
from ctrbench import cli, trainer
step = trainer.Trainer.step
def first_step(self, batch):
    step(self, batch)
    print(time.perf_counter() - started, flush=True)
    raise KeyboardInterrupt
trainer.Trainer.step = first_step
cli.main(["run", "--expid", "SDCNv3_tiny", *(word for value in sys.argv[1:] for word in ("--set", value))])
"""
# The imports of its model folders' run_expid.py; reading configurations and building data, which ours does, left out.
THEIRS = """
import sys, time
started = time.perf_counter()
from fuxictr.utils import load_config, set_logger, print_to_json, print_to_list
from fuxictr.features import FeatureMap
from fuxictr.pytorch.torch_utils import seed_everything
from fuxictr.pytorch.dataloaders import RankDataLoader
from fuxictr.preprocess import FeatureProcessor, build_dataset
sys.path[:0] = sys.argv[1:3]
from src import SDCNv3
from shapes import make_feature_map, shape_of
shape = shape_of("ML_1M", True)
feature_map = make_feature_map(shape)
settings = {"optimizer": "adam", "loss": "binary_crossentropy", "metrics": ["AUC"], "verbose": 0, "model_root": "."}
model = SDCNv3(feature_map, **shape.params, **shape.training, **settings)
train, _ = RankDataLoader(feature_map, "train", sys.argv[3], batch_size=shape.batch_size, num_workers=0)
model._max_gradient_norm = 10.0
for batch in train:
    model.train_step(batch)
    print(time.perf_counter() - started, flush=True)
    break
"""


def measure_startup(repeats: int, scratch: Path, has_theirs: bool) -> dict[str, list[float]]:
    """Seconds of a bare `import torch`, and of all that each side does until its first training step is done.

    Args:
        repeats: processes of each.
        scratch: a folder for data and runs.
        has_theirs: whether the installed FuxiCTR is measured too.
    """
    raw = scratch / "raw"
    make_tiny = [sys.executable, str(ROOT / "data" / "make_tiny.py"), "--dataset", "tiny_ctr", "--output", str(raw)]
    subprocess.run(make_tiny, check=True, capture_output=True)
    rows = scratch / "first_step.npz"
    write_columns(shape_of("ML_1M", True), 64, rows)
    overrides = [f"{split}_data={raw / split}.csv" for split in ("train", "valid", "test")]
    overrides += [f"data_root={scratch / 'data'}", f"model_root={scratch / 'runs'}", "verbose=0"]
    commands = {"import torch": (BARE, []), "ctrbench": (OURS, overrides)}
    if has_theirs:
        here = str(Path(__file__).resolve().parent)
        commands["fuxictr"] = THEIRS, [str(ROOT / "model_zoo" / "SDCNv3"), here, str(rows)]
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for code, arguments in commands.values():
        _seconds(code, arguments)  # builds the data and fills the file cache
    for _ in range(repeats):
        for name, (code, arguments) in commands.items():
            taken[name].append(_seconds(code, arguments))
    return taken


def _seconds(code: str, arguments: list[str]) -> float:
    """What a fresh process that runs `code` prints last."""
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=path, capture_output=True, text=True)
    if not done.stdout.strip():
        raise RuntimeError(done.stderr)
    return float(done.stdout.split()[-1])
