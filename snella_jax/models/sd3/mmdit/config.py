"""Shape and arithmetic of an MMDiT, and the presets."""

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp

from snella_jax.models.layers.activations import Gelu, check_activation
from snella_jax.models.layers.attention import Implementation, check_implementation
from snella_jax.models.layers.memory import check_remat, kept_names

COUNTS = (
    *("width", "depth", "heads", "channels", "patch", "positions"),
    *("context_dim", "pooled_dim", "mlp_ratio"),
)


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """Shape and arithmetic of an `MMDiT`.

    Attributes:
      width: `D`, the width of a token of either stream; a multiple of 4.
      depth: number of blocks, the last one included; at least 2.
      heads: number of attention heads; divides `width`.
      channels: `C`, channels of the latents.
      patch: side of a patch, in latents.
      positions: side of the table of positions, in patches; no image is larger.
      context_dim: `E`, width of the text's tokens.
      pooled_dim: `P`, width of its pooled embedding.
      mlp_ratio: hidden width of the MLPs, in widths; 4 in all published models.
      norm_eps: epsilon of the norms.
      stacked: True to stack and scan the blocks but the last; else they are a list.
      remat: "none", or "blocks" to keep only what goes from block to block for the
        backward pass and to compute each block again there.
      memory: what is kept for the backward pass: "usual", "lean" for what took a matmul
        alone, see `snella_jax.models.layers.memory`.
      activation: "gelu", or "gelu2" for the same output with a derivative that takes 2
        bits an element to keep, see `snella_jax.models.layers.activations`.
      attention: "xla", "cudnn" (NVIDIA GPUs, 16 bits), or "auto" for the one that suits
        the first device, see `snella_jax.models.layers.attention`.
      dtype: dtype of the computation; velocities are float32 whatever it is.
      param_dtype: dtype in which the weights are kept.
    """

    width: int = 1536
    depth: int = 24
    heads: int = 24
    channels: int = 16
    patch: int = 2
    positions: int = 192
    context_dim: int = 4096
    pooled_dim: int = 2048
    mlp_ratio: int = 4
    norm_eps: float = 1e-6
    stacked: bool = True
    remat: Literal["none", "blocks"] = "none"
    memory: str = "usual"
    activation: Gelu = "gelu"
    attention: Implementation = "auto"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.depth < 2:
            raise ValueError(f"depth={self.depth}: expected at least 2.")
        if self.width % 4 or self.width % self.heads:
            raise ValueError(
                f"width={self.width}: expected a multiple of 4 that heads="
                f"{self.heads} divides."
            )
        if not (math.isfinite(self.norm_eps) and self.norm_eps > 0):
            raise ValueError(f"norm_eps={self.norm_eps}: expected a positive number.")
        check_remat(self.remat)
        kept_names(self.memory)
        check_activation(self.activation, Gelu)
        check_implementation(self.attention)


PRESETS = {"sd3_medium": MMDiTConfig()}
