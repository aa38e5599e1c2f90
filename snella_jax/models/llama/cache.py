"""Keys and values of earlier tokens, which generation keeps instead of the tokens.

Axes: `B` prompts of `T` tokens, `n` texts that continue each, `N` places for tokens of
theirs, `L` blocks, `H` heads of queries and `K` of keys and values, `d` their width.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from snella_jax.models.llama.model import Llama, positions_of


class Pairs(NamedTuple):
    """Rotated keys, and values, `[..., K, d]`."""

    keys: Array
    values: Array


class Cache(NamedTuple):
    """What is known of the tokens so far.

    Attributes:
      prompt: those of the prompts, `[L, B, T, K, d]`, once for all that continue one.
      own: those of the tokens that followed, `[L, B, n, N, K, d]`.
      real: True for real tokens of the prompts.
      steps: number of tokens that followed.
    """

    prompt: Pairs
    own: Pairs
    real: Bool[Array, "B T"]
    steps: Int[Array, ""]

    def reordered(self, parents: Int[Array, "B n"]) -> "Cache":
        """Returns the cache of texts that each continue a text of the same prompt."""
        index = parents[None, :, :, None, None, None]
        own = Pairs(*(jnp.take_along_axis(leaf, index, 2) for leaf in self.own))
        return self._replace(own=own)


def prefilled(
    model: Llama,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"] | None,
    texts: int,
    places: int,
) -> tuple[Float[Array, "B vocab"], Cache]:
    """Reads the prompts.

    Args:
      model: plain.
      tokens, mask: as in its call, padded on one side.
      texts: `n`.
      places: `N`.

    Returns:
      Logits of the token that follows each, and the cache.
    """
    whole = model.look(mask)

    def look(q: Array, k: Array, v: Array, earlier: Any) -> tuple[Array, Pairs]:
        return whole(q, k, v, earlier)[0], Pairs(k, v)

    hidden, prompt = model.through(tokens, positions_of(tokens, mask), look)
    real = jnp.ones(tokens.shape, bool) if mask is None else mask
    last = tokens.shape[1] - 1 - real[:, ::-1].argmax(1)
    logits = model.logits(hidden[jnp.arange(len(hidden)), last])
    depth, batch, _, *rest = prompt.keys.shape
    empty = jnp.zeros((depth, batch, texts, places, *rest), prompt.keys.dtype)
    return logits, Cache(prompt, Pairs(empty, empty), real, jnp.zeros((), jnp.int32))


def advanced(
    model: Llama, tokens: Int[Array, "B n"], cache: Cache
) -> tuple[Float[Array, "B n vocab"], Cache]:
    """Reads the next token of every text; returns the logits of those that follow."""
    slot = cache.steps
    positions = jnp.broadcast_to((cache.real.sum(1) + slot)[:, None], tokens.shape)

    def look(
        q: Array, k: Array, v: Array, earlier: tuple[Pairs, Pairs]
    ) -> tuple[Array, Pairs]:
        prompt, own = earlier
        new = Pairs(*(x.reshape(*tokens.shape, 1, *x.shape[2:]) for x in (k, v)))
        own = Pairs(*map(_at(slot, 2), own, new))
        y = _attend(q.reshape(*tokens.shape, *q.shape[2:]), prompt, own, seen)
        return y.reshape(q.shape), new

    followed = jnp.arange(cache.own.keys.shape[3]) <= slot
    followed = jnp.broadcast_to(followed, (len(tokens), len(followed)))
    seen = jnp.concatenate([cache.real, followed], 1)
    hidden, new = model.through(
        tokens.reshape(-1, 1), positions.reshape(-1, 1), look, (cache.prompt, cache.own)
    )
    # The whole is written to once a token, in place, and not once a block.
    own = Pairs(*map(_at(slot, 3), cache.own, new))
    logits = model.logits(hidden).reshape(*tokens.shape, -1)
    return logits, cache._replace(own=own, steps=slot + 1)


def _at(slot: Array, axis: int) -> Any:
    """Returns a function that writes its second argument into the first."""
    return lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis)


def _attend(
    q: Float[Array, "B n H d"],
    prompt: Pairs,
    own: Pairs,
    seen: Bool[Array, "B S"],
) -> Float[Array, "B n H d"]:
    """Attends to the prompt, which is read once for all its texts, and to the rest.

    Args:
      q: queries of one token of each text.
      prompt: `[B, T, K, d]`.
      own: `[B, n, N, K, d]`.
      seen: True for the `T + N` tokens that are seen.
    """
    wide = {"preferred_element_type": jnp.float32}
    length, kv_heads, d = prompt.keys.shape[1:]
    grouped = q.reshape(*q.shape[:2], kv_heads, -1, d)
    scores = [
        jnp.einsum("bnkgd,btkd->bnkgt", grouped, prompt.keys, **wide),
        jnp.einsum("bnkgd,bntkd->bnkgt", grouped, own.keys, **wide),
    ]
    scores = jnp.concatenate(scores, -1) / math.sqrt(d)
    scores = jnp.where(seen[:, None, None, None], scores, -jnp.inf)
    share = jax.nn.softmax(scores).astype(q.dtype)
    y = jnp.einsum("bnkgt,btkd->bnkgd", share[..., :length], prompt.values, **wide)
    y += jnp.einsum("bnkgt,bntkd->bnkgd", share[..., length:], own.values, **wide)
    return y.astype(q.dtype).reshape(q.shape)
