"""The optimisers that a run can have. Each is a library's, over the groups of objective.parameter_groups."""

from typing import Any

import torch

PACKAGE = "pytorch_optimizer"
"""Has those that PyTorch lacks, or has for matrices alone."""


def make_optimizer(name: str, groups: list[dict[str, Any]], lr: float, fused: bool) -> torch.optim.Optimizer:
    """name: as TrainConfig.optimizer has it. fused: of AdamW. Each group's weight_decay is the optimiser's."""
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=fused)
    import pytorch_optimizer  # pyright: ignore[reportMissingImports]

    if name == "adan":
        return pytorch_optimizer.Adan(groups, lr=lr)
    adamw = {"use_muon": False, "betas": (0.9, 0.999), "eps": 1e-8}
    parts = [
        group | settings | {"params": params}
        for group in groups
        for settings in ({"use_muon": True}, adamw)
        if (params := [p for p in group["params"] if mixes_channels(p) == settings["use_muon"]])
    ]
    # The size of a step is AdamW's, so that lr and weight_decay are: Liu et al., "Muon is scalable for LLM training", 2025.
    return pytorch_optimizer.Muon(parts, lr=lr, adamw_lr=lr, use_adjusted_lr=True)


def mixes_channels(parameter: torch.Tensor) -> bool:
    """Whether it is a matrix, or a convolution that is one (out, in x height x width): not a vector, and not depthwise."""
    return parameter.dim() > 1 and min(parameter.shape[:2]) > 1
