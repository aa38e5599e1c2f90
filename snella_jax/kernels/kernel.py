"""What a kernel is, and how its factors are drawn."""

from collections.abc import Callable
from numbers import Integral
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from snella_jax.ops.dtypes import at_least_float32

Factors = dict[str, Array]
Statistics = Any  # a tree of small arrays
PullUpdate = Callable[[Float[Array, "..."]], Float[Array, "..."]]
Start = Literal["kernel", "zero"]


class Kernel(Protocol):
    """A kernel: draws factors and makes an update of them."""

    def init(
        self,
        key: PRNGKeyArray,
        shape: tuple[int, int],
        rank: int,
        dtype: DTypeLike = jnp.float32,
    ) -> Factors:
        """Draws the factors of one `[n, m]` matrix.

        Args:
          key: random key.
          shape: `(n, m)`, inputs and outputs.
          rank: columns of the factors, in all pieces together.
          dtype: dtype of the factors.

        Returns:
          The factors by name: `a` `[P, n, rank / P]` and `b` `[P, m, rank / P]` with P
          pieces (1 where a kernel has none), and the scalars and coefficients it has.

        Raises:
          ValueError: `rank` is not a positive multiple of the kernel's pieces.
        """
        ...

    def apply(self, factors: Factors) -> Float[Array, "..."]:
        """Makes the dense update, in the factors' dtype but at least float32.

        Args:
          factors: as `init` draws them, of one matrix.

        Returns:
          The update, `[n, m]`.
        """
        ...


@runtime_checkable
class Measured(Protocol):
    """A kernel that makes its update again in fewer passes, given statistics of it.

    One that has a `keeps_statistics` is a `Measured` kernel only where that is True.
    """

    def measured(self, factors: Factors) -> tuple[Float[Array, "..."], Statistics]:
        """Makes the dense update, and the statistics that are kept of it."""
        ...

    def again(self, factors: Factors, statistics: Statistics) -> Float[Array, "..."]:
        """Makes the dense update given its statistics, to the last bit."""
        ...

    def pull(
        self, factors: Factors, statistics: Statistics, pull_update: PullUpdate
    ) -> Factors:
        """Returns the factors' gradients.

        Args:
          factors: factors.
          statistics: as `measured` returned them with the update.
          pull_update: from the dense update to its gradient, element by element; may be
            called several times, to spare storing one of them.
        """
        ...


def is_measured(kernel: Kernel) -> bool:
    """Returns True for a `Measured` kernel whose `apply` is of the same class.

    A subclass that overrides `apply` alone makes another update than `measured`.
    """

    def owner(name: str) -> type:
        return next(c for c in type(kernel).__mro__ if name in vars(c))

    if not isinstance(kernel, Measured) or owner("apply") is not owner("measured"):
        return False
    return getattr(kernel, "keeps_statistics", True)


def starts_at_zero(kernel: Kernel) -> bool:
    """Returns True if the update is 0 before the first step."""
    start = getattr(kernel, "start", "kernel")
    return start == "zero" or getattr(kernel, "zero_init", False)


def check_start(value: str) -> None:
    """Raises a `ValueError` for an unknown start."""
    if value not in get_args(Start):
        raise ValueError(f'start={value!r}: expected "kernel" or "zero".')


def widened(factors: Factors) -> Factors:
    """Returns factors in at least float32."""
    return {
        name: value.astype(at_least_float32(value.dtype))
        for name, value in factors.items()
    }


def stored(kappa: Array) -> Array:
    """Returns an array that XLA for GPUs makes once for all that read it.

    Made again in every pass, a ViT-B/16 step compiles in 22 to 29 s instead of 9 to 10
    (for a GPU, two CPU cores).
    """
    return jax.lax.optimization_barrier(kappa)


def check_pieces(pieces: int) -> None:
    """Raises a `ValueError` if a rank cannot be cut into so many pieces."""
    if not isinstance(pieces, Integral) or pieces < 1:
        raise ValueError(f"pieces={pieces}: expected a whole number of at least 1.")


def init_pieces(key, shape, rank, pieces, dtype) -> Factors:
    """Draws `a` and `b` in pieces, with coefficients of 0.1 and -0.1 in turn."""
    coeff = 0.1 * (-1.0) ** np.arange(pieces)
    factors = init_pair(key, shape, rank, pieces, dtype)
    return factors | {"piece_coeff": jnp.asarray(coeff, dtype)}


def init_pair(key, shape, rank, pieces, dtype) -> Factors:
    """Draws `a` and `b`; raises a `ValueError` if the pieces do not divide the rank."""
    if rank <= 0 or rank % pieces:
        raise ValueError(f"rank={rank} is not a positive multiple of pieces={pieces}.")
    n, m = shape
    columns = rank // pieces
    key_a, key_b = jax.random.split(key)

    def uniform(key, rows):
        bound = (rows * columns) ** -0.5
        size = (pieces, rows, columns)
        return jax.random.uniform(key, size, dtype, -bound, bound)

    return {"a": uniform(key_a, n), "b": uniform(key_b, m)}


def at_start(factors: Factors, start: Start) -> Factors:
    """Returns new factors with `b` at 0 if the update is to start there."""
    if start == "kernel":
        return factors
    return factors | {"b": jnp.zeros_like(factors["b"])}


def scalars(dtype, **values: float) -> Factors:
    """Returns scalars of a kernel as arrays."""
    return {name: jnp.asarray(value, dtype) for name, value in values.items()}
