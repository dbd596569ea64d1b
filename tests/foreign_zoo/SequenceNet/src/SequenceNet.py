# SPDX-License-Identifier: Apache-2.0
import torch
from fuxictr.pytorch.layers import DIN_Attention, FeatureEmbeddingDict, MLP_Block, MultiHeadTargetAttention
from fuxictr.pytorch.models import BaseModel
from pandas.core.common import flatten
from src.pooling import mask_of
from torch import nn


class SequenceNet(BaseModel):
    """Target attention as FuxiCTR's sequence models have it: a tuple of fields is one field, a list is several."""

    def __init__(
        self,
        feature_map,
        model_id="SequenceNet",
        gpu=-1,
        dnn_hidden_units=[512, 128, 64],
        dnn_activations="ReLU",
        attention="din",
        attention_hidden_units=[64],
        attention_dropout=0,
        learning_rate=1e-3,
        embedding_dim=10,
        net_dropout=0,
        target_field=[("item_id", "cate_id")],
        sequence_field=[("click_history", "cate_history")],
        embedding_regularizer=None,
        net_regularizer=None,
        **kwargs,
    ):
        super(SequenceNet, self).__init__(
            feature_map,
            model_id=model_id,
            gpu=gpu,
            embedding_regularizer=embedding_regularizer,
            net_regularizer=net_regularizer,
            **kwargs,
        )
        if not isinstance(target_field, list):
            target_field = [target_field]
        if not isinstance(sequence_field, list):
            sequence_field = [sequence_field]
        assert len(target_field) == len(sequence_field)
        self.target_field, self.sequence_field = target_field, sequence_field
        self.embedding_dim = embedding_dim
        self.embedding_layer = FeatureEmbeddingDict(feature_map, embedding_dim)
        widths = [embedding_dim * len(f) if type(f) is tuple else embedding_dim for f in target_field]
        if attention == "din":
            layers = [
                DIN_Attention(
                    w,
                    attention_units=attention_hidden_units,
                    hidden_activations="Dice",
                    dropout_rate=attention_dropout,
                )
                for w in widths
            ]
        else:
            layers = [MultiHeadTargetAttention(w, w, num_heads=2, dropout_rate=attention_dropout) for w in widths]
        self.attention_layers = nn.ModuleList(layers)
        self.dnn = MLP_Block(
            input_dim=feature_map.sum_emb_out_dim(),
            output_dim=1,
            hidden_units=dnn_hidden_units,
            hidden_activations=dnn_activations,
            output_activation=self.output_activation,
            dropout_rates=net_dropout,
        )
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs):
        X = self.get_inputs(inputs)
        feature_emb_dict = self.embedding_layer(X)
        for attention, target_field, sequence_field in zip(
            self.attention_layers, self.target_field, self.sequence_field
        ):
            target_emb = self.get_embedding(target_field, feature_emb_dict)
            sequence_emb = self.get_embedding(sequence_field, feature_emb_dict)
            fields = list(flatten([sequence_field]))
            pooling_emb = attention(target_emb, sequence_emb, mask_of(X, fields[0]))
            for field, field_emb in zip(fields, pooling_emb.split(self.embedding_dim, dim=-1)):
                feature_emb_dict[field] = field_emb
        return {"y_pred": self.dnn(self.embedding_layer.dict2tensor(feature_emb_dict, flatten_emb=True))}

    def get_embedding(self, field, feature_emb_dict):
        if type(field) is tuple:
            return torch.cat([feature_emb_dict[f] for f in field], dim=-1)
        return feature_emb_dict[field]
