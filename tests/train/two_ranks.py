"""What test_distributed.py lets two processes do, one after the other: `torchrun --nproc-per-node 2 two_ranks.py CONFIG OUT`.

Each process leaves OUT/rank_R.json with what it saw.
"""

import errno
import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from autohdr.errors import UserError
from autohdr.train import loop, record
from autohdr.train.config import load_config
from autohdr.train.distributed import Ranks, local
from autohdr.train.objective import Objective
from autohdr.train.step import Step

STAGES = [{"epochs": 2}, {"epochs": 2, "size": 24, "batch_size": 1}]
ADVERSARIAL = {"l1": 1.0, "adversarial": 0.01}
SHARDED = {"parallel": "fsdp", "sharded_states": True}
TUNED = {"freeze": ["encoder*"], "lr_groups": {"output*": 0.5}, "stages": STAGES, "epochs": 4}
RANK = int(os.environ.get("RANK", 0))
make_step, predict = Step.__call__, Objective.predict


def in_steps(numbers, rank, action, changed=None):
    """Before those optimiser steps, counted from 1, that process does `action(learner)`, and after it what this returns.

    changed: gets, for each step, whether it changed this process's weights, moments or average.
    """

    def patched(self, *args, step, **others):
        undo = action(self.learner) if step + 1 in numbers and rank == RANK else None
        before = [tensor.clone() for tensor in self.learner.tensors()]
        try:
            return make_step(self, *args, step=step, **others)
        finally:
            if undo:
                undo()
            if changed is not None:
                after = self.learner.tensors()
                changed.append(len(before) != len(after) or not all(map(torch.equal, before, after)))

    return mock.patch.object(Step, "__call__", patched)


def spoil(name, value):
    """That weight's gradient holds `value` in every place of this process's part: its batch's, or its shard's."""

    def action(learner):
        weight = learner.model.get_parameter(name)
        if isinstance(weight, DTensor):
            return weight.register_post_accumulate_grad_hook(lambda weight: local(weight.grad).fill_(value)).remove
        return weight.register_hook(lambda gradient: torch.full_like(gradient, value)).remove

    return action


def brighten(learner):
    """Its sources are 100 times as bright."""
    brighter = mock.patch.object(
        Objective, "predict", lambda self, network, source, *args: predict(self, network, source * 100, *args)
    )
    brighter.start()
    return brighter.stop


def full_disk(saves, rank):
    """That process finds the disk full in those saves, counted from 1."""
    write, count = HuggingFaceStorageWriter.write_data, iter(range(1, sys.maxsize))

    def patched(self, *args):
        if next(count) in saves and rank == RANK:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, *args)

    return mock.patch.object(HuggingFaceStorageWriter, "write_data", patched)


def main(config, out):
    base, seen, runs, prepare = load_config(config), {}, [], loop.prepare

    def run(name, resume=False, **changes):
        with mock.patch.object(loop, "prepare", lambda *args, **others: runs.append(prepare(*args, **others)) or runs[-1]):
            summary = loop.train(replace(base, out=Path(out) / name, **changes), resume=resume)
        model, adversary = runs[-1].learner.model, runs[-1].learner.adversary
        weights = [weight.full_tensor() if isinstance(weight, DTensor) else weight for weight in model.parameters()]
        seen[name] = {"interrupted": summary.interrupted, "val_psnr": summary.best.get("val_psnr")}
        weights += adversary.tensors() if adversary else []
        seen[name]["weights"] = sum(weight.double().sum().item() for weight in weights)

    for parallel in ("ddp", "fsdp"):
        run(parallel, parallel=parallel)
        run(f"{parallel} accumulating", parallel=parallel, batch_size=1, accumulate=2)
        run(f"{parallel} tuned", parallel=parallel, branch=Path(out) / parallel, **TUNED)
        run(f"{parallel} adversarial", parallel=parallel, losses=ADVERSARIAL)
        teacher = Path(out) / parallel / "checkpoint_last.safetensors"
        run(f"{parallel} taught", parallel=parallel, teacher=teacher, teacher_features_weight=0.5)
        with in_steps({3}, 1, lambda learner: signal.raise_signal(signal.SIGTERM)):
            run(f"{parallel} stopped", parallel=parallel)
        # What one process left in step 3 goes on in two.
        run(f"one to two {parallel}", resume=True, parallel=parallel)
        with in_steps({3}, 1, spoil("output.weight", float("nan"))):
            run(f"{parallel} not finite", parallel=parallel)
        with in_steps({7, 8}, 1, brighten):
            run(f"{parallel} spike", parallel=parallel, spike_window=4, snapshot_every=4, epochs=4)

    run("sharded", **SHARDED)
    run("sharded tuned", branch=Path(out) / "sharded", **TUNED, **SHARDED)
    with in_steps({3}, 1, lambda learner: signal.raise_signal(signal.SIGTERM)):
        run("sharded stopped", **SHARDED)
    if RANK == 0:
        shutil.copytree(Path(out) / "sharded stopped", Path(out) / "sharded parts")
    torch.distributed.barrier()
    run("sharded parts", resume=True, **SHARDED)
    run("one to two sharded", resume=True, **SHARDED)
    with full_disk({2}, 1):
        run("sharded unsaved", save_every=1, **SHARDED)

    changed = seen["changed in float16"] = []
    # After unscale_, where each process looks at its own part of the gradient: the verdict has to be one.
    with in_steps({2}, 1, spoil("output.weight", float("inf")), changed):
        run("fsdp float16", parallel="fsdp", precision="float16")

    reductions = seen["reductions"] = []

    def wrap(ranks, network, *args):
        wrapped = original(ranks, network, *args)
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.register_comm_hook(None, lambda state, bucket: reductions.append(bucket.is_last()) or sum_up(ranks, bucket))
        return wrapped

    def sum_up(ranks, bucket):
        work = torch.distributed.all_reduce(bucket.buffer().div_(ranks.count), group=ranks.group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    original = Ranks.wrap
    with mock.patch.object(Ranks, "wrap", wrap):
        run("counted", batch_size=1, accumulate=2)

    try:
        run("refused", train_pairs=Path(out) / "bad.jsonl")
    except UserError as error:
        seen["refused"] = str(error)
    (Path(out) / f"rank_{RANK}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    record.draw_curve = lambda path, history: path.touch()  # as in runs.py
    main(*sys.argv[1:])
