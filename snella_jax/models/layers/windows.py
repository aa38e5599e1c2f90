"""Windows of a grid: rectangles of one size that do not overlap.

Axes: `B` images, `h`, `w` the grid, `W` windows of an image, row by row, `s`, `t` their
height and width, `D` numbers of a token.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def padded(x: Float[Array, "B h w D"], size: tuple[int, int]) -> Array:
    """Puts zeros behind height and width, up to multiples of these.

    >>> padded(jnp.ones((1, 4, 3, 2)), (3, 3)).shape
    (1, 6, 3, 2)
    """
    ends = [
        (0, -length % part) for length, part in zip(x.shape[1:3], size, strict=True)
    ]
    return jnp.pad(x, ((0, 0), *ends, (0, 0)))


def split(
    x: Float[Array, "B h w D"], size: tuple[int, int]
) -> Float[Array, "B W s t D"]:
    """Splits a grid, whose sides are multiples of the windows', into windows.

    >>> split(jnp.arange(8.0).reshape(1, 2, 4, 1), (2, 2))[0, 1, ..., 0].tolist()
    [[2.0, 3.0], [6.0, 7.0]]
    """
    (batch, height, width, last), (s, t) = x.shape, size
    x = x.reshape(batch, height // s, s, width // t, t, last)
    return x.swapaxes(2, 3).reshape(batch, -1, s, t, last)


def joined(
    windows: Float[Array, "B W s t D"], height: int, width: int
) -> Float[Array, "B h w D"]:
    """Puts windows together to a grid of these sides: `split` backwards.

    >>> x = jnp.arange(24.0).reshape(1, 4, 6, 1)
    >>> bool((joined(split(x, (2, 3)), 4, 6) == x).all())
    True
    """
    batch, _, s, t, last = windows.shape
    x = windows.reshape(batch, height // s, width // t, s, t, last)
    return x.swapaxes(2, 3).reshape(batch, height, width, last)
