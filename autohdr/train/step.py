"""One optimiser step: gradients, the verdict on them, and the change of the weights."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from autohdr.train.batches import Group
from autohdr.train.config import TrainConfig
from autohdr.train.distributed import Ranks
from autohdr.train.guards import Fault, Return, not_finite
from autohdr.train.learner import Learner
from autohdr.train.losses import Criterion
from autohdr.train.teacher import feature_loss, outputs


@dataclass(frozen=True)
class StepResult:
    """What a step found. All but `waited` is the same on all processes."""

    losses: dict[str, float]
    """Means over the step's pairs: the whole loss first, as "loss", then its components."""
    norm: float
    """L2 norm of the whole gradient before clipping. Not finite without a fault: float16 overflowed, and no weight changed."""
    fault: Fault | None
    """Why the step was left out; None: it was not."""
    returned: Return | None
    """Set where the step before was left out too: then the guard has gone back to a good state."""
    adversary_fault: str | None
    """Why the discriminator's step was left out, though the network's was made; None: it was not, or there is none."""
    waited: float
    """Seconds that this process waited for its pairs."""


class Step:
    """Makes one AdamW step over the batches of a group. It changes the learner, and nothing else.

    A step whose loss or gradient is bad is left out: it changes no weight, the discriminator's neither. The second in a row puts
    back what the guard kept.
    """

    def __init__(self, config: TrainConfig, learner: Learner, ranks: Ranks):
        """Raises UserError as Criterion does."""
        self.learner, self._config, self._ranks = learner, config, ranks
        self._criterion = Criterion(config, ranks.device)

    def __call__(self, group: Group, batches: Iterator[tuple[Tensor, Tensor]], *, epoch: int, step: int, lr: float) -> StepResult:
        """batches: yields this process's part of each batch of the group. epoch, step: counted from 0."""
        learner, optimizer, scaler = self.learner, self.learner.optimizer, self.learner.scaler
        for parameters in optimizer.param_groups:
            parameters["lr"] = lr * parameters.get("lr_factor", 1.0)
        optimizer.zero_grad()
        if learner.adversary:
            learner.adversary.forget()
        means, waited = self._accumulate(group, batches, epoch)
        scaler.unscale_(optimizer)
        parameters = list(learner.model.parameters())
        length = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        length = length.full_tensor() if isinstance(length, DTensor) else length
        rows = self._ranks.gather_floats(length.item(), *torch.stack(list(means.values())).tolist())
        (norm, *_), *parts = zip(*rows, strict=True)
        losses = {name: float(sum(part)) for name, part in zip(means, parts, strict=True)}
        # float16: an infinite gradient means that the loss scale is too large. At scale 1 it means what it does in float32.
        overflow = math.isfinite(losses["loss"]) and not math.isfinite(norm) and scaler.get_scale() > 1
        if not overflow:
            if fault := self._fault(losses["loss"], norm):
                scaler.update(scaler.get_scale())  # the scaler wants every step ended; its scale stays
                return StepResult(losses, norm, fault, learner.guard.failed(), None, waited)
            learner.guard.passed(step, losses["loss"])
        torch.nn.utils.clip_grads_with_norm_(parameters, self._config.clip or math.inf, length)
        scaler.step(optimizer)  # float16: changes nothing where the gradient is not finite
        scaler.update()
        if not overflow:
            learner.average.update()
        adversary_fault = None
        if learner.adversary and not overflow:
            adversary_fault = learner.adversary.step(losses["discriminator"], self._ranks)
        return StepResult(losses, norm, None, None, adversary_fault, waited)

    def _accumulate(self, group: Group, batches: Iterator[tuple[Tensor, Tensor]], epoch: int) -> tuple[dict[str, Tensor], float]:
        """Add up the gradient of the group's mean loss. Returns this process's share of the mean losses, and seconds waited."""
        learner, samples, means, waited = self.learner, sum(map(len, group)), {}, 0.0
        for number, batch in enumerate(group, 1):
            indices, counted = self._ranks.part(batch)
            started = time.perf_counter()
            source, target = next(batches)
            waited += time.perf_counter() - started
            share = counted / samples  # every sample weighs the same, also in a smaller last batch
            with self._ranks.exchanging(learner.network, last=number == len(group)):
                with learner.autocast(), outputs(learner.guided) as features:
                    said, wanted = learner.objective.predict(learner.network, source, target, epoch, indices)
                loss, components = self._criterion(said, wanted)
                if learner.teacher:
                    with learner.autocast():
                        taught, hints = learner.teacher(source)
                    term, _ = self._criterion(said, taught)
                    loss, components = loss + self._config.teacher_weight * term, components | {"teacher": term.detach()}
                    if hints:
                        term = feature_loss(features, hints)
                        loss = loss + self._config.teacher_features_weight * term
                        components = components | {"teacher_features": term.detach()}
                if learner.adversary:
                    term, more = learner.adversary.judge(said, wanted, epoch, share)
                    loss, components = loss + term, components | more
                # times the number of processes, as the exchange averages their gradients
                learner.scaler.scale(loss * (share * self._ranks.count)).backward()
            for name, value in ({"loss": loss.detach()} | components).items():
                means[name] = means.get(name, 0.0) + share * value
        return means, waited

    def _fault(self, loss: float, norm: float) -> Fault | None:
        """What is wrong with the step. All processes call this, and find the same."""
        guard, numbers = self.learner.guard, f"(loss {loss}, gradient norm {norm})"
        if not math.isfinite(loss):
            return Fault("a loss that is not finite", f"the loss is not finite {numbers}", ["loss"])
        if not math.isfinite(norm):
            found = {name for names in self._ranks.gather(not_finite(self.learner.model)) for name in names}
            names = [name for name, _ in self.learner.model.named_parameters() if name in found]
            where = f"in {len(names)} parameters, first {names[0]}" if names else "in its norm alone, which is too large"
            return Fault("a gradient that is not finite", f"the gradient is not finite {where} {numbers}", names)
        if loss > (limit := guard.limit()):
            return Fault("a spike", f"the loss {loss:.4g} is a spike, above {limit:.4g}")
        return None
