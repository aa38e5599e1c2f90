"""Dropout and stochastic depth as pure functions of a key.

Flax's own layers keep a random stream inside the module, and a stream inside a
scanned block repeats its masks. Here the caller passes a key, so a mask drawn again
while recomputing is the same mask.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray


def dropout(
    key: PRNGKeyArray, x: Float[Array, "..."], rate: float
) -> Float[Array, "..."]:
    """Zeroes each element with probability `rate`, scaling the others by 1/(1-rate).

    Source: Srivastava et al., 2014.

    >>> import jax
    >>> dropout(jax.random.key(0), jax.numpy.ones(3), 0.0).tolist()
    [1.0, 1.0, 1.0]
    """
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), 0)


def drop_path(
    key: PRNGKeyArray, x: Float[Array, "B ..."], rate: ArrayLike
) -> Float[Array, "B ..."]:
    """Drops the whole branch of an example with probability `rate` (stochastic depth).

    Axis 0 is the example; the branches kept are scaled by 1/(1-rate). `rate` is below
    1 and may be traced. Source: Huang et al., arXiv 1603.09382.

    >>> import jax
    >>> y = drop_path(jax.random.key(0), jax.numpy.ones((64, 3)), 0.5)
    >>> sorted(set(y.sum(1).tolist()))
    [0.0, 6.0]
    """
    keep = jax.random.bernoulli(key, 1 - rate, x.shape[:1] + (1,) * (x.ndim - 1))
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), 0)
