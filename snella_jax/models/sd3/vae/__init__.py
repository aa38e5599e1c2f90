"""Stable Diffusion 3's autoencoder: the model, its preset and published weights."""

from snella_jax.models.sd3.vae.config import PRESETS, VAEConfig
from snella_jax.models.sd3.vae.model import VAE
from snella_jax.models.sd3.vae.weights import load

__all__ = ["PRESETS", "VAE", "VAEConfig", "load"]
