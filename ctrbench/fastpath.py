# SPDX-License-Identifier: Apache-2.0
"""Which models the fast path may train, and what it changes in them: nothing that shows in the weights."""

from __future__ import annotations

import logging

from fuxictr.pytorch.models import BaseModel, MultiTaskModel

from ctrbench import hooks, native
from ctrbench.allocator import keep_freed_memory
from ctrbench.crosslayer import fuse_cross_layers
from ctrbench.dropout import speed_up_dropout
from ctrbench.embedding import embedding_parameters, merge_embeddings
from ctrbench.optim import CoupledAdam
from ctrbench.schema import TrainingConfig
from ctrbench.validation import parse_regularizer
from ctrbench.zoo import asked_optimizer

logger = logging.getLogger(__name__)


def keeps_stock_loop(model: BaseModel, settings: TrainingConfig) -> bool:
    """Whether a model is trained by FuxiCTR's own step with Adam and L2, which the fast path equals."""
    own = (*hooks.STEP_HOOKS, *hooks.LOOP_HOOKS)
    is_stock = isinstance(model, BaseModel) and not isinstance(model, MultiTaskModel)
    if not is_stock or any(hooks.overrides(model, name) for name in own):
        return False
    asked = asked_optimizer(model)
    if asked is None and getattr(model, "optimizer", None) is not None:
        return False  # it made one of its own
    optimizer = asked[0] if asked else settings.optimizer
    penalties = parse_regularizer(settings.embedding_regularizer) + parse_regularizer(settings.net_regularizer)
    return str(optimizer).lower() == "adam" and all(p == 2 for p, _ in penalties)


def take_fast_path(model: BaseModel, settings: TrainingConfig) -> None:
    """Merge the embedding tables, make the optimizer one pass and, on a CPU, dropout and cross layers cheaper."""
    merge_embeddings(model)
    if model.device.type == "cpu":
        if native.library() is None:
            logger.info(
                "No compiled functions, so that training is slower: have a C compiler and install ctrbench again"
            )
        speed_up_dropout(model)
        keep_freed_memory()
        fuse_cross_layers(model)
    embedding = list(embedding_parameters(model))
    known = {id(parameter) for parameter in embedding}
    net = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [
        (embedding, sum(weight for _, weight in parse_regularizer(settings.embedding_regularizer))),
        (net, sum(weight for _, weight in parse_regularizer(settings.net_regularizer))),
    ]
    asked = asked_optimizer(model)
    rate = asked[1] if asked else settings.learning_rate
    model.optimizer = CoupledAdam(groups, rate, settings.max_gradient_norm)
