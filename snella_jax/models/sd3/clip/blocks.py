"""Blocks of CLIP's towers: pre-norm attention, causal in texts, and an MLP."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from snella_jax.models.layers import basic, stack
from snella_jax.models.layers.activations import gelu
from snella_jax.models.layers.attention import Implementation, attend


class Block(nnx.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(self, config: Any, causal: bool, *, rngs: nnx.Rngs):
        c = config
        self.norm1 = basic.norm(c.width, c.norm_eps, c, rngs)
        self.attn = Attention(c, causal, rngs=rngs)
        self.norm2 = basic.norm(c.width, c.norm_eps, c, rngs)
        self.mlp = MLP(c, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nnx.Module):
    """Multi-head attention with separate query, key and value matrices."""

    def __init__(self, config: Any, causal: bool, *, rngs: nnx.Rngs):
        self.heads, self.causal = config.heads, causal
        self.implementation: Implementation = config.attention
        self.q, self.k, self.v, self.out = (
            basic.linear(config.width, config.width, config, rngs) for _ in range(4)
        )

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        q, k, v = (
            layer(x).reshape(*x.shape[:2], self.heads, -1)
            for layer in (self.q, self.k, self.v)
        )
        y = attend(q, k, v, self.implementation, causal=self.causal)
        return self.out(y.reshape(x.shape))


class MLP(nnx.Module):
    """MLP of two linear layers around the config's activation."""

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        hidden = config.mlp_dim or 4 * config.width
        self.fc1 = basic.linear(config.width, hidden, config, rngs)
        self.fc2 = basic.linear(hidden, config.width, config, rngs)
        self.quick = config.activation == "quick_gelu"

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        hidden = self.fc1(x)
        return self.fc2(quick_gelu(hidden) if self.quick else gelu(hidden))


# Made again in the backward pass: else two arrays as wide as the MLP are kept.
@jax.checkpoint
def quick_gelu(x: Array) -> Array:
    """Computes `x sigmoid(1.702 x)`, OpenAI's approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


def through(
    blocks: Any, x: Float[Array, "B T D"], remat: str
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """Calls every block; returns the input of the last one and its output.

    Args:
      blocks: blocks that `stack.build` made.
      x: input of the first.
      remat: "none" or "blocks", see `stack.call`.
    """
    before = x
    if isinstance(blocks, nnx.List):
        for block in blocks:
            graphdef, state = nnx.split(block)
            before, x = x, stack.call(graphdef, remat, scanned=False)(state, x)
        return before, x
    graphdef, state = nnx.split(blocks)
    one = stack.call(graphdef, remat, scanned=True)

    def body(carry: tuple[Array, Array], row: Any) -> tuple[Any, None]:
        _, x = carry
        return (x, one(row, x)), None

    return jax.lax.scan(body, (before, x), state)[0]
