"""Several LoRAs in one pass: each example has what its own model, merged, gives it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snella_jax as snella
from snella_jax.nnx import grouped

X = np.random.default_rng(0).normal(size=(6, 5, 8)).astype(np.float32)


AXES = nnx.StateAxes({(nnx.Param, snella.Frozen, snella.Budget): 0, ...: None})


class Row(nnx.Module):
    def __init__(self, rngs):
        self.fc = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.fc(x))


@nnx.scan(in_axes=(nnx.Carry, AXES), out_axes=nnx.Carry)
def run(x, block):
    return block(x)


class Net(nnx.Module):
    """A fused weight, heads, stacked blocks, dropout and running statistics."""

    def __init__(self, rngs, classes=3):
        self.qkv = nnx.Linear(8, 12, rngs=rngs)
        self.heads = nnx.LinearGeneral(12, (2, 3), rngs=rngs)
        self.out = nnx.LinearGeneral((2, 3), 8, axis=(-2, -1), rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.blocks = nnx.split_rngs(splits=2)(nnx.vmap(Row))(rngs)
        self.head = nnx.Linear(8, classes, rngs=rngs)

    def __call__(self, x):
        x = self.out(self.heads(jnp.tanh(self.qkv(x))))
        x = self.norm(self.drop(self.conv(x)))
        x = run(x, self.blocks)
        return {"logits": self.head(x.mean(1)), "tokens": x}


def made(base, seed, **changes):
    """An adapter with numbers everywhere, as if it had trained."""
    own = {"rank": 2, "kernel": "linear", "gate": "none", "target_density": 1}
    own |= {"targets": "qkv|heads|out|blocks/fc", "trainable": "head"}
    config = snella.SnellaConfig(**(own | changes))
    model = snella.adapt(base, config, rngs=nnx.Rngs(seed))
    keys = nnx.Rngs(seed)
    for leaf in jax.tree.leaves(nnx.state(model, nnx.Param), is_leaf=_is_variable):
        leaf.set_value(jax.random.normal(keys(), leaf.shape) / 2)
    return model


def _is_variable(leaf):
    return isinstance(leaf, nnx.Variable)


@pytest.fixture(scope="module")
def base():
    net = Net(nnx.Rngs(0))
    net.eval()
    return net


def test_each_example_has_what_its_own_model_gives(base):
    """Other ranks, other targets, a fused weight in parts, the base, heads."""
    models = {
        "all": made(base, 1),
        "none": base,
        "parts": made(base, 2, targets="qkv", overrides={"qkv": {"split": 3}}, rank=3),
        "few": made(base, 3, targets="blocks/fc", trainable=""),
    }
    ids = ["few", "all", "none", "parts", "all", "none"]
    names = list(models)
    rows = np.array([names.index(name) for name in ids], np.int32)
    assert grouped.run(list(models.values()), rows, (X,)) is not None
    found = snella.per_example(models, ids, X)
    plain = {n: m if n == "none" else snella.merge(m) for n, m in models.items()}
    for index, name in enumerate(ids):
        alone = plain[name](X)
        for key, value in alone.items():
            np.testing.assert_allclose(found[key][index], value[index], atol=1e-5)
    assert (
        len({tuple(row) for row in np.asarray(found["logits"]).round(3).tolist()}) == 6
    )


def test_what_takes_a_pass_for_each(base):
    """Nothing is compiled here: a structure tells what cannot share a pass."""
    first, rows = made(base, 1), np.arange(6, dtype=np.int32) % 2
    another = Net(nnx.Rngs(1))
    another.eval()
    others = [
        made(base, 2, **changes)
        for changes in (
            {"kernel": "mix_k", "gate": "product"},
            {"gate": "hard"},
            {"targets": "conv"},
            {"trainable": "head|conv|norm"},  # six of these are more than the base
        )
    ]
    for other in (*others, made(another, 2)):
        assert grouped.run([first, other], rows, (X,)) is None
    drops = Net(nnx.Rngs(0))
    assert grouped.run([made(drops, 1), made(drops, 2)], rows, (X,)) is None
    wide = made(base, 2)
    wide.head = nnx.Linear(8, 5, rngs=nnx.Rngs(0))
    assert grouped.run([first, wide], rows, (X,)) is None


def test_a_program_serves_other_adapters(base):
    models = [made(base, seed) for seed in (1, 2, 3)]
    rows = np.array([0, 1] * 3, np.int32)
    grouped.run(models[:2], rows, (X,))
    before = grouped._run._cache_size()
    grouped.run(models[1:], 1 - rows, (X,))
    assert grouped._run._cache_size() == before


def test_the_order_of_the_examples_compiles_nothing(base):
    """Models of different ranks, of which either comes first."""
    models = {"one": made(base, 1), "two": made(base, 2, rank=3)}
    ids = ["one", "two", "two", "one", "one", "two"]
    first = snella.per_example(models, ids, X)
    before = grouped._run._cache_size()
    back = snella.per_example(models, ids[::-1], X[::-1])
    assert grouped._run._cache_size() == before
    np.testing.assert_allclose(back["logits"][::-1], first["logits"], atol=1e-5)
