"""Sketches on 2 x 2 fake devices: the draws of one device, and nothing more moves."""

import collections
import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from snella_jax import adapted_dense, kernels

BATCH, ROWS, N, M = 8, 9, 24, 40
KERNEL = kernels.mix_k()
KEY = jax.random.key(5)
X = jax.random.normal(jax.random.key(2), (BATCH, ROWS, N))
W0 = 0.3 * jax.random.normal(jax.random.key(1), (N, M))
FACTORS = jax.tree.map(
    lambda v: 3 * v + 0.05, KERNEL.init(jax.random.key(0), (N, M), 8)
)
# How x and w0 lie on a (data, model) mesh: examples, and features, are split.
SPLIT = {
    "outputs": (P("data", None, None), P(None, "model")),
    "inputs": (P("data", None, "model"), P("model", None)),
    "fsdp": (P(("data", "model"), None, None), P(None, None)),
}
KINDS = [{}, {"sketch": 4}, {"sketch": 4, "sketch_kind": "strided", "keep_rows": (0,)}]
KINDS += [{"sketch": 4, "sketch_kind": "crs"}]
ACTIVATION = BATCH // 4 * ROWS * N  # the least that a device has of one


def loss(factors, x, w0, key, options):
    layer = functools.partial(adapted_dense, kernel=KERNEL, key=key, **options)
    return jnp.sin(layer(x, w0, factors, 300)).sum()


def gradients(options):
    return jax.grad(functools.partial(loss, options=options), (0, 1))


def moved(compiled):
    """Counts the collectives of a program by kind and sizes of what they give."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", compiled.as_text())
    return collections.Counter(
        (kind, math.prod(map(int, filter(None, sizes.split(",")))))
        for shape, kind in found
        for sizes in re.findall(r"\w+\[([\d,]*)\]", shape)
    )


def large(collectives):
    return {each: n for each, n in collectives.items() if each[1] >= ACTIVATION}


@pytest.mark.parametrize(
    "kind, split",
    [
        (AxisType.Auto, "outputs"),
        (AxisType.Auto, "inputs"),
        (AxisType.Explicit, "outputs"),
        (AxisType.Explicit, "fsdp"),
    ],
)
def test_nothing_more_moves(kind, split):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        place = (NamedSharding(mesh, spec) for spec in (*SPLIT[split], P()))
        x, w0, (factors, key) = (
            jax.device_put(v, where)
            for v, where in zip((X, W0, (FACTORS, KEY)), place, strict=True)
        )
        exact, *others = (
            jax.jit(gradients(options)).lower(factors, x, w0, key).compile()
            for options in KINDS
        )
        assert moved(exact)
        for other in others:
            assert not large(moved(other) - moved(exact))
        got = others[0](factors, x, w0, key)
    expected = jax.jit(gradients(KINDS[1]))(FACTORS, X, W0, KEY)
    chex.assert_trees_all_close(got, expected, rtol=1e-3, atol=1e-4)


def test_in_shard_map():
    """Each shard has the gradient of its own examples, and sends nothing of its own."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    keys = jax.random.split(KEY, 4)

    def local(factors, x, w0, keys):
        own = gradients(KINDS[1])(factors, x, w0, keys[0])
        return jax.tree.map(lambda v: v[None], own)

    split, whole = P("data"), P()
    specs = {"in_specs": (whole, split, whole, split), "out_specs": split}
    # What does not vary would be added up over the shards.
    step = jax.jit(jax.shard_map(local, mesh=mesh, check_vma=False, **specs))
    compiled = step.lower(FACTORS, X, W0, keys).compile()
    assert not moved(compiled)
    got = compiled(FACTORS, X, W0, keys)
    one = jax.jit(gradients(KINDS[1]))
    for i, key in enumerate(list(keys)):
        expected = one(FACTORS, X[2 * i : 2 * i + 2], W0, key)
        own = jax.tree.map(lambda v, i=i: v[i], got)
        chex.assert_trees_all_close(own, expected, rtol=1e-3, atol=1e-4)


def test_in_shard_map_gradients_are_added_up():
    """Factors that all shards have: with their types checked, one sum of each."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    keys = jax.random.split(KEY, 2)

    def local(options, factors, x, w0, keys):
        return gradients(options)(factors, x, w0, keys[0])

    split, whole = P("data"), P()
    specs = {"in_specs": (whole, split, whole, split), "out_specs": (whole, split)}

    def compiled(options):
        step = functools.partial(local, options)
        step = jax.jit(jax.shard_map(step, mesh=mesh, **specs))
        return step.lower(FACTORS, X, W0, keys).compile()

    exact, sketched = map(compiled, KINDS[:2])
    assert not large(moved(sketched) - moved(exact))
    got, _ = sketched(FACTORS, X, W0, keys)
    one = jax.jit(gradients(KINDS[1]))
    halves = [one(FACTORS, X[4 * i : 4 * i + 4], W0, keys[i])[0] for i in range(2)]
    expected = jax.tree.map(jnp.add, *halves)
    chex.assert_trees_all_close(got, expected, rtol=1e-3, atol=1e-4)
