"""Texts that a LLaMA writes: greedily, drawn, or by beam search.

One compiled function for each shape of prompts and number of new tokens: the prompts
are read once, then a loop reads a token at a time against the cache of earlier ones
(`cache.py`) until every text has ended.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from snella_jax.models.layers.stack import require_plain
from snella_jax.models.llama import beams as search
from snella_jax.models.llama.cache import Cache, advanced, prefilled
from snella_jax.models.llama.model import Llama

Side = Literal["right", "left"]


class Drawing(NamedTuple):
    """Key of tokens that are drawn, and the temperature."""

    key: PRNGKeyArray
    temperature: Float[Array, ""]


def generate(
    model: Llama,
    tokens: Int[Array | np.ndarray, "B T"],
    *,
    lengths: Int[Array | np.ndarray, " B"] | Sequence[int] | None = None,
    padding: Side = "right",
    max_new_tokens: int,
    eos: Sequence[int] = (),
    temperature: float = 0.0,
    key: PRNGKeyArray | None = None,
    beams: int = 1,
) -> Int[Array, "B N"]:
    """Writes on from each prompt; returns the new tokens alone, int32.

    Behind the first token of `eos` in a row there is only that token. A row does not
    depend on the others, nor on how long the prompts are padded to; drawn tokens depend
    on its number. A new shape of `tokens` or a new `max_new_tokens` compiles anew: pad
    prompts to a few lengths.

    >>> sizes = {"width": 24, "depth": 2, "heads": 4, "kv_heads": 2, "head_dim": 6}
    >>> from snella_jax.models import llama
    >>> model = llama.create(
    ...     "smollm2_135m", vocab_size=50, mlp_dim=32, **sizes, rngs=nnx.Rngs(0))
    >>> prompts = np.array([[5, 7, 9], [8, 0, 0]])
    >>> llama.generate(model, prompts, lengths=[3, 1], max_new_tokens=4).shape
    (2, 4)

    Args:
      model: without adapters; `snella_jax.generate` takes one that has some.
      tokens: prompts with what begins them, at least one token each.
      lengths: number of tokens of each prompt; None if none is padded. What pads them
        may be any number.
      padding: "right" if it stands behind them, "left" if before.
      max_new_tokens: `N`.
      eos: tokens that end a text; () never ends one before `N` tokens.
      temperature: 0 takes the likeliest token; else tokens are drawn from the softmax
        of logits divided by it.
      key: key of what is drawn; needs a temperature.
      beams: number of texts that are followed. More than one: beam search, which
        returns the text with the highest mean log-probability of its tokens, the end
        included, among those that it finds, as transformers does (`num_beams`, with
        `length_penalty=1.0`, `early_stopping=False`).

    Raises:
      TypeError: an argument of another type.
      ValueError: an argument of another shape or range, texts longer than
        `model.config.context`, options that exclude each other, or a model with
        adapters.
    """
    require_plain(model)
    prompts, mask = _prompts(model, tokens, lengths, padding)
    _check_counts(max_new_tokens=max_new_tokens, beams=beams)
    longest = max_new_tokens + int(
        prompts.shape[1] if mask is None else mask.sum(1).max()
    )
    if longest > model.config.context:
        raise ValueError(
            f"The longest prompt with max_new_tokens={max_new_tokens} has {longest} "
            f"tokens: expected at most the model's context={model.config.context}, a "
            "field of its config."
        )
    _check_drawing(temperature, key, beams)
    graphdef, state = nnx.split(model)
    return _generated(
        graphdef,
        state,
        prompts,
        mask,
        _ends(eos, model.config.vocab_size),
        None if key is None else Drawing(key, jnp.float32(temperature)),
        count=int(max_new_tokens),
        beams=int(beams),
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "count", "beams"))
def _generated(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"] | None,
    eos: Int[Array, " ends"],
    drawing: Drawing | None,
    *,
    count: int,
    beams: int,
) -> Int[Array, "B N"]:
    """Returns `count` new tokens of each prompt."""
    model: Any = nnx.merge(graphdef, state)
    logits, cache = prefilled(model, tokens, mask, beams, count)
    if beams > 1:
        found = search.best(model, logits, cache, eos)
    else:
        found = _written(model, logits, cache, eos, drawing)
    # A row that ended went on until the others had.
    last = jnp.isin(found, eos).at[:, -1].set(True).argmax(1)[:, None]
    index = jnp.minimum(jnp.arange(count), last)
    return jnp.take_along_axis(found, index, 1)


def _written(
    model: Llama,
    logits: Float[Array, "B vocab"],
    cache: Cache,
    eos: Int[Array, " ends"],
    drawing: Drawing | None,
) -> Int[Array, "B N"]:
    """Writes token by token until every row has ended; zeros behind that."""
    rows, count = len(logits), cache.own.keys.shape[3]

    def chosen(logits: Array, place: Array | int) -> Array:
        if drawing is None:
            return logits.argmax(-1).astype(jnp.int32)
        # A key of its own for each row: none depends on how many there are.
        keys = jax.vmap(jax.random.fold_in, (None, 0))(drawing.key, jnp.arange(rows))
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, place)
        drawn = jax.vmap(jax.random.categorical)(keys, logits / drawing.temperature)
        return drawn.astype(jnp.int32)

    def going(carry: tuple) -> Array:
        _, _, place, ended = carry
        return (place < count) & ~ended.all()

    def body(carry: tuple) -> tuple:
        found, cache, place, ended = carry
        logits, cache = advanced(model, found[:, place - 1, None], cache)
        new = chosen(logits[:, 0], place)
        return (
            found.at[:, place].set(new),
            cache,
            place + 1,
            ended | jnp.isin(new, eos),
        )

    first = chosen(logits, 0)
    found = jnp.zeros((rows, count), jnp.int32).at[:, 0].set(first)
    start = found, cache, jnp.int32(1), jnp.isin(first, eos)
    return jax.lax.while_loop(going, body, start)[0]


def _prompts(
    model: Llama, tokens: Any, lengths: Any, padding: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the prompts, 0 for what pads them, and the mask of real tokens."""
    if padding not in get_args(Side):
        raise ValueError(f'padding={padding!r}: expected "right" or "left".')
    tokens = _integers("tokens", tokens)
    if tokens.ndim != 2 or not tokens.size:
        raise ValueError(
            f"tokens have shape {tokens.shape}: expected [B, T], a token or more."
        )
    mask = None
    if lengths is not None:
        lengths = _integers("lengths", lengths)
        if lengths.shape != tokens.shape[:1]:
            raise ValueError(
                f"lengths has shape {lengths.shape}: expected ({len(tokens)},), a "
                "number for each row of the tokens."
            )
        if lengths.min() < 1 or lengths.max() > tokens.shape[1]:
            raise ValueError(
                f"lengths={lengths.tolist()}: expected 1 to {tokens.shape[1]}, the "
                "tokens in a row."
            )
        mask = np.arange(tokens.shape[1]) < lengths[:, None]
        mask = mask[:, ::-1] if padding == "left" else mask
        tokens = np.where(mask, tokens, 0)
    _check_known("tokens", tokens, model.config.vocab_size)
    return tokens.astype(np.int32), mask


def _ends(eos: Sequence[int], vocabulary: int) -> Int[np.ndarray, " ends"]:
    """Returns the ids of end tokens, each once."""
    ends = np.zeros(0, int) if np.size(eos) == 0 else _integers("eos", eos)
    if ends.ndim != 1:
        raise TypeError(f"eos={eos!r}: expected a sequence of tokens, such as (2,).")
    _check_known("eos", ends, vocabulary)
    return np.unique(ends).astype(np.int32)


def _integers(name: str, value: Any) -> np.ndarray:
    """Returns an array of integers, or raises a `TypeError`."""
    array = np.asarray(value)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name}: {array.dtype}, expected integers.")
    return array


def _check_known(name: str, tokens: np.ndarray, vocabulary: int) -> None:
    """Raises a `ValueError` on tokens that are not in the vocabulary."""
    wrong = tokens[(tokens < 0) | (tokens >= vocabulary)]
    if wrong.size:
        raise ValueError(
            f"{name} has {wrong.flat[0]}: expected 0 to {vocabulary - 1}, the model's "
            "vocabulary. (What pads prompts may be any number, if lengths are given.)"
        )


def _check_counts(**counts: Any) -> None:
    """Raises a `ValueError` on what is no number of things, one or more."""
    for name, count in counts.items():
        if not isinstance(count, int | np.integer) or count < 1:
            raise ValueError(f"{name}={count!r}: expected an integer of at least 1.")


def _check_drawing(temperature: float, key: PRNGKeyArray | None, beams: int) -> None:
    """Raises a `ValueError` on options of drawing that exclude each other."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: expected 0 or a finite more.")
    if temperature and key is None:
        raise ValueError(f"temperature={temperature} draws tokens: expected a key.")
    if key is not None and not temperature:
        raise ValueError("key: nothing is drawn at temperature=0; leave it out.")
    if beams > 1 and temperature:
        raise ValueError(
            f"beams={beams}, temperature={temperature}: beam search draws nothing; "
            "expected temperature=0."
        )
