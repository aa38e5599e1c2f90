"""Gradients of the factors on an NVIDIA GPU: `x^T g` reduced in panels, by Mosaic GPU.

A panel of some inputs and all outputs is made by the GPU's own matmul and reduced by a
kernel at once, tile by tile in registers. (Reduced inside the matmul, a tile has to be
as small as the registers of 128 threads: 64 x 128, for which x and g are read from the
cache so often that it takes 6.3 ms for 4096 x 11008 and 16,384 tokens, counted at 5.5
TB/s, where the whole matmul takes about 2.) Each tile leaves sums of its rows and
columns, which are added up outside.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from snella_jax.ops.pallas import tile as tiles
from snella_jax.ops.pallas.gpu_weight import WHOLE, Tile, call, whole
from snella_jax.ops.pallas.packed import Packed, result
from snella_jax.ops.pallas.tile import Form, Scalars, make, pull, slope, tail
from snella_jax.ops.varying import varying_alike

PANEL = 512  # inputs: 22 MiB for 11008 outputs

Sums = tuple[Float[Array, "r N"], Float[Array, "r M"], Float[Array, "k N"]]


def _into(own: Tile, da, db, sums) -> tiles.Sums:
    def to(ref):
        def write(k, value):
            ref[0, k, :] = value

        return write

    return tiles.Sums(to(da), to(db), to(sums), own.over_outputs, own.over_inputs)


def _gradients(s, limit, g, a, b, row, da, db, sums, *, form, tile):
    scalars = Scalars.read(form, s)
    rows, columns, valid = tile.factors(a, b)
    made = make(form, scalars, rows, columns, tile.stats(form, row), tile.root)
    moved = slope(form, scalars, made.delta, limit[0], tile.read(g, ..., WHOLE))
    moved = jnp.where(valid, moved, 0.0)
    to = _into(tile, da, db, sums)
    pull(form, scalars, rows, columns, made, moved, to)


def _tail(s, a, b, row, of_rows, da, db, sums, *, form, tile):
    scalars = Scalars.read(form, s)
    rows, columns, valid = tile.factors(a, b)
    made = make(form, scalars, rows, columns, tile.stats(form, row), tile.root)
    totals = tile.of_row(of_rows, 0)
    to = _into(tile, da, db, sums)
    tail(form, scalars, rows, columns, made, valid, totals, to)


def _call(kernel, own: Tile, a, b, many: int, in_specs, operands, name: str) -> Sums:
    """Calls a kernel whose tiles leave sums, and adds these up."""
    (bn, bm), (r1, n), m = own.shape, a.shape, b.shape[1]
    high, wide, rank = n // bn, m // bm, r1 - 1
    shapes = (wide, rank, n), (high, rank, m), (wide, many, n)
    found = call(
        kernel,
        name,
        own.interpret,
        grid=(high, wide),
        in_specs=in_specs,
        out_specs=[
            pl.BlockSpec((1, rank, bn), lambda i, j: (j, 0, i)),
            pl.BlockSpec((1, rank, bm), lambda i, j: (i, 0, j)),
            pl.BlockSpec((1, many, bn), lambda i, j: (j, 0, i)),
        ],
        out_shape=[result(shape, jnp.float32, a) for shape in shapes],
    )(*operands)
    da, db, sums = (value.sum(0) for value in found)
    return da, db, sums


def _of_factors(a: Array, own: Tile) -> list[pl.BlockSpec]:
    bn, bm = own.shape
    return [
        pl.BlockSpec((a.shape[0], bn), lambda i, j: (0, i)),
        pl.BlockSpec((a.shape[0], bm), lambda i, j: (0, j)),
        pl.BlockSpec((2, bn), lambda i, j: (0, i)),
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
    """Returns the sums of `pull` over all tiles of `x^T g`."""
    own = Tile(tile[:2], interpret)
    bn, bm = own.shape
    kernel = functools.partial(_gradients, form=form, tile=own)

    def panel(x: Array, a: Array, row: Array) -> Sums:
        axes = (((0,), (0,)), ((), ()))
        weight = lax.dot_general(x, g, axes, preferred_element_type=jnp.float32)
        in_specs = [
            whole(interpret),
            whole(interpret),
            pl.BlockSpec((bn, bm), lambda i, j: (i, j)),
            *_of_factors(a, own),
        ]
        operands = (packed.scalars, limit[None], weight, a, packed.b, row)
        return _call(
            kernel, own, a, packed.b, form.sums, in_specs, operands, "snella_gradients"
        )

    n, size = x.shape[1], panel_size(x.shape[1], bn)
    done = n // size * size

    def one(db: Array, start: Array) -> tuple[Array, Any]:
        parts = (
            lax.dynamic_slice_in_dim(v, start, size, 1) for v in (x, packed.a, row)
        )
        da, more, sums = panel(*parts)
        return db + more, (da, sums)

    db = jnp.zeros((packed.rank, packed.b.shape[1]), jnp.float32)
    db, _ = varying_alike(db, packed.b)
    of_inputs: list[list[Array]] = [[], []]
    if done:
        db, found = lax.scan(one, db, jnp.arange(0, done, size))
        for parts, value in zip(of_inputs, found, strict=True):
            parts.append(jnp.moveaxis(value, 0, 1).reshape(value.shape[1], -1))
    if done < n:
        da, more, sums = panel(*(v[:, done:] for v in (x, packed.a, row)))
        db = db + more
        for parts, value in zip(of_inputs, (da, sums), strict=True):
            parts.append(value)
    da, sums = (jnp.concatenate(parts, 1) for parts in of_inputs)
    return da, db, sums


def panel_size(n: int, step: int) -> int:
    """Returns the inputs of a panel: whole tiles, and panels alike where that goes.

    >>> panel_size(768, 64), panel_size(11008, 64), panel_size(100, 64)
    (384, 256, 512)
    """
    least = -(-n // PANEL)
    alike = [k for k in range(least, 2 * least + 1) if n % (k * step) == 0]
    return n // alike[0] if alike else PANEL


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
    in_specs = [
        whole(interpret),
        *_of_factors(packed.a, own),
        pl.BlockSpec((1, bn), lambda i, j: (0, i)),
    ]
    operands = (packed.scalars, packed.a, packed.b, row, totals[None])
    return _call(
        functools.partial(_tail, form=form, tile=own),
        own,
        packed.a,
        packed.b,
        form.tail_sums,
        in_specs,
        operands,
        "snella_softmax_tail",
    )
