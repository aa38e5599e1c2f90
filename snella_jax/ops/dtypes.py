"""Dtypes in which numbers of several dtypes meet.

Explicit, for under `jax_numpy_dtype_promotion="strict"` JAX promotes nothing by itself.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike


def at_least_float32(*dtypes: DTypeLike) -> jnp.dtype:
    """Returns float64 if one of the dtypes is that, else float32.

    >>> at_least_float32("bfloat16"), at_least_float32("float32", "float64")
    (dtype('float32'), dtype('float64'))
    """
    wide = any(jnp.dtype(dtype) == jnp.float64 for dtype in dtypes)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def check_floating(dtype: DTypeLike | None) -> None:
    """Raises a `ValueError` for a dtype that is not one of floating-point numbers."""
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype={dtype}: expected a floating-point dtype.")


def wider(one: DTypeLike, other: DTypeLike) -> jnp.dtype:
    """Returns the wider of two floating-point dtypes; float32 for two halves.

    >>> wider("bfloat16", "float32"), wider("bfloat16", "float16")
    (dtype('float32'), dtype('float32'))
    """
    one, other = jnp.dtype(one), jnp.dtype(other)
    if one == other:
        return one
    return max(one, other, jnp.dtype(jnp.float32), key=lambda dtype: dtype.itemsize)


def widened(
    weights: Mapping[str, Array], inputs: Sequence[Array], dtype: DTypeLike | None
) -> dict[str, Array]:
    """Casts weights to what a layer of Flax computes in, if that is wider than theirs.

    An update that rounding to bfloat16 would lose is kept there.

    Args:
      weights: by name.
      inputs: inputs of the layer.
      dtype: dtype that the layer was given, or None.
    """
    floats = [x for x in inputs if jnp.issubdtype(x.dtype, jnp.floating)]
    wide = {}
    for name, weight in weights.items():
        meets = dtype or jnp.result_type(weight, *floats)
        wide[name] = weight.astype(wider(weight.dtype, meets))
    return wide
