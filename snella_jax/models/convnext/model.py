"""ConvNeXt (Liu et al., arXiv 2201.03545), in Flax NNX.

The blocks of a stage are stacked and scanned. Axes: `B` images, `h`, `w` the grid of a
stage, `D` its width.

    >>> from snella_jax.models import convnext
    >>> config = convnext.ConvNeXtConfig((8, 16), depths=(1, 3), image_size=24)
    >>> model = convnext.ConvNeXt(config, rngs=nnx.Rngs(0))
    >>> [grid.shape for grid in model.features(jnp.zeros((2, 24, 24, 3)))]
    [(2, 6, 6, 8), (2, 3, 3, 16)]
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from snella_jax.models.layers import basic, stack
from snella_jax.models.layers.activations import Gelu
from snella_jax.models.layers.images import IMAGENET_MEAN, IMAGENET_STD, ImageSizes
from snella_jax.models.layers.memory import STREAM
from snella_jax.models.layers.stages import Staged, check_stages
from snella_jax.ops.names import OUTPUTS, named

EPS = 1e-6  # of every norm but the last


@dataclasses.dataclass(frozen=True)
class ConvNeXtConfig(ImageSizes):
    """Shape and arithmetic of a `ConvNeXt`.

    Attributes:
      widths: width of each stage.
      depths: blocks of each stage.
      patch_size: side of a patch in pixels, or (height, width).
      image_size: side of the images in pixels, or (height, width); pixels that do not
        fill a patch, at the right and at the bottom, are not seen.
      layer_scale: initial value of LayerScale; None for none.
      drop_path: rate of stochastic depth in the last block, rising from 0.
      norm_eps: epsilon of the norm before the head.
      channels, num_classes, pixel_mean, pixel_std, stacked, remat, memory, activation,
        dtype, param_dtype: as in `vit.ViTConfig`.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    patch_size: int | tuple[int, int] = 4
    image_size: int | tuple[int, int] = 224
    layer_scale: float | None = 1e-6
    drop_path: float = 0.0
    norm_eps: float = EPS
    channels: int = 3
    num_classes: int = 1000
    pixel_mean: tuple[float, ...] = IMAGENET_MEAN
    pixel_std: tuple[float, ...] = IMAGENET_STD
    stacked: bool = True
    remat: Literal["none", "blocks"] = "none"
    memory: str = "usual"
    activation: Gelu = "gelu"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        check_stages(self, "widths")
        shrinks = 2 ** (len(self.depths) - 1)
        least = tuple(shrinks * side for side in self.patch_hw)
        if any(has < needs for has, needs in zip(self.image_hw, least, strict=True)):
            raise ValueError(
                f"image_size={self.image_size}: expected at least {least}, a pixel in "
                "the last grid."
            )

    @property
    def rows(self) -> tuple[tuple[int], ...]:
        """Number of blocks of each stage."""
        return tuple((depth,) for depth in self.depths)


PRESETS = {"convnext_b": ConvNeXtConfig((128, 256, 512, 1024), (3, 3, 27, 3))}


class ConvNeXt(Staged):
    """Patch embedding, stages of blocks, a norm of the mean, and a head."""

    def __init__(self, config: ConvNeXtConfig, *, rngs: nnx.Rngs):
        c = self.config = config

        def block(stage: int, rngs: nnx.Rngs) -> Block:
            return Block(c.widths[stage], c, rngs=rngs)

        def downsample(stage: int, rngs: nnx.Rngs) -> Downsample:
            narrow, wide = c.widths[stage : stage + 2]
            return Downsample(narrow, wide, c, rngs=rngs)

        self.build(block, downsample, (EPS, c.norm_eps), rngs)

    def pool(self, last: Float[Array, "B h w D"]) -> Float[Array, "B D"]:
        """Returns the normed mean of the grid."""
        return self.norm(last.mean((1, 2)))


class Downsample(nnx.Module):
    """Norm and convolution of 2 x 2 neighbours."""

    def __init__(self, n: int, m: int, config: ConvNeXtConfig, *, rngs: nnx.Rngs):
        self.norm = basic.norm(n, EPS, config, rngs)
        self.conv = basic.convolution(n, m, (2, 2), config, rngs)

    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h/2 w/2 E"]:
        return self.conv(self.norm(x))


class Block(nnx.Module):
    """A depthwise convolution, a norm and an MLP around a residual."""

    def __init__(self, width: int, config: ConvNeXtConfig, *, rngs: nnx.Rngs):
        self.dwconv = nnx.Conv(
            width,
            width,
            kernel_size=(7, 7),
            feature_group_count=width,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.norm = basic.norm(width, EPS, config, rngs)
        self.mlp = basic.MLP(width, 4 * width, config, rngs=rngs, init=basic.SMALL)
        self.layer_scale = config.layer_scale is not None
        if config.layer_scale is not None:
            scale = jnp.full(width, config.layer_scale, config.param_dtype)
            self.scale = nnx.Param(scale)

    def __call__(
        self, x: Float[Array, "B h w D"], drop: stack.Drop | None = None
    ) -> Float[Array, "B h w D"]:
        """Runs the block; `drop` is None, or a key and the rate of stochastic depth."""
        y = self.mlp(self.norm(named(self.dwconv(x), STREAM)))
        if self.layer_scale:
            y = basic.scaled(named(y, OUTPUTS), self.scale[...])
        return x + stack.dropped(y, drop, 0)
