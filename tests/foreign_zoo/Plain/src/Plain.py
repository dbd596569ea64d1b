# SPDX-License-Identifier: Apache-2.0
import json
import os

import torch
from fuxictr.pytorch.layers import FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel
from torch import nn


class Plain(BaseModel):
    """An MLP over weighted fields, with FuxiCTR's own loop."""

    def __init__(
        self,
        feature_map,
        model_id="Plain",
        gpu=-1,
        learning_rate=1e-3,
        embedding_dim=10,
        hidden_units=[64, 64],
        hidden_activations="ReLU",
        net_dropout=0,
        batch_norm=False,
        embedding_regularizer=None,
        net_regularizer=None,
        **kwargs,
    ):
        super(Plain, self).__init__(
            feature_map,
            model_id=model_id,
            gpu=gpu,
            embedding_regularizer=embedding_regularizer,
            net_regularizer=net_regularizer,
            **kwargs,
        )
        with open(os.path.join(feature_map.data_dir, "feature_map.json")) as stream:
            assert kwargs["dataset_id"] == json.load(stream)["dataset_id"]
        assert os.path.isdir(kwargs["data_root"])
        self.num_labels = len(feature_map.labels)
        self.field_weight = nn.Parameter(torch.ones(feature_map.num_fields))
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.mlp = MLP_Block(
            input_dim=feature_map.sum_emb_out_dim() + embedding_dim,
            output_dim=1,
            hidden_units=hidden_units,
            hidden_activations=hidden_activations,
            output_activation=None,
            dropout_rates=net_dropout,
            batch_norm=batch_norm,
        )
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs):
        X = self.get_inputs(inputs)
        feature_emb = self.embedding_layer(X) * self.field_weight.view(1, -1, 1)
        # The item's table once more, by its name.
        item_emb = self.embedding_layer.embedding_layer.embedding_layers["item_id"](X["item_id"].long())
        logit = self.mlp(torch.cat([feature_emb.flatten(start_dim=1), item_emb], dim=-1))
        return {"y_pred": self.output_activation(logit), "logit": logit, "feature_emb": feature_emb, "nothing": None}
