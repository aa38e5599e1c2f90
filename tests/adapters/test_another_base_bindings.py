"""The rest of a base in other bindings: other names, shapes, stacks and kinds."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

import snella_jax as snella
from snella_jax import linen, pytree
from snella_jax.adapters.base import Base, differences
from snella_jax.nnx.variables import variables_of

X = jnp.ones((2, 6))
CONFIG = snella.SnellaConfig(
    rank=4, targets="(one/)?fc", trainable="(one/)?head", allocation="fixed"
)
TO_NNX = {"fc": "one/fc", "head/(.*)": r"one/head/\1", "norm/(.*)": r"one/norm/\1"}
FROM_NNX = {"one/(.*)": r"\1"}


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="fc")(nn.LayerNorm(name="before")(x))
        x = nn.BatchNorm(True, name="norm")(x)
        x = nn.DenseGeneral((2, 4), name="heads")(x).reshape(len(x), 8)
        return nn.Dense(3, name="head")(x)


class One(nnx.Module):
    def __init__(self, rngs):
        self.fc = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.general = nnx.Linear(8, 8, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)


class Nnx(nnx.Module):
    """The same under other names, one shape another, and with state of its own."""

    def __init__(self, rngs):
        self.one = One(rngs)
        self.scale, self.shift = (nnx.Param(jnp.ones(6)) for _ in range(2))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.cache = nnx.Cache(jnp.zeros(3))
        self.calls, self.name = nnx.Variable(0), nnx.Variable("one")
        self.counts = nnx.Variable(jnp.zeros(3, int))
        self.table = nnx.Variable(jnp.ones(3))


PLACES = {"one/general": "heads", "scale": "before/scale", "shift": "before/bias"}


@pytest.fixture(scope="module")
def tree():
    """Linen's variables, every one of them drawn."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(Linen().init, jax.random.key(0), X)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), "f4"), shapes)


def nnx_of(tree):
    """The same numbers in the NNX model."""
    model = Nnx(nnx.Rngs(0))
    flat = {}
    for kind in tree.values():
        flat |= flatten_dict(kind, sep="/")
    for kind in (nnx.Param, nnx.BatchStat):
        for path, variable in variables_of(model, kind):
            name = path.removeprefix("one/")
            for ours, theirs in PLACES.items():
                name = theirs + path[len(ours) :] if path.startswith(ours) else name
            variable.set_value(flat[name].reshape(variable.shape))
    return model


def changed(tree, collection, layer, name):
    new = jax.tree.map(lambda x: x, tree)
    value = np.array(new[collection][layer][name])
    value.reshape(-1)[0] += 1
    new[collection][layer][name] = jnp.asarray(value)
    return new


def load_linen(tree, folder, **options):
    return linen.load(Linen(), tree, folder, X, **options)


def load_pytree(tree, folder, **options):
    return pytree.load(tree["params"], folder, **options)


@pytest.fixture(scope="module")
def folders(tree, tmp_path_factory):
    """The same adapter, trained in each binding."""
    made = tmp_path_factory.mktemp("adapters")
    key = jax.random.key(1)
    adapters, params = linen.adapt(Linen(), tree, CONFIG, X, key=key)
    adapters.save(params, made / "linen", batch_stats=tree["batch_stats"])
    adapters, params = pytree.adapt(tree["params"], CONFIG, key=key)
    adapters.save(params, made / "pytree")
    snella.save(snella.adapt(nnx_of(tree), CONFIG, rngs=nnx.Rngs(1)), made / "nnx")
    return made


WAYS = [
    ("linen", load_linen, {}),
    ("linen", lambda tree, *a, **o: snella.load(nnx_of(tree), *a, **o), TO_NNX),
    ("pytree", load_linen, {}),
    ("pytree", load_pytree, {}),
    ("pytree", lambda tree, *a, **o: snella.load(nnx_of(tree), *a, **o), TO_NNX),
    ("nnx", load_linen, FROM_NNX),
]


@pytest.mark.parametrize(("folder", "load", "rename"), WAYS)
def test_the_rest_is_known_in_other_bindings_and_another_is_not(
    folder, load, rename, tree, folders, caplog
):
    load(tree, folders / folder, rename=rename)
    for layer, name in (("before", "scale"), ("heads", "kernel"), ("fc", "bias")):
        other = changed(tree, "params", layer, name)
        with pytest.raises(snella.CheckpointError, match="numbers"):
            load(other, folders / folder, rename=rename)
        load(other, folders / folder, rename=rename, allow_base_mismatch=True)
        assert "has another base" in caplog.text
    load(changed(tree, "params", "head", "bias"), folders / folder, rename=rename)


def test_a_rule_of_names_that_is_meant_for_adapters_does_no_harm(tree, folders):
    """It gives two weights of the rest one name, which a third has."""
    names = {"(heads|before)/.*": "scale", **TO_NNX}
    snella.load(nnx_of(tree), folders / "linen", rename=names)


def test_what_changes_when_a_model_is_called_is_not_compared(tree, folders):
    model = nnx_of(tree)
    model.one.norm.mean[...] += 1  # the file has them
    model.dropout(jnp.ones(3))  # draws
    model.cache[...] += 1
    model.calls.set_value(5)
    model.counts[...] += 1
    again = snella.load(model, folders / "nnx")
    np.testing.assert_array_equal(again.one.norm.mean[...], nnx_of(tree).one.norm.mean)
    model.table[...] += 1
    with pytest.raises(snella.CheckpointError, match="table: its numbers are not"):
        snella.load(model, folders / "nnx")


def test_counters_and_random_keys_of_a_tree_are_not_compared(tree, tmp_path):
    state = {"step": jnp.array(3), "key": jax.random.key(0), "old": jnp.uint32([1, 2])}
    params = tree["params"] | {"state": state, "table": jnp.arange(5)}
    adapters, adapted = pytree.adapt(params, CONFIG, key=jax.random.key(1))
    adapters.save(adapted, tmp_path / "a")
    state = {"step": jnp.array(9), "key": jax.random.key(1), "old": jnp.uint32([5, 6])}
    pytree.load(params | {"state": state}, tmp_path / "a")
    with pytest.raises(snella.CheckpointError, match="table: its numbers are not"):
        pytree.load(params | {"table": jnp.arange(5)[::-1]}, tmp_path / "a")


RNG = np.random.default_rng(0)
ROWS = {f"b{i}/w": RNG.normal(size=(8, 6)).astype("f4") for i in range(3)}
NORM = {"norm": RNG.normal(size=8).astype("f4")}
STACK = {"blocks/w": np.stack(list(ROWS.values()))}


def same(known, found):
    known, found = ({k: np.asarray(v) for k, v in x.items()} for x in (known, found))
    return not differences(Base(known).fingerprints(), Base(found))


def test_names_stacks_and_axes_do_not_matter():
    for other in (
        STACK,
        {"w": np.stack(list(ROWS.values()), 1)},
        {name: value.reshape(8, 2, 3) for name, value in ROWS.items()},
        {f"x/{name}": value.T for name, value in ROWS.items()},
        {"b0/w": ROWS["b2/w"], "b1/w": ROWS["b1/w"], "c": ROWS["b0/w"]},
    ):
        assert same(ROWS | NORM, other | NORM) and same(other, ROWS)
        first = next(iter(other))
        nudged = np.array(other[first], order="C")
        nudged.reshape(-1)[5] = np.nextafter(nudged.reshape(-1)[5], np.float32(9))
        assert not same(ROWS | NORM, other | NORM | {first: nudged})
        assert not same(ROWS, {k: v for k, v in other.items() if k != first})
        assert not same(ROWS, other | NORM)
    swapped = ROWS | {"b0/w": ROWS["b1/w"], "b1/w": ROWS["b0/w"]}
    assert not same(ROWS, swapped)  # where names say which is which


def test_sixteen_bits_under_other_names():
    half, bf16 = np.float16, ml_dtypes.bfloat16

    def cast(weights, dtype):
        return {name: value.astype(dtype) for name, value in weights.items()}

    for dtype in (half, bf16):
        assert same(ROWS | NORM, cast(STACK, dtype) | NORM)
        assert same(cast(ROWS, dtype) | NORM, STACK | cast(NORM, dtype))
        assert not same(cast(ROWS, dtype), {k: v * 1.01 for k, v in STACK.items()})
    assert not same(cast(ROWS, half), cast(STACK, bf16))
    assert same(cast(ROWS, np.float64), STACK)
    exact = cast(cast(STACK, half), np.float32)
    close = {k: np.nextafter(v, np.float32(9)) for k, v in exact.items()}
    assert not same(exact, {"w": close["blocks/w"]}) and same(cast(ROWS, half), close)
