"""Several thresholds in one search, and what a block's layers are merged with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import snella_jax as snella
from snella_jax.nnx.together import merge_together
from snella_jax.ops import threshold as ops


@pytest.mark.parametrize("searched", ["usual", "accelerator"])
def test_thresholds_of_many_are_those_of_each(searched, x64):
    rng = np.random.default_rng(0)
    deltas = [
        np.float32(rng.normal(size=(6, 10))),
        rng.normal(size=(2, 3, 5)),
        jnp.asarray(rng.normal(size=(2, 4, 4)), jnp.bfloat16),
    ]
    budgets = [7, jnp.array([0, 15]), jnp.array([3, 16])]
    if searched == "usual":
        found = ops.thresholds(deltas, budgets)
        assert [tau.dtype for tau in found] == ["float32", "float64", "bfloat16"]
    else:
        wide = [jnp.asarray(d, jnp.float64) for d in deltas]
        counts = [jnp.asarray(b, jnp.int32) for b in budgets]
        bits = ops._searches(4, ops._count)(wide, counts)
        found = [jax.lax.bitcast_convert_type(low, jnp.float64) for low in bits]
    for delta, budget, tau in zip(deltas, budgets, found, strict=True):
        rows = np.abs(np.float64(delta)).reshape(*np.shape(budget), -1)
        falling = -np.sort(-np.append(rows, np.zeros_like(rows[..., :1]), -1))
        places = np.asarray(budget)[..., None]
        expected = np.take_along_axis(falling, places, -1)[..., 0]
        np.testing.assert_array_equal(np.float64(tau), expected)


def test_counts_of_many_cross_devices_in_one_loop():
    axes = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    where = NamedSharding(axes, P(None, "x"))
    deltas = [jnp.ones(s, device=where) for s in ((4, 8), (8, 16), (2, 4))]
    search = jax.jit(lambda *d: ops._searches(4, ops._count)(d, [jnp.int32(3)] * 3))
    assert search.lower(*deltas).compile().as_text().count(" while(") == 1


class Block(nnx.Module):
    def __init__(self, rngs):
        self.qkv = nnx.Linear(8, 24, rngs=rngs)
        self.up = nnx.LinearGeneral(8, (2, 6), rngs=rngs)
        self.down = nnx.Linear(12, 8, rngs=rngs)
        self.plain = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        q, k, v = jnp.split(self.qkv(x), 3, -1)
        x = self.plain(q * k + jnp.sin(v))
        return self.down(jnp.tanh(self.up(x)).reshape(len(x), -1))


@pytest.mark.parametrize(
    "kernel, gate", [("mix_k", "product"), ("rbf", "soft"), ("mix_k", "none")]
)
def test_a_block_merged_together_is_the_adapted_block(kernel, gate):
    """Its output and the gradients of its factors; one layer is left as it is."""
    config = snella.SnellaConfig(
        rank=4, kernel=kernel, gate=gate, targets="qkv|up|down|plain", trainable="",
        overrides={"qkv": {"split": 3}, "plain": {"path": "parallel"}},
        target_density=1.0 if gate == "none" else 0.3,
    )  # fmt: skip
    model = snella.adapt(Block(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    for path, value in nnx.to_flat_state(nnx.state(model, snella.Budget)):
        if path[-1] == "budget":
            value[...] = value[...] // 3
    graphdef, trainable, rest = nnx.split(model, nnx.Param, ...)
    x, placed = np.random.default_rng(1).normal(size=(4, 8)), []

    def loss(trainable, together):
        block = nnx.merge(graphdef, trainable, rest, copy=True)
        if together:
            merge_together(block, lambda path, w: (placed.append(path), w)[1])
            assert type(block.qkv) is nnx.Linear and type(block.plain) is not nnx.Linear
        y = block(jnp.float32(x))
        return jnp.sin(y).sum(), y

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    found, expected = step(trainable, True), step(trainable, False)
    assert sorted(placed) == ["down", "qkv", "up"]
    for got, own in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(got, own, rtol=1e-5, atol=1e-6)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(expected[1]))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_a_layer_whose_input_decides_its_dtype_is_left_as_it_is(dtype):
    made = {"dtype": dtype, "param_dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
    block = nnx.Dict(fc=nnx.Linear(4, 6, **made))
    config = snella.SnellaConfig(rank=2, targets="fc", trainable="")
    model = snella.adapt(block, config, rngs=nnx.Rngs(1))
    x = jnp.float32(np.random.default_rng(0).normal(size=(3, 4)))
    expected = model.fc(x)
    merge_together(model, lambda path, w: w)
    assert (type(model.fc) is nnx.Linear) == (dtype is not None)
    np.testing.assert_array_equal(model.fc(x), expected)
    assert model.fc(x).dtype == (jnp.bfloat16 if dtype else jnp.float32)
