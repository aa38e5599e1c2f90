"""Plain Flax NNX models; none of them knows of SNELLA."""

from snella_jax.models.export import export
from snella_jax.models.families import PRESETS, Model, create, load, of
from snella_jax.models.stack import unstack

__all__ = ["PRESETS", "Model", "create", "export", "load", "of", "unstack"]
