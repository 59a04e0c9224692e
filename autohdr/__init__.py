"""autohdr: kernels, models and a trainer that turn unedited real-estate photos into edited, HDR-looking ones."""

import importlib
from typing import Any

__all__ = ["create_model", "kernels", "list_models", "load_checkpoint", "load_weights", "models"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The names in __all__, which need torch: imported on first use, so that ``autohdr -h`` answers at once."""
    if name not in __all__:
        raise AttributeError(f"module 'autohdr' has no attribute {name!r}")
    if name in ("kernels", "models"):
        return importlib.import_module(f"autohdr.{name}")
    return getattr(importlib.import_module("autohdr.models"), name)
