"""One update: loss, mean gradient and new values of what trains, of a whole batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

import snella_jax as snella
from experiments.training.objective import Batch
from snella_jax.tuning.accumulation import mean_over_parts

Loss = Callable[[Any, Batch, PRNGKeyArray], Float[Array, ""]]


def training_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    loss: Loss,
    accumulate: int = 1,
    where: Any = None,
) -> Callable:
    """Returns the function of one update, to be jitted.

    Args:
      graphdef: the model's.
      tx: the optimizer; it sees the mean gradient of the whole batch.
      loss: an objective's.
      accumulate: micro-batches into which the batch is cut, computed one after the
        other.
      where: a sharding for every leaf of the gradient, those of what trains.

    Returns:
      A function of `trainable, opt_state, budgets, frozen, batch, key` that gives the
      new `trainable` and `opt_state` and the loss; the loss is not a number, too, where
      the gradient or the update is not finite.
    """

    def loss_fn(trainable, budgets, frozen, batch, key):
        model: Any = nnx.merge(graphdef, trainable, budgets, frozen)
        key_adapter, key_loss = jax.random.split(key)
        snella.seed(model, key_adapter)
        return loss(model, batch, key_loss)

    def step(trainable, opt_state, budgets, frozen, batch, key):
        def gradient(_, batch, key):
            found = jax.value_and_grad(loss_fn)(trainable, budgets, frozen, batch, key)
            return None, found

        if accumulate == 1:
            _, (value, grads) = gradient(None, batch, key)
        else:
            parts = accumulate, None, batch, key
            _, (value, grads) = mean_over_parts(gradient, *parts)
        if where is not None:
            # Left to choose, XLA (jax 0.10.2, 2 x 2 CPUs) made NaN of accumulated ones.
            grads = jax.lax.with_sharding_constraint(grads, where)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        # AdamW makes an update of 0 of a gradient that is too large to be squared.
        norms = optax.tree.norm(updates) + optax.tree.norm(grads)
        value = jnp.where(jnp.isfinite(norms), value, jnp.nan)
        return optax.apply_updates(trainable, updates), opt_state, value

    return step
