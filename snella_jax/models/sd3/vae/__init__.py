"""Stable Diffusion 3's autoencoder: the model, its presets and published weights."""

from snella_jax.models.sd3.vae.config import PRESETS, VAEConfig
from snella_jax.models.sd3.vae.model import VAE

__all__ = ["PRESETS", "VAE", "VAEConfig"]
