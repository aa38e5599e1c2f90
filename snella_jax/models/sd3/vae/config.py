"""Shape and arithmetic of Stable Diffusion 3's autoencoder, and the presets."""

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp

from snella_jax.models.layers.memory import check_remat


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Shape and arithmetic of a `VAE`.

    Attributes:
      widths: channels of each level, from the images' resolution to the latents', which
        is half as fine with each.
      blocks: residual blocks of a level of the encoder; the decoder has one more.
      groups: groups of each norm; divides all `widths`.
      latents: channels of the latents.
      channels: channels of the images.
      norm_eps: epsilon of the norms.
      scale: factor of the latents that a diffusion model sees, `(z - shift) * scale`.
      shift: mean of the latents, which these lack.
      remat: "none", or "blocks" to keep only what goes from block to block for the
        backward pass and to compute each block again there.
      dtype: dtype of the computation; the published weights want float32.
      param_dtype: dtype in which the weights are kept.
    """

    widths: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    groups: int = 32
    latents: int = 16
    channels: int = 3
    norm_eps: float = 1e-6
    scale: float = 1.5305
    shift: float = 0.0609
    remat: Literal["none", "blocks"] = "none"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        for name in ("blocks", "groups", "latents", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1.")
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths={self.widths}: expected a number for each level.")
        if any(width % self.groups for width in self.widths):
            raise ValueError(
                f"groups={self.groups}: expected a divisor of widths={self.widths}."
            )
        for name in ("norm_eps", "scale"):
            number = getattr(self, name)
            if not (math.isfinite(number) and number > 0):
                raise ValueError(f"{name}={number}: expected a positive number.")
        if not math.isfinite(self.shift):
            raise ValueError(f"shift={self.shift}: expected a number.")
        check_remat(self.remat)

    @property
    def factor(self) -> int:
        """Side in pixels of what a latent stands for."""
        return 2 ** (len(self.widths) - 1)


PRESETS = {"sd3": VAEConfig()}
