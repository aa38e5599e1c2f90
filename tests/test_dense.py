"""The adapted matmul: values, gradients, what is stored, what is recomputed.

The oracle is `naive`: the same kernel and gate (both have tests of their own) without
any recomputation. Where memory is at stake it is also the counterexample.
"""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snella_jax import (
    Layout,
    adapted,
    adapted_dense,
    kernels,
    sparse_delta,
    sparsify,
    stochastic,
)
from snella_jax.sparsify import GATES as SPARSE_GATES

N, M, BATCH, RANK = 12, 20, 5, 4
KERNELS = {name: kernels.named(name) for name in kernels.KERNELS}
PATHS = ("merged", "parallel")
GATES = (*SPARSE_GATES, "none")
VARIANTS = [(gate, path) for gate in GATES for path in PATHS]

each_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
each_gate = pytest.mark.parametrize("gate", GATES)
each_path = pytest.mark.parametrize("path", PATHS)


# Without LLVM's optimizations, for programs that run only once.
OPTIONS = {"xla_backend_optimization_level": 0}


def run(function, *arguments):
    return jax.jit(function, compiler_options=OPTIONS)(*arguments)


def generic_factors(kernel, lead=(), n=N, m=M, dtype=jnp.float32):
    """Factors a good way from where they start, with leading axes."""
    shapes = jax.eval_shape(lambda: kernel.init(jax.random.key(0), (n, m), RANK))
    rng = np.random.default_rng(0)
    spread = {"alpha": 1.3, "beta": -0.2}

    def draw(name, shape):
        return spread.get(name, 0) + 0.3 * rng.normal(size=(*lead, *shape))

    return {k: jnp.asarray(draw(k, shapes[k].shape), dtype) for k in sorted(shapes)}


def generic_inputs(n=N, m=M, dtype=jnp.float32):
    """`x` and `w0`."""
    rng = np.random.default_rng(1)
    x, w0 = rng.normal(size=(BATCH, n)), 0.3 * rng.normal(size=(n, m))
    return jnp.asarray(x, dtype), jnp.asarray(w0, dtype)


def naive(x, w0, factors, budget, *, kernel, gate="product", path="merged"):
    delta = sparsify(kernel.apply(factors), budget, gate)
    if path == "merged":
        return x @ (w0 + delta).astype(x.dtype)
    return x @ w0.astype(x.dtype) + x @ delta.astype(x.dtype)


# Values and gradients


@each_kernel
def test_every_gate_and_path(kernel):
    """Finite and as NumPy has it, bfloat16 stays, and a budget of 0 is the base."""
    x, w0 = generic_inputs()
    factors = generic_factors(kernel)

    def every(x, budget):
        def layer(x, gate, path):
            settings = {"kernel": kernel, "gate": gate, "path": path}
            return adapted_dense(x, w0, factors, budget, **settings)

        def update(gate):
            return sparse_delta(factors, budget, kernel=kernel, gate=gate)

        outputs = {variant: layer(x, *variant) for variant in VARIANTS}
        narrow = {v: layer(x.astype(jnp.bfloat16), *v) for v in VARIANTS[:2]}
        return outputs, narrow, {gate: update(gate) for gate in GATES}

    step, wide = jax.jit(every, compiler_options=OPTIONS), np.float64(x)
    (outputs, narrow, updates), (base, _, _) = step(x, 90), step(x, 0)
    for variant in VARIANTS:
        update = np.float64(updates[variant[0]])
        expected = wide @ (np.float64(w0) + update)
        assert np.abs(wide @ update).max() > 1e-2
        atol, y = np.abs(expected).max() * np.array([1e-6, 1e-2]), outputs[variant]
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, expected, 0, atol[0], err_msg=str(variant))
        if variant[0] != "none":  # which heeds no budget
            np.testing.assert_array_equal(base[variant], x @ w0, str(variant))
        if variant in narrow:
            assert narrow[variant].dtype == jnp.bfloat16
            np.testing.assert_allclose(
                np.float32(narrow[variant]), expected, 0, atol[1]
            )


@each_kernel
def test_jit_equals_eager(kernel):
    """A few roundings apart: fusion contracts products and sums."""
    x, w0 = generic_inputs()

    def layers(x, w0, factors, budget):
        arguments, settings = (x, w0, factors, budget), {"kernel": kernel}
        return [adapted_dense(*arguments, path=path, **settings) for path in PATHS]

    arguments = x, w0, generic_factors(kernel), 90
    eager, jitted = np.array(layers(*arguments)), np.array(jax.jit(layers)(*arguments))
    ulp = np.spacing(np.abs(eager).max())
    np.testing.assert_allclose(jitted, eager, rtol=0, atol=4 * ulp)


@pytest.mark.parametrize(
    "kernel, variants",
    [(KERNELS[name], VARIANTS[:2]) for name in KERNELS if name != "mix_k"]
    + [(KERNELS["mix_k"], VARIANTS[:2] + VARIANTS[2::2] + [("none", "parallel")])],
    ids=[name for name in KERNELS if name != "mix_k"] + ["mix_k with every gate"],
)
def test_gradients_are_those_of_the_naive_layer(kernel, variants, x64):
    """Of `x`, `w0` (a dense layer's) and the factors, to float64's rounding."""
    x, w0 = generic_inputs(dtype=jnp.float64)
    factors = generic_factors(kernel, dtype=jnp.float64)

    def gradients(layer, gate, path, *arguments):
        def loss(x, w0, factors):
            y = layer(x, w0, factors, 90, kernel=kernel, gate=gate, path=path)
            return jnp.sin(y).sum()

        return jax.grad(loss, (0, 1, 2))(*arguments)

    # As arguments: XLA folds constants with another rounding than it computes with.
    def both(*arguments):
        return [
            [gradients(layer, *variant, *arguments) for variant in variants]
            for layer in (adapted_dense, naive)
        ]

    got, expected = run(both, x, w0, factors)
    chex.assert_trees_all_close(got, expected, rtol=1e-12, atol=1e-12)
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(expected))


@each_path
def test_leading_axes_of_x(path):
    """`x[..., n]`: one row alone, and two more axes."""
    x, w0 = generic_inputs()
    kernel = kernels.rbf()
    factors = generic_factors(kernel)

    def layer(x):
        return adapted_dense(x, w0, factors, 90, kernel=kernel, path=path)

    y, row, more = run(lambda x: [layer(v) for v in (x, x[2], x[None, :, None])], x)
    np.testing.assert_allclose(row, y[2], atol=2e-6)
    np.testing.assert_allclose(more[0, :, 0], y, atol=2e-6)


def test_a_new_budget_does_not_retrace():
    x, w0 = generic_inputs()
    kernel = kernels.piecewise_linear()
    factors = generic_factors(kernel)

    def layer(x, budget):
        return adapted_dense(x, w0, factors, budget, kernel=kernel)

    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(layer, n=1))
    outputs = [step(x, budget) for budget in (0, 10, N * M)]
    assert len({y.tobytes() for y in map(np.asarray, outputs)}) == 3


@each_path
def test_frozen_bfloat16_weight(path):
    """A bfloat16 `w0` is widened for the sum; the output has the dtype of `x`."""
    x, w0 = generic_inputs()
    kernel, narrow = kernels.rbf(), w0.astype(jnp.bfloat16)
    factors = generic_factors(kernel)

    def both(x, narrow):
        weights = (adapted_dense, narrow), (naive, narrow.astype(jnp.float32))
        settings = {"kernel": kernel, "path": path}
        return [layer(x, w, factors, 90, **settings) for layer, w in weights]

    y, expected = run(both, x, narrow)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected, atol=2e-6)


def test_parallel_path_keeps_updates_that_bfloat16_merging_loses():
    """An update of a thousandth of |w0|: merged rounds it away."""
    x, w0 = jnp.ones((1, N), jnp.bfloat16), jnp.ones((N, M), jnp.bfloat16)
    kernel = kernels.rbf()
    factors = kernel.init(jax.random.key(0), (N, M), RANK) | {"alpha": jnp.array(1e-3)}

    def both(x, w0, factors):
        def layer(w0, path):
            settings = {"kernel": kernel, "gate": "hard", "path": path}
            return adapted_dense(x, w0, factors, N * M, **settings)

        return layer(w0, "merged"), layer(0 * w0, "parallel")

    merged, update = run(both, x, w0, factors)
    np.testing.assert_array_equal(np.float32(merged), N)
    np.testing.assert_allclose(np.float32(update), N * 0.9e-3, rtol=0.2)


# What is stored and what is recomputed


def residuals(layer, x, w0, factors, **settings):
    """The arrays a gradient of `x` and the factors keeps, and the variable of `w0`."""

    def stored(x, w0, factors):
        _, vjp = jax.vjp(
            lambda *xf: layer(xf[0], w0, xf[1], 90, **settings), x, factors
        )
        return jax.tree.leaves(vjp)

    jaxpr = jax.make_jaxpr(stored)(x, w0, factors).jaxpr
    return [v for v in jaxpr.outvars if hasattr(v, "aval")], jaxpr.invars[1]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["piecewise_linear", "mix_k"])
def test_no_update_among_the_residuals(name, dtype):
    """Nothing as large as the weight is kept but `w0` itself."""
    x, w0 = generic_inputs()
    x, kernel = x.astype(dtype), KERNELS[name]
    factors = generic_factors(kernel)
    for gate, path in VARIANTS:
        settings = {"kernel": kernel, "gate": gate, "path": path}
        kept, base = residuals(adapted_dense, x, w0, factors, **settings)
        assert [v for v in kept if v.aval.size >= N * M] == [base], (gate, path)
        kept, base = residuals(naive, x, w0, factors, **settings)
        assert [v for v in kept if v.aval.size >= N * M] != [base]  # it can fail


@each_path
@pytest.mark.parametrize("gate, searches", [("product", 1), ("none", 0)])
def test_compiled_gradient_recomputes(gate, searches, path):
    """XLA keeps the second exponential, and does not search for tau again."""
    n, m = 96, 160
    kernel = kernels.mix_k()
    x, w0 = generic_inputs(n, m)
    factors = generic_factors(kernel, n=n, m=m)

    def count(layer, transform):
        def loss(factors, x):
            y = layer(x, w0, factors, 3000, kernel=kernel, gate=gate, path=path)
            return jnp.sin(y).sum()

        text = jax.jit(transform(loss)).lower(factors, x).compile(OPTIONS).as_text()
        exponentials = re.findall(rf"f32\[{n},{m}\]\S* exponential\(", text)
        return len(exponentials), len(re.findall(r" while\(", text))

    def gradient(loss):
        return jax.value_and_grad(loss, (0, 1))

    assert count(adapted_dense, lambda loss: loss) == (1, searches)
    assert count(adapted_dense, gradient) == (2, searches)
    assert count(naive, gradient) == (1, searches)  # stores the update instead


# Dropout and drop-path


RATES = {"dropout": 0.4, "drop_path": 0.3}


def with_masks(x, w0, factors, budget, key, *, kernel, gate="product"):
    """The parallel path with its two masks written out, nothing recomputed."""
    key_x, key_y = jax.random.split(key)
    delta = sparsify(kernel.apply(factors), budget, gate)
    dropped = stochastic.dropout(key_x, x, RATES["dropout"])
    return x @ w0 + stochastic.drop_path(key_y, dropped @ delta, RATES["drop_path"])


def test_masks_are_the_same_when_recomputed(x64):
    """Output and gradients with a key are those of explicit masks."""
    x, w0 = generic_inputs(dtype=jnp.float64)
    kernel, key = kernels.mix_k(), jax.random.key(3)
    factors = generic_factors(kernel, dtype=jnp.float64)
    settings = RATES | {"path": "parallel"}

    def adapted_layer(x, factors):
        return adapted_dense(x, w0, factors, 90, kernel=kernel, key=key, **settings)

    def masked_layer(x, factors):
        return with_masks(x, w0, factors, 90, key, kernel=kernel)

    def both(x, factors):
        cotangent = jnp.cos(jnp.arange(BATCH * M)).reshape(BATCH, M)
        vjps = [jax.vjp(f, x, factors) for f in (adapted_layer, masked_layer)]
        return [(y, vjp(cotangent)) for y, vjp in vjps]

    got, expected = run(both, x, factors)
    chex.assert_trees_all_close(got, expected, rtol=1e-12, atol=1e-12)


def test_masks_follow_the_key():
    """The same key, the same output; another key, another; none, no mask."""
    x, w0 = generic_inputs()
    kernel = kernels.rbf()
    factors = generic_factors(kernel)

    def layer(key, dropout=0.0, drop_path=0.0):
        rates = {"dropout": dropout, "drop_path": drop_path}
        return adapted_dense(
            x, w0, factors, 90, kernel=kernel, path="parallel", key=key, **rates
        )

    every = ({}, {"dropout": 0.5}, {"drop_path": 0.5}, RATES)
    keys = jax.random.split(jax.random.key(0))[np.array([0, 0, 1])]

    def outputs(keys):
        without = [layer(None, **rates) for rates in every]
        return without, jax.vmap(lambda key: [layer(key, **r) for r in every])(keys)

    without, masked = run(outputs, keys)
    np.testing.assert_allclose(masked[0][0], without[0], rtol=1e-6)
    for plain, (one, again, other) in zip(without[1:], masked[1:], strict=True):
        np.testing.assert_array_equal(plain, without[0])
        np.testing.assert_array_equal(one, again)
        assert (one != other).any() and (one != plain).any()


def test_masks_average_to_the_plain_layer():
    """Over 4000 keys the mean is within 5 standard errors of no mask at all."""
    x, w0 = generic_inputs()
    kernel = kernels.rbf()
    factors = generic_factors(kernel)

    def layer(key, **rates):
        return adapted_dense(
            x, w0, factors, N * M, kernel=kernel, path="parallel", key=key, **rates
        )

    keys = jax.random.split(jax.random.key(0), 4000)
    seen = np.float64(run(jax.vmap(lambda key: layer(key, **RATES)), keys))
    plain, error = run(lambda: layer(None)), seen.std(0) / np.sqrt(len(keys))
    assert error.min() > 1e-4  # every output is masked now and then
    assert (np.abs(seen.mean(0) - plain) < 5 * error).all()


def test_drop_path_drops_whole_examples():
    """An example has its whole update, scaled by 1 / (1 - rate), or none of it."""
    x, w0 = generic_inputs()
    x = jnp.tile(x, (20, 1))
    kernel = kernels.rbf()
    factors = generic_factors(kernel)

    def outputs(x):
        settings = {"kernel": kernel, "path": "parallel"}
        dropping = settings | {"drop_path": 0.3, "key": jax.random.key(0)}
        plain = adapted_dense(x, w0, factors, 90, **settings)
        return x @ w0, plain, adapted_dense(x, w0, factors, 90, **dropping)

    base, plain, dropped = run(outputs, x)
    lost = np.abs(dropped - base).max(1) == 0
    assert 10 < lost.sum() < 50  # of 100; 30 expected
    expected = base + (plain - base) / 0.7
    np.testing.assert_allclose(dropped[~lost], expected[~lost], atol=5e-6)


# Einsums and convolutions


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
    ],
    ids=["no multiple", "no multiple of heads", "slices", "runs of a moved axis"],
)
def test_split_that_does_not_fit(layout, parts):
    with pytest.raises(ValueError, match=rf"split={parts} does not fit"):
        layout.split(parts)


# Errors


@pytest.mark.parametrize(
    "message, change",
    {
        "No path is called 'sum': expected merged, parallel": {"path": "sum"},
        "No gate is called 'relu': expected product,": {"gate": "relu"},
        r'dropout=0\.1 needs path="parallel"': {"dropout": 0.1},
        r'drop_path=0\.1 needs path="parallel"': {"drop_path": 0.1},
        "dropout=1: expected 0 <= rate < 1": {"dropout": 1, "path": "parallel"},
        r"drop_path=-0\.1: expected": {"drop_path": -0.1, "path": "parallel"},
        "budget=-3: expected at least 0": {"budget": -3},
        r"budget=0\.3: expected a number of weights": {"budget": 0.3},
        r"w0 has shape \(2, 12, 20\): expected \[n, m\]": {"w0": jnp.ones((2, N, M))},
        r"expected \(11, 20\)": {"w0": jnp.ones((11, M))},
        r"expected \(12, 21\)": {"w0": jnp.ones((N, 21))},
    }.items(),
)
def test_errors(message, change):
    x, w0 = generic_inputs()
    kernel = kernels.mix_k()
    arguments = {"x": x, "w0": w0, "factors": generic_factors(kernel), "budget": 90}
    with pytest.raises(ValueError, match=message):
        adapted_dense(**(arguments | {"kernel": kernel} | change))


def test_factors_that_do_not_fit():
    """Another number of slices, and a and b swapped."""
    kernel = kernels.mix_k()
    layer = adapted(jnp.matmul, Layout((6,), (24,)).split(3))
    x, w0, budgets = jnp.ones((2, 6)), jnp.ones((6, 24)), np.full(3, 9)
    with pytest.raises(ValueError, match=r"expected \(6, 24\) and .*\(3, 2, 6, 2\)"):
        layer(x, w0, generic_factors(kernel, (2,), 6, 8), budgets, kernel=kernel)
    with pytest.raises(ValueError, match=r"expected \(6, 24\) and .*\(3, 2, 8, 2\)"):
        layer(x, w0, generic_factors(kernel, (3,), 8, 6), budgets, kernel=kernel)


# How far the output moves before any training


def bound_at_the_start(name):
    """What `|delta|` cannot exceed, from the ranges the factors are drawn from.

    Every one of a row's r/P entries is at most 1/sqrt(n r/P), so a row of `a` has a
    norm of at most 1/sqrt(n), a row of `b` of 1/sqrt(m), and their distance is at most
    the sum of the two. kappa, 0.1 times a difference of two distances, is within a
    tenth of that. A softmax over m of numbers within +-k is at most exp(2 k) / m.
    """
    kappa = 0.1 * (N**-0.5 + M**-0.5)
    soft = np.exp(2 * kappa) / M
    return {
        "linear": 0.0,
        "piecewise_linear": kappa,
        "rbf": 1.0,
        "sigmoid": 1 / (1 + np.exp(-((N * M) ** -0.5))),
        "normalized_rbf": soft,
        "mix_k": kappa + soft,
    }[name]


@pytest.mark.parametrize("name", KERNELS)
def test_the_output_moves_little_at_the_start(name, x64):
    """At most `||x||_1` times the bound on a gated weight, and not vacuously so.

    Two gates multiply a magnitude by at most itself; the others keep it or shrink it.
    """
    kernel = KERNELS[name]
    _, w0 = generic_inputs(dtype=jnp.float64)
    x = jnp.concatenate([jnp.eye(N), jnp.ones((1, N)), -2 * jnp.eye(N)[:3]])
    bound = bound_at_the_start(name)

    factors = run(
        lambda k: kernel.init(k, (N, M), RANK, jnp.float64), jax.random.key(0)
    )

    def moved(budget):
        return {
            gate: adapted_dense(x, w0, factors, budget, kernel=kernel, gate=gate)
            - x @ w0
            for gate in GATES
        }

    outputs = run(jax.vmap(moved), jnp.array([N * M // 3, N * M]))
    for gate, change in outputs.items():
        weight = bound**2 if gate in ("product", "released") else bound
        limit = weight * np.abs(x).sum(1)[:, None] + 1e-14
        ratio = np.abs(change) / limit
        assert ratio.max() <= 1, gate
        assert name == "linear" or ratio[1].max() > 0.01, gate
