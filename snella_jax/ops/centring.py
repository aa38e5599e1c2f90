"""Means of an update's rows and columns, and the update without them.

Taking means out is a projection: what is done to an update is done to its gradient.

>>> import jax.numpy as jnp
>>> delta = jnp.array([[1.0, 2.0], [3.0, 6.0]])
>>> without(delta, means(delta, 1, "both")).tolist()
[[0.5, -0.5], [-0.5, 0.5]]
"""

from collections.abc import Iterable
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

Centred = Literal["none", "rows", "columns", "both"]


def check_centred(value: str) -> None:
    """Raises a `ValueError` for an unknown way of centring."""
    if value not in get_args(Centred):
        raise ValueError(
            f"centred={value!r}: expected {', '.join(map(repr, get_args(Centred)))}."
        )


def has_rows(centred: Centred) -> bool:
    """Returns True if the means of the rows are taken out."""
    return centred in ("rows", "both")


def has_columns(centred: Centred) -> bool:
    """Returns True if the means of the columns are taken out."""
    return centred in ("columns", "both")


def means(
    x: Float[Array, "..."], n_axes: int, centred: Centred
) -> tuple[Float[Array, "..."], ...]:
    """Returns what `without` has to subtract: arrays of `n` and of `m` numbers.

    Args:
      x: update or gradient, `[*n, *m]`.
      n_axes: number of axes of `n`, the inputs.
      centred: means to take out: of each row (an input's weights to all outputs), of
        each column, or both.
    """
    axes = tuple(range(x.ndim))
    found = []
    if has_rows(centred):
        found.append(jnp.mean(x, axes[n_axes:], keepdims=True))
    if has_columns(centred):
        columns = jnp.mean(x, axes[:n_axes], keepdims=True)
        found.append(columns - jnp.mean(columns) if found else columns)
    return tuple(found)


def without(
    x: Float[Array, "..."], taken: Iterable[Float[Array, "..."]]
) -> Float[Array, "..."]:
    """Returns `x` without these means."""
    for mean in taken:
        x = x - mean
    return x
