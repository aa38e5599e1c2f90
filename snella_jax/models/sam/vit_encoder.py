"""SAM's image encoder: a plain ViT of which most blocks attend in windows.

Kirillov et al., arXiv 2304.02643, and Li et al., arXiv 2203.16527. Blocks of a kind,
"windowed" or "whole" (over the whole grid), are stacked and scanned: one of each is
compiled. Axes: `B` images, `h`, `w` the grid, `D` width, `H` heads, `d = D / H`.

    >>> config = ViTEncoderConfig(16, depth=3, heads=2, global_blocks=(1,),
    ...                           window=3, image_size=80, out_channels=8)
    >>> encoder = ViTEncoder(config, rngs=nnx.Rngs(0))
    >>> encoder(jnp.zeros((2, 80, 80, 3))).shape
    (2, 5, 5, 8)
    >>> encoder.blocks["windowed"].attn.rel_pos_h.shape
    (2, 5, 8)
"""

import collections
import dataclasses
import itertools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from snella_jax.models.layers import basic, stack, windows
from snella_jax.models.layers.activations import Gelu
from snella_jax.models.layers.attention import Implementation, check_implementation
from snella_jax.models.layers.images import (
    PatchGrid,
    check_batch,
    check_input,
    check_kept,
)
from snella_jax.models.layers.memory import ATTENTION, QKV, STREAM
from snella_jax.models.sam import relative
from snella_jax.models.sam.neck import Neck
from snella_jax.ops.names import named, remade

Kind = Literal["windowed", "whole"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # in the order of a group
SMALL = nnx.initializers.truncated_normal(0.02)


@dataclasses.dataclass(frozen=True)
class ViTEncoderConfig(PatchGrid):
    """Shape and arithmetic of a `ViTEncoder`.

    Attributes:
      width: `D`, the width of a token.
      depth: number of blocks.
      heads: number of attention heads; divides `width`.
      global_blocks: indices of the blocks that attend over the whole grid, ascending.
      mlp_dim: hidden width of the MLP; None for `4 * width`.
      window: side of the other blocks' windows in tokens.
      out_channels: channels of the output.
      patch_size: side of a patch in pixels, or (height, width).
      image_size: side of the images in pixels, or (height, width); a multiple of
        `patch_size`.
      channels: channels of the images.
      norm_eps: epsilon of the blocks' norms.
      stacked: True to stack and scan the blocks of each kind; else they are lists.
      remat, memory, activation, attention, dtype, param_dtype: as in `vit.ViTConfig`.
    """

    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    mlp_dim: int | None = None
    window: int = 14
    out_channels: int = 256
    patch_size: int | tuple[int, int] = 16
    image_size: int | tuple[int, int] = 1024
    channels: int = 3
    norm_eps: float = 1e-6
    stacked: bool = True
    remat: Literal["none", "blocks"] = "none"
    memory: str = "usual"
    activation: Gelu = "gelu"
    attention: Implementation = "auto"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        check_input(self)
        check_kept(self)
        for name in ("width", "depth", "heads", "window", "out_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}.")
        if [*self.global_blocks] != sorted(
            {*self.global_blocks} & {*range(self.depth)}
        ):
            raise ValueError(
                f"global_blocks={self.global_blocks}: expected indices of the "
                f"{self.depth} blocks, ascending."
            )
        check_implementation(self.attention)
        self.check_patches()

    @property
    def attention_widths(self) -> tuple[int, int]:
        """Channels of a head in fused attention, in windows and over the whole grid.

        >>> ViTEncoderConfig(768, 12, 12, global_blocks=(2, 5, 8, 11)).attention_widths
        (96, 192)
        """
        head_dim, window = self.width // self.heads, (self.window, self.window)
        windowed, whole = (
            relative.extended_width(head_dim, grid) for grid in (window, self.grid)
        )
        return windowed, whole

    @property
    def places(self) -> tuple[tuple[Kind, int], ...]:
        """Kind of each block, and its row among those of its kind.

        >>> ViTEncoderConfig(16, depth=3, heads=2, global_blocks=(1,)).places
        (('windowed', 0), ('whole', 0), ('windowed', 1))
        """
        rows, found = collections.Counter(), []
        for index in range(self.depth):
            kind: Kind = "whole" if index in self.global_blocks else "windowed"
            found.append((kind, rows[kind]))
            rows[kind] += 1
        return tuple(found)


class ViTEncoder(nnx.Module):
    """Patch embedding with positions, blocks of two kinds, and a convolutional neck.

    Attributes:
      blocks: blocks of each kind, "windowed" and "whole" (one may be missing), as
        `stack.build` makes them.
    """

    def __init__(self, config: ViTEncoderConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.patch_embed = basic.convolution(c.channels, c.width, c.patch_hw, c, rngs)
        shape = 1, *c.grid, c.width
        self.pos_embed = nnx.Param(SMALL(rngs.params(), shape, c.param_dtype))
        counts = collections.Counter(kind for kind, _ in c.places)
        grids = {"windowed": (c.window, c.window), "whole": c.grid}

        def build(kind: str) -> Any:
            def make(rngs: nnx.Rngs) -> Block:
                return Block(c, grids[kind], rngs=rngs)

            return stack.build(make, counts[kind], c.stacked, rngs)

        self.blocks = nnx.Dict({kind: build(kind) for kind in counts})
        self.neck = Neck(c.width, c, rngs=rngs)

    def __call__(
        self, images: Float[Array, "B height width C"]
    ) -> Float[Array, "B h w out"]:
        """Returns the embeddings of normalised, padded images.

        Raises:
          ValueError: the images do not have the configured height, width or channels.
        """
        check_batch(images, self.config)
        x = self.patch_embed(images)
        x = x + self.pos_embed[...].astype(x.dtype)
        run = _scan if self.config.stacked else _unroll
        return self.neck(run(self.blocks, x, self.config))


class Block(nnx.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(
        self, config: ViTEncoderConfig, grid: tuple[int, int], *, rngs: nnx.Rngs
    ):
        width, eps = config.width, config.norm_eps
        self.norm1 = basic.norm(width, eps, config, rngs)
        self.attn = Attention(config, grid, rngs=rngs)
        self.norm2 = basic.norm(width, eps, config, rngs)
        hidden = config.mlp_dim or 4 * width
        self.mlp = basic.MLP(width, hidden, config, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        x = named(x + self.attn(self.norm1(x)), STREAM)
        return x + self.mlp(self.norm2(x))


class Attention(nnx.Module):
    """Multi-head attention with relative positions, over grids of one size.

    A larger input is divided into such grids, windows, and padded with zeros where
    they do not: the tokens of these zeros are attended to as all others are.
    """

    def __init__(
        self, config: ViTEncoderConfig, grid: tuple[int, int], *, rngs: nnx.Rngs
    ):
        self.heads, self.grid = config.heads, grid
        self.implementation: Implementation = config.attention
        width, dtype = config.width, config.param_dtype
        self.q, self.k, self.v, self.proj = (
            basic.linear(width, width, config, rngs) for _ in range(4)
        )
        shapes = [(2 * side - 1, width // config.heads) for side in grid]
        self.rel_pos_h, self.rel_pos_w = (
            nnx.Param(SMALL(rngs.params(), shape, dtype)) for shape in shapes
        )

    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        padded = windows.padded(x, self.grid)
        split = windows.split(padded, self.grid)
        own = split.reshape(-1, *split.shape[2:])  # [B * windows, *grid, D]
        heads = *own.shape[:3], self.heads, -1
        with remade():
            q, k, v = (
                named(f(own).reshape(heads), QKV) for f in (self.q, self.k, self.v)
            )
        rows, columns = (
            table[...].astype(q.dtype) for table in (self.rel_pos_h, self.rel_pos_w)
        )
        y = relative.attend(q, k, v, rows, columns, self.implementation)
        y = self.proj(named(y, ATTENTION).reshape(own.shape)).reshape(split.shape)
        y = windows.joined(y, *padded.shape[1:3])
        return y[:, : x.shape[1], : x.shape[2]]


def _scan(blocks: nnx.Dict, x: Array, config: ViTEncoderConfig) -> Array:
    """Scans groups of blocks, and inside a group the blocks of each kind."""
    split = {kind: nnx.split(own) for kind, own in blocks.items()}
    calls = {
        kind: stack.call(graphdef, config.remat, config.memory, scanned=True)
        for kind, (graphdef, _) in split.items()
    }

    def group(x: Array, states: dict[str, nnx.State]) -> tuple[Array, None]:
        for kind in (kind for kind in KINDS if kind in states):
            one = calls[kind]
            x, _ = jax.lax.scan(lambda x, s, f=one: (f(s, x), None), x, states[kind])
        return x, None

    done = collections.Counter()
    for sizes, count in groups(config):
        states = {}
        for kind, size in sizes.items():
            start, done[kind] = done[kind], done[kind] + count * size
            own = slice(start, done[kind]), (count, size)
            states[kind] = jax.tree.map(
                lambda leaf, o=own: _rows(leaf, *o), split[kind][1]
            )
        x, _ = jax.lax.scan(group, x, states)
    return x


def _rows(leaf: Array, rows: slice, shape: tuple[int, int]) -> Array:
    return leaf[rows].reshape(*shape, *leaf.shape[1:])


def groups(config: ViTEncoderConfig) -> list[tuple[dict[str, int], int]]:
    """Returns how many blocks of each kind follow each other, and how often they do.

    A group ends with its only whole block, or at the end.

    >>> config = ViTEncoderConfig(16, depth=8, heads=2, global_blocks=(2, 5))
    >>> groups(config)
    [({'windowed': 2, 'whole': 1}, 2), ({'windowed': 2}, 1)]
    """
    ends = [-1, *config.global_blocks, config.depth]
    gaps = [end - start - 1 for start, end in itertools.pairwise(ends)]
    found = [{"windowed": gap, "whole": 1} for gap in gaps]
    found[-1]["whole"] = 0
    kept = ({kind: size for kind, size in one.items() if size} for one in found)
    return [(one, len([*same])) for one, same in itertools.groupby(kept) if one]


def _unroll(blocks: nnx.Dict, x: Array, config: ViTEncoderConfig) -> Array:
    for kind, row in config.places:
        graphdef, state = nnx.split(blocks[kind][row])
        run = stack.call(graphdef, config.remat, config.memory, scanned=False)
        x = run(state, x)
    return x
