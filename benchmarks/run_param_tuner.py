# SPDX-License-Identifier: Apache-2.0
"""Run a hyperparameter sweep: `python benchmarks/run_param_tuner.py --config TUNER.yaml --gpu 0 1 2 3`."""

import sys

from ctrbench.cli import run_param_tuner

if __name__ == "__main__":
    sys.exit(run_param_tuner())
