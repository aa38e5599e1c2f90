"""The Swin Transformer (Liu et al., arXiv 2103.14030), in Flax NNX.

Every second block shifts its windows, so blocks come in pairs, a plain one and a
shifted one; the pairs of a stage are stacked and scanned. Axes: `B` images, `h`, `w`
the grid of a stage, `D` its width, `H` heads, `T = window * window` tokens.

    >>> from snella_jax.models import swin
    >>> config = swin.SwinConfig(8, depths=(2, 4), heads=(1, 2), image_size=28)
    >>> model = swin.Swin(config, rngs=nnx.Rngs(0))
    >>> [grid.shape for grid in model.features(jax.numpy.zeros((2, 28, 28, 3)))]
    [(2, 7, 7, 8), (2, 4, 4, 16)]
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from snella_jax.models.layers import basic, stack, windows
from snella_jax.models.layers.activations import Gelu
from snella_jax.models.layers.attention import attend
from snella_jax.models.layers.images import IMAGENET_MEAN, IMAGENET_STD, ImageSizes
from snella_jax.models.layers.memory import ATTENTION, QKV, STREAM
from snella_jax.models.layers.stages import Staged, check_stages
from snella_jax.ops.names import named, remade

EPS = 1e-5  # of every norm


@dataclasses.dataclass(frozen=True)
class SwinConfig(ImageSizes):
    """Shape and arithmetic of a `Swin`.

    Attributes:
      width: width of the first stage; doubles from stage to stage.
      depths: blocks of each stage, even numbers.
      heads: attention heads of each stage.
      window: side of a window in tokens. Where a grid is not larger, the window is as
        large as the grid's shorter side, and nothing is shifted.
      mlp_ratio: hidden width of the MLPs, by the stage's width.
      patch_size: side of a patch in pixels, or (height, width).
      image_size: side of the images in pixels, or (height, width); what patches,
        merging or windows do not divide is padded with 0.
      channels, num_classes, pixel_mean, pixel_std, remat, memory, activation, dtype,
        param_dtype: as in `vit.ViTConfig`.
      drop_path: rate of stochastic depth in the last block, rising from 0.
      stacked: True to stack and scan the pairs of a stage; else they are a list.
    """

    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int = 7
    mlp_ratio: float = 4.0
    patch_size: int | tuple[int, int] = 4
    image_size: int | tuple[int, int] = 224
    channels: int = 3
    num_classes: int = 1000
    drop_path: float = 0.0
    pixel_mean: tuple[float, ...] = IMAGENET_MEAN
    pixel_std: tuple[float, ...] = IMAGENET_STD
    stacked: bool = True
    remat: Literal["none", "blocks"] = "none"
    memory: str = "usual"
    activation: Gelu = "gelu"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        check_stages(self, "heads")
        if any(depth % 2 for depth in self.depths):
            raise ValueError(f"depths={self.depths}: expected even numbers.")
        if min(self.width, self.window, round(self.width * self.mlp_ratio)) < 1:
            raise ValueError(
                f"width={self.width}, window={self.window}, mlp_ratio={self.mlp_ratio}:"
                " expected positive numbers."
            )
        if any(w % h for w, h in zip(self.widths, self.heads, strict=True)):
            raise ValueError(f"heads={self.heads} do not divide {self.widths}.")

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each stage."""
        return tuple(self.width * 2**stage for stage in range(len(self.depths)))

    @property
    def rows(self) -> tuple[tuple[int, int], ...]:
        """Number of pairs of blocks of each stage, and 2."""
        return tuple((depth // 2, 2) for depth in self.depths)


PRESETS = {"swin_b": SwinConfig(128, (2, 2, 18, 2), (4, 8, 16, 32))}


class Swin(Staged):
    """Patch embedding, stages of block pairs with merging between, norm and head."""

    def __init__(self, config: SwinConfig, *, rngs: nnx.Rngs):
        c = self.config = config

        def pair(stage: int, rngs: nnx.Rngs) -> Pair:
            return Pair(c.widths[stage], c.heads[stage], c, rngs=rngs)

        def merging(stage: int, rngs: nnx.Rngs) -> Merging:
            return Merging(c.widths[stage], c, rngs=rngs)

        self.build(pair, merging, (EPS, EPS), rngs)

    def pool(self, last: Float[Array, "B h w D"]) -> Float[Array, "B D"]:
        """Returns the mean of the normed grid."""
        return self.norm(last).mean((1, 2))

    def embed(
        self, images: Float[Array, "B height width C"]
    ) -> Float[Array, "B h w D"]:
        """Embeds the patches of images, padded where patches do not divide them."""
        return self.patch_embed(windows.padded(images, self.config.patch_hw))


class Merging(nnx.Module):
    """Merging of four neighbours into one token, twice as wide."""

    def __init__(self, width: int, config: SwinConfig, *, rngs: nnx.Rngs):
        self.norm = basic.norm(4 * width, EPS, config, rngs)
        sizes = 4 * width, 2 * width
        self.reduction = basic.linear(
            *sizes, config, rngs, use_bias=False, init=basic.SMALL
        )

    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h/2 w/2 2*D"]:
        x = windows.padded(x, (2, 2))
        neighbours = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(jnp.concatenate(neighbours, -1)))


class Pair(nnx.Module):
    """A block with plain windows and one with shifted windows."""

    def __init__(self, width: int, heads: int, config: SwinConfig, *, rngs: nnx.Rngs):
        self.plain, self.shifted = (
            Block(width, heads, config, shifted, rngs) for shifted in (False, True)
        )

    def __call__(
        self, x: Float[Array, "B h w D"], drop: stack.Drop | None = None
    ) -> Float[Array, "B h w D"]:
        """Runs both; `drop` is None, or two keys and two rates of stochastic depth."""
        for index, block in enumerate((self.plain, self.shifted)):
            x = named(x, STREAM)
            x = block(x, jax.tree.map(lambda leaf, i=index: leaf[i], drop))
        return x


class Block(nnx.Module):
    """Attention within windows and MLP, each behind a norm and around a residual."""

    def __init__(
        self, width: int, heads: int, config: SwinConfig, shifted: bool, rngs: nnx.Rngs
    ):
        self.norm1 = basic.norm(width, EPS, config, rngs)
        self.attn = WindowAttention(width, heads, config, shifted, rngs=rngs)
        self.norm2 = basic.norm(width, EPS, config, rngs)
        hidden = round(config.mlp_ratio * width)
        self.mlp = basic.MLP(width, hidden, config, rngs=rngs, init=basic.SMALL)

    def __call__(
        self, x: Float[Array, "B h w D"], drop: stack.Drop | None = None
    ) -> Float[Array, "B h w D"]:
        """Runs the block; `drop` is None, or a key and the rate of stochastic depth."""
        x = named(x + stack.dropped(self.attn(self.norm1(x)), drop, 0), STREAM)
        return x + stack.dropped(self.mlp(self.norm2(x)), drop, 1)


class WindowAttention(nnx.Module):
    """Multi-head attention within windows, with a bias by relative position."""

    def __init__(
        self,
        width: int,
        heads: int,
        config: SwinConfig,
        shifted: bool,
        *,
        rngs: nnx.Rngs,
    ):
        self.heads, self.window, self.shifted = heads, config.window, shifted
        self.query, self.key, self.value, self.out = (
            basic.linear(width, width, config, rngs, init=basic.SMALL) for _ in range(4)
        )
        shape = (2 * config.window - 1) ** 2, heads
        drawn = basic.SMALL(rngs.params(), shape, config.param_dtype)
        self.bias_table = nnx.Param(drawn)

    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        batch, height, width, _ = x.shape
        side = min(self.window, height, width)
        shift = side // 2 if self.shifted and min(height, width) > self.window else 0
        x = jnp.roll(windows.padded(x, (side, side)), (-shift, -shift), (1, 2))
        rows, columns = x.shape[1] // side, x.shape[2] // side
        tokens = windows.split(x, (side, side))
        tokens = tokens.reshape(batch, -1, side * side, x.shape[-1])

        with remade():
            q, k, v = (
                named(self._split(f(tokens)), QKV)
                for f in (self.query, self.key, self.value)
            )
        bias = self.bias_table[...][offsets(side, self.window)].transpose(2, 0, 1)
        mask = _together(rows, columns, side, shift)[:, None, None] if shift else None

        def one(q: Array, k: Array, v: Array, mask: Any) -> Array:
            return attend(q, k, v, "xla", bias=bias[None], mask=mask)

        y = jax.vmap(one, (1, 1, 1, 0), 1)(q, k, v, mask)  # over the windows
        y = named(y, ATTENTION)
        y = self.out(y.reshape(tokens.shape)).reshape(
            batch, -1, side, side, x.shape[-1]
        )
        y = windows.joined(y, *x.shape[1:3])
        return jnp.roll(y, (shift, shift), (1, 2))[:, :height, :width]

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:3], self.heads, -1)  # [B, windows, T, H, d]


def offsets(side: int, window: int) -> Int[np.ndarray, "T T"]:
    """Returns the row of a `window`'s table for every two tokens of a side's window."""
    tokens = np.stack(np.divmod(np.arange(side * side), side), -1)
    rows, columns = np.moveaxis(tokens[:, None] - tokens + window - 1, -1, 0)
    return rows * (2 * window - 1) + columns


def _together(
    rows: int, columns: int, side: int, shift: int
) -> Bool[np.ndarray, "windows T T"]:
    """Tells which tokens of a shifted window were neighbours before the shift."""
    height, width = (
        np.digitize(np.arange(n), (n - side, n - shift))
        for n in (rows * side, columns * side)
    )
    region = 3 * height[:, None] + width
    region = region.reshape(rows, side, columns, side).swapaxes(1, 2)
    region = region.reshape(-1, side * side)
    return region[:, None] == region[:, :, None]
