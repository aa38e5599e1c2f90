"""Meshes: what their text means, what lies where on them, and what they cannot be."""

import functools

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from experiments.training import blocks, sharding


def test_what_no_mesh_can_be():
    assert sharding.make().shape == {"data": 4, "fsdp": 1, "tensor": 1}
    assert sharding.make("tensor=2") == sharding.make("model=2")
    assert sharding.make("fsdp=2,data=2").shape == {"data": 2, "fsdp": 2, "tensor": 1}
    shown = sharding.describe(sharding.make("data=2"))
    assert shown == "2 x cpu (data=2, fsdp=1, tensor=1)"
    assert sharding.describe(sharding.make("data=1")) == "cpu"
    wrong = ("data", "data=", "data=0", "data=x", "rows=1", "data=2;model=2")
    for text in (*wrong, "model=2,tensor=2", "data=1,data=2"):
        with pytest.raises(ValueError, match="expected data=N, fsdp=N, tensor=N"):
            sharding.make(text)
    with pytest.raises(ValueError, match="takes 6 devices: there are 4"):
        sharding.make("data=3,tensor=2")


@pytest.mark.parametrize("text", ["data=2", "model=4", "data=1,tensor=4"])
def test_every_process_has_devices_and_images_of_its_own(text, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="2 processes with 4 devices need all of"):
        sharding.make(text)
    for text in ("data=2,model=2", "fsdp=2,tensor=2", "fsdp=4"):
        assert sharding.make(text).size == sharding.make().size == 4


@pytest.mark.parametrize(
    "path, shape, spec",
    [
        ("blocks/mlp/fc1/kernel", (3, 8, 12), P(None, "fsdp", "tensor")),
        ("blocks/mlp/fc2/kernel", (3, 12, 8), P(None, "tensor", "fsdp")),
        ("0/mu/blocks/attn/out/kernel", (8, 8), P("tensor", "fsdp")),
        ("blocks/mlp/fc1/adapter/a", (3, 2, 8, 4), P(None, None, ("fsdp", "tensor"))),
        ("blocks/mlp/fc1/adapter/b", (2, 8, 4), P(None, ("tensor", "fsdp"))),
        ("blocks/mlp/fc2/adapter/a", (2, 6, 4), P(None, "tensor")),
        ("blocks/mlp/fc1/adapter/piece_coeff", (2,), P()),
        ("blocks/mlp/fc1/bias", (12,), P()),
        ("head/kernel", (8, 5), P("fsdp")),
        ("patch_embed/kernel", (4, 4, 3, 8), P(None, None, None, "tensor")),
        ("cls_token", (1, 1, 8), P()),
    ],
)
def test_what_lies_where(path, shape, spec):
    """Closing matrices are split the other way; what is not divided is whole."""
    mesh = sharding.make("fsdp=2,tensor=2")
    leaf = np.arange(np.prod(shape)).reshape(shape)
    *modules, name = path.split("/")
    tree = {name: leaf}
    for module in reversed(modules):
        tree = {module: tree}
    (placed,) = jax.tree.leaves(sharding.place(tree, mesh))
    assert placed.sharding == jax.NamedSharding(mesh, spec)
    np.testing.assert_array_equal(placed, leaf)


def test_a_block_s_thresholds_cross_devices_as_one_array():
    """Of matrices split both ways, and of one that `tensor` does not divide."""
    mesh, rng = sharding.make("fsdp=2,tensor=2"), np.random.default_rng(0)
    layers, sizes = ["mlp/fc1", "mlp/fc2", "up"], [(8, 12), (12, 8), (6, 5)]
    deltas = [np.float32(rng.normal(size=size)) for size in sizes]
    placed = [
        jax.device_put(
            delta, sharding.of_parameter([layer, "kernel"], delta.shape, mesh)
        )
        for layer, delta in zip(layers, deltas, strict=True)
    ]
    budgets = [jax.numpy.int32(n) for n in (0, 50, 7)]
    search = jax.jit(functools.partial(blocks._search, mesh, layers))
    program = search.lower(placed, budgets).compile()
    found = [float(tau) for tau in program(placed, budgets)]
    pairs = zip(deltas, (0, 50, 7), strict=True)
    assert found == [float(np.sort(-np.abs(d), axis=None)[n]) * -1 for d, n in pairs]
    assert program.as_text().count(" all-reduce(") == 1


def test_a_factor_may_be_of_a_block_itself(monkeypatch):
    """Such as prompts, which lie whole on TPUs, too."""
    monkeypatch.setattr(blocks, "on_tpus", lambda mesh: True)
    model = tiny.adapted("vpt_deep")
    blocks.pin(model, sharding.make("fsdp=2,tensor=2"))
    images = np.zeros((4, 8, 8, 1), np.float32)
    assert jax.eval_shape(lambda: model(images)).shape == (4, 3)
