# SPDX-License-Identifier: Apache-2.0
from fuxictr.pytorch.layers import FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel


class Net(BaseModel):
    """What the models of this folder share."""

    def __init__(self, feature_map, model_id="Net", gpu=-1, learning_rate=1e-3, embedding_dim=10, **kwargs):
        super(Net, self).__init__(feature_map, model_id=model_id, gpu=gpu, **kwargs)
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.mlp = MLP_Block(input_dim=feature_map.sum_emb_out_dim(), output_dim=1, hidden_units=[16])
        self.calls = []
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs):
        logit = self.mlp(self.embedding_layer(self.get_inputs(inputs), flatten_emb=True))
        return {"y_pred": self.output_activation(logit)}

    def model_to_device(self):
        self.calls.append("model_to_device")
        super(Net, self).model_to_device()
