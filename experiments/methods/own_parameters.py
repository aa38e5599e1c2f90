"""Methods that train the model's own parameters: all, the biases, the last block."""

import dataclasses
from typing import Any, ClassVar

from flax import nnx

from experiments.methods.method import Method
from experiments.training.session import Scope
from snella_jax import models
from snella_jax.models.swin.model import Pair
from snella_jax.nnx.surgery import freeze


@dataclasses.dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning: everything trains."""

    title: ClassVar[str] = "Full"

    lr: float = 1e-4
    """Peak learning rate."""

    def adapt(self, base: Any, scope: Scope) -> Any:
        """Returns a copy of a model."""
        return nnx.clone(base)


@dataclasses.dataclass(frozen=True)
class Bias(Method):
    """BitFit (Ben Zaken et al., arXiv 2106.10199): the biases train."""

    title: ClassVar[str] = "Bias"

    lr: float = 1e-2
    """Peak learning rate."""

    def adapt(self, base: Any, scope: Scope) -> Any:
        """Returns a copy of a model whose biases train.

        Raises:
          ValueError: `scope.trainable` does not compile, or there are no biases.
        """
        model = nnx.clone(base)
        state = nnx.to_flat_state(nnx.state(model, nnx.Param))
        if not any(path[-1] == "bias" for path, _ in state):
            raise ValueError(
                f"{self.title} trains biases: a {type(base).__name__} has none. Leave "
                "the method out."
            )
        freeze(model, f"{scope.trainable}|.*/bias")
        return model


@dataclasses.dataclass(frozen=True)
class Partial(Method):
    """The last block and the norm behind it train, besides the head."""

    title: ClassVar[str] = "Partial-1"

    lr: float = 1e-3
    """Peak learning rate."""

    def adapt(self, base: Any, scope: Scope) -> Any:
        """Returns a copy of a model, as lists of blocks, whose last block trains."""
        model = models.unstack(base)
        freeze(model, f"head|norm|{_last_block(model)}")
        return model


def _last_block(model: Any) -> str:
    """Returns the path of the block before the head, where blocks are lists."""
    blocks, path = model.blocks, "blocks"
    while isinstance(blocks, nnx.List):
        path, blocks = f"{path}/{len(blocks) - 1}", blocks[-1]
    return f"{path}/shifted" if isinstance(blocks, Pair) else path
