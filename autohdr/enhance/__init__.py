"""Enhances photo files at their own resolution, with a model or with the auto-tone."""

from autohdr.enhance.batch import EnhanceResult, Interrupted, enhance
from autohdr.enhance.enhancer import Enhancer

__all__ = ["EnhanceResult", "Enhancer", "Interrupted", "enhance"]
