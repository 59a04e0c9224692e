"""The sharded tensors of a training state on disk: a folder into which every process writes its own part of them.

torch.distributed.checkpoint writes and reads it, as safetensors files that say which part of a tensor each holds: what any number
of processes wrote any other number reads. No code runs from it.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from autohdr.errors import UserError
from autohdr.files import sha256
from autohdr.train.distributed import together

FILE = 1 << 30
"""Bytes of whole tensors whose parts share a file: while it is written, what it holds is in memory twice."""


def split(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, DTensor]]:
    """(the tree without its sharded tensors, those by their way into it: "optimizer/state/output.weight/exp_avg")."""
    rest, sharded = {}, {}
    for key, value in tree.items():
        if isinstance(value, DTensor):
            sharded[key] = value
        elif isinstance(value, dict):
            rest[key], below = split(value)
            sharded |= {f"{key}/{way}": tensor for way, tensor in below.items()}
        else:
            rest[key] = value
    return rest, sharded


def merge(tree: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put tensors back into a tree that `split` took them from."""
    for way, tensor in tensors.items():
        *keys, last = way.split("/")
        node = tree
        for key in keys:
            node = node[key]
        node[last] = tensor


def write(folder: Path, sharded: Mapping[str, DTensor], group: Any) -> dict[str, str]:
    """Write the tensors, on the CPU, into a new folder. All processes of the group call this, each with its own parts.

    Returns {name of a file: SHA-256}, of all processes; the files are on the disk by then. Raises OSError, in all, where one of
    them cannot write.
    """
    numbers, size = {}, 0
    for way, tensor in sharded.items():
        numbers[way] = 1 + size // FILE
        size += tensor.numel() * tensor.itemsize
    try:
        writer = HuggingFaceStorageWriter(str(folder), numbers, save_distributed=True)
        save(dict(sharded), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, OSError):
                raise OSError(failure.errno, failure.strerror, str(folder)) from None
        raise RuntimeError(str(error)) from None  # as it is no Exception
    own = f"shard-{dist.get_rank(group) + 1:05d}-*"
    parts = together(lambda: {file.name: sha256(file) for file in folder.glob(own)}, group)
    return {name: digest for part in parts for name, digest in part.items()}


def read(folder: Path, files: Mapping[str, str], like: Mapping[str, DTensor], check: bool = True) -> dict[str, Tensor]:
    """What `write` wrote: whole, on the CPU; or of a parameter in `like` this process's part, as and where the parameter's is.

    files: what `write` returned. check: compare the digests. Raises UserError where a file is missing, damaged or too many.
    """
    there = {file.name for file in folder.glob("*")}
    for name in sorted(there ^ files.keys()):
        raise UserError(f"{folder / name}: {'missing' if name in files else 'not'} in the training state")
    for name, digest in files.items() if check else ():
        if sha256(folder / name) != digest:
            raise UserError(f"{folder / name}: damaged: its SHA-256 does not match")
    reader, tensors = HuggingFaceStorageReader(str(folder)), {}
    entries: dict[str, Any] = reader.read_metadata().state_dict_metadata
    for way, entry in entries.items():
        dtype = entry.properties.dtype
        parameter = next((like[key] for key in way.split("/") if key in like), None)
        tensors[way] = torch.empty(entry.size, dtype=dtype) if parameter is None else torch.empty_like(parameter, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each process reads by itself
        load(tensors, storage_reader=reader, no_dist=True)
    return tensors
