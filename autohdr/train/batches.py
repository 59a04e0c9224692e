"""Which pairs each step takes, and their way from the disk to the device."""

import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from autohdr.data.augment import Augmentation
from autohdr.data.pairs import Pair, PairDataset, Sample
from autohdr.errors import UserError
from autohdr.train.config import TrainConfig
from autohdr.train.distributed import Ranks
from autohdr.train.guards import held_signals, survive_signals
from autohdr.train.schedule import Schedule

Group = list[list[int]]
"""The pairs of one step, as indices into the list of pairs: one batch for each forward pass, for all processes together."""


WAITS = (0.1, 0.4, 1.5, 6.0)
"""Seconds before a photo that cannot be read is tried again: a network's disk may be gone for a while."""


class _Patient(Dataset[Sample]):
    """Pairs, read again where a photo cannot be read."""

    def __init__(self, pairs: PairDataset, stand_ins: bool):
        """stand_ins: after the last try the next pair that can be read has the place, and a warning says so; else UserError."""
        self.pairs, self.stand_ins = pairs, stand_ins

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        for wait in WAITS:
            try:
                return self.pairs[index]
            except UserError:
                time.sleep(wait)
        others = [(index + step) % len(self) for step in range(len(self))] if self.stand_ins else [index]
        for other in others[:-1]:
            try:
                return self.pairs[other]
            except UserError as error:
                warnings.warn(f"left out this time, another pair has its place: {error}", stacklevel=2)
        return self.pairs[others[-1]]


class Loader:
    """Brings batches of a dataset's pairs to the device; config.workers processes read and decode them."""

    def __init__(self, dataset: PairDataset, config: TrainConfig, device: torch.device, training: bool = False):
        """training: the workers stay between calls, until this object is deleted, and a pair that can no longer be read is left
        out. Without it that raises UserError: a validation of fewer pairs could not be compared with the others."""
        self.device = device
        self._batches: list[list[int]] = []
        workers = {"prefetch_factor": 4, "persistent_workers": training} if config.workers else {}
        self._loader = DataLoader(
            _Patient(dataset, stand_ins=training),
            batch_sampler=self._batches,
            num_workers=config.workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=survive_signals,
            generator=torch.Generator(),  # else the workers' seeds would be drawn from the run's random numbers
            **workers,
        )

    def __call__(self, batches: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (source, target) of each batch, (B, 3, H, W) float32, channels-last. The workers begin to read at once."""
        self._batches[:] = batches
        with held_signals():
            read = iter(self._loader)
        return map(self._to_device, read)

    def _to_device(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        source, target = (
            batch[key].to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last) for key in ("src", "tar")
        )
        return source, target


class Batches:
    """Divides the pairs to train on into steps, anew for each epoch. Each pair comes once an epoch.

    datasets: the pairs, as each stage sees them. dataset: those of the stage that was last read from.
    """

    def __init__(self, config: TrainConfig, pairs: list[Pair], ranks: Ranks, schedule: Schedule):
        settings = schedule.stages
        self.datasets = [PairDataset(pairs, s.size, s.resize, s.augment, s.seed, Augmentation.of(s)) for s in settings]
        self.dataset = self.datasets[0]
        self._config, self._ranks, self._schedule = config, ranks, schedule
        self._loader = self._load()

    def groups(self, epoch: int, left_out: Sequence[int] = ()) -> list[Group]:
        """The steps of an epoch, which is counted from 0. The order depends on (seed, epoch) alone.

        left_out: pairs whose places others take, drawn at random.
        """
        rng = np.random.default_rng([self._config.seed, epoch])
        order = rng.permutation(len(self.dataset)).tolist()
        if left_out:
            others = sorted(set(order) - set(left_out))
            order = [int(rng.choice(others)) if index in left_out else index for index in order]
        stage = self._schedule.stages[self._schedule.stage(epoch)]
        size, count = stage.batch_size * self._ranks.count, stage.accumulate
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        return [batches[i : i + count] for i in range(0, len(batches), count)]

    def read(self, groups: list[Group], epoch: int, left_out: Sequence[int] = ()) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (source, target) of this process's part of each batch of `groups`, augmented as in that epoch."""
        stage = self._schedule.stage(epoch)
        if self.dataset is not self.datasets[stage]:
            self.dataset = self.datasets[stage]
            self._loader = self._load()  # the workers of the stage before end
            if self._ranks.rank == 0:
                for dataset in self.datasets[:stage]:
                    dataset.drop_decoded(but=self.datasets[stage:])
        self.dataset.set_epoch(epoch, left_out)
        return self._loader([self._ranks.part(batch)[0] for group in groups for batch in group])

    def _load(self) -> Loader:
        return Loader(self.dataset, self._config, self._ranks.device, training=True)

    def sources(self, group: Group) -> list[str]:
        """The files of the step's source photos, and of those that were mixed into them."""
        indices = [index for batch in group for index in batch]
        mixed = [found[0] for index in indices if (found := self.dataset.mixed(index))]
        return [str(self.dataset.pairs[index].src) for index in (*indices, *mixed)]

    @contextmanager
    def workers(self) -> Iterator[None]:
        """The workers end with this block, also where it fails. Nothing can be read after it."""
        try:
            yield
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # a frame holds the iterator, which holds its workers
            raise
        finally:
            del self._loader
