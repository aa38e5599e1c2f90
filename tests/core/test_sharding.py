"""Four fake devices give the numbers of one, and gather no weight to do so."""

import math
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from modules import Doubled, Holder

import snella_jax as snella
from snella_jax import (
    adapted_dense,
    importance,
    kernels,
    linen,
    reallocate,
    threshold,
    track_importance,
)

N, M, BATCH = 24, 40, 8
KERNEL = kernels.mix_k()
CENTRED = kernels.mix_k(centred="both", start="zero")
# How x and w0 lie on a (data, model) mesh.
SHARDINGS = {
    "w0 by outputs": (P("data", None), P(None, "model")),
    "w0 by inputs": (P("data", "model"), P("model", None)),
    "w0 whole": (P("data", None), P(None, None)),
}


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))


def inputs(dtype=jnp.float32):
    """x, w0, factors and a budget, on one device."""
    rng = np.random.default_rng(0)
    x, w0 = rng.normal(size=(BATCH, N)), 0.3 * rng.normal(size=(N, M))
    factors = KERNEL.init(jax.random.key(0), (N, M), rank=8, dtype=dtype)
    factors = jax.tree.map(lambda v: 3 * v + 0.05, factors)
    return jnp.asarray(x, dtype), jnp.asarray(w0, dtype), factors, jnp.int32(300)


def sharded(arrays, specs, mesh):
    """x and w0 as the specs say; the factors and the budget on every device."""
    x, w0, *rest = arrays
    place = (NamedSharding(mesh, spec) for spec in (*specs, P()))
    return [
        jax.device_put(value, where)
        for value, where in zip((x, w0, rest), place, strict=True)
    ]


def value_and_grad(path, sharding=None, kernel=KERNEL):
    def loss(factors, x, w0, budget):
        settings = {"kernel": kernel, "path": path, "sharding": sharding}
        y = adapted_dense(x, w0, factors, budget, **settings)
        return jnp.sin(y).sum(), y

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def gathered(hlo):
    """The number of elements that every all-gather of a program ends up with."""
    lines = [
        line for line in hlo.splitlines() if re.search(r" all-gather(-start)?\(", line)
    ]
    shapes = [
        re.findall(r"\w+\[([\d,]*)\]", re.split(r" all-gather", line)[0])
        for line in lines
    ]
    return [math.prod(map(int, s.split(","))) if s else 1 for ss in shapes for s in ss]


def test_there_are_four_devices():
    """The fake devices of conftest.py, without which this file shows nothing."""
    assert len(jax.devices()) == 4


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


@pytest.mark.parametrize(
    "path, kind, kernel",
    [
        ("merged", AUTO, KERNEL),
        ("parallel", AUTO, KERNEL),
        ("merged", EXPLICIT, KERNEL),
        ("merged", AUTO, CENTRED),
        ("merged", EXPLICIT, CENTRED),
    ],
)
def test_values_and_gradients(path, kind, kernel, x64):
    """The output, the loss and every factor's gradient, to float64's rounding."""
    arrays = inputs(jnp.float64)
    x, w0, factors, budget = arrays
    step = value_and_grad(path, kernel=kernel)
    expected = step(factors, x, w0, budget)
    for name in ("w0 by outputs", "w0 by inputs"):
        of_x, of_w0 = SHARDINGS[name]
        if kind == EXPLICIT:  # which splits no sum by itself
            of_x = P("data", None)
        x, w0, (factors, budget) = sharded(arrays, (of_x, of_w0), mesh(kind))
        got = step(factors, x, w0, budget)
        (_, y), _ = got
        assert len(y.sharding.device_set) == 4
        assert y.sharding.shard_shape(y.shape)[0] == BATCH // 2
        chex.assert_trees_all_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "path, axes, kernel",
    [
        ("merged", mesh(), KERNEL),
        ("parallel", mesh(), KERNEL),
        ("merged", None, KERNEL),
        ("parallel", None, KERNEL),
        ("merged", mesh(), CENTRED),
    ],
    ids=str,
)
def test_no_weight_is_gathered(path, axes, kernel):
    """With w0 sharded by outputs nothing as large as a device's part of it moves.

    None: the mesh that `jax.make_mesh` gives by default, of `Explicit` axes.
    """
    axes = axes or jax.make_mesh((2, 2), ("data", "model"))
    x, w0, (factors, budget) = sharded(inputs(), SHARDINGS["w0 by outputs"], axes)
    step = value_and_grad(path, kernel=kernel)
    hlo = step.lower(factors, x, w0, budget).compile().as_text()
    assert max(gathered(hlo), default=0) < N * M // 2


def test_sharding_argument_splits_the_update():
    """Where w0 is whole, every device would otherwise make all of the update."""
    arrays, axes = inputs(), mesh()
    x, w0, (factors, budget) = sharded(arrays, SHARDINGS["w0 whole"], axes)

    def shapes_made(sharding):
        step = value_and_grad("merged", sharding).lower(factors, x, w0, budget)
        step = step.compile()
        shapes = re.findall(r"f32\[([\d,]+)\]\S* exponential\(", step.as_text())
        return set(shapes), step(factors, x, w0, budget)

    shapes, expected = shapes_made(None)
    assert shapes == {f"{N},{M}"}
    shapes, got = shapes_made(NamedSharding(axes, P(None, "model")))
    assert shapes == {f"{N},{M // 2}"}
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_gather_would_be_seen():
    """The check above can fail: a sort gathers the whole weight."""
    _, w0, _ = sharded(inputs(), SHARDINGS["w0 by outputs"], mesh())
    hlo = jax.jit(lambda w: jnp.sort(w, axis=None)).lower(w0).compile().as_text()
    assert max(gathered(hlo)) >= N * M // 2


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "spec",
    [P("data", "model"), P(None, "model"), P("model", None), P(("data", "model"))],
)
def test_threshold_bit_for_bit(spec, kind, searched):
    """Under both kinds of axes, with counts alone crossing devices."""
    _, delta, *_ = inputs()
    falling = np.append(np.sort(np.abs(delta), axis=None)[::-1], np.float32(0))
    axes = mesh(kind)
    with jax.set_mesh(axes):
        on_mesh = jax.device_put(delta, NamedSharding(axes, spec))
        search = searched.lower(on_mesh, 300).compile()
        for budget in (0, 1, 300, N * M - 1, N * M):
            tau = np.asarray(search(on_mesh, budget))
            assert tau.tobytes() == falling[budget].tobytes()
    hlo = search.as_text()
    assert "all-reduce" in hlo and not gathered(hlo)


@pytest.mark.parametrize("searched", ["accelerator"], indirect=True)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_thresholds_of_a_stack_share_their_reductions(kind, searched):
    """Of three matrices as of one: one reduction a pass."""
    _, delta, *_ = inputs()
    deltas, budgets = jnp.stack([delta, -2 * delta, delta**2]), jnp.array([0, 9, 300])
    axes = mesh(kind)
    with jax.set_mesh(axes):
        on_mesh = jax.device_put(
            deltas, NamedSharding(axes, P(None, None, ("data", "model")))
        )
        search = jax.jit(jax.vmap(searched)).lower(on_mesh, budgets).compile()
        found = search(on_mesh, budgets)
    falling = np.sort(np.abs(np.asarray(deltas)).reshape(3, -1))[:, ::-1]
    np.testing.assert_array_equal(found, falling[np.arange(3), budgets])
    assert search.as_text().count(" all-reduce(") == 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_threshold_over_devices_that_do_not_divide_16(kind):
    """The CPU's way of counting cuts the last axis in 16."""
    delta = np.float32(np.random.default_rng(0).normal(size=(5, 48)))
    axes = jax.make_mesh(
        (3,), ("model",), axis_types=(kind,), devices=jax.devices()[:3]
    )
    with jax.set_mesh(axes):
        on_mesh = jax.device_put(delta, NamedSharding(axes, P(None, "model")))
        tau = np.asarray(jax.jit(threshold)(on_mesh, 7))
    assert tau == np.sort(np.abs(delta), axis=None)[-8]


def test_reallocate_keeps_shardings():
    """A replicated budget and one spread over its stack stay as they are."""
    axes = mesh()

    def factors(*lead):
        return {name: jnp.ones((*lead, 2, 4, 3)) for name in "ab"}

    params = {"blocks": factors(4), "fc1": factors()}
    tx = track_importance()
    state = tx.init(params)
    for scale in (1.0, 2.0, 4.0):
        grads = jax.tree.map(lambda p, s=scale: s * p, params)
        _, state = tx.update(grads, state, params)
    specs = {"blocks": P("data"), "fc1": P()}
    budgets = {
        name: {
            leaf: jax.device_put(
                jnp.full(lead, 16 * (leaf == "budget"), jnp.int32),
                NamedSharding(axes, specs[name]),
            )
            for leaf in ("budget", "allocated_at")
        }
        for name, lead in {"blocks": (4,), "fc1": ()}.items()
    }
    new, report = reallocate(budgets, state, 40)
    assert report.budgets.tolist() == [8] * 5
    np.testing.assert_array_equal(new["blocks"]["budget"], 8)
    np.testing.assert_array_equal(new["blocks"]["allocated_at"], 3)
    chex.assert_trees_all_equal_structs(new, budgets)
    for old_leaf, new_leaf in zip(*map(jax.tree.leaves, (budgets, new)), strict=True):
        assert new_leaf.sharding == old_leaf.sharding


def test_importance_of_sharded_factors():
    """Scores are those of one device, and every device has them."""
    rng = np.random.default_rng(0)
    axes, tx = mesh(), track_importance()
    params, *grads = (
        {"fc1": {name: jnp.float32(rng.normal(size=(2, 8, 4))) for name in "ab"}}
        for _ in range(4)
    )

    def scores(place):
        step, theta = jax.jit(tx.update), place(params)
        state = tx.init(theta)
        for grad in grads:
            _, state = step(place(grad), state, theta)
        return importance(state)["fc1"]

    by_rows = NamedSharding(axes, P(None, "model", None))
    on_mesh = scores(lambda tree: jax.device_put(tree, by_rows))
    np.testing.assert_allclose(on_mesh, scores(lambda tree: tree), rtol=1e-6)
    assert on_mesh.is_fully_replicated


@pytest.mark.parametrize("differentiate", ["outside", "inside"])
@pytest.mark.parametrize("path", ["merged", "parallel"])
def test_shard_map_over_examples_gives_the_same_gradients(path, differentiate):
    """Replicated weights, examples over 4 devices, JAX's checks of types on."""
    x, w0, factors, budget = inputs()

    def loss(factors, w0, x):
        y = adapted_dense(x, w0, factors, budget, kernel=KERNEL, path=path)
        return jnp.sin(y).sum()

    def gradients(loss):
        return jax.grad(loss, (0, 1))

    devices = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def manual(body):
        specs = (P(), P(), P("data"))
        return jax.shard_map(body, mesh=devices, in_specs=specs, out_specs=P())

    if differentiate == "outside":
        sharded = gradients(
            manual(lambda *arguments: jax.lax.psum(loss(*arguments), "data"))
        )
    else:  # JAX adds the gradients of replicated arrays up by itself
        sharded = manual(gradients(loss))
    got, expected = (jax.jit(f)(factors, w0, x) for f in (sharded, gradients(loss)))
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


def biased(layer):
    """A layer whose bias is not 0."""
    layer.bias[...] = jax.random.normal(jax.random.key(3), layer.bias.shape)
    return Holder(layer)


class Tanh(nn.Dense):
    """A call of its own, of which nothing is known."""

    def __call__(self, x):
        return jnp.tanh(super().__call__(x))


def of_linen(layer):
    """`loss(trainable, frozen, x)` of an adapted Linen layer, and the first two."""
    net = nn.Sequential([layer, nn.Dense(4)])
    variables = net.init(jax.random.key(0), X)
    bias = variables["params"]["layers_0"]["bias"]
    variables["params"]["layers_0"]["bias"] = bias + 0.3
    config = snella.SnellaConfig(rank=4, targets="layers_0", trainable=".*/bias")
    key = jax.random.key(1)
    adapters, params = linen.adapt(net, variables, config, X, key=key)
    trainable, budgets, frozen = adapters.partition(params)

    def loss(trainable, frozen, x):
        params = linen.join(trainable, budgets, frozen)
        return jnp.sin(adapters.apply({"params": params}, x)).sum()

    return loss, trainable, frozen


def of_nnx(layer, trainable="layer/bias", **changes):
    settings = {"rank": 4, "targets": "layer", "trainable": trainable} | changes
    config = snella.SnellaConfig(**settings)
    model = snella.adapt(biased(layer), config, rngs=nnx.Rngs(1))
    graphdef, trainable, budgets, frozen = snella.partition(model)

    def loss(trainable, frozen, x):
        model = nnx.merge(graphdef, trainable, budgets, frozen, copy=True)
        return sum(jnp.sin(y).sum() for y in jax.tree.leaves(model(x)))

    return loss, trainable, frozen


class Pair(nnx.Linear):
    """Returns more than an array, with a bias that is closed over."""

    def __call__(self, x):
        y = super().__call__(x)
        return y, y**2


X = np.random.default_rng(5).normal(size=(8, 8)).astype(np.float32)
RNGS = nnx.Rngs(0)
LAYERS = {
    "Linen": lambda: of_linen(nn.Dense(6)),
    "own call in Linen": lambda: of_linen(Tanh(6)),
    "Linear": lambda: of_nnx(nnx.Linear(8, 4, rngs=RNGS)),
    "frozen bias": lambda: of_nnx(nnx.Linear(8, 4, rngs=RNGS), trainable=""),
    "parallel": lambda: of_nnx(
        nnx.Linear(8, 4, rngs=RNGS),
        path="parallel",
        gate="hard",
        kernel=kernels.mix_k(centred="both"),
    ),
    "heads": lambda: of_nnx(nnx.LinearGeneral(8, (2, 2), rngs=RNGS)),
    "einsum": lambda: of_nnx(nnx.Einsum("bi,io->bo", (8, 4), (4,), rngs=RNGS)),
    "own call": lambda: of_nnx(Doubled(8, 4, rngs=RNGS)),
    "a tuple": lambda: of_nnx(Pair(8, 4, rngs=RNGS)),
}


@pytest.mark.parametrize("differentiate", ["outside", "inside"])
@pytest.mark.parametrize("layer", LAYERS)
def test_shard_map_with_a_bias(layer, differentiate):
    """Closed-over arrays do not vary over the mesh, and their gradients add up."""
    loss, trainable, frozen = LAYERS[layer]()
    devices = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def manual(body, out):
        specs = (P(), P(), P("data"))
        return jax.shard_map(body, mesh=devices, in_specs=specs, out_specs=out)

    def gradients(loss):
        return jax.grad(loss, (0, 2))

    if differentiate == "outside":
        sharded = gradients(
            manual(lambda *arguments: jax.lax.psum(loss(*arguments), "data"), P())
        )
    else:
        sharded = manual(gradients(loss), (P(), P("data")))
    arguments = trainable, frozen, X
    got, expected = (jax.jit(f)(*arguments) for f in (sharded, gradients(loss)))
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)
    assert all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(expected[0]))
