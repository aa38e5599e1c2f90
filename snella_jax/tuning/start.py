"""Arrays that a training starts with: copies, on the devices of the model."""

from typing import Any

import jax
import jax.numpy as jnp

from snella_jax.core.placement import everywhere, is_placed
from snella_jax.tuning.parts import Parts


def copied(parts: Parts) -> Parts:
    """Copies what a step replaces: a state may be donated, the model stays."""
    own = jax.tree.map(jnp.copy, (parts.trainable, parts.changing))
    return parts._replace(trainable=own[0], changing=own[1])


def on_the_devices_of(tree: Any, model: Any) -> Any:
    """Places what is on no particular device on all those of a model's arrays.

    A counter on the default device would come out of the first step on all of a mesh,
    and compile the second.
    """
    one = next(filter(is_placed, jax.tree.leaves(model)), None)
    return jax.tree.map(lambda x: x if is_placed(x) else everywhere(x, one), tree)
