"""Norms over the last axis that keep little for the backward pass.

Their derivative is written out, so that what stays in memory is the input in its own
dtype and two numbers of each row in at least float32: its mean, and 1 / sigma. (JAX's
derivative of Flax's norms keeps several arrays in float32.) MS-LN (Yang et al., arXiv
2406.16282) keeps the normalised output instead of the input, which takes as much, but
the output cannot be made again from it to the bit.

    >>> import jax, jax.numpy as jnp
    >>> layer = LayerNorm(4, rngs=nnx.Rngs(0))
    >>> jax.tree.map(jnp.shape, nnx.state(layer, nnx.Param).to_pure_dict())
    {'bias': (4,), 'scale': (4,)}
    >>> layer(jnp.array([[1.0, 1, 3, 3]])).round().tolist()
    [[-1.0, -1.0, 1.0, 1.0]]
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from snella_jax.ops.dtypes import at_least_float32
from snella_jax.ops.recompute import kept


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


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def normalised(
    x: Float[Array, "*B D"],
    scale: Float[Array, " D"] | None,
    bias: Float[Array, " D"] | None,
    eps: float,
    centred: bool = True,
) -> Float[Array, "*B D"]:
    """Computes `(x - mean) / sigma * scale + bias`, in at least float32, cast back.

    Args:
      x: rows to normalise.
      scale: factors; None for 1.
      bias: summands; None for 0.
      eps: added to the variance.
      centred: False to take 0 for the mean.

    >>> normalised(jnp.array([2.0, 4.0]), None, None, 0.0).tolist()
    [-1.0, 1.0]
    """
    return _output(x, *_moments(x, eps, centred), scale, bias)


@functools.partial(normalised.defjvp, symbolic_zeros=True)
def _derivative(eps, centred, primals, tangents):
    x, scale, bias = primals
    mean, inverse = _moments(x, eps, centred)
    moved = {
        name: tangent
        for name, tangent in zip(("x", "scale", "bias"), tangents, strict=True)
        if tangent is not None and not isinstance(tangent, SymbolicZero)
    }
    y = _output(x, mean, inverse, scale, bias)
    return y, _tangent(x, mean, inverse, scale, moved)


# What it is differentiated of is made again from what it is given, which is kept.
@jax.checkpoint
def _tangent(
    x: Array,
    mean: Array | None,
    inverse: Array,
    scale: Array | None,
    moved: dict[str, Array],
) -> Array:
    """Returns the output's tangent, for tangents of input, scale and bias by name."""
    hat, total = _centred(x, mean) * inverse, jnp.zeros((), inverse.dtype)
    if "x" in moved:
        d = moved["x"].astype(hat.dtype)
        along = hat * (hat * d).mean(-1, keepdims=True)
        centre = 0 if mean is None else d.mean(-1, keepdims=True)
        d = inverse * (d - centre - along)
        total = d if scale is None else d * _row(scale, d)
    if "scale" in moved:
        total = total + hat * _row(moved["scale"], hat)
    if "bias" in moved:
        total = total + _row(moved["bias"], hat)
    return jnp.broadcast_to(total, x.shape).astype(x.dtype)


def _moments(x: Array, eps: float, centred: bool) -> tuple[Array | None, Array]:
    """Returns mean, or None, and 1 / sigma of each row, `[*B, 1]`."""
    wide = x.astype(at_least_float32(x.dtype))
    mean = kept(wide.mean(-1, keepdims=True)) if centred else None
    variance = jnp.square(_centred(x, mean)).mean(-1, keepdims=True)
    return mean, kept(jax.lax.rsqrt(variance + eps))


def _output(
    x: Array,
    mean: Array | None,
    inverse: Array,
    scale: Array | None,
    bias: Array | None,
) -> Array:
    y = _centred(x, mean)
    factor = inverse if scale is None else inverse * _row(scale, y)  # as Flax does
    y = y * factor
    return (y if bias is None else y + _row(bias, y)).astype(x.dtype)


def _centred(x: Array, mean: Array | None) -> Array:
    wide = x.astype(at_least_float32(x.dtype))
    return wide if mean is None else wide - mean


def _row(value: Array, like: Array) -> Array:
    """Returns `[D]` in the rank and the dtype of `like`, as JAX may demand."""
    return value.reshape(*(1,) * (like.ndim - 1), -1).astype(like.dtype)
