"""Arrays that are made when they are needed, and memory that JAX takes as it is."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import DTypeLike

ALIGNMENT = 64  # bytes: a CPU's arrays of JAX begin at multiples of it
BLOCK = 64  # columns


@dataclasses.dataclass(frozen=True)
class Deferred:
    """An array that is made whenever it is read, and not kept.

    >>> import numpy as np
    >>> ones = Deferred((2, 3), np.dtype("float32"), lambda: np.ones((2, 3), "f4"))
    >>> ones.T.shape, np.asarray(ones.T).shape
    ((3, 2), (3, 2))

    Attributes:
      shape: shape of the array.
      dtype: dtype of the array.
      make: makes it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.make(), dtype)

    @property
    def T(self) -> "Deferred":  # noqa: N802 - as NumPy calls it
        """The array with its axes reversed."""
        return Deferred(self.shape[::-1], self.dtype, lambda: self.make().T)

    @property
    def nbytes(self) -> int:
        """Size of the array in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


Stored = np.ndarray | Deferred


def aligned(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Returns an array of any numbers that JAX on a CPU takes over without a copy.

    >>> aligned((3, 5), "float32").ctypes.data % ALIGNMENT
    0
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def put(array: Stored, into: np.ndarray) -> None:
    """Copies an array into another of its shape, in that one's dtype.

    A transposed matrix goes in blocks that caches hold: four times as fast.

    >>> made = aligned((2, 3), "float32")
    >>> put(np.arange(6.0).reshape(3, 2).T, made)
    >>> made.tolist()
    [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]
    """
    values = np.asarray(array)
    if values.ndim == 2 and values.flags.f_contiguous:
        for start in range(0, values.shape[1], BLOCK):
            own = slice(start, start + BLOCK)
            into[:, own] = values[:, own]
    else:
        into[...] = values
