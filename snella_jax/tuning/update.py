"""One jitted update of an adapted model: loss, mean gradient, new values."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from snella_jax.tuning.accumulation import mean_over_parts
from snella_jax.tuning.parts import Binding, Parts

Loss = Callable[[Any, Any], Float[Array, ""]]


@functools.partial(jax.jit, static_argnames=("binding", "tx", "loss_fn", "accumulate"))
def update(
    parts: Parts,
    opt_state: optax.OptState,
    steps: Int[Array, ""],
    key: PRNGKeyArray,
    batch: Any,
    *,
    binding: Binding,
    tx: optax.GradientTransformationExtraArgs,
    loss_fn: Loss,
    accumulate: int,
) -> tuple[dict[str, Any], Float[Array, ""]]:
    """Returns new values of the fields of a `Tuning`, and the loss.

    Args:
      parts: arrays of the model.
      opt_state: state of `tx`.
      steps: number of steps before this one.
      key: key of all steps.
      batch: second argument of `loss_fn`.
      binding: the rest of the model.
      tx: the optimizer, with `track_importance` in it where budgets move.
      loss_fn: function of the model and the batch.
      accumulate: parts of the batch that are computed one after the other.
    """

    def gradient(changing, batch, key):
        def loss(trainable):
            own = parts._replace(trainable=trainable, changing=changing)
            model = binding.training_model(own, key)
            value = loss_fn(model, batch)
            if isinstance(value, tuple) or jnp.shape(value) != ():
                raise TypeError(
                    f"loss_fn returned {_kind(value)}: expected one scalar, as step "
                    "passes nothing else on."
                )
            return value, binding.changed(model)

        (value, changing), grads = jax.value_and_grad(loss, has_aux=True)(
            parts.trainable
        )
        return changing, (value, grads)

    key = jax.random.fold_in(key, steps)
    if accumulate == 1:
        changing, (value, grads) = gradient(parts.changing, batch, key)
    else:
        changing, (value, grads) = mean_over_parts(
            gradient, accumulate, parts.changing, batch, key
        )
    updates, opt_state = tx.update(grads, opt_state, parts.trainable, value=value)
    new = {
        "trainable": optax.apply_updates(parts.trainable, updates),
        "opt_state": opt_state,
        "changing": changing,
        "steps": steps + 1,
    }
    return new, value


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return f"an array of shape {jnp.shape(value)}"
