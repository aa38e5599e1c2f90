"""Gradients of the factors on a TPU: tiles of `x^T g` reduced where they are made."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from snella_jax.ops.pallas import tile as tiles
from snella_jax.ops.pallas.packed import Packed, result
from snella_jax.ops.pallas.tile import Form, Scalars, make, pull, slope, tail
from snella_jax.ops.pallas.tpu_product import VMEM, inside, precision
from snella_jax.ops.pallas.tpu_search import (
    in_strips,
    read_outputs,
    read_rows,
    read_stats,
)

Sums = tuple[Float[Array, "r N"], Float[Array, "r M"], Float[Array, "k N"]]


def _zeroed(i, j, da, db, sums):
    @pl.when(j == 0)
    def _():
        da[...] = jnp.zeros_like(da)
        sums[...] = jnp.zeros_like(sums)

    @pl.when((i == 0) & (j == 0))
    def _():
        db[...] = jnp.zeros_like(db)


def _into(rows, outputs, da, db, sums) -> tiles.Sums:
    def of_rows(k, value):
        da[rows, k : k + 1] += value

    def of_columns(k, value):
        db[k : k + 1, outputs] += value

    def others(k, value):
        sums[rows, k : k + 1] += value

    def over(axis):
        return lambda v: v.sum(axis, keepdims=True)

    return tiles.Sums(of_rows, of_columns, others, over(1), over(0))


def _gradients(s, limit, x, g, a, b, row, da, db, sums, total, *, form, t):
    i, j, step = (pl.program_id(axis) for axis in range(3))

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros_like(total)
        _zeroed(i, j, da, db, sums)

    total[...] += lax.dot_general(
        inside(x[...], step, 0, t),
        inside(g[...], step, 0, t),
        (((0,), (0,)), ((), ())),
        precision=precision(x.dtype),
        preferred_element_type=jnp.float32,
    )

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        bm = b.shape[1]
        scalars = Scalars.read(form, s)
        columns, exists = read_outputs(b)
        outputs = pl.ds(pl.multiple_of(j * bm, bm), bm)

        def body(rows):
            inputs, here = read_rows(a, rows)
            made = make(form, scalars, inputs, columns, read_stats(form, row, rows))
            moved = slope(form, scalars, made.delta, limit[0], total[rows, :])
            moved = jnp.where((here > 0) & (exists > 0), moved, 0.0)
            to = _into(rows, outputs, da, db, sums)
            pull(form, scalars, inputs, columns, made, moved, to)

        in_strips(a.shape[0], body)


def gradients(
    form: Form,
    x: Float[Array, "T n"],
    g: Float[Array, "T m"],
    packed: Packed,
    row: Float[Array, "N 2"],
    limit: Array,
    tile: tuple[int, int, int],
    interpret: bool,
) -> Sums:
    """Returns the sums of `pull` over all tiles of `x^T g`."""
    (bn, bm, bt), t = tile, x.shape[0]
    a, b = packed.a.T, packed.b
    (n, r1), m = a.shape, b.shape[1]
    da, db, sums = pl.pallas_call(
        functools.partial(_gradients, form=form, t=t),
        grid=(n // bn, m // bm, pl.cdiv(t, bt)),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((bt, bn), lambda i, j, k: (k, i)),
            pl.BlockSpec((bt, bm), lambda i, j, k: (k, j)),
            pl.BlockSpec((bn, r1), lambda i, j, k: (i, 0)),
            pl.BlockSpec((r1, bm), lambda i, j, k: (0, j)),
            pl.BlockSpec((bn, 2), lambda i, j, k: (i, 0)),
        ],
        out_specs=[
            pl.BlockSpec((bn, r1 - 1), lambda i, j, k: (i, 0)),
            pl.BlockSpec((r1 - 1, m), lambda i, j, k: (0, 0)),  # stays in VMEM
            pl.BlockSpec((bn, form.sums), lambda i, j, k: (i, 0)),
        ],
        out_shape=[
            result(shape, jnp.float32, a)
            for shape in ((n, r1 - 1), (r1 - 1, m), (n, form.sums))
        ],
        scratch_shapes=[pltpu.VMEM((bn, bm), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",) * 3, vmem_limit_bytes=VMEM
        ),
        interpret=interpret,
        name="snella_gradients",
    )(packed.scalars, limit[None], x, g, a, b, row)
    return da.T, db, sums.T


def _tail(s, a, b, row, of_rows, da, db, sums, *, form):
    i, j = pl.program_id(0), pl.program_id(1)
    _zeroed(i, j, da, db, sums)
    bm = b.shape[1]
    scalars = Scalars.read(form, s)
    columns, exists = read_outputs(b)
    outputs = pl.ds(pl.multiple_of(j * bm, bm), bm)

    def body(rows):
        inputs, here = read_rows(a, rows)
        made = make(form, scalars, inputs, columns, read_stats(form, row, rows))
        valid = (here > 0) & (exists > 0)
        to = _into(rows, outputs, da, db, sums)
        tail(form, scalars, inputs, columns, made, valid, of_rows[rows, :], to)

    in_strips(a.shape[0], body)


def softmax_tail(
    form: Form,
    packed: Packed,
    row: Float[Array, "N 2"],
    totals: Float[Array, " N"],
    bn: int,
    bm: int,
    interpret: bool,
) -> Sums:
    """Returns the sums of `tail` over all tiles, from the first row of `pull`'s."""
    a, b = packed.a.T, packed.b
    (n, r1), m = a.shape, b.shape[1]
    da, db, sums = pl.pallas_call(
        functools.partial(_tail, form=form),
        grid=(n // bn, m // bm),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((bn, r1), lambda i, j: (i, 0)),
            pl.BlockSpec((r1, bm), lambda i, j: (0, j)),
            pl.BlockSpec((bn, 2), lambda i, j: (i, 0)),
            pl.BlockSpec((bn, 1), lambda i, j: (i, 0)),
        ],
        out_specs=[
            pl.BlockSpec((bn, r1 - 1), lambda i, j: (i, 0)),
            pl.BlockSpec((r1 - 1, m), lambda i, j: (0, 0)),  # stays in VMEM
            pl.BlockSpec((bn, form.tail_sums), lambda i, j: (i, 0)),
        ],
        out_shape=[
            result(shape, jnp.float32, a)
            for shape in ((n, r1 - 1), (r1 - 1, m), (n, form.tail_sums))
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=interpret,
        name="snella_softmax_tail",
    )(packed.scalars, a, b, row, totals[:, None])
    return da.T, db, sums.T
