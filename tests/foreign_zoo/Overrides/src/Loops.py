# SPDX-License-Identifier: Apache-2.0
import torch

from .Net import Net


class OwnFit(Net):
    """A `fit` that trains by plain gradient descent and keeps the last weights."""

    def fit(self, data_generator, epochs=1, validation_data=None, **kwargs):
        rate = 10 * kwargs["learning_rate"]
        for epoch in range(epochs):
            self._epoch_index = epoch
            self.train()
            for batch_data in data_generator:
                loss = self.compute_loss(self.forward(batch_data), self.get_labels(batch_data))
                gradients = torch.autograd.grad(loss, list(self.parameters()))
                with torch.no_grad():
                    for parameter, gradient in zip(self.parameters(), gradients):
                        parameter -= rate * gradient
            self.evaluate(validation_data, metrics=self._monitor.get_metrics())


class OwnEpoch(Net):
    """A `train_epoch` that skips every third batch and evaluates at the end."""

    def train_epoch(self, data_generator):
        self.train()
        for batch_index, batch_data in enumerate(data_generator):
            self._batch_index = batch_index
            if batch_index % 3 != 2:
                self._total_steps += 1
                self.train_step(batch_data)
        self.eval_step()
