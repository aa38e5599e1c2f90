"""The optimizer of a training."""

from typing import Any

import jax
import optax

from snella_jax.core.importance import track_importance, tracked


def with_importance(
    tx: Any, trainable: Any, competes: bool
) -> optax.GradientTransformationExtraArgs:
    """Puts `track_importance` in front, where it is needed and there is none.

    Raises:
      TypeError: this is no optax transformation.
    """
    if isinstance(tx, optax.MultiSteps):
        tx = tx.gradient_transformation()
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            f"tx is a {type(tx).__name__}: expected an optax transformation, such as "
            "optax.adamw(1e-3, mask=snella.decay_mask)."
        )
    if competes and not tracked(jax.eval_shape(tx.init, trainable)):
        tx = optax.chain(track_importance(), tx)
    return optax.with_extra_args_support(tx)
