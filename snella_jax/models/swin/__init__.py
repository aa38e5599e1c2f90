"""The Swin Transformer: the model, its presets, and published weights for it."""

from snella_jax.models.swin.model import PRESETS, Swin, SwinConfig
from snella_jax.models.swin.weights import FAMILY, load

__all__ = ["FAMILY", "PRESETS", "Swin", "SwinConfig", "load"]
