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
    return _kept(key, x, rate, x.shape)


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
    return _kept(key, x, rate, x.shape[:1] + (1,) * (x.ndim - 1))


def _kept(key: PRNGKeyArray, x: Array, rate: ArrayLike, shape: tuple) -> Array:
    if isinstance(rate, int | float) and rate == 0:
        return x
    share = jnp.asarray(1 - rate, jnp.float32)  # in float64 the mask is another
    keep = jax.random.bernoulli(key, share, shape)
    return jnp.where(keep, x / share.astype(x.dtype), 0)
