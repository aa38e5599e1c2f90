"""The merged weight on an NVIDIA GPU, and the threshold: passes that store no delta.

Written for Mosaic GPU. A block of threads makes a tile in registers, in the layout that
the tensor cores leave a product in, whose rows and columns can be reduced.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu
from jaxtyping import Array, Float, Int

from snella_jax.ops.pallas.packed import Packed, result
from snella_jax.ops.pallas.tile import (
    Form,
    Row,
    Scalars,
    bits_of,
    distances,
    gated,
    kappa_of,
    logits_of,
    make,
)

WHOLE = mgpu.Layout.WGMMA
OF_ROWS, OF_COLUMNS = WHOLE.reduce(1), WHOLE.reduce(0)
# jax 0.10 asks for an index beside the reference, which 0.11.2 deprecates.
INDEX_BESIDE = "idx" in [
    p.name
    for p in inspect.signature(mgpu.load).parameters.values()
    if p.default is p.empty
]


def root(square: Array) -> Array:
    """Returns the square root, which Mosaic GPU does not have.

    A step of Newton's takes the product with `rsqrt`, a few units in the last place
    off, to one.
    """
    inverse = lax.rsqrt(jnp.where(square > 0, square, 1.0))
    value = square * inverse
    return value + 0.5 * inverse * (square - value * value)


class Tile:
    """Reads and reduces a tile of `[n, m]`, in registers' layouts or as plain JAX."""

    def __init__(self, shape: tuple[int, int], interpret: bool):
        self.shape = shape
        self.interpret = interpret
        self.root = jnp.sqrt if interpret else root

    def laid_out(self, value: Array, layout: Any) -> Array:
        """Gives an array a layout."""
        return value if self.interpret else mgpu.layout_cast(value, layout)

    def read(self, ref: Any, index: Any, layout: Any) -> Array:
        """Reads an array into a layout, whatever way that goes."""
        if self.interpret:
            return ref[index]
        where: tuple[Any, ...] = (ref, index) if INDEX_BESIDE else (ref.at[index],)
        return mgpu.load(*where, layout=layout, optimized=False)

    def whole(self, value: Array) -> Array:
        """Gives a tile its layout."""
        return self.laid_out(value, WHOLE)

    def of_row(self, ref: Array, k: int) -> Array:
        """Reads a number of every input, and spreads it over the outputs."""
        return self._spread(self.read(ref, (k, slice(None)), OF_ROWS), 0)

    def of_column(self, ref: Array, k: int) -> Array:
        """Reads a number of every output, and spreads it over the inputs."""
        return self._spread(self.read(ref, (k, slice(None)), OF_COLUMNS), 1)

    def over_outputs(self, value: Array) -> Array:
        """Sums every row."""
        return self.laid_out(jnp.sum(value, 1), OF_ROWS)

    def over_inputs(self, value: Array) -> Array:
        """Sums every column."""
        return self.laid_out(jnp.sum(value, 0), OF_COLUMNS)

    def factors(self, a: Array, b: Array) -> tuple["Columns", "Columns", Array]:
        """Returns the factors, and where the tile is inside the matrix."""
        rank = a.shape[0] - 1
        rows, columns = Columns(self.of_row, a), Columns(self.of_column, b)
        return rows, columns, self.of_row(a, rank) * self.of_column(b, rank) > 0

    def stats(self, form: Form, ref: Array) -> Row | None:
        """Reads the softmax's statistics."""
        if not form.softmax:
            return None
        return Row(self.of_row(ref, 0), self.of_row(ref, 1))

    def _spread(self, value: Array, axis: int) -> Array:
        return self.whole(lax.broadcast_in_dim(value, self.shape, (axis,)))


class Columns(Sequence[Array]):
    """A factor's columns, each read where it is needed.

    All of them at once do not fit the registers.
    """

    def __init__(self, read: Callable[[Array, int], Array], ref: Array):
        self._read, self._ref = read, ref

    def __len__(self) -> int:
        return self._ref.shape[0] - 1

    def __getitem__(self, k: Any) -> Any:
        return self._read(self._ref, k)


def whole(interpret: bool) -> pl.BlockSpec:
    """Returns the spec of an array that is read number by number."""
    return pl.BlockSpec(memory_space=pl.ANY if interpret else mgpu.GMEM)


def call(
    kernel: Callable[..., None],
    name: str,
    interpret: bool,
    *,
    grid: tuple[int, int],
    in_specs: list[pl.BlockSpec],
    out_specs: list[pl.BlockSpec],
    out_shape: list[Any],
) -> Callable[..., Sequence[Array]]:
    """Returns a function that runs a kernel on every tile, or plain JAX instead."""
    specs: dict[str, Any] = {"in_specs": in_specs, "out_specs": out_specs}
    if interpret:
        return pl.pallas_call(
            kernel, grid=grid, out_shape=out_shape, interpret=True, name=name, **specs
        )

    # jax 0.11.2 takes no such kernel through `pallas_call`. A pipeline of one step
    # copies a tile's blocks in, and its results out.
    def on_tile(*refs):
        tile = lax.axis_index("rows"), lax.axis_index("columns")

        def of_tile(spec: pl.BlockSpec) -> pl.BlockSpec:
            if (place := spec.index_map) is None:
                return spec
            return dataclasses.replace(spec, index_map=lambda: place(*tile))

        own: Any = {key: [*map(of_tile, given)] for key, given in specs.items()}
        mgpu.emit_pipeline(lambda _, *refs: kernel(*refs), grid=(), **own)(*refs)

    return mgpu.kernel(
        on_tile,
        out_type=out_shape,
        grid=grid,
        grid_names=("rows", "columns"),
        kernel_name=name,
    )


def _stats(s, a, b, top, total, *, form, tile):
    scalars = Scalars.read(form, s)
    rows, columns, valid = tile.factors(a, b)
    kappa = kappa_of(scalars, distances(form, rows, columns, tile.root))
    lowest = jnp.finfo(jnp.float32).min
    logits = jnp.where(valid, logits_of(form, scalars, kappa), lowest)
    largest = tile.laid_out(jnp.max(logits, 1), OF_ROWS)
    top[0, :] = largest
    spread = tile.whole(lax.broadcast_in_dim(largest, tile.shape, (0,)))
    powers = jnp.where(valid, jnp.exp(logits - spread), 0.0)
    total[0, :] = tile.over_outputs(powers)


def row_stats(
    form: Form, packed: Packed, bn: int, bm: int, interpret: bool
) -> Float[Array, "2 N"]:
    """Returns the maximum of every row of the logits, and the sum of `exp`."""
    a, b = packed.a, packed.b
    grid = a.shape[1] // bn, b.shape[1] // bm
    of_tile = pl.BlockSpec((1, bn), lambda i, j: (j, i))
    shape = result((grid[1], a.shape[1]), jnp.float32, a)
    top, total = call(
        functools.partial(_stats, form=form, tile=Tile((bn, bm), interpret)),
        "snella_softmax_statistics",
        interpret,
        grid=grid,
        in_specs=[
            whole(interpret),
            pl.BlockSpec((a.shape[0], bn), lambda i, j: (0, i)),
            pl.BlockSpec((b.shape[0], bm), lambda i, j: (0, j)),
        ],
        out_specs=[of_tile, of_tile],
        out_shape=[shape, shape],
    )(packed.scalars, a, b)
    largest = top.max(0)
    # Inputs that only fill up a tile have no sum: 1 for those.
    sums = jnp.sum(total * jnp.exp(top - largest), 0)
    return jnp.stack([largest, jnp.where(sums > 0, sums, 1)])


def _counts(s, candidates, a, b, row, out, *, form, tile, k):
    scalars = Scalars.read(form, s)
    rows, columns, valid = tile.factors(a, b)
    made = make(form, scalars, rows, columns, tile.stats(form, row), tile.root)
    bits = jnp.where(valid, bits_of(made.delta), 0)
    for c in range(k):
        reached = jnp.where(bits >= candidates[c], 1.0, 0.0)
        out[0, c, :] = tile.over_outputs(reached)


def counts(
    form: Form,
    packed: Packed,
    row: Float[Array, "2 N"],
    candidates: Int[Array, " k"],
    bn: int,
    bm: int,
    interpret: bool,
) -> Int[Array, " k"]:
    """Returns how many magnitudes reach each candidate, all at least 1."""
    a, b, k = packed.a, packed.b, candidates.size
    grid = a.shape[1] // bn, b.shape[1] // bm
    (out,) = call(
        functools.partial(_counts, form=form, tile=Tile((bn, bm), interpret), k=k),
        "snella_counts",
        interpret,
        grid=grid,
        in_specs=[
            whole(interpret),
            whole(interpret),
            pl.BlockSpec((a.shape[0], bn), lambda i, j: (0, i)),
            pl.BlockSpec((b.shape[0], bm), lambda i, j: (0, j)),
            pl.BlockSpec((2, bn), lambda i, j: (0, i)),
        ],
        out_specs=[pl.BlockSpec((1, k, bn), lambda i, j: (j, 0, i))],
        out_shape=[result((grid[1], k, a.shape[1]), jnp.float32, a)],
    )(packed.scalars, candidates, a, b, row)
    return jnp.sum(out.astype(jnp.int32), (0, 2))


def _merged(s, limit, w0, a, b, row, out, *, form, tile):
    scalars = Scalars.read(form, s)
    rows, columns, _ = tile.factors(a, b)
    made = make(form, scalars, rows, columns, tile.stats(form, row), tile.root)
    sparse = gated(form, scalars, made.delta, limit[0])
    base = tile.read(w0, ..., WHOLE).astype(jnp.float32)
    out[...] = (base + sparse).astype(out.dtype)


def merged(
    form: Form,
    w0: Float[Array, "n m"],
    packed: Packed,
    row: Float[Array, "2 N"],
    limit: Int[Array, ""],
    dtype: Any,
    bn: int,
    bm: int,
    interpret: bool,
) -> Float[Array, "n m"]:
    """Returns `w0 + delta`, rounded once: `w0` is read once, the result written once.

    Made inside the product it would be made again for every tile of its rows.
    """
    a, b = packed.a, packed.b
    (out,) = call(
        functools.partial(_merged, form=form, tile=Tile((bn, bm), interpret)),
        "snella_merged",
        interpret,
        grid=(a.shape[1] // bn, b.shape[1] // bm),
        in_specs=[
            whole(interpret),
            whole(interpret),
            pl.BlockSpec((bn, bm), lambda i, j: (i, j)),
            pl.BlockSpec((a.shape[0], bn), lambda i, j: (0, i)),
            pl.BlockSpec((b.shape[0], bm), lambda i, j: (0, j)),
            pl.BlockSpec((2, bn), lambda i, j: (0, i)),
        ],
        out_specs=[pl.BlockSpec((bn, bm), lambda i, j: (i, j))],
        out_shape=[result(w0.shape, dtype, a)],
    )(packed.scalars, limit[None], w0, a, b, row)
    return out
