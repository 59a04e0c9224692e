"""A run that begins where another one stands, with other settings. Nothing of the other run's folder is changed."""

import tomllib
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from autohdr.errors import UserError
from autohdr.models import read_metadata
from autohdr.train.checkpoint import load_state
from autohdr.train.checks import check_state
from autohdr.train.config import TrainConfig, dump_config, saved_settings
from autohdr.train.folder import LAST, STATE
from autohdr.train.learner import Learner
from autohdr.train.progress import Progress


def read_parent(
    config: TrainConfig, now: dict[str, Any], processes: int, like: Mapping[str, DTensor]
) -> tuple[dict[str, Any], list[str]]:
    """The newest state in config.branch, and the digests of the photos that its weights were trained on. like: as of load_state.

    now: the pairs' identity(). Raises UserError where there is no state, or a damaged one, where no epoch is left, and where the
    model or the pairs are others, or within an epoch the seed or how many pairs a step takes. Moments are AdamW's, for AdamW.
    """
    folder = config.branch
    assert folder
    try:
        settings = saved_settings(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"branch: expected the folder of a run, got {folder}: {error}") from None
    weights, wanted = folder / LAST, tomllib.loads(dump_config(config))
    if not weights.is_file():
        raise UserError(f"branch: expected {weights}, which says what the run was trained on: no such file")

    def check_same(*keys: str) -> None:
        for key in keys:
            if settings[key] != wanted[key]:
                raise UserError(f"branch: {key}: the run in {folder} has {settings[key]!r}, got {wanted[key]!r}")

    check_same("model", "model_args")  # first: another model's parameters are like no tensor of the state
    state = load_state(folder / STATE, like)
    if state["epoch_steps"]:
        check_same("seed")  # it orders the epoch that is begun
    if {settings["optimizer"], config.optimizer} != {"adamw"}:
        state["optimizer"] = {}
    if not state["epoch_steps"]:
        state["step_pairs"] = now["step_pairs"]  # the next epoch may be divided otherwise
    check_state(state, now, config, processes, "branch")
    if config.epochs <= state["epoch"]:
        raise UserError(f"branch: epochs: expected more than the {state['epoch']} of the run in {folder}, got {config.epochs}")
    return state, read_metadata(weights).get("trained_on", [])


def first_state(parent: dict[str, Any], config: TrainConfig, learner: Learner) -> dict[str, Any]:
    """The state that a new run begins with: the parent's weights, average, moments, place in its epochs and pairs left out.

    What the parent's epochs came to is its own: the branch has a history of its own, and so its own best epoch.
    """
    new = Progress().state_dict()
    state = parent | {key: new[key] for key in new.keys() - {"step", "epoch", "epoch_steps", "spikes", "left_out"}}
    state["guard"] = {"losses": [], "in_a_row": 0}  # other settings may have other losses
    state["scaler"] = parent["scaler"] or learner.scaler.state_dict()  # none unless the parent was trained in float16
    if config.ema and not parent["ema"]:
        state["ema"] = {"updates": 0, "model": parent["model"]}
    if parent["optimizer"]:
        moments, groups = parent["optimizer"]["state"], learner.groups()
        weights = {name: parent["model"][name] for group in groups for name in group["params"]}
        moments = {name: moments.get(name) or _no_moments(weight) for name, weight in weights.items()}
        state["optimizer"] = {"state": moments, "param_groups": groups}
    return state


def _no_moments(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """AdamW's state, before its first step, of a weight that the parent had frozen."""
    return {"step": torch.zeros(()), "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
