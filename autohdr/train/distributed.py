"""The processes of a run: how they divide the work, and how they exchange values.

torchrun starts them, and tells each in its environment how many there are and which one it is. Without torchrun there is one.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from autohdr.errors import UserError
from autohdr.models.network import Network

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. Every method but `part` is called by all of them at the same point."""

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")
    group: Any = None
    """The group that gradients and weights travel through: gloo or NCCL, with the run's timeout. Plain values travel through the
    default group, gloo, which waits for days: a validation or a check of all photos takes long."""

    def part(self, batch: list[T]) -> tuple[list[T], int]:
        """This process's share of a batch, and how many of its samples count.

        Where a batch has fewer samples than there are processes, some process works on a sample that counts 0 times: each has
        to take part in the exchange of gradients.
        """
        start, end = (len(batch) * rank // self.count for rank in (self.rank, self.rank + 1))
        return batch[start:end] or batch[:1], end - start

    def first(self, function: Callable[..., T], *args: Any) -> T:
        """Run `function` on the first process only, and return its result on all. If it raises UserError, all raise one."""
        if self.count == 1:
            return function(*args)
        answer, error = [None, False], None
        if self.rank == 0:
            try:
                answer[0] = function(*args)
            except UserError as raised:
                answer[1], error = True, raised
        dist.broadcast_object_list(answer)
        if answer[1]:
            raise error or UserError("process 0 has found wrong input, see there")
        return answer[0]

    def each(self, function: Callable[..., T], *args: Any) -> T:
        """Run `function` on the first process, then on the others, and return to each its own result, which is not sent. If it
        raises UserError on the first, all raise one."""
        results: list[T] = []
        self.first(lambda: results.append(function(*args)))
        return results[0] if results else function(*args)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def gather_floats(self, *values: float) -> list[list[float]]:
        """As gather, for a few numbers (float64); fast enough for every step."""
        if self.count == 1:
            return [list(values)]
        rows = torch.empty(self.count, len(values), dtype=torch.float64)
        dist.all_gather(list(rows), torch.tensor(values, dtype=torch.float64))
        return rows.tolist()

    def add_up(self, tensors: list[Tensor]) -> None:
        """Sum each tensor over the processes, in place, in one exchange. Every process has the same shapes."""
        if self.count == 1:
            return
        whole = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(whole, group=self.group)
        for tensor, part in zip(tensors, whole.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def wrap(self, network: Network, parallel: str, precision: torch.dtype) -> nn.Module:
        """The network as a training step calls it. FSDP2 shards `network` itself, in place: each of its units, and the rest."""
        if self.count == 1:
            return network
        if parallel == "fsdp":
            shard = partial(fully_shard, mesh=DeviceMesh.from_group(self.group, self.device.type), reshard_after_forward=True)
            for module in network.modules():
                if (half := network.shard_units.get(type(module))) is not None:
                    shard(module, mp_policy=_policy(precision if half and precision is not torch.float32 else None))
            # Not FSDP2's default for the root: it would keep the weights that validation gathered, the average's for one, and the
            # next step would compute with them.
            shard(network, mp_policy=_policy(None))
            return network
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(network, devices, process_group=self.group, gradient_as_bucket_view=True)

    def exchanging(self, network: nn.Module, last: bool) -> AbstractContextManager:
        """The context of a forward and backward pass. The processes sum their gradients only after the last pass of a step."""
        if isinstance(network, DistributedDataParallel):
            return nullcontext() if last else network.no_sync()
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(last)
        return nullcontext()


def _policy(dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    """Gather weights in that dtype (None: their own) and sum gradients in float32; leave activations to autocast."""
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def join(device: torch.device, timeout: float) -> Ranks:
    """Meet the other processes that torchrun started. timeout: seconds to wait for another process's gradients or weights.

    Each process of a node takes the GPU of its local rank. Raises UserError where `device` names one GPU, or where a node has
    fewer GPUs than processes.
    """
    if not dist.is_torchelastic_launched():
        return Ranks(device=device)
    if device.type == "cuda":
        index, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if device.index is not None:
            raise UserError(f"device: expected auto or cuda, as torchrun's processes share out the GPUs; got {str(device)!r}")
        if index >= there:
            raise UserError(f"torchrun: expected at most {there} processes on this node, one a GPU; got one more")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    group = _group("nccl" if device.type == "cuda" else "gloo", timeout)
    return Ranks(dist.get_rank(), dist.get_world_size(), device, group)


@cache  # a process's second run uses the first one's group: torchrun's store and DTensor's caches would confuse two
def _group(backend: str, timeout: float) -> Any:
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # the default is half an hour
    return dist.new_group(backend=backend, timeout=timedelta(seconds=timeout))


@cache
def writers() -> Any:
    """A group of all processes for their threads that write beside training: gloo, which waits for days. All call this at the
    same point."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


def together(job: Callable[[], T], group: Any) -> list[T]:
    """What `job()` returned in each process of the group. Where it raised OSError in one, all raise it."""
    try:
        outcome = job()
    except OSError as error:
        outcome = error
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, outcome, group)
    for failure in outcomes:
        if isinstance(failure, OSError):
            raise failure
    return outcomes


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, or any other tensor whole. It shares the memory, and has no gradient."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
