"""The LLaMA, a decoder of texts (Touvron et al., arXiv 2302.13971), in Flax NNX.

LLaMA 1 to 3.2 and SmolLM2: pre-norm blocks with RMSNorm, grouped-query attention with
rotary positions, a SwiGLU MLP, and no biases. Blocks are stacked and scanned as in the
other models. Axes: `B` texts, `T` tokens, `D` width, `H` heads of queries and `K` of
keys and values, `d` their width.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from snella_jax.models import llama
    >>> sizes = {"width": 24, "depth": 2, "heads": 4, "kv_heads": 2, "head_dim": 6}
    >>> model = llama.create(
    ...     "smollm2_135m", vocab_size=50, mlp_dim=32, **sizes, rngs=nnx.Rngs(0))
    >>> model(jnp.array([[5, 7, 9]])).shape
    (1, 3, 50)
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from snella_jax.models.layers import basic, preset, stack
from snella_jax.models.layers.activations import silu2
from snella_jax.models.layers.attention import attend
from snella_jax.models.layers.memory import ATTENTION, HIDDEN, QKV, STREAM
from snella_jax.models.layers.norms import normalised
from snella_jax.models.llama.config import PRESETS, LlamaConfig
from snella_jax.models.llama.rotary import Rotation, inverse_frequencies, rotation
from snella_jax.ops.names import named, remade
from snella_jax.ops.recompute import rematerialised

# Attends, given rotated queries `[B, T, H, d]`, rotated keys `[B, T, K, d]`, values and
# what the block knows of earlier tokens; also returns what is to be kept.
Attend = Callable[[Array, Array, Array, Any], tuple[Array, Any]]


def create(name: str, *, rngs: nnx.Rngs, **overrides: Any) -> "Llama":
    """Makes a randomly initialised preset, any field of its config overridden.

    Raises:
      ValueError: `name` is not a preset; the message has the nearest ones.
    """
    where = "snella_jax.models.llama.PRESETS"
    config = preset.named(name, PRESETS, "LLaMA", where, **overrides)
    return Llama(config, rngs=rngs)


class Llama(nnx.Module):
    """Embedding, `depth` scanned blocks, a final norm and a head over all tokens.

    Attributes:
      default_targets: regex of the layers that the commonsense benchmark adapts.
      default_trainable: regex of what trains besides, nothing.
      head: only there if it has weights of its own (`config.tied` is False).
    """

    default_targets: ClassVar[str] = r"blocks/.*/(q|k|v|up|down)"
    default_trainable: ClassVar[str] = ""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.embed = nnx.Embed(
            c.vocab_size,
            c.width,
            embedding_init=basic.SMALL,
            dtype=c.dtype,
            param_dtype=c.param_dtype,
            rngs=rngs,
        )
        self.blocks = stack.build(
            lambda rngs: Block(c, rngs=rngs), c.depth, c.stacked, rngs
        )
        self.norm = RMSNorm(c)
        if not c.tied:
            self.head = nnx.Linear(
                c.width,
                c.vocab_size,
                use_bias=False,
                kernel_init=basic.SMALL,
                dtype=c.dtype,
                param_dtype=c.param_dtype,
                preferred_element_type=jnp.float32,
                rngs=rngs,
            )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T vocab"]:
        """Returns float32 logits of the token after each.

        Args:
          tokens: texts, padded on any side.
          positions: place of each token in its text, from 0; None counts the real
            tokens before it.
          mask: True for real tokens; None if all are. No token sees those after it,
            nor one that is not real but itself, so every number is finite.

        Raises:
          TypeError: `tokens` are no integers, or `mask` is not of bool.
          ValueError: one of them has another shape.
        """
        return self.logits(self.hidden(tokens, positions, mask))

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns what the head sees of each token; arguments and errors as the call.

        For `logits` of some tokens alone: those of all take `4 * vocab` bytes a token.
        """
        _check(tokens, positions, mask)
        if positions is None:
            positions = positions_of(tokens, mask)
        return self.through(tokens, positions, self.look(mask))[0]

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B vocab"]:
        """Applies the head to chosen rows of `hidden`; returns float32.

        >>> model = create("smollm2_135m", depth=1, vocab_size=20, rngs=nnx.Rngs(0))
        >>> last = model.hidden(jnp.array([[5, 7, 9]]))[:, -1]
        >>> model.logits(last).shape
        (1, 20)
        """
        if not self.config.tied:
            return self.head(hidden)
        embedding = self.embed.embedding[...].astype(hidden.dtype)
        return jnp.einsum(
            "...d,vd->...v", hidden, embedding, preferred_element_type=jnp.float32
        )

    def turn(self, positions: Int[Array, "B T"]) -> Rotation:
        """Returns the rotation of queries and keys at these positions."""
        c = self.config
        frequencies = inverse_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
        return rotation(positions, frequencies)

    def look(self, mask: Bool[Array, "B T"] | None) -> Attend:
        """Returns the attention of whole texts, which knows and keeps nothing."""
        seen = None
        if mask is not None:
            itself = jnp.eye(mask.shape[1], dtype=bool)
            seen = mask[:, None, None] | itself
        implementation = self.config.attention

        def look(q: Array, k: Array, v: Array, earlier: Any) -> tuple[Array, None]:
            return attend(q, k, v, implementation, mask=seen, causal=True), None

        return look

    def through(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        look: Attend,
        earlier: Any = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Calls every block, and the norm behind them.

        Args:
          tokens, positions: as in the call.
          look: attention of a block.
          earlier: tree of arrays `[depth, ...]`, a row for each block's attention.

        Returns:
          What the head sees of each token, and what attention kept, `[depth, ...]`.
        """
        x, turn = self.embed(tokens), self.turn(positions)

        def call(graphdef: nnx.GraphDef, scanned: bool) -> Callable[..., Any]:
            def run(state: nnx.State, x: Array, earlier: Any) -> tuple[Array, Any]:
                return nnx.merge(graphdef, state)(x, turn, look, earlier)

            c = self.config
            return stack.recomputed(run, c.remat, c.memory, scanned=scanned)

        if isinstance(self.blocks, nnx.List):
            rows = []
            for index, block in enumerate(self.blocks):
                graphdef, state = nnx.split(block)
                own = jax.tree.map(lambda leaf, i=index: leaf[i], earlier)
                x, kept = call(graphdef, scanned=False)(state, x, own)
                rows.append(kept)
            return self.norm(x), jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
        graphdef, states = nnx.split(self.blocks)
        one = call(graphdef, scanned=True)
        x, kept = jax.lax.scan(
            lambda x, row: one(row[0], x, row[1]), x, (states, earlier)
        )
        return self.norm(x), kept


class Block(nnx.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(config)
        self.attn = Attention(config, rngs=rngs)
        self.norm2 = RMSNorm(config)
        self.mlp = SwiGLU(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], turn: Rotation, look: Attend, earlier: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Runs the block; arguments and results as `Attention`."""
        y, kept = self.attn(self.norm1(x), turn, look, earlier)
        x = named(x + y, STREAM)
        return x + self.mlp(self.norm2(x)), kept


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al., arXiv 2305.13245), rotary positions."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        queries = config.heads * config.head_dim
        keys = config.kv_heads * config.head_dim
        self.q = _linear(config.width, queries, config, rngs)
        self.k = _linear(config.width, keys, config, rngs)
        self.v = _linear(config.width, keys, config, rngs)
        self.o = _linear(queries, config.width, config, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], turn: Rotation, look: Attend, earlier: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Mixes tokens; also returns what `look` keeps of them.

        Args:
          x: tokens.
          turn: rotates queries and keys by their positions.
          look: attends to these and earlier tokens.
          earlier: what it knows of the earlier ones in this block.
        """
        with remade():
            q, k, v = (self._split(f(x)) for f in (self.q, self.k, self.v))
        q, k, v = (named(part, QKV) for part in (turn(q), turn(k), v))
        y, kept = look(q, k, v, earlier)
        return self.o(named(y, ATTENTION).reshape(*x.shape[:2], -1)), kept

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, self.head_dim)


class SwiGLU(nnx.Module):
    """MLP whose hidden features are gated (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.activation = config.activation
        self.gate = _linear(config.width, config.mlp_dim, config, rngs)
        self.up = _linear(config.width, config.mlp_dim, config, rngs)
        self.down = _linear(config.mlp_dim, config.width, config, rngs)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        with remade():
            gate, up = self.gate(x), named(self.up(x), HIDDEN)
            if self.activation == "silu":
                return self.down(_gated(named(gate, HIDDEN), up))
            # The derivative by a factor is the other: both stay, and 2 bits of `gate`.
            return self.down(named(silu2(gate), HIDDEN) * up)


# Made again in the backward pass: else three arrays as wide as the MLP are kept.
@jax.checkpoint
def _gated(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up


class RMSNorm(nnx.Module):
    """Norm by the root of the mean square (Zhang and Sennrich, arXiv 1910.07467).

    In float32, cast back, and only then times the scale, as in Meta's code.
    """

    def __init__(self, config: LlamaConfig):
        self.epsilon = config.norm_eps
        self.scale = nnx.Param(jnp.ones((config.width,), config.param_dtype))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return _normed(x, self.scale[...], self.epsilon)


# Made again in the backward pass: else a scale that trains keeps the normalised array.
def _normed(x: Array, scale: Array, eps: float) -> Array:
    def run(x: Array, scale: Array) -> Array:
        return basic.scaled(normalised(x, None, None, eps, centred=False), scale)

    return rematerialised(run)(x, scale)


def positions_of(
    tokens: Int[Array, "B T"], mask: Bool[Array, "B T"] | None
) -> Int[Array, "B T"]:
    """Counts the real tokens before each.

    >>> mask = jnp.array([[False, False, True, True]])
    >>> positions_of(jnp.zeros((1, 4), int), mask).tolist()
    [[0, 0, 0, 1]]
    """
    if mask is None:
        return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)


def _linear(n: int, m: int, config: LlamaConfig, rngs: nnx.Rngs) -> nnx.Linear:
    return basic.linear(n, m, config, rngs, use_bias=False, init=basic.SMALL)


def _check(tokens: Array, positions: Array | None, mask: Array | None) -> None:
    if not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
        raise TypeError(f"tokens are {jnp.result_type(tokens)}: expected integers.")
    if mask is not None and jnp.result_type(mask) != jnp.bool_:
        raise TypeError(f"mask is {jnp.result_type(mask)}: expected bool.")
    if jnp.ndim(tokens) != 2:
        raise ValueError(f"tokens have shape {jnp.shape(tokens)}: expected [B, T].")
    for name, value in (("positions", positions), ("mask", mask)):
        if value is not None and jnp.shape(value) != jnp.shape(tokens):
            raise ValueError(
                f"{name} has shape {jnp.shape(value)}: expected that of the tokens, "
                f"{jnp.shape(tokens)}."
            )
