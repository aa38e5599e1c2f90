"""The encoder of T5 (Raffel et al., arXiv 1910.10683), version 1.1, in Flax NNX.

Pre-norm blocks with RMSNorm, attention without a scale and with learnt biases by
distance, an MLP gated by a GELU (Shazeer, arXiv 2002.05202), and no other biases.
Blocks are stacked and scanned. Axes: `B` texts, `T` tokens, `D` width, `H` heads of `d`
numbers.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from snella_jax.models.sd3 import t5
    >>> def hidden(tokens):
    ...     return t5.T5(t5.PRESETS["t5_v1_1_xxl"], rngs=nnx.Rngs(0))(tokens)
    >>> nnx.eval_shape(hidden, jnp.zeros((2, 77), int)).shape
    (2, 77, 4096)
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from snella_jax.models.layers import basic, stack
from snella_jax.models.layers.attention import attend
from snella_jax.models.layers.norms import RMSNorm
from snella_jax.models.sd3.t5.config import T5Config


class T5(nnx.Module):
    """Embedding, `depth` scanned blocks and a final norm.

    Attributes:
      positions: biases of attention by bucket of distance, `[buckets, H]`, which all
        blocks share.
    """

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        c = self.config = config
        self.embed = _embedding(c.vocab_size, c.width, c, rngs)
        self.positions = _embedding(c.buckets, c.heads, c, rngs)
        self.blocks = stack.build(
            lambda rngs: Block(c, rngs=rngs), c.depth, c.stacked, rngs
        )
        self.norm = _norm(c, rngs)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Returns the encoded tokens, in the dtype of the computation.

        Every token sees all of them, the padding too, as Stable Diffusion 3 has it.

        Raises:
          TypeError: `tokens` are no integers.
          ValueError: they have another shape.
        """
        if not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
            raise TypeError(f"tokens are {jnp.result_type(tokens)}: expected integers.")
        if jnp.ndim(tokens) != 2:
            raise ValueError(f"tokens have shape {jnp.shape(tokens)}: expected [B, T].")
        c = self.config
        places = buckets(tokens.shape[1], c.buckets, c.distance)
        bias = self.positions(jnp.asarray(places)).transpose(2, 0, 1)[None]
        x = stack.through(self.blocks, self.embed(tokens), None, c.remat, (bias,))
        return self.norm(x)


class Block(nnx.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.norm1 = _norm(config, rngs)
        self.attn = Attention(config, rngs=rngs)
        self.norm2 = _norm(config, rngs)
        self.mlp = GatedMLP(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], bias: Float[Array, "1 H T T"]
    ) -> Float[Array, "B T D"]:
        """Runs the block; `bias` is added to the logits of attention."""
        x = x + self.attn(self.norm1(x), bias)
        return x + self.mlp(self.norm2(x))


class Attention(nnx.Module):
    """Attention of all tokens to all, whose logits are not scaled."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.heads, inner = config.heads, config.heads * config.head_dim
        self.q = _linear(config.width, inner, config, rngs)
        self.k = _linear(config.width, inner, config, rngs)
        self.v = _linear(config.width, inner, config, rngs)
        self.o = _linear(inner, config.width, config, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], bias: Float[Array, "1 H T T"]
    ) -> Float[Array, "B T D"]:
        """Mixes tokens; in XLA's implementation, as no other knows a bias."""
        q, k, v = (
            f(x).reshape(*x.shape[:2], self.heads, -1) for f in (self.q, self.k, self.v)
        )
        y = attend(q, k, v, "xla", bias=bias, scale=1.0)
        return self.o(y.reshape(*x.shape[:2], -1))


class GatedMLP(nnx.Module):
    """MLP whose hidden features are gated by the tanh approximation of a GELU."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.gate = _linear(config.width, config.mlp_dim, config, rngs)
        self.up = _linear(config.width, config.mlp_dim, config, rngs)
        self.down = _linear(config.mlp_dim, config.width, config, rngs)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down(_gated(self.gate(x), self.up(x)))


# Made again in the backward pass: else three arrays as wide as the MLP are kept.
@jax.checkpoint
def _gated(gate: Array, up: Array) -> Array:
    return jax.nn.gelu(gate, approximate=True) * up


def buckets(length: int, count: int, distance: int) -> Int[np.ndarray, "T T"]:
    """Returns the bucket of each pair of tokens, by place of query, then of key.

    One half of the buckets is for keys before the query, or at it, the other for those
    after it. Half of each are of one distance, the others widen to `distance` with its
    logarithm (`_relative_position_bucket` in T5's code, in float32 as there).

    >>> buckets(12, 32, 128)[0].tolist()
    [0, 17, 18, 19, 20, 21, 22, 23, 24, 24, 24, 24]

    Args:
      length: number of tokens, `T`.
      count: number of buckets.
      distance: distance from which on all are in the last bucket of their half.
    """
    places = np.arange(length, dtype=np.int32)
    offsets = places - places[:, None]
    half, exact = count // 2, count // 4
    far = abs(offsets).astype(np.float32)
    ratio = np.log(np.maximum(far, 1) / exact) / np.float32(math.log(distance / exact))
    widening = exact + (ratio * (half - exact)).astype(np.int32)
    near = np.where(far < exact, abs(offsets), np.minimum(widening, half - 1))
    return near + half * (offsets > 0)


def _embedding(rows: int, width: int, config: T5Config, rngs: nnx.Rngs) -> nnx.Embed:
    return nnx.Embed(
        rows,
        width,
        embedding_init=basic.SMALL,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )


def _linear(n: int, m: int, config: T5Config, rngs: nnx.Rngs) -> nnx.Linear:
    return basic.linear(n, m, config, rngs, use_bias=False, init=basic.SMALL)


def _norm(config: T5Config, rngs: nnx.Rngs) -> RMSNorm:
    return RMSNorm(
        config.width,
        epsilon=config.norm_eps,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )
