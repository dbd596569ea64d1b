# SPDX-License-Identifier: Apache-2.0
import torch
from fuxictr.pytorch.torch_utils import get_loss

from .Net import Net


class OwnCompile(Net):
    """An optimizer with a learning rate for each part."""

    def compile(self, optimizer, loss, lr):
        groups = [
            {"params": list(self.embedding_layer.parameters()), "lr": lr},
            {"params": list(self.mlp.parameters()), "lr": lr / 10},
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        self.loss_fn = get_loss(loss)


class OwnDecisions(Net):
    """`checkpoint_and_earlystop` that asks for an improvement of 0.002, and `lr_decay` that halves the rate."""

    def lr_decay(self, factor=0.5, min_lr=1e-5):
        self.calls.append("lr_decay")
        return super(OwnDecisions, self).lr_decay(factor, min_lr)

    def checkpoint_and_earlystop(self, logs, min_delta=2e-3):
        self.calls.append("checkpoint_and_earlystop")
        super(OwnDecisions, self).checkpoint_and_earlystop(logs, min_delta)


class OwnWeights(Net):
    """Keeps half the weights: what is loaded is not what was trained."""

    def save_weights(self, checkpoint):
        self.calls.append("save_weights")
        torch.save({name: value / 2 for name, value in self.state_dict().items()}, checkpoint)

    def load_weights(self, checkpoint):
        self.calls.append("load_weights")
        self.load_state_dict(torch.load(checkpoint, map_location="cpu"))
