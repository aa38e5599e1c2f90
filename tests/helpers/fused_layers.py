"""Layers for fused kernels: their arrays, what they compute, and how it is compared."""

import jax
import jax.numpy as jnp
import numpy as np

from snella_jax import adapted_dense


def inputs(kernel, n, m, rows=21, rank=6, dtype=jnp.float32):
    """Factors a good way from where they start, `x`, `w0` and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 4)
    factors = kernel.init(keys[0], (n, m), rank)
    factors |= {name: 6 * factors[name] for name in ("a", "b")}
    spread = {"alpha": 3.0, "beta": 0.01, "gamma": 0.7}
    factors |= {k: jnp.float32(v) for k, v in spread.items() if k in factors}
    shapes = (rows, n), (n, m), (rows, m)
    draws = (
        jax.random.normal(key, s, dtype)
        for key, s in zip(keys[1:], shapes, strict=True)
    )
    return factors, *draws


def outputs(implementation, x, w0, factors, budget, g, **how):
    """`y` and the gradients of `x`, `w0` and the factors."""

    def layer(x, w0, factors):
        own = how | {"implementation": implementation}
        return adapted_dense(x, w0, factors, budget, **own)

    y, back = jax.vjp(layer, x, w0, factors)
    return y, *back(g)


def assert_close(got, expected, rtol=1e-5):
    """Within `rtol` of the largest number of each array."""
    got, expected = (jax.tree.leaves_with_path(v) for v in (got, expected))
    for (path, one), (_, other) in zip(got, expected, strict=True):
        assert one.dtype == other.dtype, path
        one, other = (np.float64(v) for v in (one, other))
        atol = rtol * np.abs(other).max()
        np.testing.assert_allclose(one, other, 0, atol, err_msg=str(path))
