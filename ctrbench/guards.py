# SPDX-License-Identifier: Apache-2.0
"""Signs that a model does not learn, seen at an evaluation."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ctrbench.errors import TrainingError

# The training loss explodes when it is so many times the lowest one so far.
EXPLOSION = 10.0
logger = logging.getLogger(__name__)


def check_predictions(predictions: Mapping[str, Tensor]) -> None:
    """Look at the predictions of a split, (rows,) by name; warn of those that are all the same.

    Raises:
        TrainingError: some are not finite: a gradient was not, in the last step before.
    """
    for name, values in predictions.items():
        if not values.numel():
            continue
        low, high = (float(x) for x in torch.aminmax(values.detach()))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise TrainingError(
                f"the predictions ({name}) are no longer finite: the last steps diverged: lower learning_rate or "
                "max_gradient_norm, or raise embedding_regularizer"
            )
        if low == high and values.numel() > 1:
            logger.warning(
                "All %d predictions (%s) are %.6g: the model tells no row from another: lower learning_rate or the "
                "regularizers, and give numeric columns a normalizer",
                *(values.numel(), name, low),
            )


def warn_of_explosion(train_loss: float, history: Sequence[Mapping[str, Any]]) -> None:
    """Warn of a mean training loss that is many times the lowest of the evaluations before."""
    lowest = min((record["train_loss"] for record in history), default=math.inf)
    if train_loss > EXPLOSION * max(lowest, 1e-6):
        logger.warning(
            "The training loss explodes: %.6g, %.0f times the lowest so far: lower learning_rate or max_gradient_norm",
            *(train_loss, train_loss / max(lowest, 1e-6)),
        )
