"""Steps and micro-batches of a run draw the rows of sketches anew."""

import jax
import jax.numpy as jnp
import optax
from tiny import base

import snella_jax as snella
from experiments.methods.snella import Snella
from experiments.training.session import Scope
from experiments.training.step import training_step


def test_micro_batches_and_steps_draw_apart():
    """The loss is a number drawn with the key of a layer in the second block."""
    scope = Scope("blocks/mlp/fc1", "head")
    model = Snella(rank=2, sketch=4, keep_rows=(0,)).adapt(base(), scope)
    layer = model.blocks.mlp.fc1.adapter
    assert (layer.rule.sketch, layer.rule.keep_rows) == (4, (0,))
    graphdef, trainable, *rest = snella.partition(model)

    def loss(model, batch, key):
        return jax.random.uniform(model.blocks.mlp.fc1.adapter.key[...][1])

    def value(accumulate, key):
        tx = optax.sgd(0.1)
        step = training_step(graphdef, tx, loss, accumulate)
        arguments = trainable, tx.init(trainable), *rest, jnp.zeros(4), key
        return jax.jit(step)(*arguments)[-1]

    key = jax.random.key(0)
    parts = [value(1, own) for own in list(jax.random.split(key))]
    assert parts[0] != parts[1]
    assert jnp.allclose(value(2, key), sum(parts) / 2)
