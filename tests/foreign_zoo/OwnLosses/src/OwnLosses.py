# SPDX-License-Identifier: Apache-2.0
import torch
from fuxictr.pytorch.layers import FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel


class OwnLosses(BaseModel):
    """`compute_loss` and `regularization_loss` replaced: only the rows of a batch are penalised."""

    def __init__(self, feature_map, model_id="OwnLosses", gpu=-1, learning_rate=1e-3, embedding_dim=10, **kwargs):
        super(OwnLosses, self).__init__(feature_map, model_id=model_id, gpu=gpu, **kwargs)
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.mlp = MLP_Block(input_dim=feature_map.sum_emb_out_dim(), output_dim=1, hidden_units=[16])
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs):
        feature_emb = self.embedding_layer(self.get_inputs(inputs), flatten_emb=True)
        return {"y_pred": self.output_activation(self.mlp(feature_emb)), "feature_emb": feature_emb}

    def regularization_loss(self):
        return self._net_regularizer * sum(torch.norm(p) for p in self.mlp.parameters())

    def compute_loss(self, return_dict, y_true):
        penalty = 10 * self._embedding_regularizer * return_dict["feature_emb"].pow(2).mean()
        return self.add_loss(return_dict, y_true) + self.regularization_loss() + penalty
