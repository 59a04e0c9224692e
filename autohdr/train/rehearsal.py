"""A rehearsal (--dry-run): what time and memory a run would take, measured on two steps. Nothing is written."""

from dataclasses import replace

from autohdr.measure import Measurement, format_bytes, free_bytes, measure
from autohdr.plan import plan
from autohdr.train.config import TrainConfig
from autohdr.train.guards import TrainingError
from autohdr.train.run import Run, prepare


def rehearse(config: TrainConfig) -> str:
    """Check and build a run, make two steps, validate one pair a process, and return what the whole run would take, as text.

    Raises UserError as train does, and TrainingError where a step's loss or gradient is not finite.
    """
    run = prepare(replace(config, cache_gb=0, adversarial_start=1))
    with run.batches.workers():
        steps, waits = _two_steps(run)
        with measure(run.ranks.device) as validation:
            run.validation(run.ranks.count)
    rows = run.ranks.gather_floats(*(measured.peak_bytes for measured in (*steps, validation)))
    memory = f"{format_bytes(int(max(map(max, rows))))} at most in a process ({steps[1].memory_source})"
    turns, each = run.validation.turns, run.batches.steps_per_epoch
    epoch = each * steps[1].seconds + turns * validation.seconds
    return "\n".join(
        (
            run.describe(),
            f"memory     {memory}, {format_bytes(free_bytes(run.ranks.device))} still free",
            f"planned    {_planned(run)}; Python, PyTorch, other losses than L1 and the state to go back to come on top",
            f"a step     {steps[1].seconds:.3g} s, {waits[1]:.2g} s of it for data; the first {steps[0].seconds:.3g} s",
            f"an epoch   {_duration(epoch)}: {each} steps, {turns} validations of {validation.seconds:.2g} s",
            f"the run    {_duration(config.epochs * epoch)}: {config.epochs} epochs",
            "nothing was written",
        )
    )


def _two_steps(run: Run) -> tuple[list[Measurement], list[float]]:
    """What each step took, and the seconds that it waited for data. Their learning rate is 0."""
    groups = run.batches.groups(0)
    groups = ((groups[:-1] or groups) * 2)[:2]  # an epoch's last step may be smaller
    batches, steps, waits = run.batches.read(groups, 0), [], []
    for number, group in enumerate(groups):
        with measure(run.ranks.device) as measured:
            result = run.step(group, batches, epoch=0, step=number, lr=0.0)
        if result.fault:
            raise TrainingError(
                f"step {number + 1} (epoch 1): {result.fault.cause}. Its sources: {', '.join(run.batches.sources(group))}"
            )
        steps.append(measured)
        waits.append(result.waited)
    return steps, waits


def _planned(run: Run) -> object:
    config, precision = run.config, str(run.learner.precision).removeprefix("torch.")
    settings = {"accumulate": config.accumulate, "averaged": config.ema > 0, "recompute": config.recompute}
    return plan(run.learner.model, config.size, config.batch_size, precision, "training", run.ranks.device, **settings)


def _duration(seconds: float) -> str:
    unit, size = next((unit, size) for unit, size in (("h", 3600), ("min", 60), ("s", 0)) if seconds >= 2 * size)
    return f"{seconds / (size or 1):.3g} {unit}"
