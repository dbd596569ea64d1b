# SPDX-License-Identifier: Apache-2.0
from fuxictr.pytorch.layers import FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel


class OldAddLoss(BaseModel):
    """The `add_loss(inputs)` of FuxiCTR 2.0, which runs the model itself."""

    def __init__(self, feature_map, model_id="OldAddLoss", gpu=-1, learning_rate=1e-3, embedding_dim=10, **kwargs):
        super(OldAddLoss, self).__init__(feature_map, model_id=model_id, gpu=gpu, **kwargs)
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.towers = [self.new_tower(feature_map), self.new_tower(feature_map)]
        self.tower0, self.tower1 = self.towers
        self.compile(kwargs["optimizer"], kwargs["loss"], lr=learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def new_tower(self, feature_map):
        return MLP_Block(input_dim=feature_map.sum_emb_out_dim(), output_dim=1, hidden_units=[8])

    def forward(self, inputs):
        feature_emb = self.embedding_layer(self.get_inputs(inputs), flatten_emb=True)
        logits = [tower(feature_emb) for tower in self.towers]
        y1, y2 = [self.output_activation(logit) for logit in logits]
        return {"y_pred": self.output_activation((logits[0] + logits[1]) / 2), "y1": y1, "y2": y2}

    def add_loss(self, inputs):
        return_dict = self.forward(inputs)
        y_true = self.get_labels(inputs)
        losses = [self.loss_fn(return_dict[name], y_true, reduction="mean") for name in ("y_pred", "y1", "y2")]
        return sum(losses)
