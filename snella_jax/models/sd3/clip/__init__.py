"""CLIP: towers of texts and images, their presets, and published weights for them."""

from snella_jax.models.sd3.clip.config import (
    IMAGE_PRESETS,
    PRESETS,
    ClipImageConfig,
    ClipTextConfig,
)
from snella_jax.models.sd3.clip.model import ClipImage, ClipText
from snella_jax.models.sd3.clip.weights import load, load_image

__all__ = [
    "IMAGE_PRESETS",
    "PRESETS",
    "ClipImage",
    "ClipImageConfig",
    "ClipText",
    "ClipTextConfig",
    "load",
    "load_image",
]
