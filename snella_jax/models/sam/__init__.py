"""SAM: the model, its presets, and published weights for it."""

from snella_jax.models.sam.config import PRESETS, SamConfig
from snella_jax.models.sam.model import Sam, create
from snella_jax.models.sam.segment import segment
from snella_jax.models.sam.tiny_vit import TinyViTConfig
from snella_jax.models.sam.vit_encoder import ViTEncoderConfig
from snella_jax.models.sam.weights import FAMILY, load

__all__ = [
    "FAMILY",
    "PRESETS",
    "Sam",
    "SamConfig",
    "TinyViTConfig",
    "ViTEncoderConfig",
    "create",
    "load",
    "segment",
]
