"""Factors and inputs of adapted matmuls for their tests."""

import jax
import jax.numpy as jnp
import numpy as np

N, M, BATCH, RANK = 12, 20, 5, 4


def run(function, *arguments):
    """Returns `function(*arguments)`, compiled as one program."""
    return jax.jit(function)(*arguments)


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


def weight_at_tau(delta, budget):
    """Returns the row and the column of the weight whose `|delta|` is tau.

    Made again with another rounding it alone may survive in a backward pass, so
    gradients are compared without its input (row) and its output (column).
    """
    largest_first = np.argsort(-np.abs(np.asarray(delta)), axis=None)
    return np.unravel_index(largest_first[budget], delta.shape)
