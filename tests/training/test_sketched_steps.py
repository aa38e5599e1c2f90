"""Steps and micro-batches of a run draw the rows of sketches anew."""

import operator

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from tiny import base

import snella_jax as snella
from experiments.methods.dora import Dora
from experiments.methods.lora import Lora
from experiments.methods.own_parameters import Full
from experiments.methods.snella import Snella
from experiments.training.session import Scope
from experiments.training.step import training_step
from snella_jax.ops.sketch import Sketch


@pytest.mark.parametrize(
    "method, part",
    [(Snella, "adapter"), (Lora, "lora.rows"), (Dora, "lora.rows"), (Full, "rows")],
)
def test_micro_batches_and_steps_draw_apart(method, part):
    """The loss is a number drawn with the key of a layer in the second block."""
    scope = Scope("blocks/mlp/fc1", "head")
    find = operator.attrgetter(f"blocks.mlp.fc1.{part}")
    model = method(sketch=4, keep_rows=(0,)).adapt(base(), scope)
    own = find(model)
    sketch = own.site.update.sketch if method is Snella else own.sketch
    assert sketch == Sketch(4, keep_rows=(0,))
    graphdef, trainable, *rest = nnx.split(model, nnx.Param, snella.Budget, ...)

    def loss(model, batch, key):
        return jax.random.uniform(find(model).key[...][1])

    def value(accumulate, key):
        tx = optax.sgd(0.1)
        step = training_step(graphdef, tx, loss, accumulate)
        arguments = trainable, tx.init(trainable), *rest, jnp.zeros(4), key
        return jax.jit(step)(*arguments)[-1]

    key = jax.random.key(0)
    parts = [value(1, own) for own in list(jax.random.split(key))]
    assert parts[0] != parts[1]
    assert jnp.allclose(value(2, key), sum(parts) / 2)
