"""A rehearsal (--dry-run): what time and memory a run would take, measured on two steps of each stage. No run is begun."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from autohdr.errors import UserError
from autohdr.measure import Measurement, format_bytes, free_bytes, measure
from autohdr.plan import Plan, plan
from autohdr.train import record
from autohdr.train.config import TrainConfig
from autohdr.train.guards import TrainingError
from autohdr.train.run import Run, prepare

SHOWN = 4
"""Pairs of each stage that a sheet shows, each in two epochs."""


def rehearse(config: TrainConfig, show: Path | None = None) -> str:
    """Check and build a run, make two steps a stage, validate one pair a process, and return as text what the run would take.

    show: JPEG file for a sheet of pairs as the network will see them: a row each, with source and target in the first epoch of
    the stage and in the next. Memory is the most that any stage takes. Raises UserError as train does, and TrainingError where a
    step's loss or gradient is not finite.
    """
    if show and show.suffix.lower() not in (".jpg", ".jpeg"):
        raise UserError(f"--show: expected a file .jpg or .jpeg, got {str(show)!r}")
    run = prepare(replace(config, cache_gb=0, adversarial_start=1))
    schedule, lines, measured, total = run.schedule, [], [], 0.0
    with run.batches.workers():
        stages = [_two_steps(run, schedule.first(number)) for number in range(len(schedule.stages))]
        with measure(run.ranks.device) as validation:
            run.validation(run.ranks.count)
    turns = run.validation.turns
    for number, (steps, waits) in enumerate(stages):
        first, measured = schedule.first(number), [*measured, *steps]
        each, epochs = schedule.epoch_steps(first), schedule.stages[number].epochs
        epoch = each * steps[1].seconds + turns * validation.seconds
        total += epochs * epoch
        if config.stages:
            lines.append(f"stage {number + 1}    {schedule.describe(number)}")
        lines += [
            f"a step     {steps[1].seconds:.3g} s, {waits[1]:.2g} s of it for data; the first {steps[0].seconds:.3g} s",
            f"an epoch   {_duration(epoch)}: {each} steps, {turns} validations of {validation.seconds:.2g} s",
        ]
    if show and run.ranks.rank == 0:
        record.write_sheet(show, [row for number in range(len(stages)) for row in _rows(run, number)])
    rows = run.ranks.gather_floats(*(measurement.peak_bytes for measurement in (*measured, validation)))
    memory = f"{format_bytes(int(max(map(max, rows))))} at most in a process ({measured[1].memory_source})"
    return "\n".join(
        (
            run.describe(),
            f"memory     {memory}, {format_bytes(free_bytes(run.ranks.device))} still free",
            f"planned    {_planned(run)}; Python, PyTorch, other losses than L1 and the state to go back to come on top",
            *lines,
            f"the run    {_duration(total)}: {config.epochs} epochs",
            f"written    {show}, and nothing else" if show else "nothing was written",
        )
    )


def _rows(run: Run, stage: int) -> list[list[Tensor]]:
    """The sheet's rows of a stage: its first step's pairs, and so on."""
    dataset, first = run.batches.datasets[stage], run.schedule.first(stage)
    indices = [index for group in run.batches.groups(first) for batch in group for index in batch][:SHOWN]
    rows: list[list[Tensor]] = [[] for _ in indices]
    for epoch in range(first, first + min(2, run.schedule.stages[stage].epochs)):
        dataset.set_epoch(epoch)
        for row, index in zip(rows, indices, strict=True):
            sample = dataset[index]
            row += sample["src"], sample["tar"]
    return rows


def _two_steps(run: Run, epoch: int) -> tuple[list[Measurement], list[float]]:
    """What each step took, and the seconds that it waited for data. Their learning rate is 0."""
    groups = run.batches.groups(epoch)
    groups = ((groups[:-1] or groups) * 2)[:2]  # an epoch's last step may be smaller
    batches, steps, waits = run.batches.read(groups, epoch), [], []
    for number, group in enumerate(groups):
        with measure(run.ranks.device) as measured:
            result = run.step(group, batches, epoch=epoch, step=number, lr=0.0)
        if result.fault:
            sources = ", ".join(run.batches.sources(group))
            raise TrainingError(f"step {number + 1} (epoch {epoch + 1}): {result.fault.cause}. Its sources: {sources}")
        steps.append(measured)
        waits.append(result.waited)
    return steps, waits


def _planned(run: Run) -> Plan:
    """The plan of the stage that takes the most."""
    device, precision = run.ranks.device, str(run.learner.precision).removeprefix("torch.")
    plans = []
    for config in run.schedule.stages:
        settings = {"accumulate": config.accumulate, "averaged": config.ema > 0, "recompute": config.recompute}
        plans.append(plan(run.learner.model, config.size, config.batch_size, precision, "training", device, **settings))
    return max(plans, key=lambda found: found.peak_bytes)


def _duration(seconds: float) -> str:
    unit, size = next((unit, size) for unit, size in (("h", 3600), ("min", 60), ("s", 0)) if seconds >= 2 * size)
    return f"{seconds / (size or 1):.3g} {unit}"
