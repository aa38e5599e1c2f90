"""Convolution of single pixels as a matrix product: its gradient is fast on a CPU.

XLA computes the gradient of such a kernel on a CPU as a convolution by a kernel of the
image's size, in a slow loop.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float


def multiplied(
    x: Float[Array, "B h w n"],
    kernel: Float[Array, "1 1 n m"],
    strides: Any,
    padding: Any,
    *,
    precision: Any = None,
    out_sharding: Any = None,
    **others: Any,
) -> Float[Array, "B h w m"]:
    """Multiplies each pixel by the one matrix of a kernel.

    Takes the place of `jax.lax.conv_general_dilated` in an `nnx.Conv` of single pixels
    without strides.

    >>> x, kernel = jnp.ones((1, 2, 2, 3)), jnp.full((1, 1, 3, 1), 2.0)
    >>> multiplied(x, kernel, (1, 1), "VALID")[0, ..., 0].tolist()
    [[6.0, 6.0], [6.0, 6.0]]

    Args:
      strides, padding: of rows and columns; without effect, as every pixel is kept.
      precision: of the product.
      out_sharding: of the result, on meshes with explicit axes.
      others: what else `nnx.Conv` says to its convolution; the layout is fixed.
    """
    del strides, padding, others
    return jnp.matmul(x, kernel[0, 0], precision=precision, out_sharding=out_sharding)
