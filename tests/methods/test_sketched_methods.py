"""LoRA, DoRA and full fine-tuning with a few rows of their inputs kept."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import base, leaves

import snella_jax as snella
from experiments.methods.dora import Dora
from experiments.methods.lora import Lora
from experiments.methods.own_parameters import Full
from experiments.methods.snella import Snella
from experiments.training.session import Scope

METHODS = {"lora": Lora, "dora": Dora, "full": Full}
OF_ROWS = {"lora": "lora/a", "dora": "lora/a", "full": "kernel"}  # gradients
KEYS = jax.random.split(jax.random.key(0), 64)
X = jax.random.normal(jax.random.key(1), (1, 4, 3))  # 2 runs of 2 rows: 4 draws


class Pair(nnx.Module):
    """Two layers that read one array."""

    def __init__(self, dtype=jnp.float32):
        how = {"dtype": dtype, "rngs": nnx.Rngs(0)}
        self.query, self.value = nnx.Linear(3, 2, **how), nnx.Linear(3, 2, **how)

    def __call__(self, x):
        return self.query(x) * self.value(x)


def adapted(name, dtype=jnp.float32, **settings):
    model = METHODS[name](**settings).adapt(Pair(dtype), Scope("query|value", ""))
    for i, (path, variable) in enumerate(nnx.to_flat_state(nnx.state(model))):
        if "b" in path:  # else the gradient of a is 0
            variable[...] = jax.random.normal(jax.random.key(i), variable.shape)
    return model


def loss_of(model):
    """What trains, and the loss as a function of it, an input and a key."""
    graphdef, trainable, rest = nnx.split(model, nnx.Param, ...)

    def loss(trainable, x, key):
        seeded = nnx.merge(graphdef, trainable, rest, copy=True)
        if key is not None:
            snella.seed(seeded, key)
        return (seeded(x) ** 2).sum()

    return trainable, loss


@pytest.mark.parametrize("name", METHODS)
def test_a_gradient_is_exact_on_average_and_all_others_always(name):
    """Every draw is as likely as another, and layers of one input draw the same."""
    trainable, loss = loss_of(adapted(name, sketch=2))
    plain = loss_of(adapted(name))[1]
    exact, exact_dx = jax.grad(plain, (0, 1))(trainable, X, None)
    every = jax.vmap(jax.grad(loss, (0, 1)), (None, None, 0))
    found, dx = jax.jit(every)(trainable, X, KEYS)
    close(dx, exact_dx)
    drawn, means = [], []
    for (path, value), (_, mean) in zip(flat(found), flat(exact), strict=True):
        if path.endswith(OF_ROWS[name]):
            drawn.append(value.reshape(len(KEYS), -1))
            means.append(mean.ravel())
        else:
            close(value, mean)
    rows, mean = np.concatenate(drawn, 1), np.concatenate(means)
    _, firsts = np.unique(rows.round(3), axis=0, return_index=True)
    assert len(means) == 2 and len(firsts) == 4
    close(rows[firsts].mean(0), mean)


def close(got, expected):
    np.testing.assert_allclose(*np.broadcast_arrays(got, expected), 1e-4, 1e-4)


def flat(state):
    return [
        ("/".join(map(str, path)), np.array(value[...]))
        for path, value in nnx.to_flat_state(state)
    ]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_layers_keep_the_rows_of_one_input_once(name, dtype):
    """Of 4 rows 2 are left, in the dtype of the layers; not the input itself."""
    trainable, loss = loss_of(adapted(name, dtype, sketch=2))
    of_trainable = jax.eval_shape(
        lambda t: jax.vjp(lambda t: loss(t, X, KEYS[0]), t)[1], trainable
    )
    kept = collections.Counter(
        (v.shape, v.dtype) for v in jax.tree.leaves(of_trainable)
    )
    assert kept[(1, 2, 3), jnp.dtype(dtype)] == 1
    assert not any(shape == X.shape for shape, _ in kept)


@pytest.mark.parametrize("name", METHODS)
def test_evaluation_is_exact_and_training_needs_a_key(name):
    model, plain = adapted(name, sketch=2), adapted(name)
    with pytest.raises(ValueError, match=r"sketch=2 was called in training .*seed"):
        model(X)
    model.eval()
    assert jnp.array_equal(model(X), plain(X))
    merged = METHODS[name](sketch=2).merged(model)
    assert type(merged.query) is nnx.Linear and not hasattr(merged.query, "rows")
    close(merged(X), model(X))


@pytest.mark.parametrize("name", METHODS)
def test_a_sketch_adds_nothing_to_a_checkpoint(name):
    """Blocks of a scanned ViT draw apart; without a sketch, no layer is another."""
    scope = Scope("blocks/.*/(query|value|fc1)", "head")
    method = METHODS[name]
    model, plain = method(sketch=2).adapt(base(), scope), method().adapt(base(), scope)
    before, after = leaves(model), leaves(plain)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[path], after[path]) for path in before)
    if name == "full":
        assert type(plain.blocks.mlp.fc1) is nnx.Linear
    snella.seed(model, KEYS[0])
    keys = [v for path, v in nnx.to_flat_state(nnx.state(model)) if path[-1] == "key"]
    drawn = {tuple(data) for v in keys for data in jax.random.key_data(v[...]).tolist()}
    assert len(keys) == 3 and len(drawn) == 3 * 2  # layers and blocks
    snella.seed(plain, KEYS[0])
    assert leaves(plain).keys() == after.keys()


@pytest.mark.parametrize("method", [Lora, Dora, Full, Snella])
def test_a_wrong_sketch_is_refused_by_name(method):
    with pytest.raises(ValueError, match=r"mine: sketch=0: expected a whole number"):
        method(sketch=0).check("mine")
    with pytest.raises(ValueError, match=r"mine: keep_rows=\(0, 0\)"):
        method(sketch=2, keep_rows=(0, 0)).check("mine")
