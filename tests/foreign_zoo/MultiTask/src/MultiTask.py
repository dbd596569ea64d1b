# SPDX-License-Identifier: Apache-2.0
from fuxictr.pytorch.layers import FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import MultiTaskModel
from torch import nn


class MultiTask(MultiTaskModel):
    """A shared bottom and one tower for each task."""

    def __init__(
        self,
        feature_map,
        task=["binary_classification"],
        num_tasks=1,
        model_id="MultiTask",
        gpu=-1,
        learning_rate=1e-3,
        embedding_dim=10,
        bottom_hidden_units=[64],
        tower_hidden_units=[32],
        hidden_activations="ReLU",
        net_dropout=0,
        batch_norm=False,
        embedding_regularizer=None,
        net_regularizer=None,
        **kwargs,
    ):
        super(MultiTask, self).__init__(
            feature_map,
            task=task,
            num_tasks=num_tasks,
            model_id=model_id,
            gpu=gpu,
            embedding_regularizer=embedding_regularizer,
            net_regularizer=net_regularizer,
            **kwargs,
        )
        options = {
            "hidden_activations": hidden_activations,
            "output_activation": None,
            "dropout_rates": net_dropout,
            "batch_norm": batch_norm,
        }
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.bottom = MLP_Block(
            input_dim=embedding_dim * feature_map.num_fields, hidden_units=bottom_hidden_units, **options
        )
        self.tower = nn.ModuleList(
            [
                MLP_Block(input_dim=bottom_hidden_units[-1], output_dim=1, hidden_units=tower_hidden_units, **options)
                for _ in range(num_tasks)
            ]
        )
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs):
        X = self.get_inputs(inputs)
        bottom_output = self.bottom(self.embedding_layer(X).flatten(start_dim=1))
        tower_output = [self.tower[i](bottom_output) for i in range(self.num_tasks)]
        y_pred = [self.output_activation[i](tower_output[i]) for i in range(self.num_tasks)]
        return_dict = {}
        labels = self.feature_map.labels
        for i in range(self.num_tasks):
            return_dict["{}_pred".format(labels[i])] = y_pred[i]
        return return_dict
