"""Validation: how well the weights edit pairs that they are not trained on."""

import math

import torch

from autohdr import metrics
from autohdr.data.pairs import Pair, PairDataset
from autohdr.train.batches import Loader
from autohdr.train.config import TrainConfig
from autohdr.train.distributed import Ranks
from autohdr.train.learner import Learner
from autohdr.train.record import Triptych

_METRICS = ("l1", "psnr", "ssim")


class Validation:
    """Measures a learner, by the average of its weights where there is one. The processes take turns; each pair counts once."""

    def __init__(self, config: TrainConfig, learner: Learner, ranks: Ranks, pairs: list[Pair]):
        self.dataset = PairDataset(pairs, config.size, config.resize)
        self.turns = math.ceil(len(pairs) / ranks.count)
        """Pairs that each process works on."""
        self._learner, self._ranks, self._samples = learner, ranks, config.samples
        self._loader = Loader(self.dataset, config, ranks.device)

    @torch.no_grad()  # not inference_mode: FSDP2 would gather weights that no later step can differentiate
    def __call__(self, pairs: int | None = None) -> tuple[dict[str, float], list[Triptych]]:
        """({val_METRIC: mean}, triptychs) over all pairs, or the first `pairs` of them.

        The triptychs are of the first config.samples pairs. One pair is measured at a time, so that each weighs the same. In the
        last round a process without a pair works on the last one again, which does not count.
        """
        model = self._learner.objective.photographer(self._learner.model).eval()
        pairs = min(pairs or len(self.dataset), len(self.dataset))
        turns = range(self._ranks.rank, self._ranks.rank + pairs, self._ranks.count)
        scores, triptychs = {}, {}
        loader = self._loader([[min(turn, pairs - 1)] for turn in turns])
        with self._learner.average.applied():
            for index, (source, target) in zip(turns, loader, strict=True):
                with self._learner.autocast():
                    output = model(source).float().clamp(0, 1)
                if index < pairs:
                    scores[index] = [getattr(metrics, name)(output, target).item() for name in _METRICS]
                if index < min(self._samples, pairs):
                    triptychs[index] = (source[0].cpu(), output[0].cpu(), target[0].cpu())
        for others, shown in self._ranks.gather((scores, triptychs)):
            scores, triptychs = scores | others, triptychs | shown
        columns = zip(*(scores[index] for index in sorted(scores)), strict=True)
        means = {f"val_{name}": math.fsum(column) / len(scores) for name, column in zip(_METRICS, columns, strict=True)}
        return means, [triptychs[index] for index in sorted(triptychs)]
