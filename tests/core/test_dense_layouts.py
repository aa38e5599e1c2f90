"""Einsums and convolutions: adapted by a layout, against a loop over matrices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generic import M, generic_factors, generic_inputs, run

from snella_jax import Layout, adapted, adapted_dense, kernels, sparse_delta


def heads(y, *shape):
    return y.reshape(*y.shape[:-1], *shape)


def conv(x, w):
    """NHWC by HWIO; one group for each input channel that the weight lacks."""
    numbers = ("NHWC", "HWIO", "NHWC")
    groups = x.shape[-1] // w.shape[2]
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


# name: (layout, the weight's shape, x's shape, op, the same from 2-D layers). A layer
# is `dense(x, matrix, i)`: slice i's factors and budget, None where there is one.
LAYOUTS = {
    "[D, H, d]": (
        Layout((6,), (2, 4)),
        (6, 2, 4),
        (3, 5, 6),
        lambda x, w: jnp.einsum("btD,DHd->btHd", x, w),
        lambda x, w, dense: heads(dense(x, w.reshape(6, 8), None), 2, 4),
    ),
    "[H, d, D]": (
        Layout((2, 4), (6,)),
        (2, 4, 6),
        (3, 5, 2, 4),
        lambda x, w: jnp.einsum("btHd,HdD->btD", x, w),
        lambda x, w, dense: dense(x.reshape(3, 5, 8), w.reshape(8, 6), None),
    ),
    "experts [E, D, F]": (
        Layout((6,), (8,), slices=(3,)),
        (3, 6, 8),
        (5, 3, 6),
        lambda x, w: jnp.einsum("beD,eDF->beF", x, w),
        lambda x, w, dense: jnp.stack(
            [dense(x[:, i], w[i], (i,)) for i in range(3)], 1
        ),
    ),
    "experts [D, F, E]": (
        Layout((6,), (8,), slices=(3,), order=(1, 2, 0)),
        (6, 8, 3),
        (5, 3, 6),
        lambda x, w: jnp.einsum("beD,DFe->beF", x, w),
        lambda x, w, dense: jnp.stack(
            [dense(x[:, i], w[..., i], (i,)) for i in range(3)], 1
        ),
    ),
    "two slice axes [K, E, D, F]": (
        Layout((6,), (8,), slices=(2, 3)),
        (2, 3, 6, 8),
        (5, 3, 6),
        lambda x, w: jnp.einsum("beD,keDF->kbeF", x, w),
        lambda x, w, dense: jnp.stack(
            [
                jnp.stack([dense(x[:, i], w[k, i], (k, i)) for i in range(3)], 1)
                for k in range(2)
            ]
        ),
    ),
    "fused qkv [D, 3 * 8]": (
        Layout((6,), (24,)).split(3),
        (6, 24),
        (5, 6),
        jnp.matmul,
        lambda x, w, dense: jnp.concatenate(
            [dense(x, w[:, 8 * i : 8 * i + 8], (i,)) for i in range(3)], 1
        ),
    ),
    "fused qkv [D, 3 * H, d]": (
        Layout((6,), (6, 4)).split(3),
        (6, 6, 4),
        (5, 6),
        lambda x, w: jnp.einsum("bD,DHd->bHd", x, w),
        lambda x, w, dense: jnp.concatenate(
            [
                heads(dense(x, w[:, 2 * i : 2 * i + 2].reshape(6, 8), (i,)), 2, 4)
                for i in range(3)
            ],
            1,
        ),
    ),
    "qkv [D, 3, H, d]": (
        Layout((6,), (3, 2, 4)).split(3),
        (6, 3, 2, 4),
        (5, 6),
        lambda x, w: jnp.einsum("bD,DpHd->bpHd", x, w),
        lambda x, w, dense: jnp.stack(
            [heads(dense(x, w[:, i].reshape(6, 8), (i,)), 2, 4) for i in range(3)], 1
        ),
    ),
    "qkv [3, D, H, d]": (
        Layout((6,), (3, 2, 4), order=(1, 0, 2, 3)).split(3),
        (3, 6, 2, 4),
        (5, 6),
        lambda x, w: jnp.einsum("bD,pDHd->pbHd", x, w),
        lambda x, w, dense: jnp.stack(
            [heads(dense(x, w[i].reshape(6, 8), (i,)), 2, 4) for i in range(3)]
        ),
    ),
    "convolution": (
        Layout((3, 3, 2), (4,)),
        (3, 3, 2, 4),
        (2, 5, 5, 2),
        conv,
        None,
    ),
    "depthwise convolution": (
        Layout((3, 3, 1), (4,)),
        (3, 3, 1, 4),
        (2, 5, 5, 4),
        conv,
        None,
    ),
}
WITH_GRADIENTS = ("experts [D, F, E]", "fused qkv [D, 3 * H, d]")


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_against_a_loop_over_matrices(name, x64):
    """By both paths, each matrix with a budget of its own."""
    layout, w_shape, x_shape, op, loop = LAYOUTS[name]
    assert layout.shape == w_shape
    assert np.prod(layout.slices, dtype=int) * layout.n * layout.m == np.prod(w_shape)
    kernel = kernels.piecewise_linear()
    rng = np.random.default_rng(2)
    x, w0 = (jnp.asarray(rng.normal(size=s)) for s in (x_shape, w_shape))
    factors = generic_factors(kernel, layout.slices, layout.n, layout.m, jnp.float64)
    budgets = 7 + 5 * np.arange(np.prod(layout.slices, dtype=int))
    budgets = budgets.reshape(layout.slices)

    def matrix_of(factors, index):
        index = () if index is None else index
        return jax.tree.map(lambda v: v[index], factors), budgets[index]

    def expected(factors):
        def dense(x, w, index):
            return adapted_dense(x, w, *matrix_of(factors, index), kernel=kernel)

        if loop is not None:
            return loop(x, w0, dense)
        delta = sparse_delta(*matrix_of(factors, None), kernel=kernel)
        return op(x, w0 + delta.reshape(w_shape))

    def got(path):
        return lambda factors: adapted(op, layout)(
            x, w0, factors, budgets, kernel=kernel, path=path
        )

    def outputs_and_gradients(factors):
        outputs = op(x, w0), expected(factors), got("merged")(factors)
        if name not in WITH_GRADIENTS:
            return *outputs, got("parallel")(factors), ({}, {})
        cotangent = jnp.cos(jnp.arange(outputs[0].size)).reshape(outputs[0].shape)
        layers = expected, got("parallel")
        (_, vjp), (parallel, parallel_vjp) = (jax.vjp(f, factors) for f in layers)
        return *outputs, parallel, (vjp(cotangent), parallel_vjp(cotangent))

    base, y, merged, parallel, grads = run(outputs_and_gradients, factors)
    assert y.shape == base.shape and np.abs(y - base).max() > 1e-2
    np.testing.assert_allclose(merged, y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(parallel, y, rtol=1e-12, atol=1e-12)
    chex.assert_trees_all_close(*grads, rtol=1e-12, atol=1e-12)


def test_every_slice_keeps_its_own_budget():
    """4, 0 and 40 of 48 weights, at the places of their matrices."""
    kernel, budgets = kernels.mix_k(), np.array([4, 0, 40])
    for layout, axis in (
        (Layout((6,), (24,)).split(3), None),
        (Layout((6,), (8,), (3,), order=(1, 2, 0)), 2),
    ):
        factors = generic_factors(kernel, (3,), 6, 8)

        def update(factors, layout=layout):
            return sparse_delta(factors, budgets, kernel=kernel, layout=layout)

        delta = run(update, factors)
        assert delta.shape == layout.shape
        parts = (
            np.split(np.asarray(delta), 3, 1)
            if axis is None
            else np.moveaxis(np.asarray(delta), axis, 0)
        )
        np.testing.assert_array_equal([np.count_nonzero(p) for p in parts], budgets)


def test_an_op_with_a_bias():
    """The bias is added once, by both paths, and no mask touches it."""
    x, w0 = generic_inputs()
    kernel, bias = kernels.rbf(), jnp.arange(M, dtype=jnp.float32)
    factors = generic_factors(kernel)
    biased = adapted(lambda x, w: x @ w + bias, update_op=jnp.matmul)
    masks = {"path": "parallel", "drop_path": 0.5, "key": jax.random.key(0)}

    def outputs(x):
        return [
            layer(x, w0, factors, 90, kernel=kernel, **settings)
            for layer in (biased, adapted_dense)
            for settings in ({}, {"path": "parallel"}, masks)
        ]

    outputs = run(outputs, x)
    for with_bias, without in zip(outputs[:3], outputs[3:], strict=True):
        np.testing.assert_allclose(with_bias, without + bias, atol=5e-6)


@pytest.mark.parametrize(
    "layout, parts",
    [
        (Layout((6,), (8,)), 3),
        (Layout((6,), (2, 4)), 3),
        (Layout((6,), (9,), slices=(2,)), 3),
        (Layout((6,), (6, 4), order=(1, 0, 2)), 3),
        (Layout((6,), (3,), order=(1, 0)), 3),
    ],
    ids=[
        *("no multiple", "no multiple of heads", "slices", "runs of a moved axis"),
        "all outputs of a transposed weight",
    ],
)
def test_split_that_does_not_fit(layout, parts):
    with pytest.raises(ValueError, match=rf"split={parts} does not fit"):
        layout.split(parts)
