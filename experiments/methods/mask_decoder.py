"""The mask decoder alone: a SAM's image encoder stays as it is.

What the encoder makes of an image does not change then, so a run may compute it once
(`experiments.training.embeddings`).
"""

import dataclasses
from typing import Any, ClassVar

from flax import nnx

from experiments.methods import kinds
from experiments.methods.own_parameters import OwnParameters
from experiments.training.session import Scope
from snella_jax.nnx.surgery import freeze


@dataclasses.dataclass(frozen=True)
class MaskDecoder(OwnParameters):
    """The mask decoder and no_mask_embed train, on embeddings computed once."""

    title: ClassVar[str] = "decoder alone"

    lr: float = 1e-3
    """Peak learning rate."""

    def adapt(self, base: Any, scope: Scope) -> Any:
        """Returns a copy of a SAM in which what `scope.trainable` matches trains.

        Raises:
          ValueError: the model is no SAM, or `scope.trainable` matches nothing.
        """
        if not kinds.is_sam(base):
            raise ValueError(
                "decoder trains the mask decoder of a Sam, which a "
                f"{type(base).__name__} has none of. Leave the method out."
            )
        model = nnx.clone(base)
        freeze(model, scope.trainable)
        return model
