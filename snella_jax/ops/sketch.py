"""Sketches of rows: `(S x)^T (S g)` in the place of a weight's gradient `x^T g`.

`S` has `k = ceil(T/s)` rows for the `T` rows of an example and `E[S^T S] = I`, so the
product is unbiased. What is kept for the way back is `S x`, not `x`, and the product
takes `k/T` of its time. Its noise grows with `s` and falls with the number of rows in a
batch: where an example has few of them (pooled features, a head), there is little to
save and much to lose.

    >>> import jax.numpy as jnp
    >>> sketch, x = Sketch(4), jnp.arange(10)[:, None]
    >>> key = jax.random.key(0)
    >>> sketch.of_input(key, x, 0)[:, 0].tolist()  # of 0-3, of 4-7, of 8-9
    [1, 4, 8]
    >>> Sketch(4, keep_rows=(0,)).count(197)
    50

Source: sampling and CountSketch for products, Drineas et al., 2006; Clarkson and
Woodruff, 2013.
"""

import dataclasses
import functools
from collections.abc import Sequence
from numbers import Integral
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, PRNGKeyArray

from snella_jax.ops.barriers import of_stored
from snella_jax.ops.dtypes import at_least_float32
from snella_jax.ops.names import sketched

Kind = Literal["sample", "strided", "crs"]


@dataclasses.dataclass(frozen=True)
class Sketch:
    """A random `S` of few rows, drawn for each example: static, equal by value.

    The rows are an axis of the arrays, all axes in front of it the examples'.

    Attributes:
      factor: `s`, rows of `x` to one that is kept; 1 for no sketch.
      kind: "sample" keeps one of every `s` consecutive rows (of the last, shorter run
        one, too). "strided" keeps sums with random signs of `s` rows that are `k` rows
        apart. "crs" keeps all of `x` and draws rows on the way back, the likelier the
        larger `|x_t| |g_t|`: it saves time alone.
      keep_rows: positions of rows that are always kept, with a weight of 1; the others
        are sketched.

    Raises:
      ValueError: a value that the attribute does not allow.
    """

    factor: int = 1
    kind: Kind = "sample"
    keep_rows: tuple[int, ...] = ()

    def __post_init__(self):
        if not isinstance(self.factor, int) or self.factor < 1:
            raise ValueError(
                f"sketch={self.factor}: expected a whole number of at least 1."
            )
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"No sketch is called {self.kind!r}: expected "
                f"{', '.join(get_args(Kind))}."
            )
        rows = self.keep_rows
        if not isinstance(rows, Sequence) or not all(
            isinstance(row, Integral) and row >= 0 and rows.count(row) == 1
            for row in rows
        ):
            raise ValueError(
                f"keep_rows={rows}: expected different positions from 0 on, such as "
                "(0,)."
            )
        object.__setattr__(self, "keep_rows", tuple(sorted(map(int, rows))))

    @property
    def saves(self) -> bool:
        """True if not all rows are kept for the way back."""
        return self.factor > 1 and self.kind != "crs"

    def count(self, rows: int) -> int:
        """Returns how many of so many rows are kept.

        Raises:
          ValueError: there is no such row as `keep_rows` has.
        """
        if self.keep_rows and self.keep_rows[-1] >= rows:
            raise ValueError(
                f"keep_rows={self.keep_rows} of an input with {rows} rows: there is no "
                f"row {self.keep_rows[-1]}."
            )
        kept = len(self.keep_rows)
        return kept + -(-(rows - kept) // self.factor)

    def kept(self, key: PRNGKeyArray, x: Array, axis: int) -> Array:
        """Returns what is kept of `x` for the way back: `S x`; `x` itself for "crs".

        Args:
          key: random key.
          x: input with its rows along `axis`; examples in front, features behind.
          axis: axis of the rows, from 0 on.

        Raises:
          ValueError: as `of_both`.
        """
        self._check_whole(x, axis)
        return sketched(self.of_input(key, x, axis)) if self.saves else x

    def of_both(
        self, key: PRNGKeyArray, kept: Array, g: Array, axis: int
    ) -> tuple[Array, Array]:
        """Returns `S x` and `S g`, of what `kept` kept and the cotangent.

        Raises:
          ValueError: the rows are split along an explicit axis of a mesh, and all of
            an example's are needed on one device.
        """
        self._check_whole(g, axis)
        if not self.saves:
            return self._by_size(key, kept, g, axis)
        return kept, self.of_cotangent(key, g, axis)

    def _check_whole(self, v: Array, axis: int) -> None:
        spec = jax.typeof(v).sharding.spec
        split = spec[axis] if axis < len(spec) else None
        if split is not None and (self.keep_rows or self.kind == "crs"):
            raise ValueError(
                f"rows are split along {split!r} of the mesh: keep_rows and "
                'sketch_kind="crs" need all of an example on a device, '
                'sketch_kind="sample" or "strided" alone do not.'
            )

    def of_input(self, key: PRNGKeyArray, x: Array, axis: int) -> Array:
        """Returns `S x` but for the weights, which `of_cotangent` has: exact copies."""
        return self._sketched(key, x, axis, weighted=False)

    def of_cotangent(self, key: PRNGKeyArray, g: Array, axis: int) -> Array:
        """Returns `S g` with the squares of the weights: whole numbers."""
        return self._sketched(key, g, axis, weighted=True)

    def draw(
        self, key: PRNGKeyArray, batch: tuple[int, ...], rows: int
    ) -> Int[Array, "..."]:
        """Draws for each example: places in the runs, or signs of the rows.

        Args:
          key: random key.
          batch: sizes of the axes of the examples.
          rows: number of rows that are not kept anyway.

        Returns:
          int32: for "sample" `[*batch, k]`, the row of each run; for "strided"
          `[*batch, s, k]`, 1 or -1.
        """
        k = -(-rows // self.factor)
        if self.kind == "strided":
            bits = jax.random.bits(key, (*batch, self.factor, k), jnp.uint32)
            return jnp.where(bits >> 31, jnp.int32(1), jnp.int32(-1))
        ends = self._sizes(rows).reshape(*(1,) * len(batch), k)
        return jax.random.randint(key, (*batch, k), 0, ends, jnp.int32)

    def picked(self, draw: Int[Array, "..."], v: Array, axis: int) -> Array:
        """Returns the rows that a draw leaves of `v`, without their weights."""
        rows, k = v.shape[axis], -(-v.shape[axis] // self.factor)
        spread = draw.reshape(*draw.shape, *(1,) * (v.ndim - axis - 1))
        # Slices and selections, no gather: on a mesh nothing moves, and they fuse.
        if self.kind == "strided":
            signs = jnp.moveaxis(spread, axis, 0).astype(v.dtype)
            parts = [_part(v, axis, slice(i, i + k), k) for i in range(0, rows, k)]
            signed = [sign * part for sign, part in zip(signs, parts, strict=False)]
            return functools.reduce(jnp.add, signed)
        found = _part(v, axis, slice(0, None, self.factor), k)
        for place in range(1, min(self.factor, rows)):
            part = _part(v, axis, slice(place, None, self.factor), k)
            found = jnp.where(spread == place, part, found)
        return found

    def _sketched(self, key: PRNGKeyArray, v: Array, axis: int, weighted: bool):
        self.count(v.shape[axis])
        return of_stored(lambda v: self._linear(key, v, axis, weighted), v, key)

    def _linear(self, key: PRNGKeyArray, v: Array, axis: int, weighted: bool):
        parts, start = [], 0
        for row in self.keep_rows:  # static slices: nothing is gathered
            parts.append(lax.slice_in_dim(v, start, row, axis=axis))
            start = row + 1
        parts.append(lax.slice_in_dim(v, start, None, axis=axis))
        rest = lax.concatenate(parts, axis) if len(parts) > 1 else v
        kept = self._always(v, axis)
        rows = rest.shape[axis]
        if rows:
            draw = self.draw(key, v.shape[:axis], rows)
            rest = self.picked(draw, rest, axis)
            if weighted and self.kind == "sample":
                shape = tuple(-1 if i == axis else 1 for i in range(v.ndim))
                rest *= self._sizes(rows).astype(v.dtype).reshape(shape)
        return lax.concatenate([*kept, rest], axis) if kept else rest

    def _sizes(self, rows: int) -> Int[Array, " k"]:
        """Returns the lengths of the runs: `s`, but for the last."""
        k = -(-rows // self.factor)
        starts = self.factor * jnp.arange(k, dtype=jnp.int32)
        return jnp.minimum(self.factor, rows - starts)

    def _by_size(
        self, key: PRNGKeyArray, x: Array, g: Array, axis: int
    ) -> tuple[Array, Array]:
        """Draws rows of each example by `|x_t| |g_t|`, a step apart on their sum.

        A row of the share `p` of the sum is drawn `k p` times on average, exactly.
        """
        rows = x.shape[axis]
        k = self.count(rows) - len(self.keep_rows)
        size = _norms(x, axis) * _norms(g, axis)
        for row in self.keep_rows:
            size = size.at[..., row].set(0)
        ends = jnp.cumsum(size, -1)
        whole = ends[..., -1:]
        start = jax.random.uniform(key, (*x.shape[:axis], 1), size.dtype)
        points = (jnp.arange(k, dtype=size.dtype) + start) / k * whole
        index = jnp.sum(ends[..., None, :] <= points[..., None], -1)
        index = jnp.minimum(index, rows - 1)
        drawn = jnp.take_along_axis(size, index, -1)
        weight = jnp.where(drawn == 0, 0, whole / (k * drawn))
        weight = weight.reshape(*weight.shape, *(1,) * (g.ndim - axis - 1))
        few = _rows_at(x, index), (_rows_at(g, index) * weight).astype(g.dtype)
        small, other = (
            lax.concatenate([*self._always(v, axis), rest], axis)
            for v, rest in zip((x, g), few, strict=True)
        )
        return small, other

    def _always(self, v: Array, axis: int) -> list[Array]:
        return [lax.slice_in_dim(v, i, i + 1, axis=axis) for i in self.keep_rows]


EVERY_ROW = Sketch()


def _part(v: Array, axis: int, rows: slice, k: int) -> Array:
    """Takes rows along an axis, filled up with zeros to `k`."""
    part = lax.slice_in_dim(
        v,
        rows.start,
        min(rows.stop or v.shape[axis], v.shape[axis]),
        rows.step or 1,
        axis,
    )
    missing = k - part.shape[axis]
    pads = [(0, missing if i == axis else 0) for i in range(v.ndim)]
    return jnp.pad(part, pads) if missing else part


def _norms(v: Array, axis: int) -> Array:
    """Returns the norms of the rows along an axis, at least float32."""
    wide = v.astype(at_least_float32(v.dtype))
    return jnp.sqrt(jnp.sum(jnp.square(wide), tuple(range(axis + 1, v.ndim))))


def _rows_at(v: Array, index: Int[Array, "*batch k"]) -> Array:
    """Takes rows of each example."""
    axis = index.ndim - 1
    index = index.reshape(*index.shape, *(1,) * (v.ndim - index.ndim))
    return jnp.take_along_axis(v, index, axis)
