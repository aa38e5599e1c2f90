"""Segmentation where the truth gives the prompt: the box around the true mask.

The result is no prediction, as whoever uses such a model has no true mask. It shows
what a model that was not tuned can do once it is told where to look.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from experiments.training.objective import Batch
from experiments.training.segmentation import Segmentation


@dataclasses.dataclass(frozen=True)
class TrueBoxes(Segmentation):
    """Objective of a SAM that is given the box around each true mask."""

    def masks(self, model: Any, batch: Batch) -> Float[Array, "B M h w"]:
        """Returns logits of masks."""
        return model(batch["image"], boxes=around(batch["mask"]))[0]


def around(masks: Float[Array, "B H W"]) -> Float[Array, "B 4"]:
    """Returns boxes (x0, y0, x1, y1) of the outermost pixels; whole images for none.

    >>> mask = jnp.zeros((1, 4, 8)).at[0, 1:3, 5].set(1)
    >>> around(mask).tolist(), around(jnp.zeros((1, 4, 8))).tolist()
    ([[5.0, 1.0, 5.0, 2.0]], [[0.0, 0.0, 7.0, 3.0]])
    """
    ends = []
    for axis in (1, 2):  # of what is looked across: columns, then rows
        seen = (masks > 0).any(axis)
        first = seen.argmax(1)
        last = seen.shape[1] - 1 - seen[:, ::-1].argmax(1)
        ends.append((first, last))
    (x0, x1), (y0, y1) = ends
    return jnp.stack([x0, y0, x1, y1], 1).astype(jnp.float32)
