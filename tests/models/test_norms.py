"""Norms against Flax's and against differences in float64, and what they keep."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from snella_jax.models.layers import norms
from snella_jax.models.layers.norms import normalised

EPS = 1e-3
RNG = np.random.default_rng(0)
X = 3 + RNG.normal(size=(2, 3, 8)).astype(np.float32)
SCALE, BIAS = RNG.normal(size=(2, 8)).astype(np.float32)
WEIGHTS = RNG.normal(size=X.shape)


def formula(x, scale, bias, centred):
    """The norm's output in float64."""
    x = np.float64(x)
    x = x - x.mean(-1, keepdims=True) if centred else x
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def differences(function, *arrays):
    """Central differences of a number by every number in some arrays."""
    arrays = [np.array(array, np.float64) for array in arrays]
    found = []
    for array in arrays:
        slopes = np.zeros_like(array)
        for place in np.ndindex(array.shape):
            ends = []
            for step in (1e-6, -1e-6):
                array[place] += step
                ends.append(function(*arrays))
                array[place] -= step
            slopes[place] = (ends[0] - ends[1]) / 2e-6
        found.append(slopes)
    return found


@pytest.mark.parametrize(
    ("scale", "bias", "centred"),
    [(SCALE, BIAS, True), (SCALE, None, False), (None, None, True), (None, BIAS, True)],
)
def test_gradients_are_those_of_float64(scale, bias, centred):
    given = [a for a in (scale, bias) if a is not None]

    def filled(own):
        rest = iter(own)
        return [None if a is None else next(rest) for a in (scale, bias)]

    def loss(x, *own):
        return (normalised(x, *filled(own), EPS, centred) * WEIGHTS).sum()

    def slow(x, *own):
        return (formula(x, *filled(own), centred) * WEIGHTS).sum()

    expected = differences(slow, X, *given)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(a, jnp.float64) for a in (X, *given)]
        y = normalised(arrays[0], *filled(arrays[1:]), EPS, centred)
        np.testing.assert_allclose(y, formula(X, scale, bias, centred), rtol=1e-12)
        found = jax.grad(loss, tuple(range(len(arrays))))(*arrays)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.float64
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-8)
    narrow = jax.grad(loss, tuple(range(len(arrays))))(X, *given)
    for one, other in zip(narrow, expected, strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_outputs_are_flax_s_to_the_bit(kind, dtype):
    """And gradients are, but for rounding, with weights in float32."""
    options = {"epsilon": EPS, "dtype": dtype, "use_fast_variance": False}
    found = []
    for module in (nnx, norms):
        layer = getattr(module, kind)(8, **options, rngs=nnx.Rngs(0))
        layer.scale[...] = SCALE
        if kind == "LayerNorm":
            layer.bias[...] = BIAS
        graphdef, state = nnx.split(layer)

        @jax.jit
        def run(state, x, graphdef=graphdef):
            def call(state, x):
                return nnx.merge(graphdef, state)(x)

            y, back = jax.vjp(call, state, x)
            return y, back(jnp.asarray(WEIGHTS, y.dtype))

        found.append(run(state, jnp.asarray(X, dtype)))
    (y, slopes), (expected, flax_slopes) = found[1], found[0]
    assert y.dtype == expected.dtype == dtype
    np.testing.assert_array_equal(y, expected)
    tolerance = 2e-5 if dtype == "float32" else 3e-2
    for one, other in zip(*map(jax.tree.leaves, (slopes, flax_slopes)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(
            np.float32(one), np.float32(other), tolerance, tolerance
        )


def kept(function, *arrays):
    """Dtype and shape of what is kept, apart from the two weights."""
    leaves = jax.tree.leaves(jax.eval_shape(lambda: jax.vjp(function, *arrays)[1]))
    return sorted((str(leaf.dtype), leaf.shape) for leaf in leaves if leaf.ndim > 1)


def test_keeps_its_input_and_two_numbers_of_each_row():
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in (X, SCALE, BIAS)]
    row = ("float32", (2, 3, 1))
    whole = ("bfloat16", X.shape)
    found = kept(lambda *arrays: normalised(*arrays, EPS), *arrays)
    assert found == [whole, row, row]
    found = kept(lambda x, s: normalised(x, s, None, EPS, False), *arrays[:2])
    assert found == [whole, row]


def test_frozen_weights_cost_no_gradient():
    """No sum over rows is left in the compiled program."""

    def loss(x, scale, bias):
        return (normalised(x, scale, bias, EPS) * jnp.float32(WEIGHTS)).sum()

    def sums(*wanted):
        program = jax.jit(jax.grad(loss, wanted)).lower(X, SCALE, BIAS).compile()
        return len(re.findall(r"= f32\[8\]\S* reduce\(", program.as_text()))

    assert sums(0) == 0 < sums(0, 1, 2)


def test_the_same_in_a_scan_under_vmap_and_recomputed():
    """The gradient of the norm applied three times in a row."""
    arrays = jnp.asarray(X), jnp.asarray(SCALE), jnp.asarray(BIAS)

    def one(x, scale, bias):
        return normalised(x, scale, bias, EPS)

    def plain(x, scale, bias):
        for _ in range(3):
            x = one(x, scale, bias)
        return (x * WEIGHTS[0, 0]).sum()

    def scanned(x, scale, bias):
        run = jax.checkpoint(one)
        rows = jax.vmap(lambda x: run(x, scale, bias))
        x, _ = jax.lax.scan(lambda x, _: (rows(x), None), x, length=3)
        return (x * WEIGHTS[0, 0]).sum()

    expected, found = (
        jax.jit(jax.grad(f, (0, 1, 2)))(*arrays) for f in (plain, scanned)
    )
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mapped", [False, True])
def test_gradients_of_weights_are_added_up_over_a_mesh(mapped):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(x, scale, bias):
        return jnp.sin(normalised(x, scale, bias, EPS)).sum()

    run = loss
    if mapped:

        def run(*arrays):
            return jax.lax.psum(loss(*arrays), "data")

        run = jax.shard_map(
            run, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P()
        )
    with jax.set_mesh(mesh):
        x = jax.device_put(X, jax.NamedSharding(mesh, P("data")))
        found = jax.jit(jax.grad(run, (0, 1, 2)))(x, SCALE, BIAS)
    expected = jax.grad(loss, (0, 1, 2))(X, SCALE, BIAS)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
