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
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from snella_jax.ops.distance import distance as distance
from snella_jax.ops.distance import dot, squared_distance, weighted_distances
from snella_jax.ops.dtypes import at_least_float32

Factors = dict[str, Array]


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

    SNELL's kernel. Attributes:
      pieces: `P`, number of parts that the rank is cut into; divides the rank.
      learn_piece_coeff: True if the coefficients (+0.1, -0.1, ...) train; where they do
        not, they stay in the factors and get a gradient of 0.
    """

    pieces: int = 2
    learn_piece_coeff: bool = True

    def init(self, key, shape, rank, dtype=jnp.float32) -> Factors:
        return _init_pieces(key, shape, rank, self.pieces, dtype)

    def apply(self, factors: Factors) -> Float[Array, "..."]:
        return _kappa(_at_least_float32(factors), self.learn_piece_coeff)


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


@dataclasses.dataclass(frozen=True)
class normalized_rbf:
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

    def init(self, key, shape, rank, dtype=jnp.float32) -> Factors:
        factors = _init_pieces(key, shape, rank, self.pieces, dtype)
        return factors | _scalars(dtype, alpha=1, beta=0)

    def apply(self, factors: Factors) -> Float[Array, "..."]:
        f = _at_least_float32(factors)
        kappa = _kappa(f, self.learn_piece_coeff)
        return _softmax(kappa, f, self.normalize_over) + f["beta"]


@dataclasses.dataclass(frozen=True)
class mix_k:
    """`delta = kappa_p + alpha * softmax(kappa_p / gamma) + beta`: Mix-K (Eq. 6).

    Attributes:
      pieces, normalize_over, learn_piece_coeff: as in `normalized_rbf`.
      temperature: True to learn `gamma`, as in the released code; else it is 1.
    """

    pieces: int = 2
    normalize_over: Literal["out", "in"] = "out"
    temperature: bool = False
    learn_piece_coeff: bool = True

    def __post_init__(self):
        _check_normalize_over(self.normalize_over)

    def init(self, key, shape, rank, dtype=jnp.float32) -> Factors:
        factors = _init_pieces(key, shape, rank, self.pieces, dtype)
        factors |= _scalars(dtype, alpha=1, beta=0)
        return factors | _scalars(dtype, gamma=1) if self.temperature else factors

    def apply(self, factors: Factors) -> Float[Array, "..."]:
        f = _at_least_float32(factors)
        kappa = _kappa(f, self.learn_piece_coeff)
        logits = kappa / f["gamma"] if self.temperature else kappa
        return kappa + _softmax(logits, f, self.normalize_over) + f["beta"]


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
    # Without the barrier XLA makes it again in every pass that reads it: for a GPU a
    # ViT-B/16 step then compiles in 22 to 29 s instead of 9 to 10 (two CPU cores).
    return jax.lax.optimization_barrier(weighted_distances(coeff, a, b))


def _softmax(logits: Array, factors: Factors, over: str) -> Array:
    """Computes `alpha * softmax(logits)`; alpha joins the few sums."""
    n_axes = factors["a"].ndim - 2
    axes = tuple(range(logits.ndim))
    axes = axes[n_axes:] if over == "out" else axes[:n_axes]
    largest = jax.lax.stop_gradient(logits.max(axes, keepdims=True))
    powers = jnp.exp(logits - largest)
    return powers * (factors["alpha"] / powers.sum(axes, keepdims=True))


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
