"""autohdr: kernels, models and a trainer that turn unedited real-estate photos into edited, HDR-looking ones."""

from autohdr.models import create_model, list_models, load_checkpoint, load_weights

__all__ = ["create_model", "list_models", "load_checkpoint", "load_weights"]
__version__ = "0.1.0"
