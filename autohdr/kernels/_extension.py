"""Finds and loads the compiled module ``autohdr._C`` once."""

import importlib
import importlib.util
import warnings
from types import ModuleType

import torch  # noqa: F401  the extension's symbols live in torch's libraries


def _load() -> tuple[ModuleType | None, str]:
    if importlib.util.find_spec("autohdr._C") is None:
        # pip may have handed out a wheel that it built without kernels before.
        return None, "not compiled into this installation (install with pip's --no-cache-dir; see README, Troubleshooting)"
    try:
        return importlib.import_module("autohdr._C"), ""
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"the compiled module does not load: {error}"


module, reason = _load()
"""The loaded module, or None and the reason."""

if module is None:
    warnings.warn(
        f"autohdr's compiled kernels are not available: {reason}. The reference backend, plain PyTorch, is used instead; it gives"
        " the same results, but is slower and needs several times the memory.",
        RuntimeWarning,
        stacklevel=2,
    )
