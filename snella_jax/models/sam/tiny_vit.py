"""MobileSAM's image encoder: TinyViT (Wu et al., arXiv 2207.10666), in Flax NNX.

A stem of two convolutions, a stage of inverted bottlenecks (`MBConv`) and three stages
of attention within windows, with merging between and SAM's neck behind. The published
models' batch norms are folded into the convolutions before them. Axes: `B` images, `h`,
`w` the grid of a stage, `D` its width, `H` heads, `T = window * window` tokens.

    >>> small = dict(widths=(4, 8, 8, 12), depths=(1, 1, 1, 1), heads=(2, 2, 3))
    >>> config = TinyViTConfig(**small, out_channels=6, image_size=32)
    >>> TinyViT(config, rngs=nnx.Rngs(0))(jnp.zeros((2, 32, 32, 3))).shape
    (2, 2, 2, 6)
"""

import dataclasses
import functools
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from snella_jax.models.layers import basic, depthwise, pointwise, stack, windows
from snella_jax.models.layers.activations import Gelu, activated
from snella_jax.models.layers.attention import Implementation, attend
from snella_jax.models.layers.images import (
    PatchGrid,
    check_batch,
    check_input,
    check_kept,
)
from snella_jax.models.layers.memory import ATTENTION, QKV, STREAM
from snella_jax.models.sam.neck import Neck
from snella_jax.ops.names import named, remade

STRIDES = (2, 2, 1)  # of the merging behind each stage but the last


@dataclasses.dataclass(frozen=True)
class TinyViTConfig(PatchGrid):
    """Shape and arithmetic of a `TinyViT`; the defaults are MobileSAM's TinyViT-5M.

    Attributes:
      widths: width of each of the four stages.
      depths: blocks of each stage.
      heads: attention heads of the last three stages.
      windows: side of a window in tokens, of the last three stages.
      mlp_ratio: hidden width of the MLPs, by the stage's width.
      expansion: inner width of the first stage's blocks, by its width.
      out_channels: width of the output.
      image_size: side of the images in pixels, or (height, width); multiples of 16.
      channels: colours of the images.
      norm_eps: epsilon of the norms in the blocks; the neck's is 1e-6.
      stacked: True to stack and scan the blocks of a stage; else they are a list.
      remat: "blocks" keeps only the inputs of blocks for the backward pass.
      memory, activation: as in `vit.ViTConfig`.
      attention: "auto" or "xla", both XLA's implementation: biases need it.
      dtype: dtype of the computation.
      param_dtype: dtype of the weights.
    """

    widths: tuple[int, ...] = (64, 128, 160, 320)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (4, 5, 10)
    windows: tuple[int, ...] = (7, 14, 7)
    mlp_ratio: float = 4.0
    expansion: float = 4.0
    out_channels: int = 256
    image_size: int | tuple[int, int] = 1024
    channels: int = 3
    norm_eps: float = 1e-5
    stacked: bool = True
    remat: Literal["none", "blocks"] = "none"
    memory: str = "usual"
    activation: Gelu = "gelu"
    attention: Implementation = "auto"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    # Pixels of a token of the output: as many as the convolutions stride.
    patch_size: int | tuple[int, int] = dataclasses.field(default=16, init=False)

    def __post_init__(self):
        check_input(self)
        check_kept(self)
        for name, count in (("widths", 4), ("depths", 4), ("heads", 3), ("windows", 3)):
            numbers = getattr(self, name)
            if len(numbers) != count or min(numbers) < 1:
                raise ValueError(
                    f"{name}={numbers}: expected {count} positive numbers."
                )
        if any(w % h for w, h in zip(self.widths[1:], self.heads, strict=True)):
            raise ValueError(f"heads={self.heads} do not divide {self.widths[1:]}.")
        if min(self.out_channels, *self.hidden) < 1:
            raise ValueError(
                f"out_channels={self.out_channels}, mlp_ratio={self.mlp_ratio}, "
                f"expansion={self.expansion}: expected positive numbers."
            )
        self.check_patches()
        if self.attention not in ("auto", "xla"):
            raise ValueError(
                f"attention={self.attention!r}: a TinyViT's attention has biases, for "
                'which only "auto" and "xla" do.'
            )

    @property
    def hidden(self) -> tuple[int, ...]:
        """Hidden width of the blocks of each stage."""
        first, *others = self.widths
        mlps = (round(self.mlp_ratio * width) for width in others)
        return round(self.expansion * first), *mlps


class TinyViT(nnx.Module):
    """Stem, a stage of `MBConv`, three of windowed attention, and neck.

    Attributes:
      blocks: blocks of each stage, as `stack.build` makes them.
      down: from each stage's grid to the next.
    """

    def __init__(self, config: TinyViTConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.patch_embed = Stem(c, rngs=rngs)

        def block(stage: int, rngs: nnx.Rngs) -> nnx.Module:
            return Block(stage, c, rngs=rngs) if stage else MBConv(c, rngs=rngs)

        self.blocks = nnx.List(
            stack.build(functools.partial(block, stage), depth, c.stacked, rngs)
            for stage, depth in enumerate(c.depths)
        )
        self.down = nnx.List(
            Merging(c.widths[stage], c.widths[stage + 1], stride, c, rngs=rngs)
            for stage, stride in enumerate(STRIDES)
        )
        self.neck = Neck(c.widths[-1], c, rngs=rngs)

    def __call__(
        self, images: Float[Array, "B height width C"]
    ) -> Float[Array, "B h w out"]:
        """Returns the embedding of normalised images.

        Raises:
          ValueError: the images do not have the configured height, width or channels.
        """
        c = self.config
        check_batch(images, c)
        x = self.patch_embed(images)
        for stage, blocks in enumerate(self.blocks):
            x = self.down[stage - 1](x) if stage else x
            x = stack.through(blocks, x, None, c.remat, memory=c.memory)
        return self.neck(x)


class Stem(nnx.Module):
    """Two convolutions with stride 2 around a GELU."""

    def __init__(self, config: TinyViTConfig, *, rngs: nnx.Rngs):
        c, width, self.activation = config, config.widths[0], config.activation
        self.conv1 = _conv(c.channels, width // 2, 3, c, rngs, stride=2)
        self.conv2 = _conv(width // 2, width, 3, c, rngs, stride=2)

    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B H/4 W/4 D"]:
        return self.conv2(activated(self.conv1(images), self.activation))


class MBConv(nnx.Module):
    """An inverted bottleneck around a residual, and a GELU."""

    def __init__(self, config: TinyViTConfig, *, rngs: nnx.Rngs):
        c, width, hidden = config, config.widths[0], config.hidden[0]
        self.activation = c.activation
        self.conv1 = _conv(width, hidden, 1, c, rngs)
        self.conv2 = _conv(hidden, hidden, 3, c, rngs, groups=hidden)
        self.conv3 = _conv(hidden, width, 1, c, rngs)

    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        y = activated(self.conv1(x), self.activation)
        y = activated(self.conv2(y), self.activation)
        return activated(x + self.conv3(y), self.activation)


class Merging(nnx.Module):
    """Convolutions to the width of the next stage and, with stride 2, to its grid."""

    def __init__(
        self, n: int, m: int, stride: int, config: TinyViTConfig, *, rngs: nnx.Rngs
    ):
        self.activation = config.activation
        self.conv1 = _conv(n, m, 1, config, rngs)
        self.conv2 = _conv(m, m, 3, config, rngs, stride=stride, groups=m)
        self.conv3 = _conv(m, m, 1, config, rngs)

    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B i j E"]:
        y = activated(self.conv1(x), self.activation)
        return self.conv3(activated(self.conv2(y), self.activation))


class Block(nnx.Module):
    """Attention within windows, a local convolution without a residual, and an MLP."""

    def __init__(self, stage: int, config: TinyViTConfig, *, rngs: nnx.Rngs):
        c, width, hidden = config, config.widths[stage], config.hidden[stage]
        self.window = c.windows[stage - 1]
        self.norm1 = basic.norm(width, c.norm_eps, c, rngs)
        heads = c.heads[stage - 1]
        self.attn = WindowAttention(width, heads, self.window, c, rngs=rngs)
        self.local_conv = _conv(width, width, 3, c, rngs, groups=width)
        self.norm2 = basic.norm(width, c.norm_eps, c, rngs)
        self.mlp = basic.MLP(width, hidden, c, rngs=rngs, init=basic.SMALL)

    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        x = named(x + self.attended(x), STREAM)
        x = named(self.local_conv(x), STREAM)
        return x + self.mlp(self.norm2(x))

    def attended(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        """Attends within windows, of a grid padded with zeros in front of the norm.

        So the tokens of the padding are the norm's bias, and others attend to them.
        """
        _, height, width, features = x.shape
        size = self.window, self.window
        x = self.norm1(windows.padded(x, size))
        _, rows, columns, _ = x.shape
        parts = windows.split(x, size)
        y = self.attn(parts.reshape(-1, self.window**2, features))
        y = windows.joined(y.reshape(parts.shape), rows, columns)
        return y[:, :height, :width]


class WindowAttention(nnx.Module):
    """Multi-head attention, with a bias by distance.

    Attributes:
      bias_table: `[H, T]`, biases for the first token of a window and every other: the
        one for two tokens is that of `(|dy|, |dx|)`, the distance between them.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        window: int,
        config: TinyViTConfig,
        *,
        rngs: nnx.Rngs,
    ):
        self.heads, self.window = heads, window
        self.q, self.k, self.v, self.proj = (
            basic.linear(width, width, config, rngs, init=basic.SMALL) for _ in range(4)
        )
        shape = heads, window * window
        self.bias_table = nnx.Param(jnp.zeros(shape, config.param_dtype))

    def __call__(self, x: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
        """Attends within each of `N` windows."""
        with remade():
            q, k, v = (
                named(layer(x).reshape(*x.shape[:2], self.heads, -1), QKV)
                for layer in (self.q, self.k, self.v)
            )
        bias = self.bias_table[...][:, distances(self.window)]
        y = attend(q, k, v, "xla", bias=bias[None])
        return self.proj(named(y, ATTENTION).reshape(x.shape))


def distances(window: int) -> Int[np.ndarray, "T T"]:
    """Returns the column of a window's table of biases for every two of its tokens.

    >>> distances(2).tolist()
    [[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]]
    """
    rows, columns = np.divmod(np.arange(window * window), window)
    dy, dx = (np.abs(axis[:, None] - axis) for axis in (rows, columns))
    return dy * window + dx


def _conv(
    n: int,
    m: int,
    side: int,
    config: TinyViTConfig,
    rngs: nnx.Rngs,
    *,
    stride: int = 1,
    groups: int = 1,
) -> nnx.Conv:
    """Makes a convolution that pads as PyTorch's does: alike on both sides."""
    own: dict[str, Any] = {}
    if groups > 1:
        own["conv_general_dilated"] = depthwise.shifted
    elif side == 1:
        own["conv_general_dilated"] = pointwise.multiplied
    return nnx.Conv(
        n,
        m,
        kernel_size=(side, side),
        strides=(stride, stride),
        padding=((side // 2, side // 2),) * 2,
        feature_group_count=groups,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
        **own,
    )
