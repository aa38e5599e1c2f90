"""The threshold against a sort, to the bit; the gates against their closed forms."""

import itertools
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snella_jax import sparsify, threshold
from snella_jax.core.gates import GATES

RNG = np.random.default_rng(0)
NORMAL = RNG.normal(size=(12, 10))
TINY = 2.0**-1074  # the smallest float64; 2^-149 is the smallest float32
# Tests' programs compile fast and are slow, which a search of a large matrix shows.
FAST = {"xla_backend_optimization_level": 3}

# Every matrix of a dtype has one size, so that one compiled search serves them all.
MATRICES = {
    "float32": {
        "normal": NORMAL,
        "ties": RNG.integers(-2, 3, (12, 10)),
        "zeros": np.where(NORMAL > 0, 0.0, -0.0),
        "all equal": np.where(NORMAL > 0, 0.7, -0.7),
        "subnormal": RNG.integers(-9, 9, (12, 10)) * 2.0**-149,
        "1e-42 beside normal": np.where(NORMAL > 0, NORMAL, NORMAL * 1e-42),
        "infinities": np.where(abs(NORMAL) > 1.5, np.sign(NORMAL) * np.inf, NORMAL),
        "huge": NORMAL * 1e38,
    },
    "bfloat16": {"normal": NORMAL, "subnormal": NORMAL * 1e-39},
    "float16": {"normal": NORMAL, "subnormal": NORMAL * 1e-5},
    "float64": {
        "normal": NORMAL,
        # equal in float32
        "neighbours": 1 + RNG.permutation(120).reshape(12, 10) * 2.0**-52,
        "subnormal": RNG.integers(-9, 9, (12, 10)) * TINY,
        "1e-310 beside normal": np.where(NORMAL > 0, NORMAL, NORMAL * 1e-310),
        "infinities": np.where(abs(NORMAL) > 1.5, np.inf, NORMAL),
    },
}
CASES = [
    pytest.param(np.asarray(values, jnp.dtype(dtype)), id=f"{dtype} {name}")
    for dtype, matrices in MATRICES.items()
    for name, values in matrices.items()
]
each_gate = pytest.mark.parametrize("gate", GATES)


def budgets_of(size):
    return [0, 1, 2, size // 3, size // 2, size - 1, size, size + 5]


def oracle(delta, budget):
    """The `(budget+1)`-th entry of the sorted magnitudes, as they are stored."""
    falling = np.sort(np.abs(delta), axis=None)[::-1]
    return falling[budget] if budget < delta.size else np.zeros((), delta.dtype)[()]


def assert_same_bits(got, expected):
    assert got.dtype == expected.dtype
    assert np.asarray(got).tobytes() == expected.tobytes(), (got, expected)


@pytest.mark.parametrize("delta", CASES)
def test_threshold_is_the_sorted_value(delta, searched, x64):
    on_device = jnp.asarray(delta)
    for budget in budgets_of(delta.size):
        assert_same_bits(searched(on_device, budget), oracle(delta, budget))


def test_threshold_of_every_small_matrix(searched):
    """All matrices of three of these numbers, with every budget: NaN is the largest."""
    values = np.float32([0, -0.0, 2.0**-149, -1, 1, 3e38, -np.inf, np.nan])
    deltas = np.array(list(itertools.product(values, repeat=3)))
    over_all = jax.jit(jax.vmap(jax.vmap(searched, (None, 0)), (0, None)))
    found = np.asarray(over_all(deltas, jnp.arange(5))).view(np.uint32)
    patterns = np.sort(deltas.view(np.uint32) & 0x7FFFFFFF, axis=1)[:, ::-1]
    np.testing.assert_array_equal(found[:, :3], patterns)
    np.testing.assert_array_equal(found[:, 3:], 0)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 4), (17,), (3, 4, 5), (5, 48)])
def test_threshold_of_any_number_of_axes(shape, searched):
    delta = np.float32(RNG.normal(size=shape))
    for budget in {0, 1, 7, delta.size, delta.size + 5}:
        assert_same_bits(searched(delta, budget), oracle(delta, budget))


def test_threshold_eager_takes_plain_and_array_budgets():
    """Python, NumPy and JAX integers of any width are budgets."""
    delta = np.float32(NORMAL)
    for kind in (int, np.int64, np.uint8, jnp.int32, jnp.int16):
        assert_same_bits(threshold(jnp.asarray(delta), kind(9)), oracle(delta, 9))


@pytest.mark.parametrize("kind", [np.int8, jnp.int8, jnp.int16])
def test_budgets_of_few_bits(kind):
    """A budget whose integers do not reach the size of the matrix."""
    delta = np.float32(RNG.normal(size=(200, 200)))
    assert_same_bits(threshold(jnp.asarray(delta), kind(100)), oracle(delta, 100))


@pytest.mark.parametrize("wide", [False, True])
def test_budgets_beyond_31_bits(wide):
    """More than a matrix has is all of it, whatever the integer's width."""
    with jax.enable_x64(wide):
        delta = jnp.asarray(NORMAL, jnp.float32)
        for budget in (10**10, np.int64(2**32), jnp.uint32(2**32 - 1)):
            assert_same_bits(threshold(delta, budget), np.float32(0))
            assert (sparsify(delta, budget, "hard") == delta).all()
        if wide:
            assert_same_bits(threshold(delta, jnp.int64(2**32)), np.float32(0))


def test_threshold_under_vmap(searched):
    """Over matrices and budgets together, and over budgets alone."""
    deltas = np.float32(RNG.normal(size=(8, 12, 10)))
    budgets = np.array(budgets_of(120))
    both = jax.jit(jax.vmap(searched))(deltas, budgets)
    alone = jax.jit(jax.vmap(searched, (None, 0)))(deltas[0], budgets)
    for i, budget in enumerate(budgets):
        assert_same_bits(both[i], oracle(deltas[i], budget))
        assert_same_bits(alone[i], oracle(deltas[0], budget))


def test_threshold_inside_scan():
    deltas = np.float32(RNG.normal(size=(8, 12, 10)))
    budgets = np.array(budgets_of(120))
    _, taus = jax.lax.scan(lambda _, x: (None, threshold(*x)), None, (deltas, budgets))
    expected = [oracle(d, b) for d, b in zip(deltas, budgets, strict=True)]
    assert_same_bits(taus, np.array(expected))


def test_a_new_budget_does_not_retrace():
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(lambda d, b: sparsify(d, b, "hard"), n=1)
    step, delta = jax.jit(traced), np.float32(NORMAL)
    for budget in (5, 60, 120):
        assert np.count_nonzero(step(delta, budget)) == budget


@pytest.mark.parametrize(
    "count, kept",
    [(2**24 + 1, 2**24), (2**24, 2**24)],
    ids=["one too many", "just enough"],
)
def test_counts_beyond_the_integers_of_float32(count, kept):
    """2^24 + 1 ones are more than a budget of 2^24, though float32 cannot tell."""
    delta = np.full(2**24 + 3, 0.5, np.float32)
    delta[:count] = 1
    search = jax.jit(threshold).lower(delta, kept).compile(FAST)
    assert_same_bits(search(delta, kept), np.float32(1 if count > kept else 0.5))


def test_a_large_matrix():
    """45 million weights (Llama's widest): exact, and no slower than seconds."""
    delta = np.random.default_rng(1).standard_normal((4096, 11008), np.float32)
    budget = 13_527_000
    search = jax.jit(threshold).lower(delta, budget).compile(FAST)
    on_device = jax.device_put(delta)
    seconds = []
    for _ in range(2):  # of all threads, as others may use this machine
        start = time.process_time()
        tau = search(on_device, budget).block_until_ready()
        seconds.append(time.process_time() - start)
    assert min(seconds) < 5

    rank = delta.size - 1 - budget
    assert_same_bits(tau, np.partition(np.abs(delta), rank, axis=None)[rank])
    assert np.count_nonzero(np.abs(delta) > tau) <= budget


@each_gate
def test_exactly_budget_weights_survive(gate):
    """Those of largest magnitude, of either sign, where magnitudes are distinct."""
    step, delta = jax.jit(sparsify, static_argnums=2), np.float32(NORMAL)
    order = np.argsort(-np.abs(delta), axis=None)
    for budget in budgets_of(delta.size):
        survives = np.zeros(delta.size, bool)
        survives[order[:budget]] = True
        kept = step(delta, budget, gate)
        np.testing.assert_array_equal(np.ravel(kept) != 0, survives)


def test_fewer_survive_a_tie():
    """Weights that tie with tau do not survive: 4 threes for a budget of 6."""
    delta = jnp.array([3.0, -3.0, 2.0, 2.0, -2.0, 3.0, -3.0, 1.0])
    kept = sparsify(delta, 6, "hard")
    np.testing.assert_array_equal(kept, [3, -3, 0, 0, 0, 3, -3, 0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_values_and_dtype(dtype, x64):
    """The table of gates on numbers that every dtype holds; 3 of 6 survive."""
    delta = jnp.asarray([[4.0, -3.0, 0.5], [2.5, -1.5, 0.0]], dtype)
    expected = {
        "product": [[4 * 2.5, -3 * 1.5, 0], [2.5, 0, 0]],
        "released": [[16, -9, 0], [6.25, 0, 0]],
        "soft": [[2.5, -1.5, 0], [1, 0, 0]],
        "hard": [[4, -3, 0], [2.5, 0, 0]],
    }
    assert expected.keys() == GATES.keys()
    kept = jax.jit(lambda d: {gate: sparsify(d, 3, gate) for gate in GATES})(delta)
    for gate, values in expected.items():
        assert kept[gate].dtype == dtype
        np.testing.assert_array_equal(kept[gate], jnp.asarray(values, dtype))


def test_subnormal_weights_compete():
    """A flush to zero would make them all tie."""
    delta = np.arange(1, 9, dtype=np.float32) * np.float32(2.0**-149)
    survives = jax.jit(sparsify, static_argnums=2)(delta, 3, "hard")
    np.testing.assert_array_equal(np.asarray(survives).view(np.uint32)[:5], 0)
    np.testing.assert_array_equal(np.asarray(survives)[5:], delta[5:])


@each_gate
def test_nan_survives(gate):
    """It takes one place and poisons nothing else, so that it is seen."""
    delta = np.float32(NORMAL)
    delta[3, 4] = np.nan
    step = jax.jit(lambda d, budget: sparsify(d, budget, gate))
    for budget in (0, 1, 5):
        kept = np.array(step(delta, budget))
        assert np.isnan(kept[3, 4])
        kept[3, 4] = 0
        assert np.isfinite(kept).all()
        assert np.count_nonzero(kept) == max(budget - 1, 0)


def test_infinity_survives():
    delta = jnp.array([1.0, -jnp.inf, 3.0])
    np.testing.assert_array_equal(sparsify(delta, 1, "hard"), [0, -np.inf, 0])
    np.testing.assert_array_equal(sparsify(delta, 1, "product"), [0, -np.inf, 0])


def numpy_gate(gate, delta, detached, tau):
    """Element-wise with tau given; `detached` is the `|delta|` that does not vary."""
    value = {
        "product": delta * (np.abs(delta) - tau),
        "released": delta * detached,
        "soft": np.sign(delta) * (np.abs(delta) - tau),
        "hard": delta,
    }[gate]
    return np.where(np.abs(delta) > tau, value, 0)


@each_gate
def test_values_and_gradients_with_tau_held_fixed(gate, x64):
    """Against finite differences of NumPy's gate; 0 for the weight that sets tau."""
    cotangent = RNG.normal(size=NORMAL.shape)
    detached, step = np.abs(NORMAL), 1e-6

    @jax.jit
    def value_and_pull_back(delta, budget):
        kept, vjp = jax.vjp(lambda d: sparsify(d, budget, gate), delta)
        return kept, vjp(jnp.asarray(cotangent))[0]

    for budget in budgets_of(NORMAL.size):
        tau = oracle(NORMAL, budget)
        kept, grad = value_and_pull_back(jnp.asarray(NORMAL), budget)
        expected = numpy_gate(gate, NORMAL, detached, tau)
        np.testing.assert_allclose(kept, expected, rtol=1e-15)

        ends = [numpy_gate(gate, NORMAL + s, detached, tau) for s in (step, -step)]
        slope = (ends[0] - ends[1]) / (2 * step)
        sets_tau = detached == tau
        assert sets_tau.sum() == (budget < NORMAL.size)
        slope[sets_tau] = 0  # a kink or a jump: it does not survive, it gets nothing
        np.testing.assert_allclose(grad, slope * cotangent, rtol=1e-8, atol=1e-9)
        np.testing.assert_array_equal(grad[detached <= tau], 0)


@each_gate
def test_a_full_budget_stops_no_gradient(gate):
    """LoRA starts from a delta of 0: with room for all of it, a zero survives too."""
    zeros, cotangent = jnp.zeros((2, 3)), jnp.arange(1.0, 7.0).reshape(2, 3)

    def pull_back(budget):
        return jax.vjp(lambda d: sparsify(d, budget, gate), zeros)[1](cotangent)[0]

    slope = 1 if gate in ("soft", "hard") else 0  # of delta * |delta| at 0
    np.testing.assert_array_equal(pull_back(6), slope * cotangent)
    np.testing.assert_array_equal(pull_back(9), slope * cotangent)
    np.testing.assert_array_equal(pull_back(5), 0)


def test_threshold_has_no_gradient():
    delta = jnp.asarray(NORMAL, jnp.float32)
    tau, grad = jax.value_and_grad(threshold)(delta, 30)
    assert tau > 0
    np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize("gate", ["product", "soft", "released", "hard"])
def test_a_given_threshold_has_no_gradient(gate):
    """The gradient equals that with a threshold that was searched for."""
    delta = jnp.asarray(NORMAL, jnp.float32)
    with_given = jax.grad(lambda d: sparsify(d, 30, gate, threshold(d, 30)).sum())
    sort = jax.grad(
        lambda d: sparsify(d, 30, gate, jnp.sort(abs(d.ravel()))[-31]).sum()
    )
    expected = jax.grad(lambda d: sparsify(d, 30, gate).sum())(delta)
    np.testing.assert_array_equal(with_given(delta), expected)
    np.testing.assert_array_equal(sort(delta), expected)


def test_errors():
    delta = jnp.ones((2, 3))
    for function in (threshold, sparsify):
        with pytest.raises(ValueError, match="budget=-1: expected at least 0"):
            function(delta, -1)
        with pytest.raises(ValueError, match=r"budget=0\.5: expected .* an integer"):
            function(delta, 0.5)
        with pytest.raises(ValueError, match=r"expected .* an integer"):
            jax.jit(function)(delta, jnp.float32(2))
    with pytest.raises(ValueError, match="'Soft': expected product, released, soft,"):
        sparsify(delta, 2, "Soft")
    with pytest.raises(ValueError, match=r"budget of shape \(2,\): expected one"):
        sparsify(delta, jnp.array([1, 2]))


def test_too_many_elements_for_a_32_bit_count():
    """2^31 - 1 elements are counted, 2^31 are refused (nothing is allocated)."""

    def shape_of(*shape):
        delta = jax.ShapeDtypeStruct(shape, jnp.float32)
        return jax.eval_shape(lambda d: threshold(d, 3), delta)

    assert shape_of(2**31 - 1).shape == ()
    with pytest.raises(ValueError, match="2147483648 elements: expected fewer"):
        shape_of(2**16, 2**15)
