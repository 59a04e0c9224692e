"""autohdr: kernels, models and a trainer that turn unedited real-estate photos into edited, HDR-looking ones."""

from typing import Any

__all__ = ["create_model", "list_models", "load_checkpoint", "load_weights"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The names in __all__, which need torch: imported on first use, so that ``autohdr -h`` answers at once."""
    if name not in __all__:
        raise AttributeError(f"module 'autohdr' has no attribute {name!r}")
    from autohdr import models

    return getattr(models, name)
