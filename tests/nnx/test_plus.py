"""`SnellaConfig.plus()`: it starts at the base, and its updates have no means."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import snella_jax as snella

X = jax.random.normal(jax.random.key(0), (4, 6))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.fc1 = nnx.Linear(6, 10, rngs=rngs)
        self.fc2 = nnx.Linear(10, 3, rngs=rngs)

    def __call__(self, x):
        return self.fc2(jnp.tanh(self.fc1(x)))


def test_it_trains_from_the_base_and_is_read_again(tmp_path):
    """The base's numbers bit for bit, then others; files keep kernel and factors."""
    config = snella.SnellaConfig.plus(rank=4, targets=r"fc\d", trainable="")
    base = Net(nnx.Rngs(0))
    model = snella.adapt(base, config, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(model(X), base(X))

    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    losses = []
    for _ in range(3):
        loss, grads = nnx.value_and_grad(lambda m: (m(X) ** 2).sum())(model)
        optimizer.update(model, grads)
        losses.append(float(loss))
    assert losses[2] < losses[0]
    for path, layer in (("fc1", model.fc1), ("fc2", model.fc2)):
        delta = np.asarray(layer.adapter.on(path, layer.kernel[...]).delta())
        size = np.abs(delta).max()
        assert size > 1e-3
        np.testing.assert_allclose(delta.sum(0), 0, atol=1e-5 * size)
        np.testing.assert_allclose(delta.sum(1), 0, atol=1e-5 * size)

    merged = snella.merge(model, unmoved_budgets=True)
    np.testing.assert_allclose(merged(X), model(X), atol=1e-6)
    snella.save(model, tmp_path / "adapter")
    loaded = snella.load(Net(nnx.Rngs(0)), tmp_path / "adapter")
    np.testing.assert_array_equal(loaded(X), model(X))
    assert loaded.fc1.adapter.rule.kernel == config.kernel
    snella.save_delta(tmp_path / "delta.safetensors", base, merged)
    other = snella.apply_delta(Net(nnx.Rngs(0)), tmp_path / "delta.safetensors")
    np.testing.assert_array_equal(other(X), merged(X))


def test_settings():
    """Hard gate, from 0, no means, budgets as the paper's; each can be changed."""
    config = snella.SnellaConfig.plus(rank=16)
    assert config == snella.SnellaConfig(
        rank=16,
        kernel=snella.kernels.mix_k(centred="both", start="zero"),
        gate="hard",
    )
    with pytest.raises(ValueError, match="passes no gradient: expected start="):
        snella.SnellaConfig.plus(gate="product")
    with pytest.raises(ValueError, match="lets no weight move"):
        snella.SnellaConfig.plus(initial_density=0.5)
