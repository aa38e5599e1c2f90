"""Gradients of the factors on an NVIDIA GPU: tiles of `x^T g` reduced in registers.

Each tile leaves sums of its rows and columns, `m / bm` and `n / bn` of them for every
input and output, which are added up outside.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from snella_jax.ops.pallas.gpu_weight import OF_ROWS, Tile, settings, whole
from snella_jax.ops.pallas.packed import Packed
from snella_jax.ops.pallas.tile import Form, Scalars, make, pull, slope, tail

STEPS = 4  # tiles of x and g that are read ahead

Sums = tuple[Float[Array, "r N"], Float[Array, "r M"], Float[Array, "k N"]]


def _written(pulled, da, db, sums):
    for ref, values in ((da, pulled.a), (db, pulled.b), (sums, pulled.sums)):
        for k, value in enumerate(values):
            ref[0, k, :] = value


def _gradients(s, limit, x, g, a, b, row, da, db, sums, total, *, form, tile, t):
    step = pl.program_id(2)
    if tile.interpret:

        @pl.when(step == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        # Beyond the end a GPU reads zeros.
        here = step * x.shape[0] + jnp.arange(x.shape[0])[:, None] < t
        x, g = (jnp.where(here, v[...], 0).astype(jnp.float32) for v in (x, g))
        total[...] += jnp.dot(x.T, g, precision="highest")
    else:
        mgpu.wgmma(total, mgpu.transpose_ref(x, (1, 0)), g)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        scalars = Scalars.read(form, s)
        rows, columns, valid = tile.factors(a, b)
        made = make(form, scalars, rows, columns, tile.stats(form, row), tile.root)
        moved = slope(form, scalars, made.delta, limit[0], tile.whole(total[...]))
        moved = jnp.where(valid, moved, 0.0)
        over = tile.over_outputs, tile.over_inputs
        pulled = pull(form, scalars, rows, columns, made, moved, *over)
        _written(pulled, da, db, sums)

    if not tile.interpret:
        mgpu.wgmma_wait(0)


def _rows_of_x(bt: int, width: int, which: int, interpret: bool) -> Any:
    def index(i, j, k):
        return (k, (i, j)[which])

    if interpret:
        return pl.BlockSpec((bt, width), index)
    swizzle = mgpu.find_swizzle(width * 16)  # bits of a row in 16-bit numbers
    transforms = (
        mgpu.TilingTransform((8, swizzle // 2)),
        mgpu.SwizzleTransform(swizzle),
    )
    return mgpu.BlockSpec((bt, width), index, transforms=transforms)


def _call(kernel, form, packed, tile, steps, semantics, in_specs, extra, scratch, name):
    """Calls a kernel whose tiles leave sums of their rows and columns."""
    a, b = packed.a, packed.b
    (bn, bm), (r1, n), m = tile.shape, a.shape, b.shape[1]
    high, wide = n // bn, m // bm
    rank, many = r1 - 1, form.sums if steps else form.tail_sums
    shapes = (wide, rank, n), (high, rank, m), (wide, many, n)
    found = pl.pallas_call(
        kernel,
        grid=(high, wide, *steps),
        in_specs=in_specs,
        out_specs=[
            pl.BlockSpec((1, rank, bn), lambda i, j, *_: (j, 0, i)),
            pl.BlockSpec((1, rank, bm), lambda i, j, *_: (i, 0, j)),
            pl.BlockSpec((1, many, bn), lambda i, j, *_: (j, 0, i)),
        ],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        scratch_shapes=scratch,
        compiler_params=semantics,
        interpret=tile.interpret,
        name=name,
    )(*extra)
    return tuple(value.sum(0) for value in found)


def _of_factors(packed: Packed, bn: int, bm: int) -> list[pl.BlockSpec]:
    r1 = packed.a.shape[0]
    return [
        pl.BlockSpec((r1, bn), lambda i, j, *_: (0, i)),
        pl.BlockSpec((r1, bm), lambda i, j, *_: (0, j)),
        pl.BlockSpec((2, bn), lambda i, j, *_: (0, i)),
    ]


def gradients(
    form: Form,
    x: Float[Array, "T n"],
    g: Float[Array, "T m"],
    packed: Packed,
    row: Float[Array, "2 N"],
    limit: Int[Array, ""],
    tile: tuple[int, int, int],
    interpret: bool,
) -> Sums:
    """Returns the sums of `pull` over all tiles of `x^T g`, both of 16 bits."""
    bn, bm, bt = tile
    own, t = Tile((bn, bm), interpret), x.shape[0]
    total = pltpu.VMEM if interpret else mgpu.ACC
    return _call(
        functools.partial(_gradients, form=form, tile=own, t=t),
        form,
        packed,
        own,
        (pl.cdiv(t, bt),),
        settings(
            interpret,
            "parallel",
            "parallel",
            "sequential",
            max_concurrent_steps=STEPS,
        ),
        [
            whole(interpret),
            whole(interpret),
            _rows_of_x(bt, bn, 0, interpret),
            _rows_of_x(bt, bm, 1, interpret),
            *_of_factors(packed, bn, bm),
        ],
        (packed.scalars, limit[None], x, g, packed.a, packed.b, row),
        [total((bn, bm), jnp.float32)],
        "snella_gradients",
    )


def _tail(s, a, b, row, of_rows, da, db, sums, *, form, tile):
    scalars = Scalars.read(form, s)
    rows, columns, valid = tile.factors(a, b)
    made = make(form, scalars, rows, columns, tile.stats(form, row), tile.root)
    totals = tile.of_row(of_rows, 0)
    over = tile.over_outputs, tile.over_inputs
    pulled = tail(form, scalars, rows, columns, made, valid, totals, *over)
    _written(pulled, da, db, sums)


def softmax_tail(
    form: Form,
    packed: Packed,
    row: Float[Array, "2 N"],
    totals: Float[Array, " N"],
    bn: int,
    bm: int,
    interpret: bool,
) -> Sums:
    """Returns the sums of `tail` over all tiles, from the first row of `pull`'s."""
    own = Tile((bn, bm), interpret)
    return _call(
        functools.partial(_tail, form=form, tile=own),
        form,
        packed,
        own,
        (),
        settings(interpret, "parallel", "parallel"),
        [
            whole(interpret),
            *_of_factors(packed, bn, bm),
            pl.BlockSpec((1, bn), lambda i, j: (0, i)),
        ],
        (packed.scalars, packed.a, packed.b, row, totals[None]),
        [],
        "snella_softmax_tail",
    )
