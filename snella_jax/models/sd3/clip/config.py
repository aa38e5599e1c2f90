"""Shape and arithmetic of CLIP's two towers, and the presets."""

import dataclasses
import math
from typing import Any, Literal, get_args

import jax.numpy as jnp

from snella_jax.models.layers.attention import Implementation, check_implementation
from snella_jax.models.layers.images import PatchGrid, check_input
from snella_jax.models.layers.memory import check_remat

Activation = Literal["quick_gelu", "gelu"]
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """Shape and arithmetic of a `ClipText`.

    Attributes:
      width: `D`, the width of a token.
      depth: number of blocks.
      heads: number of attention heads; divides `width`.
      mlp_dim: hidden width of the MLP; None for `4 * width`.
      vocab_size: number of tokens there are.
      positions: longest text in tokens.
      projection: `P`, the width of the pooled state after the projection; None for no
        projection, so that `P = D`.
      activation: activation of the MLP, "quick_gelu" (`x sigmoid(1.702 x)`) or the
        exact "gelu".
      norm_eps: epsilon of the norms.
      eos: token that ends a text, at which the state is pooled; None for the token with
        the largest id.
      stacked: True to stack and scan the blocks; else they are a list.
      remat: "none", or "blocks" to keep only what goes from block to block for the
        backward pass and to compute each block again there.
      attention: "xla", "cudnn" (NVIDIA GPUs, 16 bits), or "auto" for the one that suits
        the first device, see `snella_jax.models.layers.attention`. Texts of 77 tokens
        gain nothing from others than "xla", which the host knows, too.
      dtype: dtype of the computation.
      param_dtype: dtype in which the weights are kept.
    """

    width: int
    depth: int
    heads: int
    mlp_dim: int | None = None
    vocab_size: int = 49408
    positions: int = 77
    projection: int | None = None
    activation: Activation = "quick_gelu"
    norm_eps: float = 1e-5
    eos: int | None = None
    stacked: bool = True
    remat: Literal["none", "blocks"] = "none"
    attention: Implementation = "xla"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        _check_tower(self, "vocab_size", "positions")
        check_remat(self.remat)
        if self.eos is not None and not 0 <= self.eos < self.vocab_size:
            raise ValueError(
                f"eos={self.eos}: expected one of the {self.vocab_size} tokens."
            )


@dataclasses.dataclass(frozen=True)
class ClipImageConfig(PatchGrid):
    """Shape and arithmetic of a `ClipImage`.

    Attributes:
      width, depth, heads, mlp_dim, projection, activation, norm_eps, stacked, remat,
        attention, dtype, param_dtype: as in `ClipTextConfig`.
      patch_size: side of a patch in pixels, or (height, width).
      image_size: side of the images in pixels, or (height, width); a multiple of
        `patch_size`.
      channels: channels of the images.
      pixel_mean: mean of each channel that `normalise` subtracts, of pixels in [0, 1].
      pixel_std: deviation of each channel that it divides by.
    """

    width: int
    depth: int
    heads: int
    mlp_dim: int | None = None
    patch_size: int | tuple[int, int] = 32
    image_size: int | tuple[int, int] = 224
    channels: int = 3
    projection: int | None = None
    activation: Activation = "quick_gelu"
    norm_eps: float = 1e-5
    pixel_mean: tuple[float, ...] = PIXEL_MEAN
    pixel_std: tuple[float, ...] = PIXEL_STD
    stacked: bool = True
    remat: Literal["none", "blocks"] = "none"
    attention: Implementation = "auto"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        _check_tower(self)
        check_input(self)
        self.check_patches()


def _check_tower(config: Any, *names: str) -> None:
    """Raises a `ValueError` for a field, of both towers or of `names`, that cannot be.

    Args:
      config: config of a tower.
      names: further fields that have to be positive.
    """
    for name in ("width", "depth", "heads", "mlp_dim", "projection", *names):
        number = getattr(config, name)
        if number is not None and number < 1:
            raise ValueError(f"{name}={number}: expected at least 1.")
    if config.width % config.heads:
        raise ValueError(f"heads={config.heads} does not divide width={config.width}.")
    if config.activation not in get_args(Activation):
        known = ", ".join(get_args(Activation))
        raise ValueError(f"activation={config.activation!r}: expected {known}.")
    if not (math.isfinite(config.norm_eps) and config.norm_eps > 0):
        raise ValueError(f"norm_eps={config.norm_eps}: expected a positive number.")
    check_implementation(config.attention)


PRESETS = {
    # The two of Stable Diffusion 3; the first is also the text tower of ViT-L/14.
    "clip_l": ClipTextConfig(width=768, depth=12, heads=12, projection=768),
    "clip_g": ClipTextConfig(
        width=1280, depth=32, heads=20, projection=1280, activation="gelu"
    ),
    "vit_b32": ClipTextConfig(width=512, depth=12, heads=8, projection=512),
    "vit_l14": ClipTextConfig(width=768, depth=12, heads=12, projection=768),
}
IMAGE_PRESETS = {
    "vit_b32": ClipImageConfig(width=768, depth=12, heads=12, projection=512),
    "vit_l14": ClipImageConfig(
        width=1024, depth=24, heads=16, projection=768, patch_size=14
    ),
}
