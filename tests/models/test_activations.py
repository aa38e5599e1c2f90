"""Derivatives by steps: their coefficients, their error, and the 2 bits they keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy import optimize, special

from snella_jax.models.layers import activations
from snella_jax.models.layers.activations import GELU, SILU, gelu2, gelu_tanh2, silu2

GRID = np.linspace(-40, 40, 160_001)
EXACT = {
    "gelu": GRID * special.ndtr(GRID),
    "silu": GRID * special.expit(GRID),
}
STEPS = {"gelu": GELU, "silu": SILU}
# Coefficients and thresholds in the paper's code: ReGELU2 and ReSiLU2.
PAPER = {
    "gelu": ((-0.0492226, 1.0979632), (-3.1858810, -0.0011788, 3.1908326)),
    "silu": ((-0.0406036, 1.0809254), (-6.3050461, -0.0008685, 6.3258152)),
}


def distance(name, first, second, edges):
    """Integral of the squared difference from three ReLUs, of total slope 1."""
    slopes = first, second, 1 - first - second
    relus = sum(
        slope * np.maximum(GRID - edge, 0)
        for slope, edge in zip(slopes, edges, strict=True)
    )
    return ((EXACT[name] - relus) ** 2).sum() * (GRID[1] - GRID[0])


@pytest.mark.parametrize("name", STEPS)
def test_coefficients_are_the_nearest_sum_of_three_relus(name):
    """Found from the paper's ones; the middle edge makes the sum end in `x`."""

    def free(numbers):
        first, second, low, high = numbers
        middle = -(first * low + (1 - first - second) * high) / second
        return distance(name, first, second, (low, middle, high))

    (first, second), (low, _, high) = PAPER[name]
    start = first, second, low, high
    nearest = optimize.minimize(free, start, method="Nelder-Mead", options={
        "xatol": 1e-7, "fatol": 1e-13}).x  # fmt: skip
    below, edge = STEPS[name]
    ours = -below, 1 + 2 * below, -edge, edge
    np.testing.assert_allclose(nearest, ours, atol=2e-3)
    assert free(ours) < free(start) < 1.001 * free(ours)


@pytest.mark.parametrize(
    ("function", "name", "exact"),
    [
        (gelu2, "gelu", lambda x: jax.nn.gelu(x, approximate=False)),
        (gelu_tanh2, "gelu", jax.nn.gelu),
        (silu2, "silu", jax.nn.silu),
    ],
)
def test_output_is_exact_and_the_slope_s_error_is_that_of_the_steps(
    function, name, exact
):
    """The integrals of squared differences, of the slopes and of the functions.

    The slopes' is no smaller than a ReLU's (0.141 and 0.215): the steps are the nearest
    by the functions', of which a ReLU has 0.062 and 0.316.
    """
    x = jnp.asarray(GRID[:: 2 * 5], jnp.float32)
    np.testing.assert_array_equal(jax.jit(function)(x), jax.jit(exact)(x))
    slopes, true = (
        jax.jit(jax.grad(lambda x, f=f: f(x).sum()))(x) for f in (function, exact)
    )
    below, edge = STEPS[name]
    places = np.searchsorted((-edge, 0, edge), x)
    np.testing.assert_array_equal(slopes, np.float32([0, -below, 1 + below, 1])[places])
    width = float(x[1] - x[0])
    ends = np.cumsum(np.float64(slopes)) * width - width / 2  # their integral from -40
    of_slopes, of_functions = (
        ((np.float64(one) - other) ** 2).sum() * width
        for one, other in ((true, slopes), (exact(x), ends))
    )
    expected = {"gelu": (0.1573, 0.00951), "silu": (0.2376, 0.03994)}[name]
    np.testing.assert_allclose((of_slopes, of_functions), expected, rtol=0.1)


@pytest.mark.parametrize("width", [1, 6, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_bits_an_element_stay(width, dtype):
    x = 3 * jax.random.normal(jax.random.key(0), (3, 5, width)).astype(dtype)
    y, back = jax.eval_shape(lambda: jax.vjp(gelu2, x))
    [left] = jax.tree.leaves(back)
    assert y.dtype == dtype
    assert (left.dtype, left.shape) == (jnp.uint8, (3, 5, -(-width // 4)))
    g = jnp.ones_like(x)
    [slopes] = jax.vjp(gelu2, x)[1](g)
    expected = np.select(
        [x <= -GELU.edge, x <= 0, x <= GELU.edge], [0, -GELU.below, 1 + GELU.below], 1
    )
    np.testing.assert_array_equal(slopes, jnp.asarray(expected, dtype))


def test_the_same_in_a_scan_under_vmap_and_recomputed():
    x = jax.random.normal(jax.random.key(0), (4, 6))

    def plain(x):
        return gelu2(gelu2(x)).sum()

    def scanned(x):
        rows = jax.checkpoint(jax.vmap(gelu2))
        return jax.lax.scan(lambda x, _: (rows(x), None), x, length=2)[0].sum()

    np.testing.assert_array_equal(jax.grad(plain)(x), jax.jit(jax.grad(scanned))(x))


def test_no_chip_needs_another_s_numbers():
    """Where the width is split, four numbers that share a byte are on one chip."""
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    x = jax.random.normal(jax.random.key(0), (4, 16))
    expected = jax.grad(lambda x: gelu2(x).sum())(x)
    split = jax.device_put(x, jax.NamedSharding(mesh, P("data", "model")))
    with jax.set_mesh(mesh):
        run = jax.jit(jax.grad(lambda x: jax.reshard(gelu2(x), P()).sum()))
        found = run(split)
        [back] = jax.tree.leaves(jax.jit(lambda x: jax.vjp(gelu2, x)[1])(split))
        program = jax.jit(lambda x, g: jax.vjp(gelu2, x)[1](g)).lower(split, split)
    np.testing.assert_array_equal(found, expected)
    assert back.sharding.spec == P("data", "model")
    text = program.compile().as_text()
    assert not any(name in text for name in ("all-gather", "all-to-all", "permute"))


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="'gelu3': expected gelu, gelu2"):
        activations.check_activation("gelu3", activations.Gelu)
