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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from snella_jax.models import images, parts, stack, staged, tables
from snella_jax.models.loading import Checkpoint, Rule, arrange, read
from snella_jax.models.staged import Staged

EPS = 1e-6  # of every norm but the last


@dataclasses.dataclass(frozen=True)
class ConvNeXtConfig:
    """What fixes the shape and the arithmetic of a `ConvNeXt`.

    Attributes:
      widths: of each stage.
      depths: blocks of each stage.
      patch_size: side of a patch in pixels, or (height, width).
      image_size: side of the images in pixels, or (height, width); pixels that do not
        fill a patch, at the right and at the bottom, are not seen.
      layer_scale: initial value of LayerScale; None for none.
      drop_path: rate of stochastic depth in the last block, rising from 0.
      norm_eps: epsilon of the norm before the head.
      channels, num_classes, pixel_mean, pixel_std, stacked, remat, dtype, param_dtype:
        as in `vit.ViTConfig`.
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
    pixel_mean: tuple[float, ...] = images.IMAGENET_MEAN
    pixel_std: tuple[float, ...] = images.IMAGENET_STD
    stacked: bool = True
    remat: Literal["none", "blocks"] = "none"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        staged.check(self, "widths")
        shrinks = 2 ** (len(self.depths) - 1)
        least = tuple(shrinks * side for side in self.patch_hw)
        if any(has < needs for has, needs in zip(self.image_hw, least, strict=True)):
            raise ValueError(
                f"image_size={self.image_size}: expected at least {least}, a pixel in "
                "the last grid."
            )

    @property
    def rows(self) -> tuple[tuple[int], ...]:
        """How many blocks each stage has."""
        return tuple((depth,) for depth in self.depths)

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return images.pair(self.image_size)

    @property
    def patch_hw(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return images.pair(self.patch_size)


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
        """The mean, normed."""
        return self.norm(last.mean((1, 2)))


class Downsample(nnx.Module):
    """A norm, and a convolution of 2 x 2 neighbours."""

    def __init__(self, n: int, m: int, config: ConvNeXtConfig, *, rngs: nnx.Rngs):
        self.norm = parts.norm(n, EPS, config, rngs)
        self.conv = parts.convolution(n, m, (2, 2), config, rngs)

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
        self.norm = parts.norm(width, EPS, config, rngs)
        self.mlp = parts.MLP(width, 4 * width, config, rngs=rngs, init=parts.SMALL)
        self.layer_scale = config.layer_scale is not None
        if config.layer_scale is not None:
            scale = jnp.full(width, config.layer_scale, config.param_dtype)
            self.scale = nnx.Param(scale)

    def __call__(
        self, x: Float[Array, "B h w D"], drop: stack.Drop | None = None
    ) -> Float[Array, "B h w D"]:
        """`drop`: None, or a key and the rate of stochastic depth in this block."""
        y = self.mlp(self.norm(self.dwconv(x)))
        if self.layer_scale:
            y = parts.scaled(y, self.scale[...])
        return x + stack.dropped(y, drop, 0)


def _down(stage: int) -> list[Rule]:
    """The rules for what leads to a stage, which is behind the one before it."""
    names = (
        rf"(?:downsample_layers\.{stage}|encoder\.stages\.{stage}\.downsampling_layer)"
    )
    path = f"down/{stage - 1}"
    return [
        *tables.affine(rf"{names}\.0", f"{path}/norm"),
        *tables.convolution(rf"{names}\.1", f"{path}/conv"),
    ]


# The original's names, or Hugging Face's.
MARKS = (
    r"stages\.0\.0\.dwconv\.weight",
    r"encoder\.stages\.0\.layers\.0\.dwconv\.weight",
)
_BLOCK = r"(?:encoder\.)?stages\.(\d+)\.(?:layers\.)?(\d+)\."
_PLACE = "blocks/{0}/{1}/"
_STEM = r"downsample_layers\.0\."
RULES = [
    *tables.convolution(_STEM + r"0|embeddings\.patch_embeddings", "patch_embed"),
    *tables.affine(_STEM + r"1|embeddings\.layernorm", "embed_norm"),
    *tables.convolution(_BLOCK + "dwconv", _PLACE + "dwconv"),
    *tables.affine(_BLOCK + "(?:layer)?norm", _PLACE + "norm"),
    *tables.linear(_BLOCK + "pwconv([12])", _PLACE + "mlp/fc{2}"),
    Rule(_BLOCK + "(?:gamma|layer_scale_parameter)", (_PLACE + "scale",)),
    *(rule for stage in range(1, 10) for rule in _down(stage)),
    *tables.affine("(?:layer)?norm", "norm"),
    *tables.linear("head|classifier", "head"),
]


def load(
    path: str | Path | Checkpoint,
    *,
    weights: str | None = None,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    **overrides: Any,
) -> ConvNeXt:
    """A ConvNeXt with published weights: the original `.pth`, or a Hugging Face folder.

    Args:
      path: of the file or folder, or what `loading.read` made of it.
      weights: as of `vit.load`.
      num_classes: None keeps the file's head, if it has one; a number makes a new head
        that starts at 0, and 0 none.
      image_size: of the images, of any size. None is what a folder's config says, and
        224 for the original, which does not say.
      dtype: of the computation.
      param_dtype: of the weights.
      overrides: other fields of `ConvNeXtConfig`, such as `remat`.

    Raises:
      As `vit.load`.
    """
    checkpoint, rules, known = recognised(read(path, weights))
    arrays, problems = arrange(checkpoint, rules)
    given = {"image_size": image_size, "dtype": dtype, "param_dtype": param_dtype}
    return staged.load(
        (ConvNeXt, ConvNeXtConfig),
        checkpoint,
        arrays,
        problems,
        lambda: _shape(arrays),
        known,
        num_classes,
        given | overrides,
    )


def recognised(checkpoint: Checkpoint) -> tuple[Checkpoint, list[Rule], dict[str, Any]]:
    """The tensors, the rules for them, and what the format says of the config.

    Raises:
      CheckpointError: no known format, or a ConvNeXt of another kind.
    """
    tables.require(checkpoint, MARKS, "ConvNeXt")
    known = staged.described(checkpoint)
    if any(name.endswith("embeddings.layernorm.weight") for name in checkpoint.tensors):
        # A lone .safetensors has no config: the default of transformers.
        known.setdefault("norm_eps", 1e-12)
    return checkpoint.unwrapped(*MARKS), RULES, known


def _shape(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What the shapes say of the config."""
    depths = staged.counts(arrays)
    firsts = [f"blocks/{stage}/0" for stage in range(len(depths))]
    return {
        "widths": tuple(arrays[f"{first}/norm/scale"].size for first in firsts),
        "depths": depths,
        "layer_scale": 1.0 if f"{firsts[0]}/scale" in arrays else None,
    }
