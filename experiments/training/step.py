"""One step of training: loss, gradient and update of what trains, of a whole batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import snella_jax as snella


def training_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    accumulate: int = 1,
    where: Any = None,
) -> Callable:
    """One step on the cross entropy, to be jitted.

    Args:
      graphdef: of a classifier.
      tx: the optimizer; it sees the mean gradient of the whole batch.
      accumulate: parts into which the batch is cut, computed one after the other.
      where: a sharding for every leaf of the gradient, those of what trains.

    Returns:
      A function of `trainable, opt_state, budgets, frozen, images, labels, key` that
      gives the new `trainable` and `opt_state` and the loss; not a number, too, where
      the gradient or the update is not finite. `labels` are int32 `[B]`, or
      distributions over the classes, `[B, classes]`.
    """

    def loss_fn(trainable, budgets, frozen, images, labels, key):
        model: Any = nnx.merge(graphdef, trainable, budgets, frozen)
        key_adapter, key_model = jax.random.split(key)
        snella.seed(model, key_adapter)
        logits = model(images, key_model).astype(jnp.float32)
        entropy = (
            optax.softmax_cross_entropy_with_integer_labels
            if labels.ndim == 1
            else optax.softmax_cross_entropy
        )
        return entropy(logits, labels).mean()

    def step(trainable, opt_state, budgets, frozen, images, labels, key):
        def gradient(images, labels, key):
            return jax.value_and_grad(loss_fn)(
                trainable, budgets, frozen, images, labels, key
            )

        if accumulate == 1:
            loss, grads = gradient(images, labels, key)
        else:
            loss, grads = _mean_over_parts(gradient, accumulate, images, labels, key)
        if where is not None:
            # Left to choose, XLA (jax 0.10.2, 2 x 2 CPUs) made NaN of accumulated ones.
            grads = jax.lax.with_sharding_constraint(grads, where)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        # AdamW makes an update of 0 of a gradient that is too large to be squared.
        norms = optax.tree.norm(updates) + optax.tree.norm(grads)
        loss = jnp.where(jnp.isfinite(norms), loss, jnp.nan)
        return optax.apply_updates(trainable, updates), opt_state, loss

    return step


def _mean_over_parts(gradient, parts: int, images, labels, key) -> Any:
    """Loss and gradient of a batch, a part of it at a time."""

    def cut(x):  # every part gets its share of each device's images
        return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)

    batches = cut(images), cut(labels), jax.random.split(key, parts)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype),
        jax.eval_shape(gradient, *jax.tree.map(lambda x: x[0], batches)),
    )

    def add(total, batch):
        return jax.tree.map(jnp.add, total, gradient(*batch)), None

    total, _ = jax.lax.scan(add, zeros, batches)
    return jax.tree.map(lambda x: x / parts, total)
