"""Kernels: how two low-rank factors make a weight update (the paper's Section 3.2).

A kernel is a frozen dataclass, equal and hashable by value, with two pure functions:
`init` draws the factors of one matrix and `apply` makes its dense update `delta`.
Factors are a dict: `a[P, n, r/P]`, `b[P, m, r/P]` and the kernel's scalars. `apply`
also takes factors unfolded over the axes of a higher-rank weight, `a[P, *n, r/P]` and
`b[P, *m, r/P]`, and then gives `delta[*n, *m]`, without reshaping anything of that
size.

    >>> import jax
    >>> kernel = mix_k()
    >>> factors = kernel.init(jax.random.key(0), (6, 4), rank=8)
    >>> sorted(factors), kernel.apply(factors).shape
    (['a', 'alpha', 'b', 'beta', 'piece_coeff'], (6, 4))
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from snella_jax.ops.barriers import gpu_barrier
from snella_jax.ops.distance import distance as distance
from snella_jax.ops.distance import (
    dot,
    pull_distances,
    squared_distance,
    weighted_distances,
)
from snella_jax.ops.dtypes import at_least_float32

Factors = dict[str, Array]
Statistics = Any  # a tree of small arrays
PullUpdate = Callable[[Float[Array, "..."]], Float[Array, "..."]]


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

        Raises:
          ValueError: `rank` is not a positive multiple of the kernel's pieces.
        """
        ...

    def apply(self, factors: Factors) -> Float[Array, "..."]:
        """Makes the dense update, in the factors' dtype but at least float32."""
        ...


@runtime_checkable
class Measured(Protocol):
    """A kernel that makes its update again in fewer passes, given statistics of it."""

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

    return isinstance(kernel, Measured) and owner("apply") is owner("measured")


# The names are lower-case because they are what a config and a command line say.
@dataclasses.dataclass(frozen=True)
class linear:
    """LoRA: `delta[j, i] = a_j . b_i` (Eq. 2 and 4); `b` and delta start at 0.

    Attributes:
      zero_init: True to start `b` at 0, as in LoRA; False to draw it like `a`. From 0
        a threshold below full density and the gates `product` and `released` pass no
        gradient, so that nothing would ever train: there, use False.

    >>> import jax
    >>> k = linear()
    >>> float(abs(k.apply(k.init(jax.random.key(0), (3, 5), 2))).max())
    0.0
    """

    zero_init: bool = True

    def init(self, key, shape, rank, dtype=jnp.float32) -> Factors:
        factors = _init_pair(key, shape, rank, 1, dtype)
        if self.zero_init:
            factors["b"] = jnp.zeros_like(factors["b"])
        return factors

    def apply(self, factors: Factors) -> Float[Array, "..."]:
        return _inner(_at_least_float32(factors))


@dataclasses.dataclass(frozen=True)
class piecewise_linear:
    """`delta[j, i] = sum_p piece_coeff[p] * ||a_j^p - b_i^p||_2` (Eq. 6, kappa_p).

    SNELL's kernel.

    Attributes:
      pieces: `P`, number of parts that the rank is cut into; divides the rank.
      learn_piece_coeff: True if the coefficients (+0.1, -0.1, ...) train; where they do
        not, they stay in the factors and get a gradient of 0.
    """

    pieces: int = 2
    learn_piece_coeff: bool = True

    def init(self, key, shape, rank, dtype=jnp.float32) -> Factors:
        return _init_pieces(key, shape, rank, self.pieces, dtype)

    def apply(self, factors: Factors) -> Float[Array, "..."]:
        return _stored(_kappa(_at_least_float32(factors), self.learn_piece_coeff))


@dataclasses.dataclass(frozen=True)
class rbf:
    """`delta[j, i] = alpha * exp(-||a_j - b_i||_2^2 / 2)`.

    Our reading: the paper's Table XIV, which gives its exact form, was not available.
    """

    def init(self, key, shape, rank, dtype=jnp.float32) -> Factors:
        return _init_pair(key, shape, rank, 1, dtype) | _scalars(dtype, alpha=1)

    def apply(self, factors: Factors) -> Float[Array, "..."]:
        f = _at_least_float32(factors)
        squared = squared_distance(f["a"][0], f["b"][0])
        return f["alpha"] * jnp.exp(-squared / 2)


@dataclasses.dataclass(frozen=True)
class sigmoid:
    """`delta[j, i] = alpha * sigmoid(a_j . b_i)`.

    Our reading: the paper's Table XIV, which gives its exact form, was not available.
    """

    def init(self, key, shape, rank, dtype=jnp.float32) -> Factors:
        return _init_pair(key, shape, rank, 1, dtype) | _scalars(dtype, alpha=1)

    def apply(self, factors: Factors) -> Float[Array, "..."]:
        f = _at_least_float32(factors)
        return f["alpha"] * jax.nn.sigmoid(_inner(f))


class _Softmaxed:
    """Half of a kernel: `delta = [kappa_p +] alpha * softmax(kappa_p / gamma) + beta`.

    What it keeps of an update are the maximum and the sum of the softmax's powers.
    """

    pieces: int
    normalize_over: Literal["out", "in"]
    learn_piece_coeff: bool
    temperature: bool = False
    with_kappa: ClassVar[bool] = False

    def init(self, key, shape, rank, dtype=jnp.float32) -> Factors:
        factors = _init_pieces(key, shape, rank, self.pieces, dtype)
        factors |= _scalars(dtype, alpha=1, beta=0)
        return factors | _scalars(dtype, gamma=1) if self.temperature else factors

    def apply(self, factors: Factors) -> Float[Array, "..."]:
        return self.measured(factors)[0]

    def measured(self, factors: Factors) -> tuple[Float[Array, "..."], Statistics]:
        f = _at_least_float32(factors)
        kappa = _kappa(f, self.learn_piece_coeff)
        logits, axes = self._logits(f, kappa), self._axes(f, kappa)
        largest = jax.lax.stop_gradient(logits.max(axes, keepdims=True))
        total = jnp.exp(logits - largest).sum(axes, keepdims=True)
        return self._sum(f, kappa, (largest, total)), (largest, total)

    def again(self, factors: Factors, statistics: Statistics) -> Float[Array, "..."]:
        f = _at_least_float32(factors)
        return self._sum(f, _stored(_kappa(f, self.learn_piece_coeff)), statistics)

    def pull(
        self, factors: Factors, statistics: Statistics, pull_update: PullUpdate
    ) -> Factors:
        f = _at_least_float32(factors)
        kappa = _stored(_kappa(f, self.learn_piece_coeff))
        axes = self._axes(f, kappa)

        def made(largest, total):
            gradient = pull_update(self._sum(f, kappa, (largest, total)))
            powers = jnp.exp(self._logits(f, kappa) - largest)
            return gradient, powers * (1 / total)

        largest, total = statistics
        gradient, soft = made(gpu_barrier(largest), total)
        mean = jnp.sum(gradient * soft, axes, keepdims=True)
        # The mean is known: a second pass over kappa has the rest.
        largest, mean = gpu_barrier((largest, mean))
        gradient, soft = made(largest, total)
        pulled = {"alpha": jnp.sum(mean), "beta": jnp.sum(gradient)}
        of_kappa = f["alpha"] * soft * (gradient - mean)
        if self.temperature:
            of_kappa = of_kappa / f["gamma"]
            pulled["gamma"] = -jnp.sum(of_kappa * kappa) / f["gamma"]
        if self.with_kappa:
            of_kappa = gradient + of_kappa
        of_coeff, pulled["a"], pulled["b"] = pull_distances(
            f["piece_coeff"], f["a"], f["b"], of_kappa
        )
        learnt = self.learn_piece_coeff
        pulled["piece_coeff"] = of_coeff if learnt else jnp.zeros_like(of_coeff)
        return {name: pulled[name].astype(factors[name].dtype) for name in factors}

    def _axes(self, factors, kappa):
        n_axes, axes = factors["a"].ndim - 2, tuple(range(kappa.ndim))
        return axes[n_axes:] if self.normalize_over == "out" else axes[:n_axes]

    def _logits(self, factors, kappa):
        return kappa / factors["gamma"] if self.temperature else kappa

    def _sum(self, factors, kappa, statistics):
        largest, total = statistics
        powers = jnp.exp(self._logits(factors, kappa) - largest)
        soft = powers * (factors["alpha"] / total)  # alpha joins the few sums
        return (kappa + soft if self.with_kappa else soft) + factors["beta"]


@dataclasses.dataclass(frozen=True)
class normalized_rbf(_Softmaxed):
    """`delta = alpha * softmax(kappa_p) + beta`: the second half of Eq. 6 alone.

    Attributes:
      pieces, learn_piece_coeff: as in `piecewise_linear`.
      normalize_over: "out", each input's weights to all outputs sum to `alpha` (the
        paper's columns, Eq. 6's bound and the released code), or "in", the literal
        subscript of Eq. 6.
    """

    pieces: int = 2
    normalize_over: Literal["out", "in"] = "out"
    learn_piece_coeff: bool = True

    def __post_init__(self):
        _check_normalize_over(self.normalize_over)


@dataclasses.dataclass(frozen=True)
class mix_k(_Softmaxed):
    """`delta = kappa_p + alpha * softmax(kappa_p / gamma) + beta`: Mix-K (Eq. 6).

    Attributes:
      pieces, normalize_over, learn_piece_coeff: as in `normalized_rbf`.
      temperature: True to learn `gamma`, as in the released code; else it is 1.
    """

    pieces: int = 2
    normalize_over: Literal["out", "in"] = "out"
    temperature: bool = False
    learn_piece_coeff: bool = True
    with_kappa: ClassVar[bool] = True

    def __post_init__(self):
        _check_normalize_over(self.normalize_over)


KERNELS = {
    kernel.__name__: kernel
    for kernel in (linear, piecewise_linear, rbf, sigmoid, normalized_rbf, mix_k)
}


def named(kernel: str | Kernel) -> Kernel:
    """Returns the kernel of that name with default settings; a kernel passes through.

    Raises:
      ValueError: no kernel has that name; the message lists them.

    >>> named("rbf")
    rbf()
    """
    if not isinstance(kernel, str):
        return kernel
    if kernel not in KERNELS:
        raise ValueError(
            f"No kernel is called {kernel!r}: expected {', '.join(KERNELS)}."
        )
    return KERNELS[kernel]()


def _inner(factors: Factors) -> Array:
    return dot(factors["a"][0], factors["b"][0])


def _kappa(factors: Factors, learn_piece_coeff: bool) -> Array:
    coeff, a, b = (factors[name] for name in ("piece_coeff", "a", "b"))
    coeff = coeff if learn_piece_coeff else jax.lax.stop_gradient(coeff)
    return weighted_distances(coeff, a, b)


def _stored(kappa: Array) -> Array:
    # Without the barrier XLA makes it again in every pass that reads it: for a GPU a
    # ViT-B/16 step then compiles in 22 to 29 s instead of 9 to 10 (two CPU cores).
    return jax.lax.optimization_barrier(kappa)


def _at_least_float32(factors: Factors) -> Factors:
    return {
        name: value.astype(at_least_float32(value.dtype))
        for name, value in factors.items()
    }


def _init_pieces(key, shape, rank, pieces, dtype) -> Factors:
    coeff = 0.1 * (-1.0) ** np.arange(pieces)
    factors = _init_pair(key, shape, rank, pieces, dtype)
    return factors | {"piece_coeff": jnp.asarray(coeff, dtype)}


def _init_pair(key, shape, rank, pieces, dtype) -> Factors:
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


def _scalars(dtype, **values: float) -> Factors:
    return {name: jnp.asarray(value, dtype) for name, value in values.items()}


def _check_normalize_over(value: str) -> None:
    if value not in ("out", "in"):
        raise ValueError(f'normalize_over={value!r}: expected "out" or "in".')
