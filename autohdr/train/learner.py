"""What a run trains: the network, and everything else that an optimiser step changes."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from autohdr.errors import UserError
from autohdr.models import create_model, load_weights
from autohdr.models.graphs import Graphed
from autohdr.models.network import in_8_bits
from autohdr.train.adversarial import Adversary
from autohdr.train.checkpoint import to_cpu
from autohdr.train.config import TrainConfig
from autohdr.train.distributed import Ranks, local
from autohdr.train.ema import Average
from autohdr.train.guards import Guard
from autohdr.train.objective import Objective, parameter_groups
from autohdr.train.optimizers import make_optimizer
from autohdr.train.selection import freeze
from autohdr.train.teacher import Teacher

_WHOLE, _PARTS = StateDictOptions(full_state_dict=True), StateDictOptions()
"""States hold tensors by the model's own names: whole, however the processes share them out, or each process its own parts."""


class Learner:
    """The network, its objective, and what a step changes beside the weights: optimiser, loss scale, average, guard, adversary.

    model: the network. network: the same weights, as a step calls them: wrapped for several processes.
    precision: the dtype of autocast; float32: no autocast.
    trained_on: digests of the photos that the weights were trained on before this run.
    adversary: of the loss adversarial; None without that. teacher: of config.teacher; None without that.
    guided: the network's modules whose outputs learn from the teacher's features.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks, fresh: bool = True):
        """fresh: load config.init_weights, if any. Raises UserError for a model, an objective or weights that do not fit, and for
        cuda_graphs on a CPU or in several processes."""
        device = ranks.device
        self.teacher = Teacher(config.teacher, device) if config.teacher else None  # before the seed: it draws weights, too
        torch.manual_seed(config.seed)
        self.model = create_model(config.model, **config.model_args)
        if in_8_bits(self.model):
            raise UserError(f"model_args: expected a model to train, got {config.model} in 8 bits, which is for inference alone")
        self.trained_on: set[str] = set(self.teacher.trained_on if self.teacher else ())
        if config.init_weights and fresh:
            self.trained_on |= set(load_weights(self.model, config.init_weights).metadata.get("trained_on", []))
        sharded = config.parallel == "fsdp" and ranks.count > 1  # FSDP2 takes contiguous weights alone
        layout = torch.preserve_format if sharded else torch.channels_last
        self.model.to(device, memory_format=layout)  # pyright: ignore[reportCallIssue]  torch declares no memory_format
        self.objective = Objective(config, self.model)
        self.precision = _precision(config.precision, device)
        self.model.recompute = config.recompute
        freeze(self.model, config.freeze)
        self.guided = self.teacher.guided(self.model) if self.teacher and config.teacher_features_weight else []
        if config.compile:
            self.model.compile()
        if config.cuda_graphs and ranks.count > 1:
            raise UserError(f"cuda_graphs: expected one process, got {ranks.count}: what they exchange is not captured")
        wrapped = ranks.wrap(self.model, config.parallel, self.precision)
        self.network: nn.Module = Graphed(self.model, device) if config.cuda_graphs else wrapped
        # Fused, a step of a small network takes a fifth of the time. Of FSDP2's shards it is not known how they lie in memory.
        self._fused = not sharded
        groups = parameter_groups(self.model, config.weight_decay, config.lr_groups)
        self.optimizer = make_optimizer(config.optimizer, groups, config.lr, self._fused)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision is torch.float16)
        self.average = Average(self.model, config.ema)
        weight = config.losses.get("adversarial")  # at 0 it learns, and is in the logs
        self.adversary = None if weight is None else Adversary(weight, config.adversarial_start, device)
        self.guard = Guard(config.spike_factor, config.spike_window, config.snapshot_every, self.tensors)
        self._device = device
        # Several processes gather whole tensors in the CPU's memory. One leaves them to to_cpu, whose page-locked copy is faster.
        self._gathered = replace(_WHOLE, cpu_offload=ranks.count > 1)
        self._saved = _PARTS if sharded and config.sharded_states else self._gathered

    def autocast(self) -> torch.autocast:
        """The context of every forward pass."""
        return torch.autocast(self._device.type, self.precision, enabled=self.precision is not torch.float32)

    def tensors(self) -> list[Tensor]:
        """This process's part of all that a step changes: weights, moments, average, adversary. [] before the first step."""
        if not self.optimizer.state:
            return []
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        moments = [value for weight in weights for value in self.optimizer.state[weight].values()]
        others = self.average.tensors + (self.adversary.tensors() if self.adversary else [])
        return [local(tensor) for tensor in (*weights, *moments)] + others

    def groups(self) -> list[dict[str, Any]]:
        """The optimiser's parameter groups as states have them: with names in the place of weights."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return [group | {"params": [names[weight] for weight in group["params"]]} for group in self.optimizer.param_groups]

    def shards(self) -> dict[str, DTensor]:
        """{name: parameter} of those that the processes share out."""
        return {name: parameter for name, parameter in self.model.named_parameters() if isinstance(parameter, DTensor)}

    def state_dict(self) -> dict[str, Any]:
        """A copy, on the CPU, of model, ema, optimizer, scaler, guard and, where there is one, adversary. Only the first process
        has all of the tensors; but where states are sharded, each has its own parts."""
        state = {"adversary": self.adversary.state_dict()} if self.adversary else {}
        state |= {"scaler": self.scaler.state_dict(), "guard": self.guard.state_dict(), "optimizer": {}}
        if self.optimizer.state:  # before the first step there is no state, and torch would make a step to have one
            state["optimizer"] = get_optimizer_state_dict(self.model, self.optimizer, options=self._saved)
        state = to_cpu(state) | {"model": self._own_weights(self._saved), "ema": {}}
        if self.average.decay:
            with self.average.applied():
                state["ema"] = {"updates": self.average.updates, "model": self._own_weights(self._saved)}
        return state

    def measured_weights(self, state: dict[str, Any]) -> dict[str, Tensor]:
        """Of the present state_dict(): the weights that validation measures, the average where there is one. Whole, on the first
        process: all call this."""
        if self._saved is not _PARTS:
            return (state["ema"] or state)["model"]
        with self.average.applied():
            return self._own_weights(self._gathered)

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Load a state_dict() from after `step` steps, whole or this process's parts. It is also the first state that a spike can
        go back to."""
        options = _PARTS if any(isinstance(weight, DTensor) for weight in state["model"].values()) else _WHOLE
        if state["ema"]:
            set_model_state_dict(self.model, state["ema"]["model"], options=options)
            self.average.take(state["ema"]["updates"])
        set_model_state_dict(self.model, state["model"], options=options)
        if state["optimizer"]:
            own = [{key: group[key] for key in group.keys() - {"params", "step"}} for group in self.optimizer.param_groups]
            set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=options)
            for group, settings in zip(self.optimizer.param_groups, own, strict=True):
                group |= settings  # "fused" may be another in the state, and tuples are lists
            self._lay_out_moments()
        if self.adversary and "adversary" in state:
            self.adversary.load_state_dict(state["adversary"])
        self.scaler.load_state_dict(state["scaler"])
        self.guard.load_state_dict(state["guard"])
        self.guard.keep(step)

    def _lay_out_moments(self) -> None:
        """As the weights lie in memory, which the fused optimiser takes for granted: another run's, or FSDP2's, lie otherwise."""
        for weight, state in self.optimizer.state.items() if self._fused else ():
            for name, value in state.items():
                if value.dim():
                    state[name] = torch.empty_like(weight).copy_(value)

    def _own_weights(self, options: StateDictOptions) -> dict[str, Tensor]:
        return to_cpu(get_model_state_dict(self.model, options=options))


def _precision(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    return getattr(torch, name)
