"""Which parameters are trained, and how fast: by patterns on their names, as fnmatch reads them ("encoder*", "*.attn.*")."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from autohdr.errors import UserError


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Take the matching parameters out of training. Raises UserError for a pattern that none matches, and where all match one."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        _check_matched("freeze", pattern, names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(fnmatchcase(name, pattern) for pattern in patterns))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"freeze: expected at least one parameter to train; {', '.join(patterns)} match all {len(names)}")


def lr_factors(model: nn.Module, lr_groups: Mapping[str, float]) -> dict[str, float]:
    """{name of a trained parameter: the factor of the first pattern that it matches, else 1}.

    Raises UserError for a pattern that no trained parameter matches.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for pattern in lr_groups:
        _check_matched("lr_groups", pattern, names)
    return {name: next((f for pattern, f in lr_groups.items() if fnmatchcase(name, pattern)), 1.0) for name in names}


def _check_matched(setting: str, pattern: str, names: list[str]) -> None:
    if not any(fnmatchcase(name, pattern) for name in names):
        tops = dict.fromkeys(name.split(".")[0] for name in names)
        raise UserError(
            f"{setting}: expected patterns that match names of trained parameters, got {pattern!r}, which none matches; "
            f"their names begin with {', '.join(tops)}; one of them is {names[0]}"
        )
