"""Stable Diffusion 3: its transformer, its other components, and what joins them."""

from snella_jax.models.sd3 import flow, mmdit, vae

__all__ = ["flow", "mmdit", "vae"]
