# SPDX-License-Identifier: Apache-2.0
import torch
from fuxictr.pytorch.layers import FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel


class OwnBatch(BaseModel):
    """`get_inputs`, `get_labels` and `get_group_id` replaced; the batch itself is written to, as FuxiCTR's may be."""

    def __init__(self, feature_map, model_id="OwnBatch", gpu=-1, learning_rate=1e-3, embedding_dim=10, **kwargs):
        super(OwnBatch, self).__init__(feature_map, model_id=model_id, gpu=gpu, **kwargs)
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.mlp = MLP_Block(input_dim=feature_map.sum_emb_out_dim(), output_dim=1, hidden_units=[16])
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs):
        logit = self.mlp(self.embedding_layer(self.get_inputs(inputs), flatten_emb=True))
        return {"y_pred": self.output_activation(logit)}

    def get_inputs(self, inputs, feature_source=None):
        X = super(OwnBatch, self).get_inputs(inputs, feature_source)
        X["cate_id"].clamp_(max=3)  # in place
        X["price"].mul_(0.5)
        return X

    def get_labels(self, inputs):
        y = inputs[self.feature_map.labels[0]].to(self.device).float().view(-1, 1)
        return 1 - y

    def get_group_id(self, inputs):
        return torch.div(inputs[self.feature_map.group_id], 2, rounding_mode="floor")
