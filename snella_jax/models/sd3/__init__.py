"""Stable Diffusion 3: its transformer, its other components, and what joins them."""

from snella_jax.models.sd3 import clip, flow, mmdit, vae

__all__ = ["clip", "flow", "mmdit", "vae"]
