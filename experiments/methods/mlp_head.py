"""MLP-3: a head of three layers on frozen features, as in VPT's comparison.

Jia et al. (arXiv 2203.12119): the linear head becomes an MLP whose hidden layers are as
wide as the features, with ReLU between them. Its last layer starts at 0.
"""

import dataclasses
from typing import Any, ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Float

from experiments.methods import kinds
from experiments.methods.method import Method
from experiments.training.session import Scope
from snella_jax.nnx.surgery import freeze

LAYERS = 3


@dataclasses.dataclass(frozen=True)
class MlpHead(Method):
    """A head of three layers trains, and nothing else."""

    title: ClassVar[str] = "MLP-3"

    lr: float = 1e-3
    """Peak learning rate."""

    def adapt(self, base: Any, scope: Scope) -> Any:
        """Returns a copy of a model with such a head.

        Raises:
          ValueError: the model has no classes.
        """
        kinds.require_classes(base, "MLP-3 trains a new head over classes")
        model = nnx.clone(base)
        c = model.config
        width = model.head.in_features
        model.head = Head(width, c.num_classes, c.dtype, scope.rngs())
        freeze(model, "head")
        return model


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
