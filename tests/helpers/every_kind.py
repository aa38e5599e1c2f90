"""A model with every kind of weight that can be adapted, for tests of adapters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import snella_jax as snella

KINDS = "qkv|heads|conv|experts|blocks/fc"


class Every(nnx.Module):
    """Every kind of weight: fused, heads, a convolution, experts, stacked, running."""

    def __init__(self, rngs, classes=3):
        self.conv = nnx.Conv(2, 6, (2, 2), rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.qkv = nnx.Linear(6, 12, rngs=rngs)
        self.heads = nnx.LinearGeneral(12, (2, 3), rngs=rngs)
        self.experts = nnx.Einsum("bhd,hdm->bhm", (2, 3, 4), (2, 4), rngs=rngs)

        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def build(rngs):
            return Row(rngs)

        self.blocks = build(rngs)
        self.head = nnx.Linear(8, classes, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.conv(x)).mean((1, 2))
        x = self.experts(self.heads(jnp.tanh(self.qkv(x)))).reshape(len(x), -1)
        graphdef, state = nnx.split(self.blocks)

        def body(x, row):
            return x + nnx.merge(graphdef, row)(x), None

        return self.head(jax.lax.scan(body, x, state)[0])


class Row(nnx.Module):
    def __init__(self, rngs):
        self.fc = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.fc(x))


def every(**changes):
    settings = {
        "rank": 4,
        "targets": KINDS,
        "trainable": "head",
        "allocation": "fixed",
        "target_density": 0.4,
        "overrides": {
            "qkv": {"split": 3, "rank": 2, "kernel": snella.kernels.mix_k(pieces=1)},
            "conv": {"kernel": "rbf", "gate": "soft", "path": "parallel"},
            "heads": {
                "kernel": snella.kernels.mix_k(learn_piece_coeff=False, centred="both")
            },
        },
    }
    config = snella.SnellaConfig(**(settings | changes))
    return snella.adapt(Every(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))


IMAGES = np.random.default_rng(0).normal(size=(5, 4, 4, 2)).astype(np.float32)


# One object: the step is traced once for all models of one structure.
TX = optax.chain(snella.track_importance(), optax.adam(1e-2))


@nnx.jit
def _step(model, optimizer):
    def loss(model):
        labels = jnp.arange(len(IMAGES)) % 3
        return optax.softmax_cross_entropy_with_integer_labels(
            model(IMAGES), labels
        ).mean()

    optimizer.update(model, nnx.grad(loss)(model))


def trained(model, steps=3):
    """A few steps of Adam, batch statistics included."""
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    for _ in range(steps):
        _step(model, optimizer)
    return model


def outputs(model):
    """Of the images, with the running statistics, which stay."""
    model = nnx.clone(model)
    model.eval()
    return _run(*nnx.split(model))


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, state):
    return nnx.merge(graphdef, state)(IMAGES)


def leaves(model):
    """Every variable by path, and its kind."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {
        "/".join(map(str, path)): (type(v).__name__, np.asarray(v[...]))
        for path, v in flat
    }


def assert_same(one, other):
    one, other = leaves(one), leaves(other)
    assert one.keys() == other.keys()
    for path, (kind, value) in one.items():
        assert other[path][0] == kind, path
        assert other[path][1].dtype == value.dtype, path
        np.testing.assert_array_equal(other[path][1], value, err_msg=path)
