"""Factors as the kernels read them, the search they share, and gradients put back."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from snella_jax.ops.pallas.tile import ALWAYS, INFINITY, Form
from snella_jax.ops.threshold import clamped
from snella_jax.ops.varying import varying_alike

Factors = dict[str, Array]
BITS = 4  # of tau's pattern, found in one pass


class Found(NamedTuple):
    """What is searched for once and kept for the way back: small.

    Attributes:
      tau: the threshold, float32.
      limit: int32, the bit pattern that survivors exceed; negative where all survive.
      top, total: the softmax's maximum and sum of every input; None without it.
    """

    tau: Float[Array, ""]
    limit: Int[Array, ""]
    top: Float[Array, " n"] | None
    total: Float[Array, " n"] | None


@dataclasses.dataclass(frozen=True)
class Packed:
    """Factors of an `[n, m]` matrix, padded to whole tiles.

    Attributes:
      a: `[r + 1, N]`: the columns of the factor, then 1 for inputs that exist. The
        kernels for a TPU read them as `[N, r + 1]`.
      b: `[r + 1, M]`, of the outputs.
      scalars: as `Scalars` reads them; tau is 0 before it is found.
    """

    a: Float[Array, "r1 N"]
    b: Float[Array, "r1 M"]
    scalars: Float[Array, " s"]

    @property
    def rank(self) -> int:
        """Columns of a factor."""
        return self.a.shape[0] - 1


def pack(form: Form, factors: Factors, tau: Array | None, bn: int, bm: int) -> Packed:
    """Packs factors for tiles of `bn` inputs and `bm` outputs, in float32."""
    wide = {name: value.astype(jnp.float32) for name, value in factors.items()}
    one, zero = jnp.ones((), jnp.float32), jnp.zeros((), jnp.float32)
    scalars = [
        wide["alpha"] if form.softmax else zero,
        wide["beta"] if form.softmax else zero,
        wide["gamma"] if form.temperature else one,
        zero if tau is None else tau,
    ]
    packed = jnp.concatenate([wide["piece_coeff"], jnp.stack(scalars)])
    return Packed(_columns(wide["a"], bn), _columns(wide["b"], bm), packed)


def result(shape: tuple[int, ...], dtype: Any, like: Array) -> jax.ShapeDtypeStruct:
    """Describes a kernel's result, which varies over a mesh's axes as `like`."""
    kind = jax.typeof(like)
    if kind.sharding.mesh.empty:
        return jax.ShapeDtypeStruct(shape, dtype)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind.mat)


def _columns(factor: Array, size: int) -> Array:
    pieces, rows, d = factor.shape
    columns = jnp.moveaxis(factor, 2, 1).reshape(pieces * d, rows)
    marked = jnp.concatenate([columns, jnp.ones((1, rows), factor.dtype)])
    return jnp.pad(marked, ((0, 0), (0, -rows % size)))


def search(
    count: Callable[[Int[Array, " k"]], Int[Array, " k"]],
    budget: Int[Array, ""],
    size: int,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Returns the `(budget+1)`-th largest magnitude, and the pattern to exceed.

    Args:
      count: numbers of magnitudes whose patterns reach those given; each call is a
        pass over the matrix, which finds `BITS` bits.
      budget: number of weights that are to survive.
      size: number of weights.
    """
    budget = clamped(budget, size)
    steps = jnp.arange(1, 2**BITS, dtype=jnp.int32)

    def narrow(i, low):
        shift = 32 - BITS * (i + 1)
        candidates = low + lax.shift_left(steps, jnp.full_like(steps, shift))
        # The first pass has candidates with the sign's bit, which no magnitude has.
        reached = (count(candidates) > budget) & (candidates > 0)
        found = jnp.sum(reached, dtype=jnp.int32)
        return low + lax.shift_left(found, jnp.asarray(shift, jnp.int32))

    low, budget = varying_alike(jnp.zeros((), jnp.int32), budget)
    low = lax.fori_loop(0, 32 // BITS, narrow, low)
    tau = lax.bitcast_convert_type(low, jnp.float32)
    # One more pass: the pattern to exceed lies half-way to the least survivor's, so
    # that no weight changes sides where a kernel rounds it otherwise than the search.
    powers = lax.shift_left(jnp.ones_like(steps), steps - 1)
    reached = count(low + powers)
    gap = jnp.max(jnp.where(reached == reached[0], powers, 1))
    # NaN survives whatever tau is.
    limit = jnp.minimum(low + gap // 2, INFINITY)
    return tau, jnp.where(budget == size, ALWAYS, limit)


def unpacked(
    form: Form,
    factors: Factors,
    da: Float[Array, "r n"],
    db: Float[Array, "r m"],
    sums: Float[Array, "k n"],
    tail_sums: Float[Array, "l n"] | None,
) -> Factors:
    """Returns the gradients of the factors, from sums of tiles."""
    p = form.pieces
    totals = jnp.sum(sums, 1)
    coeff = totals[-p:]
    grads: dict[str, Array] = {}
    if form.softmax:
        grads |= {"alpha": totals[0], "beta": totals[1]}
    if tail_sums is not None:
        less = jnp.sum(tail_sums, 1)
        coeff = coeff + less[-p:]
        if form.temperature:
            alpha, gamma = (factors[k].astype(jnp.float32) for k in ("alpha", "gamma"))
            grads["gamma"] = (less[0] - totals[2]) * alpha / gamma**2
    grads |= {"a": _rows(da, factors["a"]), "b": _rows(db, factors["b"])}
    grads["piece_coeff"] = coeff
    return {name: grads[name].astype(value.dtype) for name, value in factors.items()}


def _rows(columns: Array, like: Array) -> Array:
    pieces, rows, d = like.shape
    return jnp.moveaxis(columns[:, :rows].reshape(pieces, d, rows), 1, 2)
