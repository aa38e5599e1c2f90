"""Second derivatives, against those that JAX derives of the kernel itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snella_jax import adapted_dense, kernels, sparse_delta
from snella_jax.core import delta
from snella_jax.kernels import is_measured

KERNELS = {
    "mix_k": kernels.mix_k(),
    "normalized_rbf": kernels.normalized_rbf(),
    "centred": kernels.mix_k(centred="both"),
}


@pytest.mark.parametrize("gate", ["product", "hard"])
@pytest.mark.parametrize("name", KERNELS)
def test_second_derivatives(name, gate, x64, monkeypatch):
    """Of a sum over the update, and through a layer: no statistic stays constant."""
    kernel, keys = KERNELS[name], jax.random.split(jax.random.key(0), 3)
    assert is_measured(kernel)
    factors = kernel.init(keys[0], (6, 4), 4, dtype=jnp.float64)
    factors = jax.tree.map(lambda v: v + 0.1 * jnp.cos(v.size + 7 * v), factors)
    direction = jax.tree.map(lambda v: jnp.sin(jnp.arange(1.0, v.size + 1)), factors)
    x, w0 = (
        jax.random.normal(k, s) for k, s in zip(keys[1:], [(3, 6), (6, 4)], strict=True)
    )

    def loss(factors):
        y = adapted_dense(x, w0, factors, 9, kernel=kernel, gate=gate)
        update = sparse_delta(factors, 9, kernel=kernel, gate=gate)
        return jnp.tanh(y).sum() + (update**3).sum()

    def along(factors):
        grads = jax.grad(loss)(factors)
        return sum((grads[n].ravel() * direction[n]).sum() for n in grads)

    got = jax.jit(jax.grad(along))(factors)
    monkeypatch.setattr(delta, "is_measured", lambda kernel: False)
    jax.clear_caches()
    expected = jax.jit(jax.grad(along))(factors)
    for leaf in expected:
        np.testing.assert_allclose(got[leaf], expected[leaf], rtol=1e-12, atol=1e-14)
        assert abs(expected[leaf]).max() > 0
