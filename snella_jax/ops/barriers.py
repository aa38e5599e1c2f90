"""Barriers for XLA that stand on one kind of device alone."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray


def gpu_barrier(tree: Any) -> Any:
    """Returns the same arrays; XLA for GPUs makes again what depends on them.

    XLA merges computations that are equal, and stores what several others read. A GPU
    makes a few element-wise operations again in less time than it reads their result; a
    CPU does not.

    >>> import jax.numpy as jnp
    >>> gpu_barrier({"a": jnp.ones(2)})["a"].tolist()
    [1.0, 1.0]
    """
    hold = jax.lax.optimization_barrier
    return jax.lax.platform_dependent(tree, cuda=hold, rocm=hold, default=_as_it_is)


def of_stored(make: Callable[[Array], Array], x: Array, key: PRNGKeyArray) -> Array:
    """Returns `make(x)`, for which XLA for CPUs stores `x` and does not make it again.

    XLA's CPU backend drops barriers before it fuses. It then makes an activation again
    inside a selection of its rows, on one core. What a branch reads is stored.

    Args:
      make: odd function: `make(-x)` is `-make(x)`.
      x: array.
      key: numbers that XLA does not know; they change nothing in the result.

    >>> import jax.numpy as jnp
    >>> of_stored(lambda x: x[1:], jnp.arange(3.0), jax.random.key(0)).tolist()
    [1.0, 2.0]
    """

    def branched(x: Array, either: Array) -> Array:
        # Both branches are right, so it does not matter which one runs.
        return jax.lax.cond(either, make, lambda x: -make(-x), x)

    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    either = jnp.any((jax.random.key_data(key) if typed else key) != 0)
    return jax.lax.platform_dependent(
        x, either, cpu=branched, default=lambda x, either: make(x)
    )


def _as_it_is(tree: Any) -> Any:
    return tree
