# SPDX-License-Identifier: Apache-2.0
import torch
import torch.nn.functional as F
from fuxictr.pytorch.layers import FeatureEmbedding, LogisticRegression, MLP_Block
from fuxictr.pytorch.models import BaseModel


class AuxLoss(BaseModel):
    """Two towers with an auxiliary loss by `add_loss(return_dict, y_true)`; indexes with ids as they come."""

    def __init__(self, feature_map, model_id="AuxLoss", gpu=-1, learning_rate=1e-3, embedding_dim=10, **kwargs):
        super(AuxLoss, self).__init__(feature_map, model_id=model_id, gpu=gpu, **kwargs)
        self.aux_weight = kwargs.get("aux_weight", 1)
        self.num_hours = feature_map.features["hour"]["vocab_size"]
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.mlp = MLP_Block(
            input_dim=feature_map.sum_emb_out_dim() + self.num_hours,
            output_dim=1,
            hidden_units=[16],
            hidden_activations="ReLU",
            output_activation=self.output_activation,
        )
        self.lr = LogisticRegression(feature_map, use_bias=True)
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs):
        X = self.get_inputs(inputs)
        hour = F.one_hot(X["hour"], self.num_hours).float()
        y_deep = self.mlp(torch.cat([self.embedding_layer(X, flatten_emb=True), hour], dim=-1))
        return {"y_pred": y_deep, "y_aux": self.output_activation(self.lr(X))}

    def add_loss(self, return_dict, y_true):
        loss = self.loss_fn(return_dict["y_pred"], y_true, reduction="mean")
        loss_aux = self.loss_fn(return_dict["y_aux"], return_dict["y_pred"].detach(), reduction="mean")
        return loss + self.aux_weight * loss_aux
