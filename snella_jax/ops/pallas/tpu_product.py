"""`x @ (w0 + delta)` on a TPU, each tile of delta made where it is multiplied."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from snella_jax.ops.pallas.packed import Packed, result
from snella_jax.ops.pallas.tile import Form, Scalars, gated, make
from snella_jax.ops.pallas.tpu_search import (
    in_strips,
    read_outputs,
    read_rows,
    read_stats,
)

VMEM = 60 * 2**20  # of 64 MiB or more


def precision(dtype) -> lax.Precision:
    """Returns the precision of a product: float32 is not rounded to bfloat16.

    Whatever the default is: Mosaic refuses another one for 16 bits, which need none.
    """
    exact = dtype == jnp.float32
    return lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT


def inside(block: Array, index: Array, axis: int, size: int) -> Array:
    """Zeroes what of a block lies beyond an array's end: anything may be there."""
    if size % block.shape[axis] == 0:
        return block
    here = index * block.shape[axis] + lax.broadcasted_iota(
        jnp.int32, block.shape, axis
    )
    return jnp.where(here < size, block, jnp.zeros_like(block))


def _product(s, limit, x, w0, a, b, row, y, merged, total, *, form, size, transposed):
    c = pl.program_id(2)

    @pl.when(c == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    scalars = Scalars.read(form, s)
    columns, exists = read_outputs(b)

    def body(rows):
        inputs, here = read_rows(a, rows)
        made = make(form, scalars, inputs, columns, read_stats(form, row, rows))
        sparse = gated(form, scalars, made.delta, limit[0])
        summed = w0[rows, :].astype(jnp.float32) + sparse
        valid = (here > 0) & (exists > 0)
        merged[rows, :] = jnp.where(valid, summed, 0.0).astype(merged.dtype)

    in_strips(a.shape[0], body)
    axes = (((1,), (1 if transposed else 0,)), ((), ()))
    total[...] += lax.dot_general(
        inside(x[...], c, 1, size),
        merged[...],
        axes,
        precision=precision(x.dtype),
        preferred_element_type=jnp.float32,
    )

    @pl.when(c == pl.num_programs(2) - 1)
    def _():
        y[...] = total[...].astype(y.dtype)


def product(
    form: Form,
    x: Float[Array, "T n"],
    w0: Float[Array, "n m"],
    packed: Packed,
    row: Float[Array, "N 2"],
    limit: Array,
    tile: tuple[int, int, int],
    transposed: bool,
    interpret: bool,
) -> Float[Array, "T m"]:
    """Computes `x @ (w0 + delta)`; transposed, `x @ (w0 + delta).T` of `x[T, m]`.

    Args:
      form: what the update is made of.
      x, w0: arrays of at most float32; the product runs in the dtype of `x`.
      packed, row, limit: the factors, with tau, and what `search` found.
      tile: sizes of a tile: inputs, outputs and rows of `x`.
      transposed: True on the way back.
      interpret: True to run as plain JAX.
    """
    bn, bm, bt = tile
    (t, size), (n, m), (a, b) = x.shape, w0.shape, (packed.a.T, packed.b)
    rows, tall, wide = (pl.cdiv(v, k) for v, k in ((t, bt), (n, bn), (m, bm)))
    # Grid: rows of x, tiles of the output, tiles that are contracted.
    if transposed:
        grid, bx, by, out = (rows, tall, wide), bm, bn, n
    else:
        grid, bx, by, out = (rows, wide, tall), bn, bm, m

    def at(o, c):
        return (o, c) if transposed else (c, o)

    return pl.pallas_call(
        functools.partial(_product, form=form, size=size, transposed=transposed),
        grid=grid,
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((bt, bx), lambda i, o, c: (i, c)),
            pl.BlockSpec((bn, bm), lambda i, o, c: at(o, c)),
            pl.BlockSpec((bn, a.shape[1]), lambda i, o, c: (at(o, c)[0], 0)),
            pl.BlockSpec((b.shape[0], bm), lambda i, o, c: (0, at(o, c)[1])),
            pl.BlockSpec((bn, 2), lambda i, o, c: (at(o, c)[0], 0)),
        ],
        out_specs=pl.BlockSpec((bt, by), lambda i, o, c: (i, o)),
        out_shape=result((t, out), x.dtype, x),
        scratch_shapes=[
            pltpu.VMEM((bn, bm), x.dtype),
            pltpu.VMEM((bt, by), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM,
        ),
        interpret=interpret,
        name="snella_product_transposed" if transposed else "snella_product",
    )(packed.scalars, limit[None], x, w0, a, b, row)
