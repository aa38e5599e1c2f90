"""Shape and arithmetic of a Vision Transformer, and the presets."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from snella_jax.models.layers.activations import Gelu
from snella_jax.models.layers.attention import Implementation, check_implementation
from snella_jax.models.layers.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PatchGrid,
    check_fields,
)


@dataclasses.dataclass(frozen=True)
class ViTConfig(PatchGrid):
    """Shape and arithmetic of a `ViT`.

    Attributes:
      width: `D`, the width of a token.
      depth: number of blocks.
      heads: number of attention heads; divides `width`.
      mlp_dim: hidden width of the MLP; None for `4 * width`.
      patch_size: side of a patch in pixels, or (height, width).
      image_size: side of the images in pixels, or (height, width); a multiple of
        `patch_size`.
      channels: channels of the images.
      num_classes: outputs of the head; 0 for no head (the call gives pooled features).
      class_token: True to put a learnt token before the patches.
      pool: input of the head: the class token ("cls") or the mean of the patch tokens
        ("mean").
      layer_scale: initial value of LayerScale (Touvron et al., arXiv 2103.17239); None
        for none.
      drop_path: rate of stochastic depth in the last block, rising linearly from 0 in
        the first; applied only when the call is given a key.
      norm_eps: epsilon of the norms.
      pixel_mean: mean of each channel that `normalise` subtracts, of pixels in [0, 1].
      pixel_std: deviation of each channel that it divides by.
      stacked: True to stack and scan the blocks; else they are a list.
      remat: "none", or "blocks" to keep only what goes from block to block for the
        backward pass and to compute each block again there.
      memory: what is kept for the backward pass: "usual", "lean" for what took a matmul
        alone, see `snella_jax.models.layers.memory`.
      activation: "gelu", or "gelu2" for the same output with a derivative that takes 2
        bits an element to keep, see `snella_jax.models.layers.activations`.
      attention: "xla", "cudnn" (NVIDIA GPUs, 16 bits), or "auto" for the one that suits
        the first device, see `snella_jax.models.layers.attention`.
      dtype: dtype of the computation.
      param_dtype: dtype in which the weights are kept.
    """

    width: int
    depth: int
    heads: int
    mlp_dim: int | None = None
    patch_size: int | tuple[int, int] = 16
    image_size: int | tuple[int, int] = 224
    channels: int = 3
    num_classes: int = 1000
    class_token: bool = True
    pool: Literal["cls", "mean"] = "cls"
    layer_scale: float | None = None
    drop_path: float = 0.0
    norm_eps: float = 1e-6
    pixel_mean: tuple[float, ...] = (0.5,)
    pixel_std: tuple[float, ...] = (0.5,)
    stacked: bool = True
    remat: Literal["none", "blocks"] = "none"
    memory: str = "usual"
    activation: Gelu = "gelu"
    attention: Implementation = "auto"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        check_fields(self)
        for name in ("width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}.")
        if self.pool not in ("cls", "mean"):
            raise ValueError(f'pool={self.pool!r}: expected "cls" or "mean".')
        if self.pool == "cls" and not self.class_token:
            raise ValueError('pool="cls" needs class_token=True; use pool="mean".')
        check_implementation(self.attention)
        self.check_patches()


PRESETS = {
    "vit_ti16": ViTConfig(width=192, depth=12, heads=3, patch_size=16),
    "vit_s16": ViTConfig(width=384, depth=12, heads=6, patch_size=16),
    "vit_b16": ViTConfig(width=768, depth=12, heads=12, patch_size=16),
    "vit_l16": ViTConfig(width=1024, depth=24, heads=16, patch_size=16),
    "vit_h14": ViTConfig(width=1280, depth=32, heads=16, patch_size=14),
    "dinov2_s14": ViTConfig(  # Oquab et al., arXiv 2304.07193
        width=384,
        depth=12,
        heads=6,
        patch_size=14,
        layer_scale=1.0,
        pixel_mean=IMAGENET_MEAN,
        pixel_std=IMAGENET_STD,
    ),
}
