"""What a run does when: the settings of each epoch, and the learning rate of each step."""

import math
from dataclasses import replace

from autohdr.train.config import TrainConfig


def stages(config: TrainConfig) -> list[TrainConfig]:
    """The settings of each stage, in their order; of a run without stages its own."""
    return [replace(config, stages=[], **stage) for stage in config.stages] or [config]


def lr_factor(step: int, total: int, warmup: int, shape: str = "cosine", floor: float = 0.0) -> float:
    """Share of the peak rate at step 0 .. total - 1: linear up to 1 in `warmup` steps, then towards `floor` at step `total`.

    shape: cosine, linear, or constant, which stays at 1.
    """
    if step < warmup:
        return (step + 1) / warmup
    if shape == "constant":
        return 1.0
    done = (step - warmup) / (total - warmup)
    return floor + (1 - floor) * (1 - done if shape == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


class Schedule:
    """Counts a run's steps, through its stages. Epochs and steps are counted from 0."""

    def __init__(self, config: TrainConfig, pairs: int, processes: int):
        """pairs: to train on, each once an epoch."""
        self._config, self.stages = config, stages(config)
        self.step_pairs = [stage.batch_size * stage.accumulate * processes for stage in self.stages]
        """Pairs that a step of each stage takes."""
        self._epoch_steps = [math.ceil(pairs / taken) for taken in self.step_pairs]
        self.steps = self._before(config.epochs)
        """Optimiser steps of the whole run."""
        self._warmup = min(round(self._before(config.warmup_epochs)), self.steps // 2)

    def stage(self, epoch: int) -> int:
        """The place in `stages` of that epoch's settings."""
        number = 0
        while number < len(self.stages) - 1 and epoch >= self.stages[number].epochs:
            epoch -= self.stages[number].epochs
            number += 1
        return number

    def first(self, stage: int) -> int:
        """The first epoch of a stage."""
        return sum(before.epochs for before in self.stages[:stage])

    def describe(self, stage: int) -> str:
        """One line: a stage's epochs, sizes and pairs."""
        config, first = self.stages[stage], self.first(stage)
        epochs = f"epochs {first + 1} to {first + config.epochs}"
        return f"{epochs}, {config.size} x {config.size} pixels ({config.resize}), {self.step_pairs[stage]} pairs in a step"

    def epoch_steps(self, epoch: int) -> int:
        """Optimiser steps of that epoch."""
        return self._epoch_steps[self.stage(epoch)]

    def lr(self, epoch: int, step: int) -> float:
        """The learning rate of an epoch's step."""
        config, at = self._config, self._before(epoch) + step
        return config.lr * lr_factor(at, self.steps, self._warmup, config.schedule, config.min_lr / config.lr)

    def _before(self, epochs):
        """Steps in the first so many epochs, of which the last may be a part of one."""
        total = 0
        for stage, steps in zip(self.stages, self._epoch_steps, strict=True):
            total += min(epochs, stage.epochs) * steps
            epochs = max(0, epochs - stage.epochs)
        return total
