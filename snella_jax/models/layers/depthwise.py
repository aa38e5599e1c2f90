"""Depthwise convolution as a sum of products: fast where XLA's convolution is not.

On a CPU XLA computes a convolution of as many groups as channels in a slow loop. A 3 x
3 kernel is nine shifted copies of the image, each times its own numbers, added up; the
gradient of the image is the same with the kernel turned round.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Pair = tuple[int, int]


def shifted(
    x: Float[Array, "B h w D"],
    kernel: Float[Array, "s t 1 D"],
    strides: Pair,
    padding: tuple[Pair, Pair],
    **others: Any,
) -> Float[Array, "B i j D"]:
    """Convolves each channel with its own kernel.

    Takes the place of `jax.lax.conv_general_dilated` in an `nnx.Conv` with as many
    groups as channels and nothing dilated.

    >>> x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 2))
    >>> shifted(x, kernel, (2, 2), ((1, 1), (1, 1)))[0, ..., 0].tolist()
    [[4.0, 6.0], [6.0, 9.0]]

    Args:
      strides: of rows and columns.
      padding: zeros before and behind rows and columns.
      others: what else `nnx.Conv` says to its convolution; the layout is fixed.
    """
    del others
    (top, bottom), (left, right) = padding  # hashable, whatever nnx.Conv gives
    hashable: Any = tuple(strides), ((top, bottom), (left, right))
    y: Any = _convolved(x, kernel[:, :, 0], *hashable)
    return y


def _products(x: Array, kernel: Array, strides: Pair, padding: Any) -> Array:
    parts = _parts(_padded(x, padding), kernel.shape[:2], strides)
    terms = [part * kernel[place].reshape(1, 1, 1, -1) for place, part in parts]
    return functools.reduce(jnp.add, terms)


def _forward(x: Array, kernel: Array, strides: Pair, padding: Any) -> Any:
    return _products(x, kernel, strides, padding), (x, kernel)


def _backward(strides: Pair, padding: Any, kept: Any, dy: Array) -> tuple[Array, Array]:
    x, kernel = kept
    # Zeros between the rows and columns that strides left out, and where the kernel
    # reaches over the ends: as many that the result has the image's size.
    config = [(0, 0, 0)]
    for axis in (0, 1):
        step, (before, _) = strides[axis], padding[axis]
        length = (dy.shape[1 + axis] - 1) * step + 1
        behind = before + x.shape[1 + axis] - length
        config.append((kernel.shape[axis] - 1 - before, behind, step - 1))
    spread = jax.lax.pad(dy, jnp.zeros((), dy.dtype), [*config, (0, 0, 0)])
    dx = _products(spread, kernel[::-1, ::-1], (1, 1), ((0, 0), (0, 0)))
    parts = _parts(_padded(x, padding), kernel.shape[:2], strides)
    sums = [jnp.einsum("bijd,bijd->d", part, dy) for _, part in parts]
    return dx, jnp.stack(sums).reshape(kernel.shape)


_convolved = jax.custom_vjp(_products, nondiff_argnums=(2, 3))
_convolved.defvjp(_forward, _backward)


def _padded(x: Array, padding: Any) -> Array:
    return jnp.pad(x, ((0, 0), *padding, (0, 0)))


def _parts(
    x: Array, size: tuple[int, ...], strides: Pair
) -> Iterator[tuple[Pair, Array]]:
    """Yields each place of a kernel, and what of a padded image it is multiplied by."""
    (high, wide), (down, right) = size, strides
    height, width = x.shape[1] - high + 1, x.shape[2] - wide + 1
    for row, column in itertools.product(range(high), range(wide)):
        rows, columns = (
            slice(row, row + height, down),
            slice(column, column + width, right),
        )
        yield (row, column), x[:, rows, columns]
