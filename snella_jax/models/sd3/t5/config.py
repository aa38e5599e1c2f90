"""Shape and arithmetic of a T5's encoder, and the presets."""

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp

from snella_jax.models.layers.memory import check_remat

COUNTS = ("vocab_size", "width", "depth", "heads", "head_dim", "mlp_dim")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Shape and arithmetic of a `T5`.

    Attributes:
      vocab_size: number of tokens there are, spare ones included.
      width: `D`, the width of a token.
      depth: number of blocks.
      heads: `H`, number of attention heads.
      head_dim: `d`, width of a head; `heads * head_dim` need not be `width`.
      mlp_dim: hidden width of the MLP.
      buckets: number of buckets that distances of tokens fall into; a multiple of 4.
      distance: distance from which on all are in the last bucket.
      norm_eps: epsilon of the norms.
      stacked: True to stack and scan the blocks; else they are a list.
      remat: "none", or "blocks" to keep only what goes from block to block for the
        backward pass and to compute each block again there.
      dtype: dtype of the computation, float32 or bfloat16: the published weights'
        activations are beyond float16's largest number.
      param_dtype: dtype in which the weights are kept; float16 is no harm here.
    """

    vocab_size: int = 32128
    width: int = 4096
    depth: int = 24
    heads: int = 64
    head_dim: int = 64
    mlp_dim: int = 10240
    buckets: int = 32
    distance: int = 128
    norm_eps: float = 1e-6
    stacked: bool = True
    remat: Literal["none", "blocks"] = "none"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.buckets < 4 or self.buckets % 4:
            raise ValueError(f"buckets={self.buckets}: expected a multiple of 4.")
        if self.distance <= self.buckets // 4:
            raise ValueError(
                f"distance={self.distance}: expected more than {self.buckets // 4}, "
                f"a quarter of buckets={self.buckets}."
            )
        if not (math.isfinite(self.norm_eps) and self.norm_eps > 0):
            raise ValueError(f"norm_eps={self.norm_eps}: expected a positive number.")
        check_remat(self.remat)
        if jnp.dtype(self.dtype) == jnp.float16:
            raise ValueError(
                "dtype=float16: expected float32 or bfloat16, as a T5's activations "
                "are beyond float16's largest number, 65504."
            )


PRESETS = {"t5_v1_1_xxl": T5Config()}
