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
import functools
import operator
from collections.abc import Iterable
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from snella_jax.dtypes import at_least_float32

Factors = dict[str, Array]


class Kernel(Protocol):
    """What every kernel provides."""

    def init(
        self,
        key: PRNGKeyArray,
        shape: tuple[int, int],
        rank: int,
        dtype: DTypeLike = jnp.float32,
    ) -> Factors:
        """Factors of one `[n, m]` matrix.

        Raises:
          ValueError: `rank` is not a positive multiple of the kernel's pieces.
        """
        ...

    def apply(self, factors: Factors) -> Float[Array, "..."]:
        """The dense update, in the factors' dtype but at least float32."""
        ...


# The names are lower-case because they are what a config and a command line say.
@dataclasses.dataclass(frozen=True)
class linear:
    """`delta[j, i] = a_j . b_i`: LoRA (Eq. 2 and 4); `b` and delta start at 0.

    Attributes:
      zero_init: whether `b` starts at 0, as in LoRA, or uniform like `a`. From 0 a
        threshold below full density and the gates `product` and `released` pass no
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
      pieces: `P`, in how many parts the rank is cut; divides the rank.
      learn_piece_coeff: whether the coefficients (+0.1, -0.1, ...) train; where they do
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
        squared = _squared_distance(f["a"][0], f["b"][0])
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
      temperature: whether `gamma` is learnt, as in the released code; else it is 1.
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
    """The kernel of that name with its default settings; a kernel passes through.

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


def distance(a: Float[Array, "*n d"], b: Float[Array, "*m d"]) -> Float[Array, "..."]:
    """`||a_j - b_i||_2` for every pair; the gradient is 0 where the two coincide.

    >>> import jax.numpy as jnp
    >>> distance(jnp.zeros((1, 2)), jnp.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[5.0, 0.0]]
    """
    return _weighted_distances(jnp.ones(1, a.dtype), a[None], b[None])


def _sum_of_distances(
    coeff: Float[Array, " P"], a: Float[Array, "P *n d"], b: Float[Array, "P *m d"]
) -> Float[Array, "..."]:
    squared = (_squared_distance(a[p], b[p]) for p in range(len(a)))
    return _sum(coeff[p] * jnp.sqrt(value) for p, value in enumerate(squared))


_weighted_distances = jax.custom_vjp(_sum_of_distances)


def _forward(coeff, a, b):
    return _sum_of_distances(coeff, a, b), (coeff, a, b)


def _backward(factors, cotangent):
    coeff, a, b = factors
    # Distances do not see a shift; without it a large offset shared by all rows would
    # cancel only after rounding, in the inner products below.
    middle = (_row_mean(a) + _row_mean(b)) / 2
    a, b = (x - middle.reshape(len(x), *(1,) * (x.ndim - 2), -1) for x in (a, b))
    # Behind the barrier the distances are made again, fused into the one pass that
    # needs them: stored, they cost two n x m arrays and the time to fill them (a
    # 768 x 3072 layer, forward and backward: 36 MiB of temporaries against 72).
    coeff, a, b = jax.lax.optimization_barrier((coeff, a, b))
    pulled = [_pull_distance(cotangent, a[p], b[p]) for p in range(len(a))]
    da, db = (jnp.stack(part) for part in zip(*pulled, strict=True))
    # A distance is homogeneous of degree 1: it is the sum of its derivatives times
    # what they are taken by (Euler), which spares another pass over n x m.
    dcoeff = sum(
        jnp.sum(x * dx, tuple(range(1, x.ndim))) for x, dx in ((a, da), (b, db))
    )
    scale = [coeff.reshape(-1, *(1,) * (x.ndim - 1)) for x in (a, b)]
    return dcoeff, scale[0] * da, scale[1] * db


_weighted_distances.defvjp(_forward, _backward)


def _pull_distance(cotangent: Array, a: Array, b: Array) -> tuple[Array, Array]:
    # d||a - b|| = (a - b).(da - db) / ||a - b||, expanded into inner products: two
    # matmuls instead of an n x m reduction for each column of a and b. Rows within
    # rounding of each other count as coincident: expanded, their difference would be
    # noise over almost 0.
    b_axes, n_axes = tuple(range(b.ndim - 1)), tuple(range(a.ndim - 1))
    m_axes = tuple(range(a.ndim - 1, cotangent.ndim))
    value = jnp.sqrt(_squared_distance(a, b))
    norm_a, norm_b = (jnp.sqrt(_squares(jax.lax.stop_gradient(x))) for x in (a, b))
    norm_a, norm_b = _crossed(norm_a, norm_b)
    noise = 4 * jnp.finfo(value.dtype).eps * (norm_a + norm_b)
    apart = value > noise
    ratio = cotangent * jnp.where(apart, 1 / jnp.where(apart, value, 1), 0)
    # The column of ones makes the sums of `ratio` part of the same two matmuls.
    one_a, one_b = (jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1) for x in (a, b))
    over_m = jnp.tensordot(ratio, one_b, (m_axes, b_axes), precision="highest")
    over_n = jnp.tensordot(ratio, one_a, (n_axes, n_axes), precision="highest")
    da, db = (x * y[..., -1:] - y[..., :-1] for x, y in ((a, over_m), (b, over_n)))
    return da, db


def _squared_distance(a: Array, b: Array) -> Array:
    # The sum of squared differences never cancels, and XLA fuses it into one loop when
    # the few columns are written out.
    columns = range(a.shape[-1])
    pairs = (_crossed(a[..., i], b[..., i]) for i in columns)
    return _sum((x - y) ** 2 for x, y in pairs)


def _crossed(x: Float[Array, "*n"], y: Float[Array, "*m"]) -> tuple[Array, Array]:
    """`x[*n, 1...]` and `y[1..., *m]`: of one rank, to meet in every pair."""
    outer = x.reshape(*x.shape, *(1,) * y.ndim)
    return outer, y.reshape(*(1,) * x.ndim, *y.shape)


def _sum(terms: Iterable[Array]) -> Array:
    return functools.reduce(operator.add, terms)


def _row_mean(x: Float[Array, "P *n d"]) -> Float[Array, "P d"]:
    return jnp.mean(x, tuple(range(1, x.ndim - 1)))


def _squares(x: Array) -> Array:
    return jnp.sum(x * x, -1)


def _dot(a: Array, b: Array) -> Array:
    return jnp.tensordot(a, b, axes=(-1, -1), precision="highest")


def _inner(factors: Factors) -> Array:
    return _dot(factors["a"][0], factors["b"][0])


def _kappa(factors: Factors, learn_piece_coeff: bool) -> Array:
    coeff, a, b = (factors[name] for name in ("piece_coeff", "a", "b"))
    coeff = coeff if learn_piece_coeff else jax.lax.stop_gradient(coeff)
    # Without the barrier XLA makes it again in every pass that reads it: for a GPU a
    # ViT-B/16 step then compiles in 22 to 29 s instead of 9 to 10 (two CPU cores).
    return jax.lax.optimization_barrier(_weighted_distances(coeff, a, b))


def _softmax(logits: Array, factors: Factors, over: str) -> Array:
    """`alpha * softmax(logits)`; alpha joins the sums, of which there are few."""
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
