"""Kernels without a softmax: linear, piecewise linear, RBF and sigmoid."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from snella_jax.kernels.kernel import (
    Factors,
    PullUpdate,
    Start,
    Statistics,
    at_start,
    check_pieces,
    check_start,
    init_pair,
    init_pieces,
    scalars,
    stored,
    widened,
)
from snella_jax.kernels.pieces import Pieces
from snella_jax.ops.barriers import gpu_barrier
from snella_jax.ops.centring import (
    Centred,
    check_centred,
    has_columns,
    has_rows,
    means,
    without,
)
from snella_jax.ops.distance import dot, squared_distance


# The names are lower-case because they are what a config and a command line say.
@dataclasses.dataclass(frozen=True)
class linear:
    """LoRA: `delta[j, i] = a_j . b_i` (Eq. 2 and 4); `b` and delta start at 0.

    Attributes:
      zero_init: True to start `b` at 0, as in LoRA; False to draw it like `a`. From 0
        a threshold below full density and the gates `product` and `released` pass no
        gradient, so that nothing would ever train: there, use False.
      centred: as in `piecewise_linear`. Here the factors' own means are taken out: of
        `b` for the rows, of `a` for the columns.

    >>> import jax
    >>> k = linear()
    >>> float(abs(k.apply(k.init(jax.random.key(0), (3, 5), 2))).max())
    0.0
    """

    zero_init: bool = True
    centred: Centred = "none"

    def __post_init__(self):
        check_centred(self.centred)

    def init(self, key, shape, rank, dtype=jnp.float32) -> Factors:
        factors = init_pair(key, shape, rank, 1, dtype)
        return at_start(factors, "zero" if self.zero_init else "kernel")

    def apply(self, factors: Factors) -> Float[Array, "..."]:
        f = widened(factors)
        a, b = f["a"][0], f["b"][0]
        if has_rows(self.centred):
            b = _from_mean(b)
        if has_columns(self.centred):
            a = _from_mean(a)
        return dot(a, b)


class _Centring:
    """Half of a kernel: takes means out, which it keeps for the way back."""

    centred: Centred

    @property
    def keeps_statistics(self) -> bool:
        """True if there are means to keep."""
        return self.centred != "none"

    def apply(self, factors: Factors) -> Float[Array, "..."]:
        return self.measured(factors)[0]

    def measured(self, factors: Factors) -> tuple[Float[Array, "..."], Statistics]:
        f = widened(factors)
        whole = self._whole(f)
        taken = means(whole, f["a"].ndim - 2, self.centred)
        return without(whole, taken), taken

    def again(self, factors: Factors, statistics: Statistics) -> Float[Array, "..."]:
        return without(self._whole(widened(factors)), statistics)

    def pull(
        self, factors: Factors, statistics: Statistics, pull_update: PullUpdate
    ) -> Factors:
        f = widened(factors)
        whole, back = jax.vjp(self._whole, f)

        def gradient(taken):
            return pull_update(without(whole, taken))

        less = means(gradient(statistics), f["a"].ndim - 2, self.centred)
        # The gradient's means are known: a second pass has the gradient without them.
        statistics, less = gpu_barrier((statistics, less))
        pulled = self._pulled(f, back, without(gradient(statistics), less))
        return {name: pulled[name].astype(factors[name].dtype) for name in factors}

    def _whole(self, factors: Factors) -> Array:
        """Makes the update with all its means."""
        raise NotImplementedError

    def _pulled(self, factors: Factors, back, gradient: Array) -> Factors:
        return back(gradient)[0]


@dataclasses.dataclass(frozen=True)
class piecewise_linear(_Centring, Pieces):
    """`delta[j, i] = sum_p piece_coeff[p] * ||a_j^p - b_i^p||_2` (Eq. 6, kappa_p).

    SNELL's kernel.

    Attributes:
      pieces: `P`, number of parts that the rank is cut into; divides the rank.
      learn_piece_coeff: True if the coefficients (+0.1, -0.1, ...) train; where they do
        not, they stay in the factors and get a gradient of 0.
      centred: means that are taken out of the update: of its "rows" (an input's weights
        to all outputs), its "columns", "both" or "none". A distance has no closed form
        for them: they come from the pass that makes the update, as `n` and `m` numbers.
      start: "kernel", as it is drawn (the paper); or "zero": `b` starts at 0, and what
        the kernel is there is taken out, `||a_j^p - b_i^p|| - ||a_j^p||`, so that the
        update starts at 0 exactly. As with `linear`, the gates `product` and `released`
        and a density below 1 at the start let nothing move from there.

    >>> kernel = piecewise_linear(centred="both", start="zero")
    >>> factors = kernel.init(jax.random.key(0), (3, 4), rank=4)
    >>> float(abs(kernel.apply(factors)).max())
    0.0
    >>> factors["b"] = factors["b"] + jnp.eye(4, 2)
    >>> delta = kernel.apply(factors)
    >>> bool(abs(delta.sum(0)).max() < 1e-7 < 1e-3 < abs(delta).max())
    True
    """

    pieces: int = 2
    learn_piece_coeff: bool = True
    centred: Centred = "none"
    start: Start = "kernel"

    def __post_init__(self):
        check_pieces(self.pieces)
        check_centred(self.centred)
        check_start(self.start)

    def init(self, key, shape, rank, dtype=jnp.float32) -> Factors:
        factors = init_pieces(key, shape, rank, self.pieces, dtype)
        return at_start(factors, self.start)

    def _whole(self, factors: Factors) -> Array:
        return stored(self._kappa(factors))

    def _pulled(self, factors: Factors, back, gradient: Array) -> Factors:
        return self._pull_kappa(factors, gradient)


@dataclasses.dataclass(frozen=True)
class _Scaled(_Centring):
    """Rest of a kernel of one piece: pairs of factors under a scale `alpha`."""

    centred: Centred = "none"
    start: Start = "kernel"

    def __post_init__(self):
        check_centred(self.centred)
        check_start(self.start)

    def init(self, key, shape, rank, dtype=jnp.float32) -> Factors:
        factors = init_pair(key, shape, rank, 1, dtype) | scalars(dtype, alpha=1)
        return at_start(factors, self.start)


@dataclasses.dataclass(frozen=True)
class rbf(_Scaled):
    """`delta[j, i] = alpha * exp(-||a_j - b_i||_2^2 / 2)`.

    Our reading: the paper's Table XIV, which gives its exact form, was not available.

    Attributes:
      centred, start: as in `piecewise_linear`; from 0,
        `alpha * (exp(-||a_j - b_i||_2^2 / 2) - exp(-||a_j||_2^2 / 2))`.
    """

    def _whole(self, factors: Factors) -> Array:
        a, b = factors["a"][0], factors["b"][0]
        squared = squared_distance(a, b)
        powers = jnp.exp(-squared / 2)
        if self.start == "kernel":
            return factors["alpha"] * powers
        # exp(x) - exp(y) by x - y = a.b - |b|^2 / 2, which is 0 where b is.
        more = dot(a, b) - jnp.sum(b * b, -1) / 2
        before = jnp.exp(-jnp.sum(a * a, -1) / 2)
        before = before.reshape(*before.shape, *(1,) * (b.ndim - 1))
        fallen = before * jnp.expm1(jnp.minimum(more, 0))
        return factors["alpha"] * (fallen - powers * jnp.expm1(-jnp.maximum(more, 0)))


@dataclasses.dataclass(frozen=True)
class sigmoid(_Scaled):
    """`delta[j, i] = alpha * sigmoid(a_j . b_i)`.

    Our reading: the paper's Table XIV, which gives its exact form, was not available.

    Attributes:
      centred, start: as in `piecewise_linear`; from 0,
        `alpha * (sigmoid(a_j . b_i) - 1/2)`.
    """

    def _whole(self, factors: Factors) -> Array:
        inner = dot(factors["a"][0], factors["b"][0])
        if self.start == "kernel":
            return factors["alpha"] * jax.nn.sigmoid(inner)
        return factors["alpha"] / 2 * jnp.tanh(inner / 2)


def _from_mean(x: Array) -> Array:
    return x - jnp.mean(x, tuple(range(x.ndim - 1)))
