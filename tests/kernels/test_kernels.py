"""One table over all kernels, against a NumPy loop over the weights."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generic import run
from kernel_oracle import RANK, as_jax, central_differences, generic_factors, oracle

from snella_jax import kernels
from snella_jax.ops import distance

KERNELS = {
    "linear": kernels.linear(),
    "piecewise_linear": kernels.piecewise_linear(),
    "piecewise_linear_3": kernels.piecewise_linear(pieces=3),
    "rbf": kernels.rbf(),
    "sigmoid": kernels.sigmoid(),
    "normalized_rbf": kernels.normalized_rbf(),
    "normalized_rbf_in": kernels.normalized_rbf(normalize_over="in"),
    "mix_k": kernels.mix_k(),
    "mix_k_in": kernels.mix_k(normalize_over="in"),
    "mix_k_gamma": kernels.mix_k(temperature=True),
}
TEMPERED = KERNELS["mix_k_gamma"]
NAMES = {  # of the factors besides a and b; gamma besides, with a temperature
    kernels.linear: (),
    kernels.piecewise_linear: ("piece_coeff",),
    kernels.rbf: ("alpha",),
    kernels.sigmoid: ("alpha",),
    kernels.normalized_rbf: ("piece_coeff", "alpha", "beta"),
    kernels.mix_k: ("piece_coeff", "alpha", "beta"),
}
DTYPES = (jnp.float32, jnp.bfloat16)

each_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
each_axis = pytest.mark.parametrize("over", ["out", "in"])


def pull_back(kernel, factors, cotangent):
    """The update and the gradient of `sum(update * cotangent)`."""

    def both(factors, cotangent):
        delta, vjp = jax.vjp(kernel.apply, factors)
        return delta, vjp(cotangent)[0]

    return run(both, factors, jnp.asarray(cotangent, factors["a"].dtype))


@pytest.mark.parametrize(
    "name", [*kernels.KERNELS, "piecewise_linear_3", "mix_k_gamma"]
)
def test_initial_shapes_and_values(name):
    """Names, shapes, dtypes, where scalars start and how far factors spread."""
    kernel = KERNELS[name]
    n, m, rank = 20, 30, 12
    scalars = {
        name: value
        for name, value in {"alpha": 1.0, "beta": 0.0, "gamma": 1.0}.items()
        if name in NAMES[type(kernel)] or (name == "gamma" and kernel == TEMPERED)
    }
    pieces = getattr(kernel, "pieces", 1)
    if "piece_coeff" in NAMES[type(kernel)]:
        scalars["piece_coeff"] = np.array([0.1, -0.1, 0.1])[:pieces]

    def init(key):
        return [kernel.init(key, (n, m), rank, dtype) for dtype in DTYPES]

    for factors, dtype in zip(run(init, jax.random.key(0)), DTYPES, strict=True):
        assert factors.keys() == {"a", "b"} | scalars.keys()
        assert all(value.dtype == dtype for value in factors.values())
        for name, value in scalars.items():
            np.testing.assert_array_equal(factors[name], np.asarray(value, dtype))
        for name, rows in {"a": n, "b": m}.items():
            columns = rank // pieces
            assert factors[name].shape == (pieces, rows, columns)
            largest = np.abs(np.asarray(factors[name], np.float32)).max()
            if name == "b" and isinstance(kernel, kernels.linear):
                assert largest == 0
            else:  # within the bound, and hundreds of draws come near it
                bound = (rows * columns) ** -0.5
                assert 0.95 * bound < largest <= bound * (1 + jnp.finfo(dtype).eps)


def test_linear_without_zero_init():
    """Then `b` spreads as `a` does, so that gates with a product of delta can train."""
    kernel = kernels.linear(zero_init=False)
    draw = jax.random.key(0), (20, 30), 12
    factors, usual = kernel.init(*draw), kernels.linear().init(*draw)
    np.testing.assert_array_equal(factors["a"], usual["a"])
    bound = (30 * 12) ** -0.5
    assert 0.95 * bound < np.abs(factors["b"]).max() <= bound
    assert kernel != kernels.linear()
    np.testing.assert_array_equal(
        kernel.apply(factors), kernels.linear().apply(factors)
    )


@pytest.mark.parametrize("name", ["linear", "mix_k"])
def test_initial_draws_depend_on_the_key_alone(name):
    """The same key draws the same, another key another; a and b are independent."""

    def init(seeds):
        keys = [jax.random.key(seed) for seed in seeds]
        return [KERNELS[name].init(key, (8, 8), RANK) for key in keys]

    first, again, other = run(init, jnp.array([1, 1, 2]))
    chex.assert_trees_all_equal(first, again)
    assert np.mean(first["a"] == other["a"]) < 0.1
    assert np.mean(first["a"] == first["b"]) < 0.1


@each_kernel
def test_equals_a_loop_over_the_weights(kernel, x64):
    factors = generic_factors(kernel)
    delta = run(kernel.apply, as_jax(factors, jnp.float64))
    assert delta.dtype == np.float64
    np.testing.assert_allclose(delta, oracle(kernel, factors), rtol=1e-12, atol=1e-14)


@each_kernel
def test_gradient_equals_finite_differences(kernel, x64):
    factors = generic_factors(kernel, n=3, m=4)
    cotangent = np.random.default_rng(1).normal(size=(3, 4))
    _, got = pull_back(kernel, as_jax(factors, jnp.float64), cotangent)
    expected = central_differences(
        lambda f: (oracle(kernel, f) * cotangent).sum(), factors
    )
    chex.assert_trees_all_close(got, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("offset", [0, 100])
@pytest.mark.parametrize("name", ["piecewise_linear", "mix_k"])
def test_float32_gradient_is_accurate(name, offset, x64):
    """The distance's backward pass subtracts inner products; little cancels.

    Nor does it where all rows of both factors share an offset, which distances ignore.
    """
    kernel = KERNELS[name]
    factors = generic_factors(kernel, n=40, m=50)
    factors |= {k: np.float32(factors[k] + offset) for k in ("a", "b")}
    cotangent = np.random.default_rng(1).normal(size=(40, 50))
    _, exact = pull_back(kernel, as_jax(factors, jnp.float64), cotangent)
    _, got = pull_back(kernel, as_jax(factors, jnp.float32), cotangent)
    for name, value in exact.items():
        assert got[name].dtype == np.float32
        atol = 3e-6 * np.abs(value).max()
        np.testing.assert_allclose(got[name], value, rtol=0, atol=atol)


@pytest.mark.parametrize("name", kernels.KERNELS)
def test_jit_equals_eager(name):
    """Fusion may contract a product and a sum; the softmax passes a rounding on."""
    kernel = KERNELS[name]
    factors = as_jax(generic_factors(kernel), jnp.float32)
    eager, jitted = kernel.apply(factors), jax.jit(kernel.apply)(factors)
    ulp = np.spacing(np.abs(eager).max())
    np.testing.assert_allclose(jitted, eager, rtol=0, atol=4 * ulp)


@each_kernel
def test_bfloat16_factors_are_widened_first(kernel):
    """bfloat16 factors give exactly the float32 update of the same numbers."""
    factors = as_jax(generic_factors(kernel), jnp.bfloat16)
    delta = kernel.apply(factors)
    assert delta.dtype == np.float32
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), factors)
    np.testing.assert_array_equal(delta, kernel.apply(wide))


@each_kernel
def test_unfolded_factors_give_the_same_numbers(kernel):
    """`a[P, 2, 3, r/P]` and `b[P, 4, 1, 2, r/P]` give `delta[2, 3, 4, 1, 2]`."""
    factors = as_jax(generic_factors(kernel, n=6, m=8), jnp.float32)
    a, b = factors["a"], factors["b"]
    unfolded = factors | {
        "a": a.reshape(len(a), 2, 3, -1),
        "b": b.reshape(len(b), 4, 1, 2, b.shape[-1]),
    }
    delta, flat = run(lambda *each: [kernel.apply(f) for f in each], unfolded, factors)
    assert delta.shape == (2, 3, 4, 1, 2)
    ulp = np.spacing(np.abs(flat).max())
    np.testing.assert_allclose(delta.reshape(6, 8), flat, rtol=0, atol=2 * ulp)


@each_kernel
def test_equal_and_hashable_by_value(kernel):
    """A kernel is a static argument: an equal copy does not retrace."""
    copy = dataclasses.replace(kernel)
    assert copy == kernel and copy is not kernel and hash(copy) == hash(kernel)
    assert sum(kernel == other for other in KERNELS.values()) == 1
    with pytest.raises((dataclasses.FrozenInstanceError, TypeError)):
        kernel.pieces = 5

    chex.clear_trace_counter()
    traced = chex.assert_max_traces(lambda f, k: k.apply(f), n=1)
    jitted = jax.jit(traced, static_argnums=1)
    factors = as_jax(generic_factors(kernel), jnp.float32)
    np.testing.assert_array_equal(jitted(factors, kernel), jitted(factors, copy))


@each_axis
@pytest.mark.parametrize("name", ["normalized_rbf", "mix_k"])
def test_softmax_runs_over_the_right_axis(name, over, x64):
    """Over "out" each input's soft weights sum to alpha, over "in" each output's."""
    kernel = dataclasses.replace(KERNELS[name], normalize_over=over)
    factors = generic_factors(kernel) | {"beta": np.float64(0)}
    soft = run(kernel.apply, as_jax(factors, jnp.float64))
    if name == "mix_k":
        soft -= oracle(KERNELS["piecewise_linear"], factors)
    along = {"out": 1, "in": 0}[over]
    np.testing.assert_allclose(soft.sum(along), factors["alpha"], rtol=1e-12)
    assert np.abs(soft.sum(1 - along) - factors["alpha"]).min() > 1e-3


@pytest.mark.parametrize("name", ["piecewise_linear", "mix_k"])
def test_fixed_piece_coeff_gets_no_gradient(name):
    """The same update and the same other gradients; 0 for `piece_coeff`."""
    learnt = KERNELS[name]
    fixed = dataclasses.replace(learnt, learn_piece_coeff=False)
    factors = as_jax(generic_factors(learnt), jnp.float32)
    cotangent = np.random.default_rng(1).normal(size=(4, 5))
    delta, grads = pull_back(learnt, factors, cotangent)
    fixed_delta, fixed_grads = pull_back(fixed, factors, cotangent)
    np.testing.assert_array_equal(fixed_delta, delta)
    assert np.all(grads["piece_coeff"] != 0)
    np.testing.assert_array_equal(fixed_grads["piece_coeff"], 0)
    chex.assert_trees_all_equal(
        fixed_grads | {"piece_coeff": grads["piece_coeff"]}, grads
    )


def test_distance_at_coincident_points():
    """Value, gradient and second derivative are 0 there and finite everywhere."""
    a = jnp.array([[0.5, -2.0], [1.0, 3.0]])
    b = jnp.array([[0.5, -2.0], [4.0, 7.0], [1.0, 3.0]])
    value = distance.distance(a, b)
    assert value[0, 0] == value[1, 2] == 0
    assert value[1, 1] == 5  # (3, 4) apart

    da, db = run(jax.jacrev(distance.distance, (0, 1)), a, b)
    np.testing.assert_array_equal(da[0, 0], 0)
    np.testing.assert_array_equal(db[1, 2], 0)
    np.testing.assert_allclose(da[1, 1, 1], [-0.6, -0.8], rtol=1e-6)
    np.testing.assert_allclose(db[1, 1, 1], [0.6, 0.8], rtol=1e-6)

    second = run(jax.hessian(distance.distance, (0, 1)), a, b)
    chex.assert_tree_all_finite(second)
    np.testing.assert_array_equal(second[0][0][0, 0], 0)
    # The Hessian of a norm: (I - u u^T) / d with d = 5 and u = (3, 4) / 5.
    np.testing.assert_allclose(
        second[0][0][1, 1, 1, :, 1, :],
        np.array([[16, -12], [-12, 9]]) / 125,
        atol=1e-6,
    )


def test_distance_of_almost_coincident_points(x64):
    """Two rows within rounding of each other are coincident, not noise over 0."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 30, 2)).astype(np.float32)
    b[0] = a[0]
    a[0, 1], b[0, 1] = 1e-12, 0.0

    def gradient(a, b, dtype):
        def total(a, b):
            return distance.distance(a, b).sum()

        pair = jnp.asarray(a, dtype), jnp.asarray(b, dtype)
        return run(jax.grad(total, (0, 1)), *pair)

    got = gradient(a, b, jnp.float32)
    b[0] = a[0]
    expected = gradient(a, b, jnp.float64)
    chex.assert_trees_all_close(got, expected, rtol=0, atol=2e-5)


def test_gradient_through_a_kernel_of_equal_factors():
    """Factors that coincide everywhere train on without a NaN."""
    kernel = kernels.mix_k()
    factors = kernel.init(jax.random.key(0), (4, 4), 4)
    factors["b"] = factors["a"]
    grads = run(jax.grad(lambda f: (kernel.apply(f) ** 2).sum()), factors)
    chex.assert_tree_all_finite(grads)


def test_numerical_rank(x64):
    """Mix-K's update has a higher rank than its factors, LoRA's exactly theirs."""
    rank = 4

    def spectrum(kernel):
        factors = as_jax(generic_factors(kernel, 32, 40, rank), jnp.float64)
        values = np.linalg.svd(run(kernel.apply, factors), compute_uv=False)
        return values / values[0]

    low, high = spectrum(kernels.linear()), spectrum(kernels.mix_k())
    assert low[rank - 1] > 1e-2 and low[rank] < 1e-14
    assert (high > 1e-3).sum() > 4 * rank


@pytest.mark.parametrize("rank", [0, -2, 3, 7])
@pytest.mark.parametrize("name", ["piecewise_linear", "normalized_rbf", "mix_k"])
def test_rank_is_a_multiple_of_the_pieces(name, rank):
    with pytest.raises(ValueError, match=f"rank={rank} is not a positive multiple"):
        KERNELS[name].init(jax.random.key(0), (4, 5), rank)


@pytest.mark.parametrize("name", ["linear", "rbf", "sigmoid"])
def test_rank_is_positive(name):
    with pytest.raises(ValueError, match="rank=0 is not a positive multiple"):
        KERNELS[name].init(jax.random.key(0), (4, 5), 0)


@pytest.mark.parametrize("kernel", [kernels.mix_k, kernels.normalized_rbf])
def test_normalize_over_is_checked(kernel):
    with pytest.raises(ValueError, match="normalize_over='rows'"):
        kernel(normalize_over="rows")


def test_named():
    """A name gives the default kernel, a kernel passes through, others are refused."""
    assert kernels.KERNELS.keys() == {
        *("linear", "piecewise_linear", "rbf"),
        *("sigmoid", "normalized_rbf", "mix_k"),
    }
    for name in kernels.KERNELS:
        assert kernels.named(name) == KERNELS[name]
    special = kernels.mix_k(temperature=True)
    assert kernels.named(special) is special
    with pytest.raises(ValueError, match=r"'mixk': expected linear, .*, mix_k\."):
        kernels.named("mixk")
