"""The adapted matmul: values, gradients, what is stored, what is recomputed.

The oracle is `naive`: the same kernel and gate (both have tests of their own) without
any recomputation. Where memory is at stake it is also the counterexample.
"""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generic import (
    RANK,
    M,
    N,
    generic_factors,
    generic_inputs,
    run,
    weight_at_tau,
)

from snella_jax import Layout, adapted, adapted_dense, kernels, sparse_delta, sparsify
from snella_jax.core.gates import GATES as SPARSE_GATES

KERNELS = {name: kernels.named(name) for name in kernels.KERNELS}
PLUS = kernels.mix_k(centred="both", start="zero")
PATHS = ("merged", "parallel")
GATES = (*SPARSE_GATES, "none")
VARIANTS = [(gate, path) for gate in GATES for path in PATHS]

each_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
each_gate = pytest.mark.parametrize("gate", GATES)
each_path = pytest.mark.parametrize("path", PATHS)


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

    step, wide = jax.jit(every), np.float64(x)
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


@dataclasses.dataclass(frozen=True)
class Cubed(kernels.mix_k):
    """A kernel of another update, whose statistics are its base class's."""

    def apply(self, factors):
        return super().apply(factors) ** 3


@pytest.mark.parametrize(
    "kernel, variants",
    [(KERNELS[name], VARIANTS[:2]) for name in KERNELS if name != "mix_k"]
    + [(KERNELS["mix_k"], VARIANTS[:2] + VARIANTS[2::2] + [("none", "parallel")])]
    + [(Cubed(), VARIANTS[:1]), (PLUS, [("product", "merged"), ("hard", "parallel")])]
    + [(kernels.piecewise_linear(centred="columns", start="zero"), [VARIANTS[0]])],
    ids=[name for name in KERNELS if name != "mix_k"]
    + ["mix_k with every gate", "one of the user's"]
    + ["centred", "centred and piecewise"],
)
def test_gradients_are_those_of_the_naive_layer(kernel, variants, x64):
    """They agree for `x`, `w0` (of a dense layer) and the factors in float64."""
    x, w0 = generic_inputs(dtype=jnp.float64)
    factors = generic_factors(kernel, dtype=jnp.float64)
    row, column = weight_at_tau(kernel.apply(factors), 90)
    x = x.at[:, row].set(0)

    def gradients(layer, gate, path, *arguments):
        def loss(x, w0, factors):
            y = layer(x, w0, factors, 90, kernel=kernel, gate=gate, path=path)
            return jnp.sin(y.at[:, column].set(0)).sum()

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
@pytest.mark.parametrize("name", ["piecewise_linear", "mix_k", "centred"])
def test_no_update_among_the_residuals(name, dtype):
    """Nothing as large as the weight is kept but `w0` itself."""
    x, w0 = generic_inputs()
    x, kernel = x.astype(dtype), {**KERNELS, "centred": PLUS}[name]
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

        text = jax.jit(transform(loss)).lower(factors, x).compile().as_text()
        exponentials = re.findall(rf"f32\[{n},{m}\]\S* exponential\(", text)
        return len(exponentials), len(re.findall(r" while\(", text))

    def gradient(loss):
        return jax.value_and_grad(loss, (0, 1))

    assert count(adapted_dense, lambda loss: loss) == (1, searches)
    assert count(adapted_dense, gradient) == (2, searches)
    assert count(naive, gradient) == (1, searches)  # stores the update instead


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
        r"budget has shape \(12,\): expected \(\),": {"budget": np.full(N, 9)},
        r"w0 has shape \(2, 12, 20\): expected \[n, m\]": {"w0": jnp.ones((2, N, M))},
        r"expected \(11, 20\)": {"w0": jnp.ones((11, M))},
        r"expected \(12, 21\)": {"w0": jnp.ones((N, 21))},
        "x is int32: expected floats": {"x": jnp.ones((2, N), jnp.int32)},
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
    """Upper bounds on `|delta|`, from the ranges the factors are drawn from.

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
