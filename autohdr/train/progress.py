"""How far a run has come: the plain values of its state, which say by themselves how they are saved and loaded."""

import copy
import math
import uuid
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

SPIKES = 3
"""A pair is left out once it was in a spike in so many epochs, and the step after each was good."""


@dataclass
class Progress:
    """What lies behind a run. Every field is a key of the state on disk."""

    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """The run's name, which its weights' metadata has too."""
    step: int = 0
    """Optimiser steps, bad ones included."""
    epoch: int = 0
    """Whole epochs, validation included."""
    epoch_steps: int = 0
    """Those of the present epoch."""
    epoch_losses: dict[str, float] = field(default_factory=dict)
    """{name: sum over the present epoch's pairs} of the whole loss and of each component, bad steps left out."""
    epoch_samples: int = 0
    """The number of pairs in those sums."""
    epoch_seconds: float = 0.0
    """Seconds that the present epoch's steps took."""
    epoch_wait: float = 0.0
    """Seconds of them in which a step waited for its pairs."""
    lost: Counter[str] = field(default_factory=Counter)
    """{cause: steps that changed nothing in the end}."""
    spikes: Counter[int] = field(default_factory=Counter)
    """{index of a pair: the epochs in which its step was a spike, and the next one good}: its own fault, not the weights'."""
    left_out: list[int] = field(default_factory=list)
    """Pairs that are no longer trained on, from the present epoch on at the latest."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One row for each whole epoch, as log.csv has it."""

    def end_step(self, losses: dict[str, float], samples: int) -> None:
        """Count a step with the mean losses of its `samples` pairs. 0 samples: the step was bad, and counts in no mean."""
        for name, value in losses.items():
            self.epoch_losses[name] = self.epoch_losses.get(name, 0.0) + (value * samples if samples else 0.0)
        self.epoch_samples += samples
        self.step, self.epoch_steps = self.step + 1, self.epoch_steps + 1

    def train_means(self) -> dict[str, float]:
        """{train_NAME: mean over the present epoch's pairs}, nan where every step was bad."""
        return {f"train_{name}": total / (self.epoch_samples or math.nan) for name, total in self.epoch_losses.items()}

    def leave_out(self, most: int) -> list[int]:
        """The pairs that are left out from the next epoch on, and were not before: `most` in all at most."""
        odd = [index for index, count in self.spikes.items() if count >= SPIKES and index not in self.left_out]
        new = odd[: most - len(self.left_out)]
        self.left_out += new
        return new

    def end_epoch(self, row: dict[str, Any]) -> None:
        """Count the present epoch, whose figures are `row`, and begin the next."""
        self.history.append(row)
        self.epoch, self.epoch_steps, self.epoch_losses, self.epoch_samples = self.epoch + 1, 0, {}, 0
        self.epoch_seconds = self.epoch_wait = 0.0

    def best(self, metric: str) -> dict[str, Any]:
        """The first row with the highest `metric`, or the lowest val_l1; {} before the first epoch's end."""
        sign = -1 if metric == "val_l1" else 1
        return max(self.history, key=lambda row: sign * row[metric], default={})

    def waited(self, metric: str) -> int:
        """Epochs since the best one; 0 before the first epoch's end."""
        return len(self.history) - 1 - self.history.index(self.best(metric)) if self.history else 0

    @classmethod
    def keys(cls) -> list[str]:
        """The keys of state_dict()."""
        return [item.name for item in fields(cls)]

    def state_dict(self) -> dict[str, Any]:
        """{key: plain value}: a copy, which may be written while the run goes on."""
        return copy.deepcopy({key: getattr(self, key) for key in self.keys()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state_dict(); other keys of `state` are ignored."""
        for key in self.keys():
            setattr(self, key, state[key])
