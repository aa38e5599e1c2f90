"""MLP-3: a head of three layers on frozen features, as in VPT's comparison.

Jia et al. (arXiv 2203.12119): the linear head becomes an MLP whose hidden layers are as
wide as the features, with ReLU between them. Its last layer starts at 0.
"""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from snella_jax.nnx.surgery import freeze

LAYERS = 3


class Head(nnx.Module):
    """`LAYERS` linear layers with ReLU between them."""

    def __init__(self, width: int, classes: int, dtype: Any, rngs: nnx.Rngs):
        hidden = [
            nnx.Linear(width, width, dtype=dtype, rngs=rngs) for _ in range(LAYERS - 1)
        ]
        zeros = nnx.initializers.zeros_init()
        last = nnx.Linear(width, classes, dtype=dtype, kernel_init=zeros, rngs=rngs)
        self.layers = nnx.List([*hidden, last])

    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B classes"]:
        *hidden, last = self.layers
        for layer in hidden:
            x = jax.nn.relu(layer(x))
        return last(x)


def adapt(model: Any, rngs: nnx.Rngs) -> Any:
    """A copy of a model with such a head, of which nothing else trains."""
    model = nnx.clone(model)
    c = model.config
    width = model.head.in_features
    model.head = Head(width, c.num_classes, c.dtype, rngs)
    freeze(model, "head")
    return model
