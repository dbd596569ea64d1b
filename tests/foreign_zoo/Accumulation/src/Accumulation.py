# SPDX-License-Identifier: Apache-2.0
import torch
from fuxictr.pytorch.layers import FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel
from torch import nn


class Accumulation(BaseModel):
    """A `train_step` that accumulates gradients and has a schedule of its own."""

    def __init__(
        self,
        feature_map,
        model_id="Accumulation",
        gpu=-1,
        learning_rate=1e-3,
        embedding_dim=10,
        accumulation_steps=1,
        **kwargs,
    ):
        super(Accumulation, self).__init__(feature_map, model_id=model_id, gpu=gpu, **kwargs)
        self.accumulation_steps = accumulation_steps
        self.num_updates = 0
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.mlp = MLP_Block(
            input_dim=feature_map.sum_emb_out_dim(),
            output_dim=1,
            hidden_units=[16],
            dropout_rates=0.1,
            output_activation=self.output_activation,
        )
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=2, gamma=0.8)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs):
        return {"y_pred": self.mlp(self.embedding_layer(self.get_inputs(inputs), flatten_emb=True))}

    def train_step(self, batch_data):
        return_dict = self.forward(batch_data)
        loss = self.compute_loss(return_dict, self.get_labels(batch_data)) / self.accumulation_steps
        loss.backward()
        if (self._batch_index + 1) % self.accumulation_steps == 0:
            nn.utils.clip_grad_norm_(self.parameters(), self._max_gradient_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.num_updates += 1
            if self.num_updates % 2 == 0:
                self.scheduler.step()
        return loss
