"""The exact magnitude threshold, by bisection over bit patterns (Eq. 13)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from snella_jax.ops.dtypes import at_least_float32
from snella_jax.ops.varying import varying_alike


def threshold(
    delta: Float[Array, " *axes"], budget: int | Int[Array, ""]
) -> Float[Array, ""]:
    """Returns the `(budget+1)`-th largest `|delta|`; 0 if `budget` covers the matrix.

    Exact and without a sort: a bisection over bit patterns, one counting pass per bit.
    Only scalars cross devices when `delta` is sharded. No gradient passes.

    Args:
      delta: float array of fewer than 2^31 elements. bfloat16 and float16 are widened
        to float32 (exactly); float64 stays float64.
      budget: number of weights that are to survive, at least 0; may be traced.

    Raises:
      ValueError: `budget` is negative or no integer, or `delta` is too large.
    """
    check_budget(budget)
    if delta.size >= 2**31:
        raise ValueError(f"delta has {delta.size} elements: expected fewer than 2^31.")
    pattern = bit_pattern(delta)
    unsigned = pattern.dtype
    budget = clamped(budget, delta.size)

    # More than budget magnitudes reach low (or it is 0), and not so many reach high.
    # NaN has the patterns just above infinity's, so it counts as the largest.
    low = jnp.zeros((), unsigned)
    high = jnp.asarray(jnp.iinfo(unsigned).max >> 1, unsigned) + jnp.ones((), unsigned)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        reached = _count(pattern >= middle) > budget
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    low, high, pattern, budget = varying_alike(low, high, pattern, budget)
    bits = jnp.iinfo(unsigned).bits - 1
    low, _ = jax.lax.fori_loop(0, bits, halve, (low, high))
    found = jax.lax.bitcast_convert_type(low, at_least_float32(delta.dtype))
    return found.astype(delta.dtype)


def check_budget(budget: int | Array) -> None:
    """Raises a `ValueError` if a budget is no integer or, where known, negative."""
    if not jnp.issubdtype(jnp.result_type(budget), jnp.integer):
        raise ValueError(
            f"budget={budget!r}: expected a number of weights, an integer."
        )
    if not isinstance(budget, Tracer) and (least := np.asarray(budget).min()) < 0:
        raise ValueError(f"budget={least}: expected at least 0.")


def clamped(budget: int | Array, size: int) -> Int[Array, ""]:
    if not isinstance(budget, Array):
        budget = min(int(budget), size)  # before it could overflow int32
    budget = jnp.asarray(budget)
    if jnp.iinfo(budget.dtype).bits < 32:  # too few to hold the size
        budget = budget.astype(jnp.int32)
    return jnp.minimum(budget, size).astype(jnp.int32)


def _count(mask: Bool[Array, "..."]) -> Int[Array, ""]:
    def at_once(mask):
        return jnp.sum(mask, dtype=jnp.int32)

    def by_parts(mask):
        # XLA's CPU backend vectorises and threads a sum of a few rows; the barrier
        # keeps the rest from being folded into it again. 768 x 3072: 3.6 ms for a
        # threshold against 20.
        parts = mask.reshape(*mask.shape[:-1], pieces, mask.shape[-1] // pieces)
        counts = jnp.sum(parts, -2, dtype=jnp.int32)
        return at_once(jax.lax.optimization_barrier(counts))

    pieces = math.gcd(mask.shape[-1], 16) if mask.ndim else 1
    mesh = jax.typeof(mask).sharding.mesh
    if pieces == 1 or not (mesh.empty or mesh.are_all_axes_auto):
        return at_once(mask)  # where a sharding is part of a type, it may not split
    return jax.lax.platform_dependent(mask, cpu=by_parts, default=at_once)


def bit_pattern(x: Array) -> Array:
    """Returns the magnitude's bits as an unsigned integer: monotone in `|x|`."""
    wide = jax.lax.stop_gradient(x).astype(at_least_float32(x.dtype))
    unsigned = jnp.uint64 if wide.dtype == jnp.float64 else jnp.uint32
    bits = jax.lax.bitcast_convert_type(wide, unsigned)
    return bits & jnp.asarray(jnp.iinfo(unsigned).max >> 1, unsigned)
