"""The sparse update of one weight: kernel, threshold and gate (Eq. 5, 6 and 13).

>>> import jax
>>> from snella_jax import kernels
>>> kernel = kernels.mix_k()
>>> factors = kernel.init(jax.random.key(0), (6, 4), rank=8)
>>> int((sparse_delta(factors, 5, kernel=kernel) != 0).sum())
5
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from snella_jax.core.gates import sparsify
from snella_jax.core.layout import Layout
from snella_jax.kernels import Factors, Kernel
from snella_jax.ops.names import kept
from snella_jax.ops.threshold import threshold


def sparse_delta(
    factors: Factors,
    budget: int | Int[Array, " *slices"],
    *,
    kernel: Kernel,
    gate: str = "product",
    layout: Layout | None = None,
) -> Float[Array, " *weight"]:
    """Returns the sparse update of one weight, in its shape and at least float32.

    Args:
      factors: factors with the leading axes `layout.slices`.
      budget: weights that survive, one number for each slice.
      kernel: makes the dense update.
      gate: value of a survivor, see `sparsify`.
      layout: the weight's axes; None for an `[n, m]` matrix.

    Source: Eq. 5, 6 and 13.
    """
    return delta_and_tau(factors, budget, None, kernel, gate, layout)[0]


def delta_and_tau(
    factors: Factors,
    budget: int | Int[Array, " *slices"],
    tau: Float[Array, " *slices"] | None,
    kernel: Kernel,
    gate: str,
    layout: Layout | None,
) -> tuple[Float[Array, " *weight"], Float[Array, " *slices"]]:
    """Returns the update and its thresholds, found where `tau` is None."""

    def one(factors, budget, tau):
        with jax.named_scope("snella_delta"):  # as profilers show it
            dense = kernel.apply(layout.unfold(factors) if layout else factors)
        with jax.named_scope("snella_threshold"):
            if tau is None and gate == "none":  # nothing to search for: recomputed
                tau = jax.lax.stop_gradient(jnp.max(dense))
            if tau is None:
                # Made again for the comparison, it could round across the threshold.
                dense = jax.lax.optimization_barrier(dense)
                tau = kept(threshold(dense, budget))
        with jax.named_scope("snella_delta"):
            return sparsify(dense, budget, gate, tau), tau

    if layout is None:
        return one(factors, budget, tau)
    for _ in layout.slices:
        one = jax.vmap(one)
    delta, tau = one(factors, budget, tau)
    return layout.place(delta), tau
