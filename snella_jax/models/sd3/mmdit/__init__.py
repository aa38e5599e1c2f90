"""The MMDiT of Stable Diffusion 3: the model, its preset and published weights."""

from snella_jax.models.sd3.mmdit.config import PRESETS, MMDiTConfig
from snella_jax.models.sd3.mmdit.model import MMDiT, create
from snella_jax.models.sd3.mmdit.weights import FAMILY, load

__all__ = [
    "FAMILY",
    "PRESETS",
    "MMDiT",
    "MMDiTConfig",
    "create",
    "load",
]
