"""ConvNeXt: the model, its presets, and published weights for it."""

from snella_jax.models.convnext.model import PRESETS, ConvNeXt, ConvNeXtConfig
from snella_jax.models.convnext.weights import FAMILY, load

__all__ = ["FAMILY", "PRESETS", "ConvNeXt", "ConvNeXtConfig", "load"]
