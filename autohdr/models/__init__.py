"""Models: built by name, saved to and loaded from checkpoints."""

from autohdr.models.diffusion import Bridge, Sampler
from autohdr.models.registry import create_model, list_models
from autohdr.models.weights import LoadReport, load_checkpoint, load_weights, save_weights

__all__ = ["Bridge", "LoadReport", "Sampler", "create_model", "list_models", "load_checkpoint", "load_weights", "save_weights"]
