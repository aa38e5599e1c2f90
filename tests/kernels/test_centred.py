"""Updates without the means of rows and columns, and ones that start at 0."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generic import run
from kernel_oracle import as_jax, central_differences, generic_factors, oracle

from snella_jax import kernels, sparse_delta
from snella_jax.core.delta import delta_and_found
from snella_jax.kernels import is_measured, starts_at_zero

ZERO = {"start": "zero"}
PIECEWISE, MIX_K = kernels.piecewise_linear, kernels.mix_k
CENTRED = [
    kernels.linear(centred="rows"),
    kernels.linear(centred="columns"),
    kernels.linear(centred="both"),
    PIECEWISE(centred="rows"),
    PIECEWISE(centred="columns", **ZERO),
    PIECEWISE(centred="both", learn_piece_coeff=False, **ZERO),
    PIECEWISE(pieces=3, **ZERO),
    kernels.rbf(centred="both", **ZERO),
    kernels.rbf(centred="columns"),
    kernels.sigmoid(centred="rows", **ZERO),
    kernels.normalized_rbf(centred="columns"),
    kernels.normalized_rbf(centred="both", **ZERO),
    MIX_K(centred="rows"),
    MIX_K(centred="columns"),
    MIX_K(centred="both"),
    MIX_K(temperature=True, **ZERO),
    MIX_K(centred="columns", temperature=True, **ZERO),
    MIX_K(centred="both", temperature=True, **ZERO),
    MIX_K(centred="rows", normalize_over="in"),
    MIX_K(centred="columns", normalize_over="in"),
    MIX_K(centred="both", normalize_over="in", temperature=True),
]
N, M = 3, 4


def test_values_and_gradients(x64):
    """The formula's update, and its gradient by JAX and by the kernel's own pull.

    Against finite differences of a NumPy loop over the weights.
    """
    cotangent = np.random.default_rng(1).normal(size=(N, M))

    def own(factors, cotangent):
        found = []
        for kernel, f in zip(CENTRED, factors, strict=True):
            delta, by_jax = jax.vjp(kernel.apply, f)

            def sparse(f, kernel=kernel):
                return sparse_delta(f, N * M, kernel=kernel, gate="hard")

            again, by_kernel = jax.vjp(sparse, f)
            pulled = by_jax(cotangent)[0], by_kernel(cotangent)[0]
            found.append((delta, again, *pulled))
        return found

    factors = [generic_factors(kernel, N, M) for kernel in CENTRED]
    arrays = [as_jax(f, jnp.float64) for f in factors]
    made = run(own, arrays, jnp.asarray(cotangent))
    for kernel, f, (delta, again, by_jax, by_kernel) in zip(
        CENTRED, factors, made, strict=True
    ):
        said, expected = str(kernel), oracle(kernel, f)
        np.testing.assert_allclose(delta, expected, 1e-12, 1e-14, err_msg=said)
        np.testing.assert_allclose(again, expected, 1e-12, 1e-14, err_msg=said)

        def total(f, kernel=kernel):
            return (oracle(kernel, f) * cotangent).sum()

        slopes = central_differences(total, f)
        if not getattr(kernel, "learn_piece_coeff", True):
            slopes["piece_coeff"] = 0 * slopes["piece_coeff"]
        for gradient in (by_jax, by_kernel):
            for name, slope in slopes.items():
                np.testing.assert_allclose(
                    gradient[name], slope, 1e-6, 1e-8, err_msg=f"{said}, {name}"
                )
