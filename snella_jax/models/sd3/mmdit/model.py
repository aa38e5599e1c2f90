"""The MMDiT of Stable Diffusion 3 (Esser et al., arXiv 2403.03206), in Flax NNX.

Two streams, the image's patches and the text's tokens, each with weights of its own,
and one attention over both. Axes: `B` images, `h`, `w` their latents, `C` channels of
these, `T` patches, `S` tokens of the text, `D` width, `H` heads of `d` numbers, `E`
width of the text's tokens and `P` of its pooled embedding.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from snella_jax.models.sd3 import mmdit
    >>> sizes = {"width": 32, "depth": 2, "heads": 4, "channels": 4, "positions": 12}
    >>> config = mmdit.MMDiTConfig(**sizes, context_dim=20, pooled_dim=12)
    >>> model = mmdit.MMDiT(config, rngs=nnx.Rngs(0))
    >>> latents, context, pooled = map(jnp.ones, ((2, 8, 12, 4), (2, 5, 20), (2, 12)))
    >>> model(latents, jnp.array([500.0, 731.25]), context, pooled).shape
    (2, 8, 12, 4)
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from snella_jax.models.layers import basic, preset, stack
from snella_jax.models.layers.activations import activated, gelu_tanh, gelu_tanh2
from snella_jax.models.layers.attention import attend
from snella_jax.models.layers.memory import ATTENTION, QKV, STREAM
from snella_jax.models.layers.norms import normalised
from snella_jax.models.sd3.mmdit.config import PRESETS, MMDiTConfig
from snella_jax.ops.names import OUTPUTS, named, remade

FREQUENCIES = 128  # of the time's embedding, cosines and then sines
LONGEST = 10_000.0  # period in the embeddings of time and place, over 2 pi


class Streams(NamedTuple):
    """Tokens of the image, `[B, T, D]`, and of the text, `[B, S, D]`."""

    image: Array
    context: Array


def create(name: str, *, rngs: nnx.Rngs, **overrides: Any) -> "MMDiT":
    """Makes a randomly initialised preset, any field of its config overridden.

    Raises:
      ValueError: `name` is not a preset; the message has the nearest ones.
    """
    where = "snella_jax.models.sd3.mmdit.PRESETS"
    config = preset.named(name, PRESETS, "MMDiT", where, **overrides)
    return MMDiT(config, rngs=rngs)


class MMDiT(nnx.Module):
    """Patches and text, `depth - 1` scanned blocks and a last one, and a linear head.

    Attributes:
      default_targets: regex of the projections of attention in both streams, but for
        the one that no gradient reaches.
      all_targets: regex of these and of the MLPs.
      default_trainable: regex of what trains besides, nothing.
      no_gradient: why a layer's gradient is always 0, by its path.
      positions: the published table, `[positions, positions, D]`; no parameter.
      blocks: all blocks but the last.
      last: the block after whose attention the text's tokens are dropped.
    """

    default_targets: ClassVar[str] = (
        r"(blocks(/\d+)?|last)/image/attn/(q|k|v|proj)"
        r"|blocks(/\d+)?/context/attn/(q|k|v|proj)|last/context/attn/(k|v)"
    )
    all_targets: ClassVar[str] = (
        rf"{default_targets}|(blocks(/\d+)?|last)/(image|context)/mlp/(fc1|fc2)"
    )
    default_trainable: ClassVar[str] = ""
    no_gradient: ClassVar[Mapping[str, str]] = {
        "last/context/attn/q": "the text's tokens are dropped after the last block's "
        "attention, so what its queries find is never seen"
    }

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        side = (c.patch, c.patch)
        self.patch = basic.convolution(c.channels, c.width, side, c, rngs)
        self.positions = basic.Constant(table(c.positions, c.width, c.param_dtype))
        self.time = Embedding(2 * FREQUENCIES, c.width, c, rngs=rngs)
        self.pooled = Embedding(c.pooled_dim, c.width, c, rngs=rngs)
        self.context = basic.linear(c.context_dim, c.width, c, rngs)
        self.blocks = stack.build(
            lambda rngs: Block(c, rngs=rngs), c.depth - 1, c.stacked, rngs
        )
        self.last = Block(c, last=True, rngs=rngs)
        self.modulation = basic.linear(c.width, 2 * c.width, c, rngs, init=basic.SMALL)
        numbers = c.patch**2 * c.channels
        self.head = basic.linear(c.width, numbers, c, rngs, init=basic.SMALL)

    def __call__(
        self,
        latents: Float[Array, "B h w C"],
        timestep: Float[Array, " B"],
        context: Float[Array, "B S E"],
        pooled: Float[Array, "B P"],
    ) -> Float[Array, "B h w C"]:
        """Returns the velocity, noise minus image, in float32.

        Args:
          latents: noisy latents; height and width are multiples of the patch.
          timestep: 1000 sigma, from 0 to 1000, float32.
          context: tokens of the text.
          pooled: pooled embedding of the text.

        Raises:
          ValueError: one of them has another shape, or the image is larger than the
            table of positions.
          TypeError: `timestep` is not float32, as 16 bits do not tell times apart.
        """
        c = self.config
        _check(latents, timestep, context, pooled, c)
        batch, height, width, _ = latents.shape
        x = self.patch(latents)
        x = x + centre(self.positions[...], *x.shape[1:3]).astype(x.dtype)[None]
        streams = Streams(x.reshape(batch, -1, c.width), self.context(context))
        condition = self.time(waves(timestep)) + self.pooled(pooled)
        condition = jax.nn.silu(condition)
        x = self._through(streams, condition).image
        shift, scale = jnp.split(self.modulation(condition), 2, -1)
        x = self.head(modulated(x, shift, scale, c.norm_eps))
        x = x.reshape(batch, height // c.patch, width // c.patch, c.patch, c.patch, -1)
        return x.swapaxes(2, 3).reshape(latents.shape).astype(jnp.float32)

    def _through(self, streams: Streams, condition: Float[Array, "B D"]) -> Streams:
        """Calls every block."""
        how = self.config.remat, self.config.memory
        streams = stack.through(
            self.blocks, streams, None, how[0], (condition,), memory=how[1]
        )
        graphdef, state = nnx.split(self.last)
        return stack.call(graphdef, *how, scanned=False)(state, streams, condition)


class Block(nnx.Module):
    """One attention over both streams, and an MLP for each.

    Attributes:
      image, context: layers of each stream; those of the text in the last block end
        with the keys and values.
    """

    def __init__(self, config: MMDiTConfig, *, last: bool = False, rngs: nnx.Rngs):
        self.config = config
        self.image = Stream(config, rngs=rngs)
        self.context = Stream(config, ends=last, rngs=rngs)

    def __call__(self, streams: Streams, condition: Float[Array, "B D"]) -> Streams:
        """Returns the streams after the block; in the last one, the text as it came.

        Args:
          streams: tokens of both.
          condition: time and pooled text, activated.
        """
        image, context = self.image, self.context
        of_image, of_context = image.parts(condition), context.parts(condition)
        normed_image = image.normed(streams.image, of_image)
        normed_context = context.normed(streams.context, of_context)
        keys, values = (
            named(jnp.concatenate(pair, 1), QKV)
            for pair in zip(
                image.attn.seen(normed_image),
                context.attn.seen(normed_context),
                strict=True,
            )
        )
        patches = streams.image.shape[1]
        queries = image.attn.queries(normed_image)
        if not context.ends:
            own = context.attn.queries(normed_context)
            queries = jnp.concatenate([queries, own], 1)
        queries = named(queries, QKV)
        found = attend(queries, keys, values, self.config.attention)
        found = named(found, ATTENTION)
        found = found.reshape(*found.shape[:2], -1)
        x = image.after(streams.image, found[:, :patches], of_image)
        if context.ends:
            return Streams(x, streams.context)
        return Streams(
            x, context.after(streams.context, found[:, patches:], of_context)
        )


class Stream(nnx.Module):
    """Layers of one stream in a block.

    Attributes:
      ends: True if nothing of the stream is seen after the attention.
    """

    def __init__(self, config: MMDiTConfig, *, ends: bool = False, rngs: nnx.Rngs):
        c, self.eps, self.ends = config, config.norm_eps, ends
        count = 2 if ends else 6
        self.modulation = basic.linear(
            c.width, count * c.width, c, rngs, init=basic.SMALL
        )
        self.attn = Attention(c, ends=ends, rngs=rngs)
        if not ends:
            self.mlp = MLP(c.width, c.mlp_ratio * c.width, c, rngs=rngs)

    def parts(self, condition: Float[Array, "B D"]) -> list[Float[Array, "B D"]]:
        """Returns shift, scale and gate of the attention, then those of the MLP.

        The first two alone where the stream ends.
        """
        parts = named(self.modulation(condition), OUTPUTS)
        return jnp.split(parts, 2 if self.ends else 6, -1)

    def normed(
        self, x: Float[Array, "B T D"], parts: list[Float[Array, "B D"]]
    ) -> Float[Array, "B T D"]:
        """Returns the tokens as the attention sees them."""
        return modulated(x, parts[0], parts[1], self.eps)

    def after(
        self,
        x: Float[Array, "B T D"],
        found: Float[Array, "B T D"],
        parts: list[Float[Array, "B D"]],
    ) -> Float[Array, "B T D"]:
        """Adds what attention found, and the MLP, each behind its gate."""
        _, _, gate, shift, scale, mlp_gate = parts
        y = named(self.attn.proj(found), OUTPUTS)
        x = named(x + gate[:, None] * y, STREAM)
        y = named(self.mlp(modulated(x, shift, scale, self.eps)), OUTPUTS)
        return x + mlp_gate[:, None] * y


class Attention(nnx.Module):
    """Projections of one stream."""

    def __init__(self, config: MMDiTConfig, *, ends: bool, rngs: nnx.Rngs):
        width, self.heads = config.width, config.heads
        self.q, self.k, self.v = (
            basic.linear(width, width, config, rngs) for _ in range(3)
        )
        if not ends:
            self.proj = basic.linear(width, width, config, rngs)

    def queries(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H d"]:
        """Returns the queries."""
        with remade():
            return self._split(self.q(x))

    def seen(self, x: Float[Array, "B T D"]) -> tuple[Array, Array]:
        """Returns keys and values, `[B, T, H, d]`."""
        with remade():
            return self._split(self.k(x)), self._split(self.v(x))

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], self.heads, -1)


class Embedding(nnx.Module):
    """Two linear layers around a SiLU."""

    def __init__(self, n: int, m: int, config: MMDiTConfig, *, rngs: nnx.Rngs):
        self.fc1 = basic.linear(n, m, config, rngs)
        self.fc2 = basic.linear(m, m, config, rngs)

    def __call__(self, x: Float[Array, "B n"]) -> Float[Array, "B m"]:
        return self.fc2(jax.nn.silu(self.fc1(x)))


class MLP(basic.MLP):
    """MLP of two linear layers around the tanh approximation of a GELU."""

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        with remade():
            hidden = self.fc1(x)
        with remade(self.activation == "gelu"):
            y = activated(hidden, self.activation, gelu_tanh, gelu_tanh2)
            return self.fc2(y)


def modulated(
    x: Float[Array, "B T D"],
    shift: Float[Array, "B D"],
    scale: Float[Array, "B D"],
    eps: float,
) -> Float[Array, "B T D"]:
    """Normalises tokens, then scales and shifts them as their image's condition says.

    >>> x, one = jnp.array([[[1.0, 1, 3, 3]]]), jnp.ones((1, 4))
    >>> modulated(x, shift=one, scale=one, eps=1e-6).astype(int).tolist()
    [[[0, 0, 2, 2]]]
    """
    normed = normalised(x, None, None, eps)
    return normed * (1 + scale[:, None]) + shift[:, None]


def waves(timestep: Float[Array, " B"]) -> Float[Array, "B 256"]:
    """Returns cosines, then sines, of a time at 128 frequencies from 1 to 1/10000.

    >>> waves(jnp.zeros(1))[0, jnp.array([0, 127, 128, 255])].tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    steps = jnp.arange(FREQUENCIES, dtype=jnp.float32) / FREQUENCIES
    angles = timestep[:, None] * jnp.exp(-math.log(LONGEST) * steps)[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], 1)


def table(side: int, width: int, dtype: Any) -> Float[Array, "side side width"]:
    """Returns positions of a new model: sines and cosines of column, then of row.

    A patch is 1/3 wide, as in diffusers' table for SD3; published ones are loaded.

    >>> (1000 * table(6, 8, jnp.float32)[0, 3]).astype(int).tolist()
    [841, 9, 540, 999, 0, 0, 1000, 1000]
    """
    quarter = width // 4
    steps = jnp.arange(quarter, dtype=jnp.float32) / quarter
    places = jnp.arange(side, dtype=jnp.float32) / 3
    angles = places[:, None] * jnp.exp(-math.log(LONGEST) * steps)[None]
    one = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], 1)  # [side, width / 2]
    shape = side, side, width // 2
    both = [jnp.broadcast_to(axis, shape) for axis in (one[None], one[:, None])]
    return jnp.concatenate(both, -1).astype(dtype)


def centre(
    positions: Float[Array, "side side D"], height: int, width: int
) -> Float[Array, "height width D"]:
    """Returns the centre of the table, as many rows and columns as an image has.

    >>> centre(jnp.arange(16).reshape(4, 4, 1), 1, 2)[..., 0].tolist()
    [[5, 6]]
    """
    side = len(positions)
    top, left = (side - height) // 2, (side - width) // 2
    return positions[top : top + height, left : left + width]


def _check(
    latents: Array, timestep: Array, context: Array, pooled: Array, c: MMDiTConfig
) -> None:
    if jnp.ndim(latents) != 4 or latents.shape[-1] != c.channels:
        raise ValueError(
            f"latents have shape {jnp.shape(latents)}: expected "
            f"[B, h, w, {c.channels}]."
        )
    batch, *sides, _ = latents.shape
    if any(s % c.patch or not 0 < s <= c.patch * c.positions for s in sides):
        raise ValueError(
            f"latents have shape {latents.shape}: expected height and width that "
            f"patch={c.patch} divides, of at most {c.patch * c.positions}."
        )
    if jnp.result_type(timestep) != jnp.float32:
        raise TypeError(f"timestep is {jnp.result_type(timestep)}: expected float32.")
    tokens = context.shape[1] if jnp.ndim(context) == 3 else "S"
    for name, array, shape in (
        ("timestep", timestep, (batch,)),
        ("context", context, (batch, tokens, c.context_dim)),
        ("pooled", pooled, (batch, c.pooled_dim)),
    ):
        if jnp.shape(array) != shape:
            raise ValueError(
                f"{name} has shape {jnp.shape(array)}: expected "
                f"[{', '.join(map(str, shape))}]."
            )
