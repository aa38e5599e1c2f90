"""The threshold on a TPU: statistics of the softmax, and counts of magnitudes."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from snella_jax.ops.pallas.packed import Packed, result
from snella_jax.ops.pallas.tile import (
    Form,
    Row,
    Scalars,
    bits_of,
    distances,
    kappa_of,
    logits_of,
    make,
)


def strip(size: int) -> int:
    """Returns how many rows of a tile to work on at once: few enough for registers."""
    return next((k for k in (64, 32, 16) if size % k == 0), size)


def read_rows(ref: Array, rows: Array) -> tuple[list[Array], Array]:
    """Returns the columns of `a` in some rows, and 1 where these exist."""
    block = ref[rows, :]
    *columns, exists = (block[:, k : k + 1] for k in range(block.shape[1]))
    return columns, exists


def read_outputs(ref: Array) -> tuple[list[Array], Array]:
    """Returns the columns of `b`, and 1 where the outputs exist."""
    block = ref[...]
    *columns, exists = (block[k : k + 1, :] for k in range(block.shape[0]))
    return columns, exists


def read_stats(form: Form, ref: Array, rows: Array) -> Row | None:
    """Returns the softmax's statistics of some rows."""
    if not form.softmax:
        return None
    block = ref[rows, :]
    return Row(block[:, 0:1], block[:, 1:2])


def in_strips(size: int, body) -> None:
    """Calls `body(rows)` for strips of a tile's rows."""
    step = strip(size)
    if step == size:
        return body(pl.ds(0, size))

    def one(i, carry):
        body(pl.ds(pl.multiple_of(i * step, step), step))
        return carry

    jax.lax.fori_loop(0, size // step, one, 0)


def _stats(s, a, b, out, *, form):
    j = pl.program_id(1)
    scalars = Scalars.read(form, s)
    columns, exists = read_outputs(b)

    def body(rows):
        inputs, _ = read_rows(a, rows)
        kappa = kappa_of(scalars, distances(form, inputs, columns))
        logits = jnp.where(exists > 0, logits_of(form, scalars, kappa), -jnp.inf)
        top = logits.max(1, keepdims=True)

        @pl.when(j == 0)
        def first():
            out[rows, 0:1] = top
            out[rows, 1:2] = jnp.exp(logits - top).sum(1, keepdims=True)

        @pl.when(j > 0)
        def more():
            before, total = out[rows, 0:1], out[rows, 1:2]
            largest = jnp.maximum(before, top)
            out[rows, 0:1] = largest
            out[rows, 1:2] = total * jnp.exp(before - largest) + jnp.exp(
                logits - largest
            ).sum(1, keepdims=True)

    in_strips(a.shape[0], body)


def row_stats(
    form: Form, packed: Packed, bn: int, bm: int, interpret: bool
) -> Float[Array, "N 2"]:
    """Returns the maximum of every row of the logits, and the sum of `exp`."""
    a, b = packed.a.T, packed.b
    return pl.pallas_call(
        functools.partial(_stats, form=form),
        grid=(a.shape[0] // bn, b.shape[1] // bm),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((bn, a.shape[1]), lambda i, j: (i, 0)),
            pl.BlockSpec((b.shape[0], bm), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((bn, 2), lambda i, j: (i, 0)),
        out_shape=result((a.shape[0], 2), jnp.float32, a),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary")
        ),
        interpret=interpret,
        name="snella_softmax_statistics",
    )(packed.scalars, a, b)


def _counts(s, candidates, a, b, row, out, *, form, k):
    @pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0))
    def _():
        out[...] = jnp.zeros_like(out)

    scalars = Scalars.read(form, s)
    columns, exists = read_outputs(b)

    def body(rows):
        inputs, here = read_rows(a, rows)
        made = make(form, scalars, inputs, columns, read_stats(form, row, rows))
        bits = jnp.where((here > 0) & (exists > 0), bits_of(made.delta), 0)
        for c in range(k):
            reached = (bits >= candidates[c]).astype(jnp.int32)
            out[c : c + 1, :] += reached.sum(0, keepdims=True)

    in_strips(a.shape[0], body)


def counts(
    form: Form,
    packed: Packed,
    row: Float[Array, "N 2"],
    candidates: Int[Array, " k"],
    bn: int,
    bm: int,
    interpret: bool,
) -> Int[Array, " k"]:
    """Returns how many magnitudes reach each candidate, all at least 1."""
    a, b, k = packed.a.T, packed.b, candidates.size
    out = pl.pallas_call(
        functools.partial(_counts, form=form, k=k),
        grid=(a.shape[0] // bn, b.shape[1] // bm),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((bn, a.shape[1]), lambda i, j: (i, 0)),
            pl.BlockSpec((b.shape[0], bm), lambda i, j: (0, j)),
            pl.BlockSpec((bn, 2), lambda i, j: (i, 0)),
        ],
        out_specs=pl.BlockSpec((k, bm), lambda i, j: (0, 0)),
        out_shape=result((k, bm), jnp.int32, a),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary")
        ),
        interpret=interpret,
        name="snella_counts",
    )(packed.scalars, candidates, a, b, row)
    return out.sum(1)
