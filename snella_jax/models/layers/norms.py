"""Norms over the last axis that keep little for the backward pass.

Their derivative is written out, so that what stays in memory is the input in its own
dtype and two numbers of each row in at least float32: its mean, and 1 / sigma. (JAX's
derivative of Flax's norms keeps several arrays in float32.) MS-LN (Yang et al., arXiv
2406.16282) keeps the normalised output instead of the input, which takes as much, but
the output cannot be made again from it to the bit.

    >>> layer = LayerNorm(4, rngs=nnx.Rngs(0))
    >>> layer(jnp.array([[1.0, 1, 3, 3]])).round().tolist()
    [[-1.0, -1.0, 1.0, 1.0]]
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from snella_jax.ops.dtypes import at_least_float32
from snella_jax.ops.names import kept
from snella_jax.ops.varying import varying_alike


class LayerNorm(nnx.LayerNorm):
    """Flax's norm over the last axis, to the bit, with little kept."""

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Array, "*B D"]
    ) -> Float[Array, "*B D"]:
        return _call(self, x, centred=True)


class RMSNorm(nnx.RMSNorm):
    """Flax's norm by the root of the mean square, to the bit, with little kept."""

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Array, "*B D"]
    ) -> Float[Array, "*B D"]:
        return _call(self, x, centred=False)


def _call(layer: Any, x: Array, centred: bool) -> Array:
    own = (getattr(layer, name, None) for name in ("scale", "bias"))
    scale, bias = (None if variable is None else variable[...] for variable in own)
    x, scale, bias = layer.promote_dtype((x, scale, bias), dtype=layer.dtype)
    return normalised(x, scale, bias, layer.epsilon, centred)


def normalised(
    x: Float[Array, "*B D"],
    scale: Float[Array, " D"] | None,
    bias: Float[Array, " D"] | None,
    eps: float,
    centred: bool = True,
) -> Float[Array, "*B D"]:
    """Computes `(x - mean) / sigma * scale + bias`, in at least float32, cast back.

    Reverse mode only.

    Args:
      x: rows to normalise.
      scale: factors; None for 1.
      bias: summands; None for 0.
      eps: added to the variance.
      centred: False to take 0 for the mean.

    >>> normalised(jnp.array([2.0, 4.0]), None, None, 0.0).tolist()
    [-1.0, 1.0]
    """
    # Outside, for the transpose to add up the gradients inside `jax.shard_map`.
    return _normalised(*varying_alike(x, scale, bias), eps, centred)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalised(x, scale, bias, eps, centred):
    return _forward(x, scale, bias, eps, centred)[0]


def _forward(x, scale, bias, eps, centred):
    mean, inverse = _moments(x, eps, centred)
    y = _centred(x, mean)
    factor = inverse if scale is None else inverse * _row(scale, y)  # as Flax does
    y = y * factor
    y = y if bias is None else y + _row(bias, y)
    return y.astype(x.dtype), (x, mean, inverse, scale, bias)


def _backward(eps, centred, residuals, g):
    x, mean, inverse, scale, bias = residuals
    hat = _centred(x, mean) * inverse
    g = g.astype(hat.dtype)
    own = g if scale is None else g * _row(scale, g)
    d = own - hat * (own * hat).mean(-1, keepdims=True)
    d = d if mean is None else d - own.mean(-1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    return (
        (d * inverse).astype(x.dtype),
        None if scale is None else (g * hat).sum(rows).astype(scale.dtype),
        None if bias is None else g.sum(rows).astype(bias.dtype),
    )


_normalised.defvjp(_forward, _backward)


def _moments(x: Array, eps: float, centred: bool) -> tuple[Array | None, Array]:
    """Returns mean, or None, and 1 / sigma of each row, `[*B, 1]`."""
    wide = x.astype(at_least_float32(x.dtype))
    mean = kept(wide.mean(-1, keepdims=True)) if centred else None
    variance = jnp.square(_centred(x, mean)).mean(-1, keepdims=True)
    return mean, kept(jax.lax.rsqrt(variance + eps))


def _centred(x: Array, mean: Array | None) -> Array:
    wide = x.astype(at_least_float32(x.dtype))
    return wide if mean is None else wide - mean


def _row(value: Array, like: Array) -> Array:
    """Returns `[D]` in the rank and the dtype of `like`, as JAX may demand."""
    return value.reshape(*(1,) * (like.ndim - 1), -1).astype(like.dtype)
