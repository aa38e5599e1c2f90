"""Plain Flax NNX models; none of them knows of SNELLA."""

from snella_jax.models.export import export
from snella_jax.models.layers.stack import unstack
from snella_jax.models.registry import (
    IMAGE_PRESETS,
    PRESETS,
    ImageModel,
    Model,
    create,
    load,
    of,
)

__all__ = [
    "IMAGE_PRESETS",
    "PRESETS",
    "ImageModel",
    "Model",
    "create",
    "export",
    "load",
    "of",
    "unstack",
]
