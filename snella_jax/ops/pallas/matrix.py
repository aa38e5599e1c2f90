"""An adapted matrix on the platform at hand: threshold, product and gradients.

The three calls that a layer makes; what differs between platforms is behind them. Each
is jitted, so that layers of one shape share its traced and lowered kernels.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from snella_jax.ops.pallas import (
    gpu_gradients,
    gpu_weight,
    tpu_gradients,
    tpu_product,
    tpu_search,
)
from snella_jax.ops.pallas.packed import (
    Factors,
    Found,
    Packed,
    pack,
    search,
    unpacked,
)
from snella_jax.ops.pallas.target import Target
from snella_jax.ops.pallas.tile import Form

# Largest tiles: inputs, outputs, rows of x. A TPU's are for a product that is bound by
# its arithmetic (v5e: 512 outputs to a row of x that is read), and fit its 128 MiB. A
# GPU's are what 128 threads hold in registers.
TPU_PRODUCT, TPU_GRADIENTS = (512, 512, 4096), (512, 1024, 1024)
GPU = 64, 128, 64


def find(form: Form, factors: Factors, budget: Int[Array, ""], target: Target) -> Found:
    """Finds the threshold, exactly, and the softmax's statistics."""
    n, m = _sizes(factors)
    bn, bm, _ = _tile(target, TPU_PRODUCT, n, m, 0)
    packed = pack(form, factors, None, bn, bm)
    module = tpu_search if target.platform == "tpu" else gpu_weight
    row = _no_stats(packed, target)
    if form.softmax:
        row = module.row_stats(form, packed, bn, bm, target.interpret)

    def count(candidates):
        return module.counts(form, packed, row, candidates, bn, bm, target.interpret)

    tau, limit = search(count, budget, n * m)
    if not form.softmax:
        return Found(tau, limit, None, None)
    top, total = row.T if target.platform == "tpu" else row
    return Found(tau, limit, top[:n], total[:n])


@functools.partial(jax.jit, static_argnames=("form", "target", "transposed"))
def product(
    form: Form,
    x: Float[Array, "T n"],
    w0: Float[Array, "n m"],
    factors: Factors,
    found: Found,
    target: Target,
    transposed: bool = False,
) -> Float[Array, "T m"]:
    """Computes `x @ (w0 + delta)`; transposed, `x @ (w0 + delta).T` of `x[T, m]`."""
    n, m = w0.shape
    tile = bn, bm, _ = _tile(target, TPU_PRODUCT, n, m, x.shape[0])
    packed = pack(form, factors, found.tau, bn, bm)
    row = _stats(found, packed, target)
    if target.platform == "tpu":
        return tpu_product.product(
            form, x, w0, packed, row, found.limit, tile, transposed, target.interpret
        )
    weight = gpu_weight.merged(
        form, w0, packed, row, found.limit, x.dtype, bn, bm, target.interpret
    )
    axes = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(x, weight, axes, preferred_element_type=x.dtype)


@functools.partial(jax.jit, static_argnames=("form", "target"))
def gradients(
    form: Form,
    x: Float[Array, "T n"],
    g: Float[Array, "T m"],
    factors: Factors,
    found: Found,
    target: Target,
) -> Factors:
    """Returns the gradients of the factors, of a weight whose gradient is `x^T g`."""
    n, m = _sizes(factors)
    tile = bn, bm, _ = _tile(target, TPU_GRADIENTS, n, m, x.shape[0])
    packed = pack(form, factors, found.tau, bn, bm)
    row = _stats(found, packed, target)
    module = tpu_gradients if target.platform == "tpu" else gpu_gradients
    da, db, sums = module.gradients(
        form, x, g, packed, row, found.limit, tile, target.interpret
    )
    if not form.softmax:
        return unpacked(form, factors, da, db, sums, None)
    da2, db2, less = module.softmax_tail(
        form, packed, row, sums[0], bn, bm, target.interpret
    )
    return unpacked(form, factors, da + da2, db + db2, sums, less)


def _sizes(factors: Factors) -> tuple[int, int]:
    return factors["a"].shape[1], factors["b"].shape[1]


def _tile(
    target: Target, largest: tuple[int, int, int], n: int, m: int, t: int
) -> tuple[int, int, int]:
    """Returns the sizes of a tile; a TPU's are hardly larger than the arrays."""
    if target.platform == "gpu":
        return target.tile or GPU
    bn, bm, bt = target.tile or largest
    # Whole registers: 128 numbers in the last axis, 16 rows of 16 bits in the other.
    return (
        min(bn, -(-n // 128) * 128),
        min(bm, -(-m // 128) * 128),
        min(bt, -(-max(t, 1) // 16) * 16),
    )


def _no_stats(packed: Packed, target: Target) -> Array:
    rows = packed.a.shape[1]
    shape = (rows, 2) if target.platform == "tpu" else (2, rows)
    return jnp.zeros(shape, jnp.float32)


def _stats(found: Found, packed: Packed, target: Target) -> Array:
    """Returns the softmax's statistics as the kernels read them."""
    if found.top is None or found.total is None:
        return _no_stats(packed, target)
    more = packed.a.shape[1] - found.top.size
    ends = ((found.top, 0), (found.total, 1))  # no input has a sum of 0
    rows = jnp.stack([jnp.pad(v, (0, more), constant_values=end) for v, end in ends])
    return rows.T if target.platform == "tpu" else rows
