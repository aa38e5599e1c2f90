"""Dropout and drop-path of adapted matmuls: the same masks when recomputed."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from generic import BATCH, M, N, generic_factors, generic_inputs, run

from snella_jax import adapted_dense, kernels, sparsify
from snella_jax.ops import dropout as stochastic

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


def test_a_rate_of_0_draws_nothing():
    x, key = jnp.ones((4, 3)), jax.random.key(0)
    for mask in (stochastic.dropout, stochastic.drop_path):
        made = str(jax.make_jaxpr(lambda key, x, mask=mask: mask(key, x, 0.0))(key, x))
        assert "random_bits" not in made and mask(key, x, 0.0) is x


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
