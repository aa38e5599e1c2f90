"""Parameters of the Linen zoo as mere dicts, through functions that take them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from zoo.linen_models import CLASSES, ZOO, D

import snella_jax as snella
from snella_jax import Layout, linen, pytree
from snella_jax.adapters.tree import name_of

LABELS = jnp.arange(8) % CLASSES
BEHIND = Layout((D,), (D,), (D,), order=(1, 0, 2))  # layers behind the inputs
MEMBERS = {
    "decoder": ("attn/.*|mlp/.*", ZOO["decoder"].layouts),
    "scan_axis_1": ("layers/w.", {"layers/w.": BEHIND}),
}


def flat(tree):
    return {"/".join(k): np.asarray(v) for k, v in flatten_dict(tree).items()}


@functools.cache
def run(name):
    """The base, adapters, and parameters after 20 steps."""
    member, (targets, layouts) = ZOO[name], MEMBERS[name]
    base = jax.jit(member.module.init)(jax.random.key(0), member.inputs)["params"]
    config = snella.SnellaConfig(
        rank=4, target_density=0.5, targets=targets, trainable="head"
    )
    adapters, params = pytree.adapt(
        base, config, key=jax.random.key(1), layouts=layouts
    )
    trainable, budgets, frozen = adapters.partition(params)
    tx = optax.chain(
        snella.track_importance(), optax.adamw(1e-2, mask=snella.decay_mask)
    )
    state = tx.init(trainable)

    traces = []

    @jax.jit
    def step(trainable, state, budgets):
        traces.append(None)

        def loss(trainable):
            plain = adapters.summed(pytree.join(trainable, budgets, frozen))
            logits = member.module.apply({"params": plain}, member.inputs)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
            return losses.mean()

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    losses = []
    for index in range(20):
        if index == 10:
            total = sum(w.w0.size for w in adapters.weights(params)) // 2
            budgets, report = snella.reallocate(budgets, state, total)
            assert report.budgets.sum() == total
        trainable, state, value = step(trainable, state, budgets)
        losses.append(float(value))
    assert losses[-1] < losses[0] and len(traces) == 1
    return nn.meta.unbox(base), adapters, pytree.join(trainable, budgets, frozen)


@pytest.mark.parametrize("name", MEMBERS)
def test_what_was_frozen_is_and_merged_equals_adapted(name):
    base, adapters, params = run(name)
    first, now, merged = flat(base), flat(params), flat(adapters.merge(params))
    adapted = {name_of(key) for key in adapters.sites}
    assert adapted == set(ZOO[name].place)
    for key, value in first.items():
        trains = key.startswith("head")
        assert (now[key] != value).any() == trains, key
        assert (merged[key] != value).any() == (trains or key in adapted), key
    assert sum(m.moved for m in snella.sparsity(adapters.weights(params))) > 0
    member = ZOO[name]
    apply = jax.jit(member.module.apply)
    found = apply({"params": adapters.summed(params)}, member.inputs)
    expected = apply({"params": adapters.merge(params)}, member.inputs)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", MEMBERS)
def test_an_adapter_from_a_file_is_the_one_that_was_saved(name, tmp_path):
    base, adapters, params = run(name)
    adapters.save(params, tmp_path / "a")
    again, loaded = pytree.load(base, tmp_path / "a", layouts=MEMBERS[name][1])
    assert again.sites == adapters.sites
    expected, found = flat(params), flat(loaded)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)


def test_linen_computes_the_same_with_an_adapter_of_a_dict(tmp_path):
    base, adapters, params = run("decoder")
    member = ZOO["decoder"]
    adapters.save(params, tmp_path / "a")
    again, loaded = linen.load(
        member.module,
        {"params": base},
        tmp_path / "a",
        member.inputs,
        layouts=member.layouts,
    )
    found = jax.jit(again.apply)(loaded, member.inputs)
    merged = {"params": adapters.merge(params)}
    expected = jax.jit(member.module.apply)(merged, member.inputs)
    np.testing.assert_allclose(found, expected, atol=1e-5)
