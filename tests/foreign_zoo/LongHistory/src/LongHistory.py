# SPDX-License-Identifier: Apache-2.0
import torch
from fuxictr.pytorch.layers import DIN_Attention, FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel
from fuxictr.utils import not_in_whitelist
from torch import nn


class LongHistory(BaseModel):
    """Batches are tuples: columns of the row, features of [history, target] one below the other, mask of the history."""

    def __init__(
        self,
        feature_map,
        model_id="LongHistory",
        gpu=-1,
        dnn_hidden_units=[64],
        attention_hidden_units=[64],
        learning_rate=1e-3,
        embedding_dim=10,
        net_dropout=0,
        batch_norm=False,
        accumulation_steps=1,
        embedding_regularizer=None,
        net_regularizer=None,
        **kwargs,
    ):
        super(LongHistory, self).__init__(
            feature_map,
            model_id=model_id,
            gpu=gpu,
            embedding_regularizer=embedding_regularizer,
            net_regularizer=net_regularizer,
            **kwargs,
        )
        self.feature_map = feature_map
        self.item_info_dim = 0
        for _, spec in self.feature_map.features.items():
            if spec.get("source") == "item":
                self.item_info_dim += spec.get("embedding_dim", embedding_dim)
        self.accumulation_steps = accumulation_steps
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.attention_layer = DIN_Attention(self.item_info_dim, attention_units=attention_hidden_units)
        self.dnn = MLP_Block(
            input_dim=feature_map.sum_emb_out_dim() + self.item_info_dim,
            output_dim=1,
            hidden_units=dnn_hidden_units,
            output_activation=self.output_activation,
            dropout_rates=net_dropout,
            batch_norm=batch_norm,
        )
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs):
        batch_dict, item_dict, mask = self.get_inputs(inputs)
        emb_list = []
        if batch_dict:
            emb_list.append(self.embedding_layer(batch_dict, flatten_emb=True))
        item_feat_emb = self.embedding_layer(item_dict, flatten_emb=True)
        item_feat_emb = item_feat_emb.view(mask.shape[0], -1, self.item_info_dim)
        target_emb, sequence_emb = item_feat_emb[:, -1, :], item_feat_emb[:, 0:-1, :]
        emb_list += [target_emb, self.attention_layer(target_emb, sequence_emb, mask)]
        return {"y_pred": self.dnn(torch.cat(emb_list, dim=-1))}

    def get_inputs(self, inputs, feature_source=None):
        batch_dict, item_dict, mask = inputs
        X_dict = dict()
        for feature, value in batch_dict.items():
            if feature in self.feature_map.labels:
                continue
            feature_spec = self.feature_map.features[feature]
            if feature_spec["type"] == "meta":
                continue
            if feature_source and not_in_whitelist(feature_spec["source"], feature_source):
                continue
            X_dict[feature] = value.to(self.device)
        for item, value in item_dict.items():
            item_dict[item] = value.to(self.device)
        return X_dict, item_dict, mask.to(self.device)

    def get_labels(self, inputs):
        return inputs[0][self.feature_map.labels[0]].to(self.device).float().view(-1, 1)

    def get_group_id(self, inputs):
        return inputs[0][self.feature_map.group_id]

    def train_step(self, batch_data):
        return_dict = self.forward(batch_data)
        loss = self.compute_loss(return_dict, self.get_labels(batch_data)) / self.accumulation_steps
        loss.backward()
        if (self._batch_index + 1) % self.accumulation_steps == 0:
            nn.utils.clip_grad_norm_(self.parameters(), self._max_gradient_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss
