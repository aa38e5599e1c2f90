"""Sketching adapters of NNX models: keys, what is kept, and what is refused."""

import collections
import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from modules import Doubled, Holder
from tiny import TINY

import snella_jax as snella
from snella_jax.models.vit import ViT

KEY = jax.random.key(3)
CONFIG = snella.SnellaConfig(rank=4, sketch=4)
PLAIN = dataclasses.replace(TINY, image_size=16, dtype=jnp.float32)
BATCH, ROWS = 3, 17  # 4 x 4 patches and the class token, of which 5 are kept


def model_of(config=CONFIG, **options):
    """A tiny ViT with adapters of which none is where it started."""
    model = ViT(dataclasses.replace(PLAIN, **options), rngs=nnx.Rngs(0))
    model.head.kernel[...] = jax.random.normal(jax.random.key(1), (8, 3))
    return snella.adapt(model, config, rngs=nnx.Rngs(1))


def loss_of(model):
    """Its parts, and the loss as a function of what trains, images and a key."""
    graphdef, trainable, *rest = snella.partition(model)

    def loss(trainable, images, key):
        seeded = nnx.merge(graphdef, trainable, *rest, copy=True)
        if key is not None:
            snella.seed(seeded, key)
        return (seeded(images) ** 2).sum()

    return trainable, loss


IMAGES = jax.random.normal(jax.random.key(2), (BATCH, 16, 16, 1))


@pytest.mark.parametrize("stacked", [False, True], ids=["unrolled", "scanned"])
def test_layers_that_read_one_array_keep_one_sketch(stacked):
    """A block keeps those of queries, keys and values; of out, of fc1 and of fc2."""
    trainable, loss = loss_of(model_of(stacked=stacked, dtype=jnp.bfloat16))
    _, back = jax.vjp(lambda t: loss(t, IMAGES, KEY), trainable)
    leaves = jax.tree.leaves(back)
    rows = 5
    kept = collections.Counter(
        leaf.shape[-1] for leaf in leaves if leaf.shape[-3:-1] == (BATCH, rows)
    )
    blocks = 1 if stacked else PLAIN.depth
    assert kept == {8: 3 * blocks, 32: blocks}


def test_rematerialised_blocks_have_the_same_gradients():
    """Another key gives others; what has no adapter has those of the exact layers."""
    targets = "blocks/.*/(query|key|fc1)"  # two that share a sketch, and one alone
    own = dataclasses.replace(CONFIG, targets=targets)
    trainable, loss = loss_of(model_of(own))
    again = loss_of(model_of(own, remat="blocks"))[1]
    plain = loss_of(model_of(dataclasses.replace(own, sketch=1)))[1]
    gradient = jax.jit(jax.grad(loss))
    got, other = (gradient(trainable, IMAGES, key) for key in jax.random.split(KEY, 2))
    same = jax.jit(jax.grad(again))(trainable, IMAGES, jax.random.split(KEY, 2)[0])
    exact = jax.jit(jax.grad(plain))(trainable, IMAGES, None)
    chex.assert_trees_all_close(got, same, rtol=1e-3, atol=1e-4)
    for draw in (other, exact):
        factor = [g["blocks"]["mlp"]["fc1"]["adapter"]["a"][...] for g in (got, draw)]
        assert np.abs(factor[0] - factor[1]).max() > 1e-3
        chex.assert_trees_all_close(draw["head"], exact["head"], rtol=1e-4, atol=1e-4)


class Pair(nnx.Module):
    """Two layers without a base, equal factors and one input, or two inputs."""

    def __init__(self, rngs):
        self.one, self.two = (nnx.Linear(6, 6, rngs=rngs) for _ in range(2))

    def __call__(self, x, y):
        return self.one(x), self.two(y)


def drawn_rows(model, x, y, key):
    """Rows of `x` and of `y` that reach the factors' gradients."""

    def kept(cotangents):
        seeded = nnx.clone(model)
        snella.seed(seeded, key)
        graphdef, trainable, *rest = snella.partition(seeded)
        call = lambda t: nnx.merge(graphdef, t, *rest)(x, y)  # noqa: E731
        _, back = jax.vjp(call, trainable)
        return back(cotangents)[0]

    def of_row(i):
        g = jnp.zeros((*x.shape[:-1], 6)).at[:, i].set(1)
        found = kept((g, g))
        return [jnp.abs(found[n]["adapter"]["a"]).sum() > 0 for n in ("one", "two")]

    return np.array(jax.jit(jax.vmap(of_row))(jnp.arange(x.shape[1])))


def test_one_input_has_one_draw_and_others_have_their_own():
    config = snella.SnellaConfig(
        rank=4, targets="one|two", trainable="", target_density=1.0, sketch=4
    )
    model = snella.adapt(Pair(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    x, y = (jax.random.normal(jax.random.key(i), (1, 64, 6)) for i in (5, 6))
    first, second = drawn_rows(model, x, x, KEY)
    np.testing.assert_array_equal(first, second)
    assert first.sum() == 16
    own, other = drawn_rows(model, x, y, KEY)
    np.testing.assert_array_equal(own, first)
    assert other.sum() == 16 and (own != other).any()
    step = drawn_rows(model, x, x, jax.random.key(7))[0]
    assert (step != first).any()


def test_one_trace_trains_a_layer_that_is_called_twice():
    """Twice on one input its gradient is twice that of a call; each step has a key."""
    layer = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
    config = snella.SnellaConfig(rank=4, targets="layer", trainable="", sketch=4)
    model = snella.adapt(Holder(layer), config, rngs=nnx.Rngs(1))
    snella.seed(model, KEY)
    optimizer = nnx.Optimizer(model, optax.sgd(0.0), wrt=snella.Factor)
    x = jax.random.normal(KEY, (2, 16, 6))
    traces = []

    @nnx.jit
    def step(model, optimizer, key):
        traces.append(key)
        snella.seed(model, key)

        def gradient(calls):
            def loss(model):
                return sum((x[::-1] * model(x)).sum() for _ in range(calls))

            return nnx.grad(loss, argnums=nnx.DiffState(0, snella.Factor))(model)

        one, two = gradient(1), gradient(2)
        optimizer.update(model, two)
        return [g["layer"]["adapter"]["a"][...] for g in (one, two)]

    (one, two), (other, _) = (step(model, optimizer, k) for k in jax.random.split(KEY))
    assert len(traces) == 1
    np.testing.assert_allclose(two, 2 * one, rtol=1e-4, atol=1e-5)
    assert np.abs(one - other).max() > 1e-2


def test_training_without_a_key_raises_and_evaluation_is_exact():
    model = model_of()
    with pytest.raises(ValueError, match=r"sketch=4 was called in training without"):
        model(IMAGES)
    model.eval()
    exact = model_of(snella.SnellaConfig(rank=4))
    programs = []
    for own in (model, exact):
        trainable, loss = loss_of(own)
        program = jax.make_jaxpr(lambda t, f=loss: f(t, IMAGES, None))(trainable)
        programs.append(str(program))
    assert programs[0] == programs[1]


def test_heads_side_by_side():
    """Weights of several input axes, as the projection behind an attention has."""
    layer = nnx.LinearGeneral((2, 3), 6, axis=(-2, -1), rngs=nnx.Rngs(0))
    config = snella.SnellaConfig(rank=4, targets="layer", trainable="", sketch=4)
    model = snella.adapt(Holder(layer), config, rngs=nnx.Rngs(1))
    x = jax.random.normal(KEY, (2, 9, 2, 3))
    graphdef, trainable, *rest = snella.partition(model)

    def call(x, trainable):
        seeded = nnx.merge(graphdef, trainable, *rest, copy=True)
        snella.seed(seeded, KEY)
        return seeded(x)

    y, back = jax.vjp(call, x, trainable)
    sizes = {leaf.size for leaf in jax.tree.leaves(back) if hasattr(leaf, "size")}
    assert 2 * 3 * 6 in sizes and x.size not in sizes
    plain = snella.merge(model, unmoved_budgets=True)
    _, dense = jax.vjp(plain, x)
    g = jax.random.normal(jax.random.key(4), y.shape)
    np.testing.assert_allclose(back(g)[0], dense(g)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        lambda r: nnx.Conv(6, 4, (3,), rngs=r),
        lambda r: nnx.Einsum("btn,nm->btm", (6, 4), rngs=r),
        lambda r: Doubled(6, 4, rngs=r),
        lambda r: nnx.LinearGeneral(6, 4, axis=0, rngs=r),
        lambda r: nnx.LinearGeneral(6, 4, batch_axis={0: 2}, rngs=r),
        lambda r: nnx.Linear(6, 4, dot_general=lambda *a, **k: None, rngs=r),
    ],
)
def test_layers_that_need_not_multiply_rows_are_refused(layer):
    model = Holder(layer(nnx.Rngs(0)))
    config = snella.SnellaConfig(rank=4, targets="layer", trainable="", sketch=4)
    with pytest.raises(ValueError, match=r"layer cannot be .*sketch=4 .*overrides"):
        snella.adapt(model, config, rngs=nnx.Rngs(1))
    without = dataclasses.replace(config, overrides={"layer": {"sketch": 1}})
    snella.adapt(model, without, rngs=nnx.Rngs(1))


def test_a_sketch_is_no_part_of_an_adapters_file(tmp_path):
    """It changes how the next one trains, not what was learnt."""
    base = ViT(PLAIN, rngs=nnx.Rngs(0))
    fused = dataclasses.replace(CONFIG, implementation="pallas")  # nor is that
    for config, folder in ((fused, "few"), (snella.SnellaConfig(rank=4), "all")):
        snella.save(snella.adapt(base, config, rngs=nnx.Rngs(1)), tmp_path / folder)
    few, every = (tmp_path / f / "adapter_config.json" for f in ("few", "all"))
    assert few.read_bytes() == every.read_bytes()
    loaded = snella.load(base, tmp_path / "few")
    assert loaded.blocks.mlp.fc1.adapter.rule.sketch == 1
