"""Sketched weight gradients of the adapted matmul: exact but for the factors'."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generic import M, N, generic_factors, generic_inputs, run

from snella_jax import adapted, adapted_dense, kernels, sparse_delta

KERNEL = kernels.mix_k()
FACTORS = generic_factors(KERNEL)
W0 = generic_inputs()[1]
LAYER = functools.partial(adapted_dense, kernel=KERNEL)
KEY = jax.random.key(3)
each_kind = pytest.mark.parametrize("kind", ["sample", "strided", "crs"])


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def gradients(x, g, key=None, factors=FACTORS, **options):
    """Of `x` and of the factors, by the cotangent `g`."""
    layer = functools.partial(LAYER, budget=90, key=key, **options)
    _, back = jax.vjp(lambda x, f: layer(x, W0, f), x, factors)
    return back(g)


def contributions(x, g):
    """What row `a` of `x` and row `b` of `g` give the factors, for each example.

    Linear in their product: made by the update's own gradient, without any layer.
    """
    _, back = jax.vjp(lambda f: sparse_delta(f, 90, kernel=KERNEL), FACTORS)
    products = jnp.einsum("ean,ebm->eabnm", x, g)
    each = functools.reduce(lambda f, _: jax.vmap(f), range(3), lambda p: back(p)[0])
    return {name: np.float64(c) for name, c in run(each, products).items()}


def variance(kind, s, c, x, g):
    """Variance of a sum of contributions `c [examples, T, T, ...]`, in closed form."""
    if kind == "crs":
        return variance_by_size(s, c, x, g)
    rows = c.shape[1]
    k = -(-rows // s)
    own = np.einsum("eaa...->ea...", c)
    total = 0
    for j in range(k):
        if kind == "sample":
            part = own[:, j * s : (j + 1) * s]
            total += (part.shape[1] * (part**2).sum(1) - part.sum(1) ** 2).sum(0)
        else:
            members = range(j, rows, k)
            pairs = [(a, b) for a in members for b in members if a != b]
            total += sum(
                (c[:, a, b] ** 2 + c[:, a, b] * c[:, b, a]).sum(0) for a, b in pairs
            )
    return total


def variance_by_size(s, c, x, g):
    """The same of rows drawn by size, over the start of the steps, piece by piece."""
    k, total = -(-x.shape[1] // s), 0
    sizes = np.linalg.norm(x, axis=-1) * np.linalg.norm(g, axis=-1)
    for own, size in zip(np.einsum("eaa...->ea...", c), np.float64(sizes), strict=True):
        ends = k * np.cumsum(size) / size.sum()  # steps of 1, from the start on
        cuts = np.unique([0, 1, *(ends[:-1] % 1)])
        points = (cuts[:-1] + cuts[1:]) / 2 + np.arange(k)[:, None]
        rows = [np.searchsorted(ends, p, "right") for p in points.T]
        times = np.stack([np.bincount(row, minlength=len(size)) for row in rows])
        drawn = np.tensordot(times * size.sum() / (k * size), own, 1)
        mean, square = (np.tensordot(np.diff(cuts), v, 1) for v in (drawn, drawn**2))
        np.testing.assert_allclose(mean, own.sum(0), atol=1e-6)
        total += square - mean**2
    return total


@each_kind
@pytest.mark.parametrize("rows", [6, 2])
def test_gradients_of_the_factors_are_unbiased(kind, rows):
    """Their mean over keys is exact within its noise, and that is as predicted."""
    x, g, keys = drawn(2, rows, N), drawn(2, rows, M, seed=1), 4000
    options = {"sketch": 4, "sketch_kind": kind}
    draw = jax.vmap(lambda key: gradients(x, g, key, **options)[1])
    got = run(draw, jax.random.split(KEY, keys))
    _, expected = run(gradients, x, g)
    every = contributions(x, g)
    for name, value in expected.items():
        each = np.float64(got[name])
        spread = each.std(0)
        bound = 5 * spread / keys**0.5 + 1e-4 * np.abs(value).max()
        assert (np.abs(each.mean(0) - value) < bound).all(), name
        predicted = variance(kind, 4, every[name], x, g)
        assert predicted.max() > 1e-3
        np.testing.assert_allclose(
            (spread**2).sum(), predicted.sum(), rtol=0.1, err_msg=name
        )


@each_kind
@pytest.mark.parametrize(
    "shape", [(7, N), (2, 3, 5, N), (1, 1, N), (N,), (2, 0, N)], ids=str
)
def test_the_rest_is_the_exact_layer(kind, shape):
    """Output, gradients of `x` and a bias; one row is its own sketch, as none is."""
    x, g, bias = drawn(*shape), drawn(*shape[:-1], M, seed=1), drawn(M, seed=2)

    def layer(sketch):
        def whole(x, factors, bias):
            op = adapted(lambda x, w: x @ w + bias)
            options = {"kernel": KERNEL, "sketch_kind": kind}
            return op(x, W0, factors, 90, key=KEY, sketch=sketch, **options)

        y, back = jax.vjp(whole, x, FACTORS, bias)
        return y, back(g)

    got, expected = run(lambda: (layer(3), layer(1)))
    (y, (dx, df, db)), (y0, (dx0, df0, db0)) = got, expected
    chex.assert_trees_all_close((y, dx, db), (y0, dx0, db0), rtol=1e-5, atol=1e-5)
    whole = np.prod(shape[-2:-1], dtype=int) <= 1
    same = np.allclose(df["a"], df0["a"], rtol=1e-4, atol=1e-5)
    assert same == whole


def test_without_a_sketch_or_a_key_it_is_the_exact_layer():
    """Bit for bit: `sketch=1` heeds no key, and without a key there is no sketch."""
    x, g = drawn(2, 7, N), drawn(2, 7, M, seed=1)
    exact = run(gradients, x, g)
    ways = [{"key": KEY}, {"sketch": 4}, {"sketch": 4, "sketch_kind": "crs"}]
    for options in ways:
        chex.assert_trees_all_equal(run(lambda o=options: gradients(x, g, **o)), exact)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(gradients(x, g, KEY, sketch=4), exact)


def test_rows_that_are_always_kept():
    """Where the others have no cotangent the gradients are exact."""
    x, g = drawn(2, 9, N), drawn(2, 9, M, seed=1) * (np.arange(9) % 8 == 0)[:, None]
    for kind in ("sample", "strided", "crs"):
        options = {"sketch": 4, "sketch_kind": kind, "keep_rows": (0, 8)}
        got, expected = run(
            lambda o=options: (gradients(x, g, KEY, **o), gradients(x, g))
        )
        chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)


def test_nothing_of_the_inputs_size_is_kept():
    """Of 3 x 16 rows 3 x 4; in bfloat16 too, and exact layers do keep them."""

    def sizes(dtype, **options):
        x = drawn(3, 16, N).astype(dtype)
        layer = functools.partial(LAYER, w0=W0, budget=90, key=KEY, **options)
        _, back = jax.vjp(lambda x, f: layer(x, factors=f), x, FACTORS)
        return {leaf.size for leaf in jax.tree.leaves(back) if hasattr(leaf, "size")}

    for dtype in (jnp.float32, jnp.bfloat16):
        for kind in ("sample", "strided"):
            kept = sizes(dtype, sketch=4, sketch_kind=kind)
            assert 3 * 4 * N in kept and 3 * 16 * N not in kept
        assert 3 * 16 * N in sizes(dtype)


@pytest.mark.parametrize("kernel", [KERNEL, kernels.mix_k(centred="both")])
def test_under_transformations(kernel):
    """The same draw rematerialised, scanned and mapped over keys."""
    x, keys = drawn(2, 7, N), jax.random.split(KEY, 3)
    own = generic_factors(kernel)
    layer = functools.partial(LAYER, kernel=kernel, sketch=4)

    def loss(factors, key, remat=False):
        def total(f):
            return jnp.sin(layer(x, W0, f, 90, key=key)).sum()

        return (jax.checkpoint(total) if remat else total)(factors)

    every_key = list(keys)

    @jax.jit
    def every():
        one = jax.grad(loss)
        loop = [one(own, key) for key in every_key]
        looped = jax.tree.map(lambda *v: jnp.stack(v), *loop)
        mapped = jax.vmap(one, (None, 0))(own, keys)
        scanned = jax.lax.scan(lambda c, key: (c, one(own, key)), 0, keys)[1]
        again = jax.vmap(lambda key: one(own, key, True))(keys)
        return looped, mapped, scanned, again

    looped, *others = every()
    assert np.std(looped["a"], axis=0).max() > 1e-2
    for other in others:
        chex.assert_trees_all_close(other, looped, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sketch": 0}, "sketch=0"),
        ({"sketch": 2, "path": "parallel"}, 'path="merged"'),
        ({"sketch": 2, "sketch_kind": "count"}, "sample, strided, crs"),
        ({"sketch": 2, "keep_rows": (7,), "key": KEY}, "no row 7"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LAYER(drawn(2, 7, N), W0, FACTORS, 90, **options)


def test_an_operation_that_mixes_rows_is_refused():
    mixed = adapted(lambda x, w: x.sum(1) @ w)
    with pytest.raises(ValueError, match="one output for each row"):
        mixed(drawn(2, 7, N), W0, FACTORS, 90, kernel=KERNEL, sketch=2, key=KEY)
