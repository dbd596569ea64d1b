# SPDX-License-Identifier: Apache-2.0
"""Run one experiment: `python run_expid.py --config DIR --expid ID --gpu N` (`--gpu -1` is the CPU)."""

import sys
from pathlib import Path

from ctrbench.cli import run_expid

if __name__ == "__main__":
    sys.exit(run_expid(Path(__file__).resolve().parent))
