"""The parts of a run, checked and built, for training and its rehearsal. Nothing is written."""

from dataclasses import dataclass

from autohdr.measure import pick_device
from autohdr.train.batches import Batches
from autohdr.train.checks import check_config, check_folder, checked_pairs
from autohdr.train.config import Resume, TrainConfig
from autohdr.train.distributed import Ranks, join
from autohdr.train.learner import Learner
from autohdr.train.schedule import Schedule
from autohdr.train.step import Step
from autohdr.train.validation import Validation


@dataclass(frozen=True)
class Run:
    """The parts of a run. Each knows only those before it."""

    config: TrainConfig
    resumes: bool
    """Whether it goes on from a state in its folder, which is not loaded yet."""
    ranks: Ranks
    learner: Learner
    schedule: Schedule
    batches: Batches
    step: Step
    validation: Validation

    def describe(self, step: int = 0) -> str:
        """One line for the terminal: model, device, pairs, and `step`, the steps behind the run."""
        ranks, weights = self.ranks, list(self.learner.model.parameters())
        count, trained = sum(w.numel() for w in weights), sum(w.numel() for w in weights if w.requires_grad)
        frozen = f", {trained:,} of them trained" if trained < count else ""
        processes = f" in {ranks.count} processes ({self.config.parallel})" if ranks.count > 1 else ""
        return (
            f"{self.config.model}, {count:,} parameters{frozen}, {ranks.device}{processes}; {len(self.batches.dataset)} pairs to "
            f"train on, {len(self.validation.dataset)} to validate; step {step} of {self.schedule.steps}; {self.config.out}"
        )


def prepare(config: TrainConfig, *, resume: Resume = False) -> Run:
    """Check settings, folder and pairs, and build the parts of a run as at its start. Raises UserError as these do."""
    check_config(config, resume)
    ranks = join(pick_device(config.device), config.rank_timeout)
    resumes = ranks.first(check_folder, config, resume)
    train_pairs, val_pairs = ranks.first(checked_pairs, config)
    learner = Learner(config, ranks, fresh=not resumes and not config.branch)
    schedule, validation = Schedule(config, len(train_pairs), ranks.count), Validation(config, learner, ranks, val_pairs)
    batches = Batches(config, train_pairs, ranks, schedule)
    assert config.out  # check_config refuses None
    cache, room = config.out / "cache", config.cache_gb * 1e9
    taken = max(dataset.keep_decoded(cache, room) for dataset in batches.datasets)  # a stage gives its room to the next
    validation.dataset.keep_decoded(cache, room - taken)
    return Run(config, resumes, ranks, learner, schedule, batches, Step(config, learner, ranks), validation)
