"""The Vision Transformer (Dosovitskiy et al., arXiv 2010.11929), pre-norm, in Flax NNX.

The blocks are built stacked (every variable has a leading axis of `depth`) and run by
`jax.lax.scan`: one block is compiled, whatever the depth. With `stacked=False` they are
an `nnx.List` and run one after the other, as in most NNX models. Axes: `B` images, `T`
tokens (class token first), `D` width, `H` heads, `d = D / H`.

    >>> from flax import nnx
    >>> from snella_jax.models import vit
    >>> model = vit.create("vit_ti16", num_classes=10, image_size=32, rngs=nnx.Rngs(0))
    >>> model(jax.numpy.zeros((2, 32, 32, 3))).shape
    (2, 10)
"""

import operator
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from snella_jax.models.layers import basic, preset, stack
from snella_jax.models.layers.attention import Implementation, attend, attention_weights
from snella_jax.models.layers.images import Classifier, check_batch
from snella_jax.models.layers.memory import ATTENTION, QKV, STREAM
from snella_jax.models.vit.config import PRESETS, ViTConfig
from snella_jax.ops.names import OUTPUTS, named, remade


def create(name: str, *, rngs: nnx.Rngs, **overrides: Any) -> "ViT":
    """Makes a randomly initialised preset, any field of its `ViTConfig` overridden.

    Raises:
      ValueError: `name` is not a preset; the message has the nearest ones.
    """
    where = "snella_jax.models.vit.PRESETS"
    return ViT(preset.named(name, PRESETS, "ViT", where, **overrides), rngs=rngs)


class ViT(Classifier):
    """Patch embedding, `depth` scanned blocks, a final norm and a linear head."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        small = nnx.initializers.truncated_normal(0.02)
        tokens = c.grid[0] * c.grid[1] + c.class_token

        self.patch_embed = basic.convolution(c.channels, c.width, c.patch_hw, c, rngs)
        if c.class_token:
            self.cls_token = nnx.Param(
                small(rngs.params(), (1, 1, c.width), c.param_dtype)
            )
        self.pos_embed = nnx.Param(
            small(rngs.params(), (1, tokens, c.width), c.param_dtype)
        )
        self.blocks = stack.build(
            lambda rngs: Block(c, rngs=rngs), c.depth, c.stacked, rngs
        )
        self.norm = _norm(c, rngs)
        if c.num_classes:
            self.head = basic.head(c.width, c, rngs)

    def pooled(
        self, images: Float[Array, "B height width C"], key: PRNGKeyArray | None = None
    ) -> Float[Array, "B D"]:
        """Returns the input of the head; arguments and errors as in the call."""
        return self.pool(self.features(images, key))

    def pool(self, tokens: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        """Returns the class token, or the mean of those of the patches."""
        if self.config.pool == "cls":
            return tokens[:, 0]
        return tokens[:, int(self.config.class_token) :].mean(1)

    def features(
        self,
        images: Float[Array, "B height width C"],
        key: PRNGKeyArray | None = None,
        *,
        layers: tuple[int, ...] | None = None,
    ) -> Any:
        """Returns the tokens `[B, T, D]` after the last block and the final norm.

        Args:
          images, key: as in the call.
          layers: indices of blocks, from 0; then a tuple with the tokens after each of
            them instead, before any norm.

        Raises:
          ValueError: as the call, or a layer that does not exist.
        """
        config, keep = self.config, self._checked(layers or ())
        run = _scan if config.stacked else _unroll
        tokens, kept = run(self.blocks, self._embed(images), config, key, keep)
        return self.norm(tokens) if layers is None else tuple(kept[i] for i in keep)

    def attention_maps(
        self, images: Float[Array, "B height width C"], *, layers: tuple[int, ...]
    ) -> tuple[Float[Array, "B H T T"], ...]:
        """Returns what each token (rows) attends to in some blocks, in float32.

        Args:
          images: as in the call.
          layers: indices of blocks, from 0.

        Raises:
          ValueError: as the call, or a layer that does not exist.
        """
        maps = self._checked(layers)
        before = tuple(layer - 1 for layer in maps if layer)
        tokens = dict(zip(before, self.features(images, layers=before), strict=True))
        tokens[-1] = self._embed(images)
        return tuple(
            stack.row(self.blocks, i).attention_map(tokens[i - 1]) for i in maps
        )

    def _checked(self, layers: Iterable[int]) -> tuple[int, ...]:
        indices = tuple(operator.index(layer) for layer in layers)
        if not all(0 <= index < self.config.depth for index in indices):
            last = self.config.depth - 1
            raise ValueError(f"layers={indices}: there are 0 to {last}.")
        return indices

    def _embed(self, images: Array) -> Array:
        c = self.config
        check_batch(images, c)
        x = self.patch_embed(images)
        x = x.reshape(x.shape[0], -1, c.width)  # [B, grid_h * grid_w, D]
        if c.class_token:
            cls = self.cls_token[...].astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, c.width)), x], 1)
        return x + self.pos_embed[...].astype(x.dtype)


class Block(nnx.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.norm1 = _norm(config, rngs)
        self.attn = Attention(config, rngs=rngs)
        self.norm2 = _norm(config, rngs)
        hidden = config.mlp_dim or 4 * config.width
        self.mlp = basic.MLP(config.width, hidden, config, rngs=rngs)
        if config.layer_scale is not None:
            shape, scale = (config.width,), config.layer_scale
            # Of two arrays: a step cannot donate one twice.
            self.scale1, self.scale2 = (
                nnx.Param(jnp.full(shape, scale, config.param_dtype)) for _ in range(2)
            )
        self.layer_scale = config.layer_scale is not None

    def __call__(
        self, x: Float[Array, "B T D"], drop: tuple[Array, Array] | None = None
    ) -> Float[Array, "B T D"]:
        """Runs the block; `drop` is None, or a key and the rate of stochastic depth."""
        x = x + self._branch(self.attn(self.norm1(x)), "scale1", drop, 0)
        x = named(x, STREAM)
        return x + self._branch(self.mlp(self.norm2(x)), "scale2", drop, 1)

    def attention_map(self, x: Float[Array, "B T D"]) -> Float[Array, "B H T T"]:
        """Returns what each token of the block's input attends to, in float32."""
        return self.attn.map(self.norm1(x))

    def _branch(self, y: Array, scale: str, drop: Any, salt: int) -> Array:
        if self.layer_scale:
            y = basic.scaled(named(y, OUTPUTS), getattr(self, scale)[...])
        return stack.dropped(y, drop, salt)


class Attention(nnx.Module):
    """Multi-head attention with separate query, key and value matrices."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.heads = config.heads
        self.implementation: Implementation = config.attention
        width = config.width
        self.query, self.key, self.value, self.out = (
            basic.linear(width, width, config, rngs) for _ in range(4)
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        seen: Float[Array, "B S D"] | None = None,
        length: Int[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        """Lets tokens attend to each other, or to those `seen`.

        With a `length`, only the first `length` of these.
        """
        seen = x if seen is None else seen
        with remade():
            q = named(self._split(self.query(x)), QKV)
            k, v = (named(self._split(f(seen)), QKV) for f in (self.key, self.value))
        y = attend(q, k, v, self.implementation, length)
        return self.out(named(y, ATTENTION).reshape(x.shape))

    def map(self, x: Float[Array, "B T D"]) -> Float[Array, "B H T T"]:
        """Returns the weights with which the call sums the values, in float32."""
        return attention_weights(self._split(self.query(x)), self._split(self.key(x)))

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], self.heads, -1)  # [B, T, H, d]


Kept = dict[int, Array]  # tokens by the index of the block that they come after


def _scan(
    blocks: Block,
    x: Array,
    config: ViTConfig,
    key: PRNGKeyArray | None,
    keep: tuple[int, ...],
) -> tuple[Array, Kept]:
    """Returns the tokens after the last block, and those after each of `keep`."""
    graphdef, state = nnx.split(blocks)
    one = stack.call(graphdef, config.remat, config.memory, scanned=True)
    wanted = sorted(set(keep))
    # The place of each block's tokens among those kept; past the end for the others.
    place = jnp.array([wanted.index(i) if i in wanted else len(wanted)
                       for i in range(config.depth)])  # fmt: skip

    def body(carry, layer):
        (x, kept), (state, drop, place) = carry, layer
        x = one(state, x, drop)
        return (x, kept.at[place].set(x, mode="drop") if wanted else kept), None

    kept: Any = jnp.zeros((len(wanted), *x.shape), x.dtype) if wanted else None
    [drops] = stack.drops(key, config.drop_path, [(config.depth,)])
    (x, kept), _ = jax.lax.scan(body, (x, kept), (state, drops, place))
    return x, dict(zip(wanted, kept, strict=True)) if wanted else {}


def _unroll(
    blocks: nnx.List,
    x: Array,
    config: ViTConfig,
    key: PRNGKeyArray | None,
    keep: tuple[int, ...],
) -> tuple[Array, Kept]:
    [drops], kept = stack.drops(key, config.drop_path, [(config.depth,)]), {}
    for index, block in enumerate(blocks):
        graphdef, state = nnx.split(block)
        drop = jax.tree.map(lambda leaf, i=index: leaf[i], drops)
        run = stack.call(graphdef, config.remat, config.memory, scanned=False)
        x = run(state, x, drop)
        if index in keep:
            kept[index] = x
    return x, kept


def _norm(config: ViTConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return basic.norm(config.width, config.norm_eps, config, rngs)
