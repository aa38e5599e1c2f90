"""The Vision Transformer: the model, its presets, and published weights for it."""

from snella_jax.models.vit.config import PRESETS, ViTConfig
from snella_jax.models.vit.model import ViT, create
from snella_jax.models.vit.weights import FAMILY, load

__all__ = ["FAMILY", "PRESETS", "ViT", "ViTConfig", "create", "load"]
