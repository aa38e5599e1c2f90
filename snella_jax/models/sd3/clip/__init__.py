"""CLIP: its tower of texts, that of images, and their presets."""

from snella_jax.models.sd3.clip.config import (
    IMAGE_PRESETS,
    PRESETS,
    ClipImageConfig,
    ClipTextConfig,
)
from snella_jax.models.sd3.clip.model import ClipImage, ClipText

__all__ = [
    "IMAGE_PRESETS",
    "PRESETS",
    "ClipImage",
    "ClipImageConfig",
    "ClipText",
    "ClipTextConfig",
]
