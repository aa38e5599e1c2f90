"""T5's encoder: the model, its preset and published weights."""

from snella_jax.models.sd3.t5.config import PRESETS, T5Config
from snella_jax.models.sd3.t5.model import T5
from snella_jax.models.sd3.t5.weights import load

__all__ = ["PRESETS", "T5", "T5Config", "load"]
