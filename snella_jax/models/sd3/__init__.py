"""Stable Diffusion 3: its transformer, its other components, and what joins them."""

from snella_jax.models.sd3 import clip, flow, mmdit, t5, vae
from snella_jax.models.sd3.pipeline import Pipeline
from snella_jax.models.sd3.pipeline_files import load

__all__ = ["Pipeline", "clip", "flow", "load", "mmdit", "t5", "vae"]
