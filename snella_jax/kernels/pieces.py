"""Sums of distances, a part of the rank each: kappa_p of Eq. 6."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from snella_jax.kernels.kernel import Factors, Start
from snella_jax.ops.centring import Centred, has_rows
from snella_jax.ops.distance import (
    beyond_origin,
    pull_distances,
    pull_norms,
    weighted_distances,
)


class Pieces:
    """Part of a kernel: the sum of distances, and its gradient."""

    learn_piece_coeff: bool
    centred: Centred
    start: Start

    def _kappa(self, factors: Factors) -> Array:
        """Returns the sum, less what it is at `b = 0` if the update starts there."""
        coeff, a, b = (factors[name] for name in ("piece_coeff", "a", "b"))
        coeff = coeff if self.learn_piece_coeff else jax.lax.stop_gradient(coeff)
        made = weighted_distances if self.start == "kernel" else beyond_origin
        return made(coeff, a, b)

    def _pull_kappa(self, factors: Factors, gradient: Array) -> Factors:
        """Returns the gradients of `a`, `b` and the coefficients, from that of kappa.

        Without the rows' means a gradient of kappa has rows with a sum of 0, which what
        is the same along a row gets nothing from.
        """
        coeff, a, b = (factors[name] for name in ("piece_coeff", "a", "b"))
        of_coeff, of_a, of_b = pull_distances(coeff, a, b, gradient)
        if self.start == "zero" and not has_rows(self.centred):
            sums = jnp.sum(gradient, tuple(range(a.ndim - 2, gradient.ndim)))
            less_coeff, less_a = pull_norms(coeff, a, sums)
            of_coeff, of_a = of_coeff - less_coeff, of_a - less_a
        if not self.learn_piece_coeff:
            of_coeff = jnp.zeros_like(of_coeff)
        return {"a": of_a, "b": of_b, "piece_coeff": of_coeff}
