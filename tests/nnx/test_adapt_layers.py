"""Adapted NNX layers: what every kind computes, its gradients, masks and merging."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import called, gradient
from flax import nnx
from modules import Doubled, Holder
from oracles import oracle_deltas

import snella_jax as snella
from snella_jax.nnx.selection import adapted_layers

RANK = 4


class Stack(nnx.Module):
    """Three blocks of one Linear, stacked, run by `lax.scan`."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def build(rngs):
            return nnx.Linear(6, 6, rngs=rngs)

        self.blocks = build(rngs)

    def __call__(self, x):
        graphdef, state = nnx.split(self.blocks)

        def body(x, layer):
            return jnp.tanh(nnx.merge(graphdef, layer)(x)), None

        return jax.lax.scan(body, x, state)[0]


def experts(deltas):  # [E, n, m], the kernel's own order
    return deltas


# build(rngs), shape of x, (n, m), from [*lead, n, m] to the kernel's shape, options
LAYERS = {
    "linear": (
        lambda r: nnx.Linear(6, 5, rngs=r), (3, 6), (6, 5), lambda d: d, {},
    ),
    "linear_no_bias": (
        lambda r: nnx.Linear(6, 5, use_bias=False, rngs=r), (2, 3, 6), (6, 5),
        lambda d: d, {},
    ),
    "own_subclass": (
        lambda r: Doubled(6, 5, rngs=r), (3, 6), (6, 5), lambda d: d, {},
    ),
    "fused_qkv": (
        lambda r: nnx.Linear(6, 12, rngs=r), (3, 6), (6, 4),
        lambda d: np.concatenate(list(d), axis=1), {"split": 3},
    ),
    "heads_out": (
        lambda r: nnx.LinearGeneral(6, (2, 3), rngs=r), (3, 6), (6, 6),
        lambda d: d.reshape(6, 2, 3), {},
    ),
    "heads_in": (
        lambda r: nnx.LinearGeneral((2, 3), 5, axis=(-2, -1), rngs=r), (4, 2, 3),
        (6, 5), lambda d: d.reshape(2, 3, 5), {},
    ),
    "batched": (
        lambda r: nnx.LinearGeneral(4, 5, batch_axis={0: 3}, rngs=r), (3, 2, 4),
        (4, 5), experts, {},
    ),
    "qkv_on_an_axis": (
        lambda r: nnx.LinearGeneral(6, (3, 2, 2), rngs=r), (4, 6), (6, 4),
        lambda d: np.stack([part.reshape(6, 2, 2) for part in d], axis=1),
        {"split": 3},
    ),
    "einsum_heads": (
        lambda r: nnx.Einsum("BTD,HDd->BTHd", (2, 6, 3), (2, 3), rngs=r), (2, 3, 6),
        (6, 6), lambda d: d.reshape(6, 2, 3).transpose(1, 0, 2), {},
    ),
    "einsum_experts": (
        lambda r: nnx.Einsum("...EC,ECF->...EF", (3, 4, 5), rngs=r), (2, 3, 4),
        (4, 5), experts, {},
    ),
    "einsum_qkv": (
        lambda r: nnx.Einsum("BTD,SHDd->SBTHd", (3, 2, 6, 2), rngs=r), (2, 3, 6),
        (6, 4),
        lambda d: np.stack([p.reshape(6, 2, 2).transpose(1, 0, 2) for p in d]),
        {"split": 3},
    ),
    "conv": (
        lambda r: nnx.Conv(3, 4, (2, 2), strides=2, rngs=r), (2, 6, 6, 3), (12, 4),
        lambda d: d.reshape(2, 2, 3, 4), {},
    ),
    "conv_groups": (
        lambda r: nnx.Conv(4, 6, (3,), padding="CAUSAL", feature_group_count=2, rngs=r),
        (2, 5, 4), (6, 6), lambda d: d.reshape(3, 2, 6), {},
    ),
}  # fmt: skip


def adapt_layer(name, **options):
    build, shape, nm, assemble, own = LAYERS[name]
    model = Holder(build(nnx.Rngs(0)))
    config = snella.SnellaConfig(
        rank=RANK, targets="layer", trainable="", initial_density=0.4,
        **{**own, **options},
    )  # fmt: skip
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    return model, snella.adapt(model, config, rngs=nnx.Rngs(2)), x, nm, assemble


EVERY_LAYER_AND_PATH = [
    (name, path)
    for name in LAYERS
    for path in ("merged", "parallel")
    if (name, path) != ("own_subclass", "parallel")  # refused, see test_adapt
]


@pytest.mark.parametrize(("name", "path"), EVERY_LAYER_AND_PATH)
def test_layer_computes_with_w0_plus_delta(name, path):
    plain, model, x, (n, m), assemble = adapt_layer(name, path=path)
    grow(model)
    delta = assemble(oracle_deltas(model.layer.adapter, n, m))
    assert delta.shape == plain.layer.kernel.shape
    assert 0 < np.count_nonzero(delta) < delta.size and np.abs(delta).max() > 0.1
    change(plain.layer.kernel, lambda w: w + np.float32(delta))
    outputs = called(model, x), called(plain, x)
    np.testing.assert_allclose(*outputs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("name", "path"), EVERY_LAYER_AND_PATH)
def test_merge_gives_a_plain_layer_with_the_same_outputs(name, path):
    plain, model, x, _, _ = adapt_layer(name, path=path)
    grow(model)
    merged = snella.merge(model, unmoved_budgets=True)
    assert type(merged.layer) is type(plain.layer)
    assert nnx.graphdef(merged) == nnx.graphdef(plain)
    base, adapted, outputs = (called(m, x) for m in (plain, model, merged))
    assert np.abs(np.subtract(outputs, base)).max() > 1e-2  # the update matters
    np.testing.assert_allclose(outputs, adapted, rtol=1e-5, atol=1e-5)


def change(variable, how):
    """By NumPy, which compiles nothing."""
    variable.set_value(jnp.asarray(how(np.asarray(variable[...]))))


def grow(model):
    """Makes the factors 30 times larger: an update that rivals the weights."""
    for _, layer in adapted_layers(model):
        for name in ("a", "b"):
            change(getattr(layer.adapter, name), lambda factor: 30 * factor)


@pytest.mark.parametrize("name", LAYERS)
def test_every_factor_gets_a_gradient_and_nothing_else(name):
    _, model, x, _, _ = adapt_layer(name)
    grads = gradient(model, x)
    paths = {path[-1] for path, _ in nnx.to_flat_state(grads)}
    assert paths == {"a", "b", "alpha", "beta", "piece_coeff"}
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_flax_attention_is_adapted_in_place():
    attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    config = snella.SnellaConfig(
        rank=RANK, targets="query|key|value|out", trainable="", target_density=1.0
    )
    model = snella.adapt(attention, config, rngs=nnx.Rngs(1))
    assert [path for path, _ in adapted_layers(model)] == [
        "key",
        "out",
        "query",
        "value",
    ]
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    merged, adapted, base = (
        called(m, x) for m in (snella.merge(model), model, attention)
    )
    np.testing.assert_allclose(merged, adapted, rtol=1e-5, atol=1e-5)
    assert np.abs(np.subtract(adapted, base)).max() > 0


def test_stacked_blocks_have_an_adapter_each_and_scan():
    model = snella.adapt(Stack(nnx.Rngs(0)), STACKED, rngs=nnx.Rngs(1))
    adapter = model.blocks.adapter
    assert adapter.a.shape == (3, 2, 6, RANK // 2)
    assert adapter.alpha.shape == adapter.budget.shape == (3,)
    assert not np.allclose(adapter.a[0], adapter.a[1])
    grow(model)
    x = jax.random.normal(jax.random.key(0), (2, 6))
    h = np.asarray(x, np.float64)
    deltas = oracle_deltas(adapter, 6, 6)
    for i in range(3):
        w = np.asarray(model.blocks.kernel[i], np.float64) + deltas[i]
        h = np.tanh(h @ w + np.asarray(model.blocks.bias[i]))
    merged = snella.merge(model, unmoved_budgets=True)
    for each in (model, merged):
        np.testing.assert_allclose(called(each, x), h, rtol=1e-4, atol=1e-5)


STACKED = snella.SnellaConfig(
    rank=RANK, targets="blocks", trainable="", initial_density=0.5
)


def test_adapt_leaves_the_model_alone_and_shares_its_arrays():
    model = Stack(nnx.Rngs(0))
    before = nnx.graphdef(model)
    adapted = snella.adapt(model, STACKED, rngs=nnx.Rngs(1))
    assert nnx.graphdef(model) == before
    assert adapted.blocks.kernel[...] is model.blocks.kernel[...]
    assert type(model.blocks.kernel) is nnx.Param
    assert type(adapted.blocks.kernel) is snella.Frozen


def test_merged_magnitude_is_the_mean_of_every_matrix():
    model = snella.adapt(Stack(nnx.Rngs(0)), STACKED, rngs=nnx.Rngs(1))
    expected = np.abs(oracle_deltas(model.blocks.adapter, 6, 6)).mean((1, 2))
    found = snella.merged_magnitude(model)
    assert list(found) == ["blocks/adapter"]
    np.testing.assert_allclose(found["blocks/adapter"], expected, rtol=1e-4)


def dropping(**options):
    config = snella.SnellaConfig(
        rank=RANK, targets="blocks", trainable="", target_density=1.0, path="parallel",
        gate="hard", **options,
    )  # fmt: skip
    model = Stack(nnx.Rngs(0))
    # Three equal layers without a base: what differs between them is the mask.
    model = snella.adapt(model, config, rngs=nnx.Rngs(1))
    adapter = model.blocks.adapter
    for name in adapter.names:
        value = getattr(adapter, name)
        change(value, lambda v: np.broadcast_to(v[0], v.shape))
    return model


@pytest.mark.parametrize("rate", ["dropout", "drop_path"])
def test_masks_differ_between_steps_and_layers_and_repeat_with_the_key(rate):
    model = dropping(**{rate: 0.5})
    x = jnp.ones((32, 6))

    @jax.jit
    def updates(key):
        seeded = nnx.clone(model)
        snella.seed(seeded, key)
        graphdef, state = nnx.split(seeded.blocks)
        base, branch = nnx.split(snella.merge(seeded).blocks)

        def body(_, layers):
            layer, plain = layers
            plain = nnx.merge(base, plain)
            w0 = nnx.merge(graphdef, layer).kernel[...]
            return None, nnx.merge(graphdef, layer)(x) - x @ w0 - plain.bias[...]

        return jax.lax.scan(body, None, (state, branch))[1]  # [layer, example, 6]

    first, again, second = (updates(jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, second, atol=1e-6)
    assert not np.allclose(first[0], first[1], atol=1e-6)
    assert not np.allclose(first[1], first[2], atol=1e-6)


def test_a_model_that_was_seeded_before_is_traced_once():
    """By `nnx.jit`, given the model itself: its keys are there from then on."""
    model, traces = dropping(dropout=0.5), []
    x = jnp.ones((4, 6))

    @nnx.jit
    def step(model, key):
        traces.append(key)
        snella.seed(model, key)
        return model(x)

    snella.seed(model, jax.random.key(9))
    first, second = (step(model, jax.random.key(k)) for k in (0, 1))
    assert len(traces) == 1 and not np.allclose(first, second, atol=1e-6)


def test_masks_agree_between_forward_and_recompute():
    """The gradient is the output's: central differences with the same key."""
    model = dropping(dropout=0.5, drop_path=0.3)
    graphdef, trainable, budgets, frozen = snella.partition(model)
    x = jax.random.normal(jax.random.key(5), (16, 6))

    @jax.jit
    def loss(trainable):
        seeded = nnx.merge(graphdef, trainable, budgets, frozen)
        snella.seed(seeded, jax.random.key(3))
        return jnp.sum(seeded(x) * x)

    grads = jax.grad(loss)(trainable)
    direction = jax.tree.map(
        lambda v: jax.random.normal(jax.random.key(7), v.shape), trainable
    )
    slope = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, grads, direction)))
    h = 2e-3
    ahead, behind = (
        loss(jax.tree.map(lambda v, d, s=sign: v + s * h * d, trainable, direction))
        for sign in (1, -1)
    )
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * h), rtol=2e-3)


def test_training_without_a_key_raises_and_evaluation_does_not():
    model = dropping(dropout=0.5)
    with pytest.raises(ValueError, match=r"snella\.seed\(model, key\)"):
        model(jnp.ones((2, 6)))
    model.eval()
    x = jnp.ones((2, 6))
    outputs = called(model, x), called(snella.merge(model), x)
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)


class Biased(nnx.Linear):
    """A call of its own that needs its bias."""

    def __call__(self, x):
        return x @ self.kernel[...] + self.bias[...]


def test_the_merged_path_calls_a_layer_as_it_is():
    class Holds(nnx.Module):
        def __init__(self, rngs):
            self.fc = Biased(6, 6, rngs=rngs)

        def __call__(self, x):
            return self.fc(x)

    config = snella.SnellaConfig(rank=RANK, targets="fc", trainable="")
    model = snella.adapt(Holds(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    x = jnp.ones((2, 6))
    merged = snella.merge(model, unmoved_budgets=True)
    np.testing.assert_allclose(model(x), merged(x), rtol=1e-5, atol=1e-6)
