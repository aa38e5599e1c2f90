"""Fingerprints of weights: sums over their numbers, taken where they are stored.

Every number gives a term, mixed from its bits and its place; the terms are summed
modulo 2^64. So the sum depends neither on the parts that an array is read in nor on the
devices that hold them, and nothing larger than a sum goes from process to process.
Without places it does not depend on order, shape and number of arrays either. It tells
weights apart that were not made to be mistaken for each other; it is no signature.

    >>> whole = np.arange(6, dtype=np.float32).reshape(2, 3)
    >>> numbers = [total(part, "float32") for part in (whole, whole[0], whole[1].T)]
    >>> bool(numbers[0] == numbers[1] + numbers[2])
    True
    >>> found = Fingerprint.of(whole)
    >>> found.is_of(whole), found.is_of(whole[::-1])
    (True, False)
"""

import dataclasses
import functools
import hashlib
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import DTypeLike, UInt64

from snella_jax.core.layout import Layout
from snella_jax.files.hosts import over_processes, parts

NARROWER = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
# Of splitmix64 (Steele et al., OOPSLA 2014): the step from place to place, the mixing.
STEP = np.uint64(0x9E3779B97F4A7C15)
MIX = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
BLOCK = 1 << 15  # numbers at a time: they stay in the cache


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Sums over the numbers of an array: as it is, and rounded to narrower dtypes.

    Attributes:
      dtype: dtype of the array.
      shape: shape of the array.
      places: sum of the array by dtype: its own, and those of `NARROWER` that are
        narrower.
      numbers: the same without places; empty if nobody asks for it.
    """

    dtype: str
    shape: tuple[int, ...]
    places: Mapping[str, int]
    numbers: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, value: Any) -> "Fingerprint":
        """Sums an array; every process that has some of it has to call."""
        own = dtype_of(value)
        places, numbers = (
            {str(d): int(total(value, d, axes)) for d in dtypes(own)}
            for axes in (_in_order(np.shape(value)), None)
        )
        return cls(str(own), tuple(np.shape(value)), places, numbers)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def dtype_for(self, own: np.dtype) -> np.dtype:
        """Returns the dtype in which to compare an array of dtype `own` with this."""
        return own if str(own) in self.places else np.dtype(self.dtype)

    def is_of(self, value: Any) -> bool:
        """Returns True for the array, and for what it is rounded from or rounds to.

        False for float16 against bfloat16, which cannot be compared.
        """
        own = dtype_of(value)
        if self.shape != np.shape(value) or not self.comparable(own):
            return False
        dtype = self.dtype_for(own)
        found = total(value, dtype, _in_order(self.shape))
        return int(found) == self.places[str(dtype)]

    def is_stack_of(self, rows: Sequence[Any]) -> bool:
        """Returns True if the array is these, stacked along a new axis 0."""
        if not rows:
            return self.size == 0
        found = np.uint64(0)
        for index, row in enumerate(rows):
            own = dtype_of(row)
            if not self.comparable(own):
                return False
            first, *others = _in_order(np.shape(row))
            places = [first + index * math.prod(np.shape(row)), *others]
            found = np.add(found, total(row, self.dtype_for(own), places))
        return int(found) == self.places[str(self.dtype_for(dtype_of(rows[0])))]

    def comparable(self, own: np.dtype) -> bool:
        """Returns True if rounding may lie between this and an array of dtype `own`."""
        return str(own) == self.dtype or (
            _floating(own) and _floating(np.dtype(self.dtype))
        )

    def as_json(self) -> dict[str, Any]:
        """Returns it for a file; `from_json` reads it."""
        return {
            "dtype": self.dtype,
            "shape": list(self.shape),
            "places": as_hex(self.places),
            "numbers": as_hex(self.numbers),
        }

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> "Fingerprint":
        """Reads what `as_json` returned; raises whatever damage may cause."""
        places, numbers = (of_hex(given[name]) for name in ("places", "numbers"))
        dtype, shape = (
            str(np.dtype(given["dtype"])),
            map(operator.index, given["shape"]),
        )
        _ = places[dtype], numbers[dtype]
        return cls(dtype, tuple(shape), places, numbers)


@dataclasses.dataclass(frozen=True)
class Digest:
    """SHA-256 of a weight of the base, in files of format 1.

    Attributes:
      dtype: dtype of the weight.
      sha256: SHA-256 of the weight by dtype: its own, and 16 bits if that has more.
    """

    dtype: str
    sha256: Mapping[str, str]

    def is_of(self, matrices: np.ndarray) -> bool:
        """Returns True for matrices `[*slices, n, m]` of the weight (`Fingerprint`)."""
        known = self.sha256.get(str(matrices.dtype))
        if known is None:
            known = self.sha256[self.dtype]
            matrices = _rounded(matrices, np.dtype(self.dtype))
        return sha256(matrices) == known


def sha256(array: np.ndarray) -> str:
    """Hashes dtype, shape and numbers of an array in the machine's byte order."""
    found = hashlib.sha256(f"{array.dtype}{list(array.shape)}".encode())
    numbers: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    found.update(numbers)
    return found.hexdigest()


def of_rows(
    value: Any, layout: Layout, stack: tuple[int, ...]
) -> tuple[str, list[dict[str, int]]]:
    """Returns the dtype of a weight, and the sums by dtype of each row of its stack.

    Arguments and places are those of `row_totals`.
    """
    own = dtype_of(value)
    sums = [row_totals(value, dtype, layout, stack) for dtype in dtypes(own)]
    names = [str(dtype) for dtype in dtypes(own)]
    rows = zip(*(found.reshape(-1).tolist() for found in sums), strict=True)
    return str(own), [dict(zip(names, row, strict=True)) for row in rows]


def row_totals(
    value: Any, dtype: DTypeLike, layout: Layout, stack: tuple[int, ...]
) -> UInt64[np.ndarray, " *rows"]:
    """Sums each row of a stacked weight.

    Places are those in its matrices, so that the order of its axes does not matter.

    Args:
      value: the weight.
      dtype: as in `total`.
      layout: layout of a row.
      stack: the axes of the stack.
    """
    return total(value, dtype, layout.places(), stack)


def total(
    value: Any,
    dtype: DTypeLike,
    places: Sequence[np.ndarray] | None = None,
    stack: tuple[int, ...] = (),
) -> UInt64[np.ndarray, " *rows"]:
    """Sums an array, rounded to a dtype.

    Args:
      value: array of NumPy or JAX.
      dtype: dtype of the numbers whose bits count.
      places: for each axis that is not in `stack`, what an index along it adds to the
        place of a number; None where places do not count.
      stack: axes each index of which has a sum of its own.
    """
    shape = np.shape(value)
    order = [*stack, *(axis for axis in range(len(shape)) if axis not in stack)]
    sizes, k = [shape[axis] for axis in order], len(stack)
    if places is None:
        places = [np.zeros(size, np.int64) for size in sizes[k:]]
    steps = [np.asarray(axis, np.uint64) * STEP for axis in places]
    dtype, found = np.dtype(dtype), np.zeros(sizes[:k], np.uint64)
    for index, part in parts(value):
        where = [index[axis] for axis in order]
        own = [step[i] for step, i in zip(steps, where[k:], strict=True)]
        target = found[(*where[:k], ...)]  # a view, whatever the stack
        rows = part.transpose(order)
        for row in np.ndindex(target.shape):
            target[row] = np.add(target[row], _mixed(rows[row], dtype, own))
    return over_processes(value, found)


def dtypes(own: np.dtype) -> list[np.dtype]:
    """Lists a dtype and those that its numbers are rounded to, widest first."""
    narrower = [d for d in NARROWER if _floating(own) and d.itemsize < own.itemsize]
    return [own, *narrower]


def dtype_of(value: Any) -> np.dtype:
    """Returns the dtype of an array or a number, in the machine's byte order."""
    own = value.dtype if hasattr(value, "dtype") else jnp.result_type(value)
    return np.dtype(own).newbyteorder("=")


def are_rows(rows: Sequence[Fingerprint], value: Any) -> bool:
    """Returns True if fingerprints are, in their order, those of an array's rows."""
    own, shape = dtype_of(value), np.shape(value)
    if not all(row.comparable(own) for row in rows):
        return False
    sums = {
        dtype: total(value, dtype, _in_order(shape[1:]), (0,))
        for dtype in {row.dtype_for(own) for row in rows}
    }
    return all(
        int(sums[row.dtype_for(own)][i]) == row.places[str(row.dtype_for(own))]
        for i, row in enumerate(rows)
    )


def as_hex(sums: Mapping[str, int]) -> dict[str, str]:
    """Writes sums as text."""
    return {name: f"{value:016x}" for name, value in sums.items()}


def of_hex(sums: Mapping[str, str]) -> dict[str, int]:
    """Reads what `as_hex` wrote."""
    return {name: int(value, 16) for name, value in sums.items()}


def _floating(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _in_order(shape: tuple[int, ...]) -> list[np.ndarray]:
    """Returns the places of an array in C order, by axis."""
    return [np.arange(size) * math.prod(shape[i + 1 :]) for i, size in enumerate(shape)]


def _mixed(part: np.ndarray, dtype: np.dtype, axes: list[np.ndarray]) -> np.uint64:
    """Sums the terms of a part; `axes` as in `total`, times `STEP`."""
    if not part.size:
        return np.uint64(0)
    if part.dtype.kind == "c":  # two numbers, in places that no array reaches
        real = np.dtype(f"f{part.itemsize // 2}")
        part = np.ascontiguousarray(part)[..., None].view(real)
        dtype, axes = part.dtype, [*axes, np.array([0, 1 << 62], np.uint64)]
    *lead, last = axes or [np.zeros(1, np.uint64)]
    first = functools.reduce(np.add.outer, lead, np.zeros(1, np.uint64)).reshape(-1)
    table = part.reshape(first.size, last.size)
    sums = []
    for column in range(0, last.size, BLOCK):
        columns = slice(column, column + BLOCK)
        width = last[columns].size
        height = max(1, BLOCK // width)
        for row in range(0, first.size, height):
            rows = slice(row, row + height)
            block = _rounded(table[rows, columns], dtype)
            term = block.view(f"u{dtype.itemsize}").astype(np.uint64)
            term += first[rows, None]
            term += last[columns]
            for factor in MIX:
                term *= factor
                term ^= term >> np.uint64(32)
            sums.append(term.sum())
    return np.array(sums).sum()


def _rounded(numbers: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if numbers.dtype == dtype:
        return numbers
    with np.errstate(over="ignore"):  # what is infinite in float16 is no other weight
        return numbers.astype(dtype)
