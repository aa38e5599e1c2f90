"""Kernels with a softmax over distances: the normalised RBF and Mix-K."""

import dataclasses
import math
from typing import ClassVar, Literal

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


class _Softmaxed(Pieces):
    """Half of a kernel: `delta = [kappa_p +] alpha * softmax(kappa_p / gamma) + beta`.

    What it keeps of an update are the maximum and the sum of the softmax's powers, and
    the means that are taken out.
    """

    pieces: int
    normalize_over: Literal["out", "in"]
    temperature: bool = False
    with_kappa: ClassVar[bool] = False

    def __post_init__(self):
        if self.normalize_over not in ("out", "in"):
            raise ValueError(
                f'normalize_over={self.normalize_over!r}: expected "out" or "in".'
            )
        check_pieces(self.pieces)
        check_centred(self.centred)
        check_start(self.start)
        if self.start == "zero" and self.normalize_over == "in":
            raise ValueError(
                'start="zero" needs normalize_over="out": at b = 0 a softmax over the '
                "inputs depends on all of a."
            )

    def init(self, key, shape, rank, dtype=jnp.float32) -> Factors:
        factors = init_pieces(key, shape, rank, self.pieces, dtype)
        factors = at_start(factors, self.start) | scalars(dtype, alpha=1)
        if self.centred == "none":
            factors |= scalars(dtype, beta=0)
        return factors | scalars(dtype, gamma=1) if self.temperature else factors

    def apply(self, factors: Factors) -> Float[Array, "..."]:
        return self.measured(factors)[0]

    def measured(self, factors: Factors) -> tuple[Float[Array, "..."], Statistics]:
        f = widened(factors)
        kappa = self._kappa(f)
        logits, axes = self._logits(f, kappa), self._axes(f, kappa)
        largest = jax.lax.stop_gradient(logits.max(axes, keepdims=True))
        total = jnp.exp(logits - largest).sum(axes, keepdims=True)
        statistics = largest, total
        if self.centred != "none":
            whole = self._sum(f, kappa, statistics)
            taken = means(whole, f["a"].ndim - 2, self.centred)
            statistics = gpu_barrier((*statistics, *taken))
        return self._sum(f, kappa, statistics), statistics

    def again(self, factors: Factors, statistics: Statistics) -> Float[Array, "..."]:
        f = widened(factors)
        return self._sum(f, stored(self._kappa(f)), statistics)

    def pull(
        self, factors: Factors, statistics: Statistics, pull_update: PullUpdate
    ) -> Factors:
        f = widened(factors)
        kappa = stored(self._kappa(f))
        axes = self._axes(f, kappa)

        def softmax(largest):
            powers = jnp.exp(self._logits(f, kappa) - largest)
            return powers * (1 / statistics[1])

        def made(largest):
            known = (largest, *statistics[1:])
            return pull_update(self._sum(f, kappa, known)), softmax(largest)

        largest = statistics[0]
        gradient, soft = made(gpu_barrier(largest))
        mean = jnp.sum(gradient * soft, axes, keepdims=True)
        less = means(gradient, f["a"].ndim - 2, self.centred)
        for part in less:  # of the softmax's mean, what is taken out of the gradient
            if all(part.shape[axis] == 1 for axis in axes):
                mean = mean - part
            else:
                largest, part = gpu_barrier((largest, part))
                soft = softmax(largest)
                mean = mean - jnp.sum(part * soft, axes, keepdims=True)
        # The means are known: another pass over kappa has the rest.
        largest, mean, less = gpu_barrier((largest, mean, less))
        gradient, soft = made(largest)
        gradient = without(gradient, less)
        pulled = {"alpha": jnp.sum(mean), "beta": jnp.sum(gradient)}
        if self.start == "zero" and self.centred == "none":
            pulled["alpha"] -= pulled["beta"] / _size(kappa, axes)
        of_kappa = f["alpha"] * soft * (gradient - mean)
        if self.temperature:
            of_kappa = of_kappa / f["gamma"]
            pulled["gamma"] = -jnp.sum(of_kappa * kappa) / f["gamma"]
        if self.with_kappa:
            of_kappa = gradient + of_kappa
        pulled |= self._pull_kappa(f, of_kappa)
        return {name: pulled[name].astype(factors[name].dtype) for name in factors}

    def _axes(self, factors, kappa):
        n_axes, axes = factors["a"].ndim - 2, tuple(range(kappa.ndim))
        return axes[n_axes:] if self.normalize_over == "out" else axes[:n_axes]

    def _logits(self, factors, kappa):
        return kappa / factors["gamma"] if self.temperature else kappa

    @property
    def _flat(self) -> bool:
        """True if the softmax goes without its own mean, 1 / the number of terms."""
        has = has_rows if self.normalize_over == "out" else has_columns
        return self.start == "zero" or has(self.centred)

    def _sum(self, factors, kappa, statistics):
        """Makes the update; the means are taken out that are among the statistics."""
        largest, total, *taken = statistics
        powers = jnp.exp(self._logits(factors, kappa) - largest)
        if self._flat:
            powers = powers - total / _size(kappa, self._axes(factors, kappa))
        soft = powers * (factors["alpha"] / total)  # alpha joins the few sums
        whole = kappa + soft if self.with_kappa else soft
        if self.centred == "none":
            return whole + factors["beta"]
        return without(whole, taken)


@dataclasses.dataclass(frozen=True)
class normalized_rbf(_Softmaxed):
    """`delta = alpha * softmax(kappa_p) + beta`: the second half of Eq. 6 alone.

    Attributes:
      pieces, learn_piece_coeff: as in `piecewise_linear`.
      normalize_over: "out", each input's weights to all outputs sum to `alpha` (the
        paper's columns, Eq. 6's bound and the released code), or "in", the literal
        subscript of Eq. 6.
      centred: as in `piecewise_linear`. Without means there is no `beta`, which would
        be one of them, and the softmax's own along its axis is known: it is 1 / the
        number of its terms.
      start: as in `piecewise_linear`: from 0 the softmax, too, is less what it is at
        `b = 0`, `1 / m`. Needs `normalize_over="out"`.
    """

    pieces: int = 2
    normalize_over: Literal["out", "in"] = "out"
    learn_piece_coeff: bool = True
    centred: Centred = "none"
    start: Start = "kernel"


@dataclasses.dataclass(frozen=True)
class mix_k(_Softmaxed):
    """`delta = kappa_p + alpha * softmax(kappa_p / gamma) + beta`: Mix-K (Eq. 6).

    Attributes:
      pieces, normalize_over, learn_piece_coeff: as in `normalized_rbf`.
      temperature: True to learn `gamma`, as in the released code; else it is 1.
      centred, start: as in `normalized_rbf`.
    """

    pieces: int = 2
    normalize_over: Literal["out", "in"] = "out"
    temperature: bool = False
    learn_piece_coeff: bool = True
    centred: Centred = "none"
    start: Start = "kernel"
    with_kappa: ClassVar[bool] = True


def _size(kappa: Array, axes: tuple[int, ...]) -> int:
    return math.prod(kappa.shape[axis] for axis in axes)
