"""Models: built by name, saved to and loaded from checkpoints."""

from autohdr.models.combined import combine
from autohdr.models.diffusion import Bridge, Sampler
from autohdr.models.registry import create_model, list_models
from autohdr.models.tiling import in_strips
from autohdr.models.weights import LoadReport, load_checkpoint, load_weights, read_metadata, save_weights

__all__ = [
    "Bridge",
    "LoadReport",
    "Sampler",
    "combine",
    "create_model",
    "in_strips",
    "list_models",
    "load_checkpoint",
    "load_weights",
    "read_metadata",
    "save_weights",
]
