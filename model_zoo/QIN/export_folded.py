# SPDX-License-Identifier: Apache-2.0
"""Export a finished QIN run with the R rows of every quadratic layer summed: the weights of `num_row: 1`.

    python model_zoo/QIN/export_folded.py RUN_DIR --output FILE.safetensors

The outputs of evaluation stay the same; each quadratic layer has a R-th of its weights. A model built with `num_row: 1`
and otherwise the run's configuration loads the file.
"""

import argparse
import sys
from pathlib import Path

from ctrbench.errors import CtrbenchError


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    from ctrbench.checkpoint import save_state
    from ctrbench.run import load_trained

    try:
        _, _, _, trainer = load_trained(options.run_dir)
        if not hasattr(trainer.model, "qnn"):
            raise CtrbenchError(f"{options.run_dir}: not a run of QIN with a quadratic network")
        state = trainer.model.folded_state_dict()
        save_state(options.output, state)
    except CtrbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{sum(x.numel() for x in state.values()):,} numbers: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
