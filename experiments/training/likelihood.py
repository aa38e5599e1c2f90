"""Likelihoods of texts: of the choices of a question, and of prose."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Float

from experiments.data.questions import AnswerBuckets
from experiments.data.tokens import Examples
from experiments.training import evaluation, sharding
from experiments.training.answers import log_likelihoods


def of_examples(
    model: Any, source: Examples, buckets: AnswerBuckets, mesh: Mesh
) -> Float[np.ndarray, " N"]:
    """Returns the sum of the log-likelihoods of each example's learnt tokens.

    Args:
      model: a language model.
      source: texts, and the tokens of each that count.
      buckets: how they become batches.
      mesh: the devices.
    """
    graphdef, state = nnx.split(model)
    state = sharding.place(state, mesh)

    @jax.jit
    def run(state, batch):
        model: Any = nnx.merge(graphdef, state)
        model.eval()
        return log_likelihoods(model, batch, batch["learnt"])

    found = np.zeros(len(source))
    for batch in evaluation.batches(source, buckets, mesh):
        own = {**batch, "sums": run(state, batch)}
        own = {name: own[name] for name in ("sums", "index", "valid")}
        whole = multihost_utils.process_allgather(own, tiled=True)
        found[whole["index"][whole["valid"]]] = whole["sums"][whole["valid"]]
    return found


def windows(tokens: Sequence[int], length: int, stride: int) -> Examples:
    """Returns overlapping windows in which every token but the first counts once.

    >>> found = windows([5, 6, 7, 8, 9], length=4, stride=2)
    >>> [own.tolist() for own in found.tokens], found.starts
    ([[5, 6, 7, 8], [7, 8, 9]], [1, 2])

    Args:
      tokens: ids of a text, with what begins it.
      length: most tokens of a window.
      stride: tokens from one window to the next; those before have been counted, and
        every token but a few of the first window's has `length - stride` before it.
    """
    begins = range(0, max(1, len(tokens) - length + stride), stride)
    rows = [np.asarray(tokens[begin : begin + length], np.int32) for begin in begins]
    starts = [1, *(length - stride for _ in rows[1:])]
    return Examples(rows, starts, list(range(len(rows))))


def perplexity(
    model: Any, source: Examples, buckets: AnswerBuckets, mesh: Mesh
) -> float:
    """Returns the exponential of the mean cross entropy of the tokens that count."""
    count = sum(
        len(tokens) - start
        for tokens, start in zip(source.tokens, source.starts, strict=True)
    )
    return math.exp(-of_examples(model, source, buckets, mesh).sum() / count)
