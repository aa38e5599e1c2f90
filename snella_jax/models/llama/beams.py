"""Beam search, as transformers has it (`GenerationMixin._beam_search`, 5.24).

A text's score is the sum of its tokens' log-probabilities over their number, the end
included. `n` texts of each prompt are followed; one that ends goes to the finished
ones, of which the `n` best are kept. A prompt is done when the best text that is
followed, were it to end now, is no better than the worst of `n` finished ones.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from snella_jax.models.llama.cache import Cache, advanced
from snella_jax.models.llama.model import Llama


class Beams(NamedTuple):
    """Texts of each prompt, with `N` places.

    Attributes:
      place: number of tokens so far.
      texts: those that are followed, the best first.
      sums: their log-probabilities; -inf for none.
      finished: those that have ended, the best first.
      scores: their scores; -inf for none.
      going: False for prompts that are done.
    """

    place: Int[Array, ""]
    texts: Int[Array, "B n N"]
    sums: Float[Array, "B n"]
    finished: Int[Array, "B n N"]
    scores: Float[Array, "B n"]
    going: Bool[Array, " B"]


def best(
    model: Llama,
    logits: Float[Array, "B vocab"],
    cache: Cache,
    eos: Int[Array, " ends"],
) -> Int[Array, "B N"]:
    """Returns the finished text with the highest score; zeros behind its end.

    Args:
      model: plain.
      logits: logits of the first tokens.
      cache: cache of the prompts, for `n` texts each.
      eos: tokens that end a text.
    """
    rows, beams, count = cache.own.keys.shape[1:4]
    texts = jnp.zeros((rows, beams, count), jnp.int32)
    none = jnp.full((rows, beams), -jnp.inf)
    start = Beams(
        place=jnp.int32(0),
        texts=texts,
        sums=none.at[:, 0].set(0),
        finished=texts,
        scores=none,
        going=jnp.ones(rows, bool),
    )
    logits = jnp.broadcast_to(logits[:, None], (rows, beams, logits.shape[-1]))
    start, _ = _longer(start, logits, eos)

    def body(carry: tuple[Beams, Cache]) -> tuple[Beams, Cache]:
        found, cache = carry
        logits, cache = advanced(model, found.texts[:, :, found.place - 1], cache)
        found, parents = _longer(found, logits, eos)
        return found, cache.reordered(parents)

    def going(carry: tuple[Beams, Cache]) -> Array:
        return carry[0].going.any()

    return jax.lax.while_loop(going, body, (start, cache))[0].finished[:, 0]


def _longer(
    found: Beams, logits: Float[Array, "B n vocab"], eos: Int[Array, " ends"]
) -> tuple[Beams, Int[Array, "B n"]]:
    """Returns texts that are a token longer, and the numbers of those they continue."""
    rows, beams, vocabulary = logits.shape
    sums = found.sums[:, :, None] + jax.nn.log_softmax(logits)
    # So many that `n` go on, whichever end.
    candidates = min(beams * (1 + max(1, len(eos))), beams * vocabulary)
    sums, index = jax.lax.top_k(sums.reshape(rows, -1), candidates)
    parents, tokens = index // vocabulary, index % vocabulary
    texts = _rows(found.texts, parents).at[:, :, found.place].set(tokens)
    place = found.place + 1
    ends = jnp.isin(tokens, eos) | (place == found.texts.shape[2])

    counts = ends & (jnp.arange(candidates) < beams) & found.going[:, None]
    scores = jnp.where(counts, sums / place, -jnp.inf)
    scores, order = jax.lax.top_k(jnp.concatenate([found.scores, scores], 1), beams)
    finished = _rows(jnp.concatenate([found.finished, texts], 1), order)

    sums, order = jax.lax.top_k(jnp.where(ends, -jnp.inf, sums), beams)
    going = found.going & (sums[:, 0] / place > scores[:, -1])
    longer = Beams(place, _rows(texts, order), sums, finished, scores, going)
    return longer, jnp.take_along_axis(parents, order, 1)


def _rows(texts: Int[Array, "B n N"], order: Int[Array, "B m"]) -> Int[Array, "B m N"]:
    return jnp.take_along_axis(texts, order[:, :, None], 1)
