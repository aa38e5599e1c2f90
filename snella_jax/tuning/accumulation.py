"""The mean gradient of a batch, computed a part of it at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from snella_jax.ops.dtypes import at_least_float32


def mean_over_parts(
    gradient: Callable, count: int, carried: Any, batch: Any, key: PRNGKeyArray
) -> tuple[Any, Any]:
    """Returns what the last part carried, and the mean of what all of them gave.

    Args:
      gradient: function of what is carried, a part and its key; returns what is carried
        on, and a tree of floats (a loss and its gradient, say).
      count: number of parts; divides the first axis of every array of the batch. Each
        part gets its share of every device's examples.
      carried: given to the first part; None for nothing.
      batch: a pytree of arrays.
      key: split for the parts.

    >>> def gradient(carried, part, key):
    ...     return carried + 1, part.mean()
    >>> batch = jnp.array([1.0, 2.0, 3.0, 6.0])
    >>> carried, mean = mean_over_parts(gradient, 2, 0, batch, jax.random.key(0))
    >>> int(carried), float(mean)
    (2, 3.0)
    """

    def cut(x):
        return jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)

    batches = jax.tree.map(cut, batch), jax.random.split(key, count)
    one = jax.tree.map(lambda x: x[0], batches)
    _, shapes = jax.eval_shape(gradient, carried, *one)
    # In bfloat16 a sum of many parts stops growing.
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, at_least_float32(s.dtype)), shapes
    )

    def add(state, part):
        carried, total = state
        carried, own = gradient(carried, *part)
        return (carried, jax.tree.map(jnp.add, total, own)), None

    (carried, total), _ = jax.lax.scan(add, (carried, zeros), batches)
    mean = jax.tree.map(lambda x, s: (x / count).astype(s.dtype), total, shapes)
    return carried, mean


def check_parts(batch: Any, count: int) -> None:
    """Raises an error if a batch cannot be cut into as many equal parts.

    Raises:
      TypeError: the number of parts is no integer.
      ValueError: it is below 1, or does not divide the batch.
    """
    if not isinstance(count, int | np.integer):
        raise TypeError(f"accumulate={count!r}: expected an integer.")
    if count < 1:
        raise ValueError(f"accumulate={count}: expected at least 1.")
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
    odd = [shape for shape in shapes if not shape or shape[0] % count]
    if count > 1 and odd:
        raise ValueError(
            f"accumulate={count} does not divide the first axis of a batch with "
            f"shapes {shapes}."
        )
