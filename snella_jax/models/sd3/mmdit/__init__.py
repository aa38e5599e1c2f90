"""The MMDiT of Stable Diffusion 3: the model, its preset and published weights."""

from snella_jax.models.sd3.mmdit.config import PRESETS, MMDiTConfig

__all__ = [
    "PRESETS",
    "MMDiTConfig",
]
