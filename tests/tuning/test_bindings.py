"""`Tuning` of Linen modules and of dicts of arrays: as loops around today's calls."""

import dataclasses

import documented
import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import snella_jax as snella
from snella_jax import linen, pytree

X = jax.random.normal(jax.random.key(0), (8, 6))
KEY = jax.random.key(1)
CONFIG = snella.SnellaConfig(
    rank=4, target_density=0.3, targets=r"fc\d", trainable="head"
)
TX = optax.adamw(1e-2, mask=snella.decay_mask)
EPOCHS = 3


class Net(nn.Module):
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8, name="fc1")(x))
        x = nn.Dropout(self.rate, deterministic=not train)(nn.relu(x))
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(8, name="fc2")(x)))


def equal(one, other):
    flat = map(jax.tree.leaves, (one, other))
    return all(bool((a == b).all()) for a, b in zip(*flat, strict=True))


def loss_fn(model, batch):
    x, y = batch
    logits = model(x, train=True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def test_linen_trains_as_the_loop_of_the_documentation(tmp_path):
    """Bit for bit; variables may be frozen dicts. Each epoch is one step there.

    The adapter is saved with its statistics.
    """
    net, y = Net(), jnp.arange(8) % 3
    variables = net.init(KEY, X)
    adapters, params = linen.adapt(net, variables, CONFIG, X, key=KEY)
    given = {"variables": variables, "inputs": X, "targets": y, "config": CONFIG}
    expected = documented.trained_linen(adapters, params, epochs=EPOCHS, **given)
    state = snella.Tuning.create_linen(
        net,
        flax.core.freeze(variables),
        CONFIG,
        TX,
        X,
        epochs=EPOCHS,
        steps_per_epoch=1,
        key=KEY,
    )
    for _ in range(EPOCHS):
        state, loss = state.step(loss_fn, (X, y))
        state = state.end_of_epoch()
    assert equal(loss, expected["loss"])
    assert equal(state.trainable, expected["trainable"])
    assert equal(state.changing, expected["carried"])
    assert equal(state.budgets, expected["budgets"])
    plain = state.merge()
    assert equal(plain["params"], adapters.merge(expected["params"]))
    half = state.merge(dtype=jnp.bfloat16)["params"]
    assert equal(half, adapters.merge(expected["params"], dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(net.apply(plain, X), state.model(X), atol=1e-5)
    state.save(tmp_path / "adapter")
    loading, loaded = linen.load(net, variables, tmp_path / "adapter", X)
    assert equal(loaded["batch_stats"], state.changing["batch_stats"])
    assert not equal(loaded["batch_stats"], variables["batch_stats"])
    np.testing.assert_array_equal(loading.apply(loaded, X), state.model(X))


def test_random_streams_of_linen():
    """Another key each step and each call; the same for the same state."""
    net = Net(rate=0.5)
    options = {"epochs": 2, "steps_per_epoch": 9, "key": KEY}
    given = net, net.init(KEY, X), CONFIG, optax.sgd(0.0), X
    state = snella.Tuning.create_linen(*given, **options)

    def apart(model, x):
        return jnp.abs(model(x, train=True) - model(x, train=True)).sum()

    first, one = state.step(apart, X)
    _, again = state.step(apart, X)
    _, two = first.step(apart, X)
    assert float(one) == float(again) > 0 and float(two) not in (0, float(one))
    assert equal(state.model(X), state.model(X))

    def updates(model, x):
        return model(x, mutable=["batch_stats"]).sum()

    with pytest.raises(ValueError, match="mutable= in a loss"):
        state.step(updates, X)
    with pytest.raises(TypeError, match="streams='dropout': expected a tuple"):
        snella.Tuning.create_linen(*given, **options, streams="dropout")


def test_adapters_of_linen_drop_whatever_the_modules_streams_are():
    net, rule = Net(), {"path": "parallel", "dropout": 0.5}
    config = dataclasses.replace(CONFIG, **rule)
    given = net, net.init(KEY, X), config, optax.sgd(0.0), X
    state = snella.Tuning.create_linen(
        *given, epochs=2, steps_per_epoch=9, key=KEY, streams=("noise",)
    )

    def total(model, x):
        return model(x).sum()

    following, one = state.step(total, X)
    assert float(one) != float(following.step(total, X)[1])


def test_a_caller_keeps_the_key_of_a_donated_state():
    params, key = {"fc1": jnp.ones((6, 8)), "head": jnp.ones(2)}, jax.random.key(3)
    given = params, CONFIG, optax.sgd(0.1)
    state = snella.Tuning.create_tree(*given, epochs=2, steps_per_epoch=1, key=key)
    jax.jit(lambda state: state, donate_argnums=0)(state)
    assert np.isfinite(jax.random.normal(key))


def test_sketches_of_linen_draw_keys():
    """A step differs from the exact one, and the next draws other rows."""
    config = snella.SnellaConfig(rank=4, targets="fc2", trainable="", sketch=4)
    net = Net()
    state = snella.Tuning.create_linen(
        net,
        net.init(KEY, X),
        config,
        optax.sgd(1.0),
        X,
        epochs=2,
        steps_per_epoch=2,
        key=KEY,
    )
    moved = []
    for _ in range(2):
        after, _ = state.step(loss_fn, (X, jnp.arange(8) % 3))
        moved.append(after.trainable["fc2"]["adapter"]["b"])
        state = after.__class__(**vars(state) | {"steps": after.steps})
    assert not equal(*moved)


def test_a_tree_trains_as_a_loop_of_ones_own():
    """Bit for bit, legacy keys too."""
    params = {"fc1": {"kernel": jnp.ones((6, 8)) / 6}, "head": jnp.ones((8, 2))}
    key = jax.random.PRNGKey(3)
    adapters, adapted = pytree.adapt(params, CONFIG, key=key)
    trainable, budgets, frozen = adapters.partition(adapted)
    tx = optax.chain(snella.track_importance(), TX)
    schedule, opt_state = CONFIG.schedule(48, EPOCHS), tx.init(trainable)

    def loss_of(params, x):
        return jnp.square(jnp.tanh(x @ params["fc1"]["kernel"]) @ params["head"]).mean()

    @jax.jit
    def step(trainable, opt_state, budgets):
        def loss(trainable):
            joined = pytree.join(trainable, budgets, frozen)
            return loss_of(adapters.summed(joined), X)

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value

    state = snella.Tuning.create_tree(
        params, CONFIG, TX, epochs=EPOCHS, steps_per_epoch=1, key=key
    )
    for epoch in range(EPOCHS):
        if epoch:
            budgets, _ = snella.reallocate(budgets, opt_state, schedule(epoch))
        trainable, opt_state, value = step(trainable, opt_state, budgets)
        state, loss = state.step(loss_of, X)
        state = state.end_of_epoch()
        assert equal(loss, value)
    assert equal((state.trainable, state.budgets), (trainable, budgets))
    plain = adapters.merge(pytree.join(trainable, budgets, frozen))
    assert equal(state.merge(), plain)
    assert state.merge(dtype=jnp.bfloat16)["head"].dtype == jnp.bfloat16
    assert equal(state.model["fc1"]["kernel"], plain["fc1"]["kernel"])
    assert params["head"].shape == (8, 2) and sorted(params["fc1"]) == ["kernel"]
