"""A running average of the weights, which can stand in for them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from autohdr.train.distributed import local


class Average:
    """Exponential moving average of a network's parameters. With decay 0 it keeps nothing, and the network keeps its weights.

    Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; the decay's start is TensorFlow's
    (tf.train.ExponentialMovingAverage, num_updates).
    """

    def __init__(self, network: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.parameters = [local(parameter) for parameter in network.parameters()] if decay else []
        self.tensors: list[Tensor] = [parameter.clone() for parameter in self.parameters]

    def update(self) -> None:
        """Add the weights as they are after a step."""
        self.updates += 1
        if self.decay:
            decay = min(self.decay, self.updates / (self.updates + 9))
            get_ema_multi_avg_fn(decay)(self.tensors, self.parameters, None)

    def take(self, updates: int) -> None:
        """Set the average to the network's present weights, and the count of updates."""
        self.updates = updates
        for parameter, average in zip(self.parameters, self.tensors, strict=True):
            average.copy_(parameter)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Within the block the network's weights are the average. After it they are its own again, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for parameter, average in zip(self.parameters, self.tensors, strict=True):
            own = parameter.clone()
            parameter.copy_(average)
            average.copy_(own)
