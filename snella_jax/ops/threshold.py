"""The exact magnitude threshold, by a search over bit patterns (Eq. 13)."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, DTypeLike, Float, Int, UInt

from snella_jax.ops.dtypes import at_least_float32
from snella_jax.ops.varying import varying_alike


def threshold(
    delta: Float[Array, " *axes"], budget: int | Int[Array, ""]
) -> Float[Array, ""]:
    """Returns the `(budget+1)`-th largest `|delta|`; 0 if `budget` covers the matrix.

    Exact and without a sort: a search over bit patterns, 4 bits in each of 8 counting
    passes (16 of float64), or a bit a pass on the CPU, where 15 counts at once are
    three times slower. Counts are all that crosses devices when `delta` is sharded. No
    gradient passes.

    Args:
      delta: float array of fewer than 2^31 elements. bfloat16 and float16 are widened
        to float32 (exactly); float64 stays float64.
      budget: number of weights that are to survive, at least 0; may be traced.

    Raises:
      ValueError: `budget` is negative or no integer, or `delta` is too large.
    """
    return thresholds([delta], [budget])[0]


Total = Callable[[list[Int[Array, "..."]]], list[Int[Array, "..."]]]


def thresholds(
    deltas: Sequence[Float[Array, "..."]],
    budgets: Sequence[int | Int[Array, "..."]],
    total: Total = list,
) -> list[Float[Array, "..."]]:
    """Returns the thresholds of several arrays, found in one loop.

    Args:
      deltas: as `threshold` takes them, each behind the axes of its budgets.
      budgets: numbers of weights that are to survive.
      total: sums the counts of all of them over devices, inside `jax.shard_map` with
        parts of the arrays; there, with types of what varies unchecked.

    Raises:
      ValueError: as `threshold`.

    >>> thresholds([jnp.arange(4.0), jnp.ones((2, 3))], [1, jnp.array([0, 3])])
    [Array(2., dtype=float32), Array([1., 0.], dtype=float32)]
    """
    wide = at_least_float32(*(delta.dtype for delta in deltas))
    pairs = [_checked(*pair) for pair in zip(deltas, budgets, strict=True)]
    lows = jax.lax.platform_dependent(
        [delta.astype(wide) for delta, _ in pairs],
        [budget for _, budget in pairs],
        cpu=_searches(1, _count_by_parts, total),
        default=_searches(4, _count, total),
    )
    return [
        jax.lax.bitcast_convert_type(low, wide).astype(delta.dtype)
        for low, (delta, _) in zip(lows, pairs, strict=True)
    ]


def _checked(delta: Array, budget: int | Array) -> tuple[Array, Array]:
    """Returns an array and its budgets; raises as `threshold`."""
    check_budget(budget)
    size = math.prod(delta.shape[jnp.ndim(budget) :])
    if size >= 2**31:
        raise ValueError(f"delta has {size} elements: expected fewer than 2^31.")
    budget = in_int32(budget, size)
    return varying_alike(jax.lax.stop_gradient(delta), budget)


Count = Callable[[UInt[Array, "..."], UInt[Array, " c"]], Int[Array, " _"]]


def _searches(
    bits: int, count: Count, total: Total = list
) -> Callable[..., list[Array]]:
    """Makes a search in several arrays of one dtype, each behind its budgets' axes."""

    def find(deltas: list[Array], budgets: list[Array]) -> list[Array]:
        raws = [_raw(delta) for delta in deltas]
        unsigned = raws[0].dtype
        width = jnp.iinfo(unsigned).bits
        turns = -(-(width - 1) // bits)

        def shift(turn):
            return jnp.asarray(bits * (turns - 1 - turn), unsigned)

        # More than budget magnitudes reach low (or it is 0), and not so many reach low
        # plus what the bits below make up. NaN has the patterns just above infinity's,
        # so it counts as the largest.
        def counts(turn, raw, low):
            # Nothing is added, but XLA cannot know. It would move what does not depend
            # on low out of the loop, and store it.
            pattern = raw & (_magnitude(unsigned) | low >> (width - 1))
            steps = jnp.arange(2**bits, dtype=unsigned) << shift(turn)
            return count(pattern, low + steps)

        def narrow(turn, low, reached, budget):
            return low + (jnp.sum(reached > budget, dtype=unsigned) << shift(turn))

        def each(turn, lows):
            reached = [
                _mapped(functools.partial(counts, turn), low.ndim)(raw, low)
                for raw, low in zip(raws, lows, strict=True)
            ]
            return [
                _mapped(functools.partial(narrow, turn), low.ndim)(low, *own)
                for low, *own in zip(lows, total(reached), budgets, strict=True)
            ]

        operands = [
            varying_alike(jnp.zeros(budget.shape, unsigned), raw, budget)
            for raw, budget in zip(raws, budgets, strict=True)
        ]
        lows, raws, budgets = (list(own) for own in zip(*operands, strict=True))
        return jax.lax.fori_loop(0, turns, each, lows)

    return find


def _mapped(function: Callable, axes: int) -> Callable:
    """Maps a function over that many leading axes."""
    for _ in range(axes):
        function = jax.vmap(function)
    return function


def check_budget(budget: int | Array) -> None:
    """Raises a `ValueError` if a budget is no integer or, where known, negative."""
    if not jnp.issubdtype(jnp.result_type(budget), jnp.integer):
        raise ValueError(
            f"budget={budget!r}: expected a number of weights, an integer."
        )
    if not isinstance(budget, Tracer) and (least := np.asarray(budget).min()) < 0:
        raise ValueError(f"budget={least}: expected at least 0.")


def clamped(budget: int | Array, size: int) -> Int[Array, ""]:
    """Returns a budget as int32, at most the size of its matrix."""
    return jnp.minimum(in_int32(budget, size), size)


def in_int32(budget: int | Array, size: int) -> Int[Array, ""]:
    """Returns a budget as int32: at least `size` for all that are.

    An int32 array stays as it is: an operation less to compile for every matrix.
    """
    if not isinstance(budget, Array):
        budget = min(int(budget), size)  # before it could overflow int32
    budget = jnp.asarray(budget)
    if jnp.iinfo(budget.dtype).bits >= 32 and budget.dtype != jnp.int32:
        budget = jnp.minimum(budget, size)
    return budget.astype(jnp.int32)


def _count(pattern: UInt[Array, "..."], least: UInt[Array, " c"]) -> Int[Array, " _"]:
    # The first, which nobody asks for, makes them 16: so many columns XLA's compiler
    # for GPUs gives to whole warps.
    reached = pattern[..., None] >= least.reshape(*(1,) * pattern.ndim, -1)
    return jnp.sum(reached, tuple(range(pattern.ndim)), dtype=jnp.int32)[1:]


def _count_by_parts(
    pattern: UInt[Array, "..."], least: UInt[Array, " c"]
) -> Int[Array, " _"]:
    # XLA's CPU backend vectorises and threads a sum of a few rows; the barrier keeps
    # the rest from being folded into it again. 768 x 3072: 3.6 ms for a threshold
    # against 20.
    pieces = math.gcd(pattern.shape[-1], 16) if pattern.ndim else 1
    mesh = jax.typeof(pattern).sharding.mesh
    if pieces == 1 or not (mesh.empty or mesh.are_all_axes_auto):
        return _count(pattern, least)  # a sharding that is part of a type may not split
    parts = pattern.reshape(*pattern.shape[:-1], pieces, pattern.shape[-1] // pieces)
    counts = [jnp.sum(parts >= each, -2, dtype=jnp.int32) for each in least[1:]]
    counts = jax.lax.optimization_barrier(counts)
    return jnp.stack([jnp.sum(each, dtype=jnp.int32) for each in counts])


def bit_pattern(x: Array) -> Array:
    """Returns the magnitude's bits as an unsigned integer: monotone in `|x|`."""
    raw = _raw(x)
    return raw & _magnitude(raw.dtype)


def _raw(x: Array) -> Array:
    wide = jax.lax.stop_gradient(x).astype(at_least_float32(x.dtype))
    unsigned = jnp.uint64 if wide.dtype == jnp.float64 else jnp.uint32
    return jax.lax.bitcast_convert_type(wide, unsigned)


def _magnitude(unsigned: DTypeLike) -> Array:
    """Returns the bits of a magnitude: all but that of the sign."""
    return jnp.asarray(jnp.iinfo(unsigned).max >> 1, unsigned)
