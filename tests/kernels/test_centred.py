"""Updates without the means of rows and columns, and ones that start at 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generic import run
from kernel_oracle import as_jax, central_differences, generic_factors, oracle

from snella_jax import Layout, kernels, sparse_delta
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


def test_the_start_is_zero_exactly():
    """Of a number of weights that no vector fits; from there only `b` can move.

    Of distances along `a_j / ||a_j||`, for each piece.
    """
    zero = [kernel for kernel in CENTRED if starts_at_zero(kernel)]
    shape = 30, 67

    def own(key, cotangent):
        found = []
        for kernel in zero:
            factors = kernel.init(key, shape, 6)
            delta, back = jax.vjp(kernel.apply, factors)
            found.append((factors, delta, back(cotangent)[0]))
        return found

    cotangent = np.random.default_rng(2).normal(size=shape)
    made = run(own, jax.random.key(0), jnp.asarray(cotangent, jnp.float32))
    for kernel, (factors, delta, gradient) in zip(zero, made, strict=True):
        np.testing.assert_array_equal(delta, 0, err_msg=str(kernel))
        assert np.abs(gradient["b"]).max() > 1e-2, kernel
        if kernel == PIECEWISE(pieces=3, **ZERO):
            a, coeff = (np.float64(factors[name]) for name in ("a", "piece_coeff"))
            along = a / np.linalg.norm(a, axis=-1, keepdims=True)
            expected = -np.einsum("p,pnd,nm->pmd", coeff, along, cotangent)
            np.testing.assert_allclose(gradient["b"], expected, 1e-4, 1e-5)


def test_a_plain_kernel_keeps_no_means():
    """Nor does one whose means the factors give, which JAX then differentiates."""
    own = {kernel: is_measured(kernel) for kernel in CENTRED}
    plain = [kernel for kernel, measured in own.items() if not measured]
    assert plain == [*CENTRED[:3], PIECEWISE(pieces=3, **ZERO)]
    assert not is_measured(PIECEWISE()) and is_measured(MIX_K())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MIX_K(centred="rows and columns"), "centred='rows and columns'"),
        (lambda: kernels.linear(centred="row"), "expected 'none', 'rows', 'columns'"),
        (lambda: kernels.rbf(start="0"), 'start=\'0\': expected "kernel" or "zero"'),
        (lambda: MIX_K(start="zero", normalize_over="in"), "needs normalize_over"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_layouts_and_bfloat16():
    """Unfolded factors give the matrix's numbers; bfloat16 is widened first."""
    kernel = MIX_K(centred="both", **ZERO)
    factors = as_jax(generic_factors(kernel, 6, 8), jnp.bfloat16)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), factors)
    layout = Layout((2, 3), (4, 2), order=(2, 0, 1, 3))

    def own(factors, wide):
        flat = sparse_delta(wide, 20, kernel=kernel)
        return flat, sparse_delta(factors, 20, kernel=kernel, layout=layout)

    flat, placed = run(own, factors, wide)
    assert placed.dtype == np.float32 and (flat != 0).sum() == 20
    back = placed.transpose(1, 2, 0, 3).reshape(6, 8)
    np.testing.assert_allclose(back, flat, rtol=0, atol=1e-5 * np.abs(flat).max())
