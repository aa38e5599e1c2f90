"""The Vision Transformer: the model, its presets, and published weights for it."""

from snella_jax.models.vit.checkpoints import load
from snella_jax.models.vit.model import PRESETS, ViT, ViTConfig, create

__all__ = ["PRESETS", "ViT", "ViTConfig", "create", "load"]
