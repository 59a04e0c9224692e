"""Files of weights as mappings of tensors: safetensors, and PyTorch's pickles, of which nothing is run."""

import json
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor, nn

from autohdr.errors import UserError

HEADER = "autohdr"
"""The safetensors header key of our own files; JSON {"model": name, "overrides": {...}, "metadata": {...}}."""

NO_WEIGHTS = re.compile(r"optim|momentum|exp_avg", re.IGNORECASE)
"""Places of an optimiser's state, which can have the weights' names and shapes."""

PLAIN_DATA = re.compile(
    r"(?:addict|argparse|box|collections|datetime|decimal|easydict|enum|functools|lightning|lightning_fabric|ml_collections"
    r"|mmengine|munch|numpy|omegaconf|pathlib|pytorch_lightning|types|typing|uuid|yacs)\..*"
    r"|builtins\.(?:bool|bytes|dict|float|frozenset|int|list|object|range|slice|str|tuple)"
)
"""Names in a pickle that are read as stand-ins: settings, paths, dates and arrays that trainers save beside the weights."""

UNREADABLE = (
    (
        r"GLOBAL (?!torch\.distributed)(\S+)",
        "needs {}, which is neither a tensor nor plain data; loading it could run foreign code. "
        "Where you trust the file, save the weights alone: torch.save(model.state_dict(), path)",
    ),
    (
        r"torch\.distributed",
        "holds tensors that are spread over processes; save the whole ones, "
        "by torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True",
    ),
    (r"TorchScript", "is a TorchScript archive; expected weights: torch.save(scripted.state_dict(), path)"),
    (r"Unsupported operand", "is damaged, or of another pickle protocol than torch.save's own, the only one that is read"),
)
"""What PyTorch's reader says of a file, and what we say."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass
class WeightFile:
    """What a file says."""

    path: Path
    mappings: list[tuple[str, dict[str, Any]]]
    """Each mapping that holds tensors, after its place: the keys to it, joined by dots."""
    metadata: dict[str, Any]
    model: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)


def read(path: Path) -> WeightFile:
    """Reads safetensors, and what torch.save wrote in either of its formats. Raises UserError for anything else."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except (OSError, ValueError) as error:  # ValueError: no name that a file can have
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    # safetensors: eight bytes of length, then JSON. PyTorch: a zip archive, or before 1.6 a bare pickle.
    if start[8:] == b"{":
        return _read_safetensors(path)
    if start.startswith((b"PK", b"\x80")):
        return _read_pickle(path)
    raise UserError(f"{path}: is no checkpoint: expected safetensors or a PyTorch file")


class _Ignored:
    """Stands for a pickled object that is no weights: made of anything, does nothing, keeps nothing."""

    def __new__(cls, *args: Any) -> "_Ignored":
        return super().__new__(cls)

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _no_items(*args: Any) -> list[Any]:
    return []


class _Dict:
    """Stands for a subclass of dict, whose items may be weights. PyTorch's reader adds items to dict and OrderedDict alone."""

    def __new__(cls, *args: Any) -> OrderedDict:
        return OrderedDict()


def _stand_in(name: str) -> Any:
    """What a name in a pickle is read as: nothing that it names is ever imported."""
    last = name.rpartition(".")[2]
    if last == "deque":
        return _no_items
    return _Dict if last.lower().endswith("dict") or last in ("CfgNode", "Box", "Munch") else _Ignored


def _numpy_scalars() -> list[tuple[Any, str]]:
    """For torch.serialization.safe_globals: what a number of numpy 1 or 2 is pickled by."""
    scalar = np.float64().__reduce__()[0]
    kinds = {np.dtype} | {type(np.dtype(code)) for code in np.typecodes["All"]}
    scalars = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return scalars + [(kind, f"{kind.__module__}.{kind.__name__}") for kind in kinds]


def _read_safetensors(path: Path) -> WeightFile:
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            header = (file.metadata() or {}).get(HEADER)
    except Exception as error:  # a damaged file can fail in any way
        raise UserError(f"{path}: is damaged, truncated or no safetensors file that this version reads") from error
    if header is None:
        return WeightFile(path, [("", tensors)], {})
    try:
        header = json.loads(header)
        model, overrides, metadata = (header[key] for key in ("model", "overrides", "metadata"))
        whole = isinstance(model, str) and isinstance(overrides, dict) and isinstance(metadata, dict)
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise UserError(
            f'{path}: its {HEADER!r} header is damaged: expected {{"model": "...", "overrides": {{}}, "metadata": {{}}}}'
        )
    return WeightFile(path, [("", tensors)], metadata, model, overrides)


def _read_pickle(path: Path) -> WeightFile:
    content = _unpickle(path)
    everything = list(_walk(content))
    mappings = [(place, values) for place, values in everything if any(isinstance(v, Tensor) for v in values.values())]
    metadata: dict[str, Any] = {}
    for place, values in everything:
        if any(not place or f"{inner}.".startswith(f"{place}.") for inner, _ in mappings):
            metadata |= _plain(values)
    if not mappings:
        got = some(content) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path}: expected a state dict, plain or in other mappings, got {got}")
    return WeightFile(path, mappings, metadata)


def _unpickle(path: Path) -> Any:
    allowed: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [*_numpy_scalars()]
    while True:
        try:
            # As a file: by a path that ends in .safetensors, torch.load expects that format.
            with open(path, "rb") as file, torch.serialization.safe_globals(allowed), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of TorchScript and protocols, which we refuse
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle can fail in any way
            if (name := _plain_data(str(error))) and (stand_in := (_stand_in(name), name)) not in allowed:
                allowed.append(stand_in)
                continue
            found = ((re.search(pattern, str(error)), text) for pattern, text in UNREADABLE)
            default = "is damaged, truncated or no PyTorch checkpoint"
            reason = next((text.format(*match.groups()) for match, text in found if match), default)
            raise UserError(f"{path}: {reason}") from error


def _plain_data(error: str) -> str | None:
    """The name that PyTorch's reader stopped at, if it is one that is read as a stand-in."""
    stopped = re.search(r"GLOBAL (\S+) was not an allowed global", error)
    name = stopped[1] if stopped and "." in stopped[1] else f"builtins.{stopped[1]}" if stopped else ""
    return name if PLAIN_DATA.fullmatch(name) else None


def _walk(content: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place and the named values of every mapping within mappings, the outer first."""
    waiting, seen = [("", content)], set()
    while waiting:
        place, mapping = waiting.pop(0)
        if not isinstance(mapping, dict) or id(mapping) in seen or NO_WEIGHTS.search(place):
            continue
        seen.add(id(mapping))  # a pickle can hold itself
        named = {key: value for key, value in dict.items(mapping) if isinstance(key, str)}
        yield place, {key: value for key, value in named.items() if not isinstance(value, dict)}
        waiting += [(f"{place}.{key}" if place else key, value) for key, value in named.items()]


def _plain(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """What of a training state JSON can hold; weights are no metadata."""
    numbers = {k: v for k, v in mapping.items() if not isinstance(v, Tensor) or (v.numel() == 1 and not oddity(v))}
    scalars = {k: v.item() if isinstance(v, Tensor | np.generic) else v for k, v in numbers.items() if "." not in k}
    return {k: v for k, v in scalars.items() if isinstance(v, str | int | float | None)}


def oddity(value: Any) -> str:
    """What a value is that is no tensor of numbers in memory. Empty where it is one."""
    if type(value) not in (Tensor, nn.Parameter):
        return type(value).__name__ if isinstance(value, str | int | float | list | tuple | Tensor) else "no tensor"
    if value.layout != torch.strided or value.is_nested:
        return "a sparse or nested tensor"
    if value.is_meta:
        return "a tensor without data"
    if value.dtype not in FLOATS + INTEGERS:
        return f"a tensor of {value.dtype}"
    return ""


def some(names: Collection[Any]) -> str:
    """The first three names, for a message."""
    return ", ".join(str(name) for name in list(names)[:3]) + (", ..." if len(names) > 3 else "") or "nothing"
