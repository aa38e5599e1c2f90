"""Methods that train the model's own parameters: all, the biases, the last block."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.methods import kinds
from experiments.methods.method import Method
from experiments.methods.sketched import Sketched, plain, sketch_kernels
from experiments.training.session import Scope
from snella_jax import models
from snella_jax.models.swin.model import Pair
from snella_jax.nnx.surgery import freeze, thaw
from snella_jax.nnx.variables import variables_of


@dataclasses.dataclass(frozen=True)
class OwnParameters(Method):
    """A method that adds nothing to a model."""

    def merged(self, model: Any) -> Any:
        """Returns a plain copy, nothing of which is frozen."""
        model = nnx.clone(model)
        thaw(model)
        return model


@dataclasses.dataclass(frozen=True)
class Full(Sketched, OwnParameters):
    """Full fine-tuning: everything trains, but a decoder's embedding and head, and a
    SAM's embeddings of prompts."""

    title: ClassVar[str] = "Full"

    lr: float = 1e-4
    """Peak learning rate."""

    def adapt(self, base: Any, scope: Scope) -> Any:
        """Returns a copy of a model.

        Embedding and head of a decoder train where `scope.trainable` names them, and so
        does a SAM's part besides the encoder.

        Raises:
          ValueError: sketched, `scope.targets` matches nothing, or no `nnx.Linear`.
        """
        model = nnx.clone(base)
        if kinds.is_decoder(model):
            freeze(model, f"blocks|norm|{scope.trainable}")
        elif kinds.is_sam(model):
            freeze(model, f"encoder|{scope.trainable}")
        if self.sketch > 1:
            sketch_kernels(model, scope.targets, self.rows)
        return model

    def merged(self, model: Any) -> Any:
        """Returns a plain copy, nothing of which is frozen or sketched."""
        return plain(model)


@dataclasses.dataclass(frozen=True)
class FullFloat32(Full):
    """Full fine-tuning in float32, whatever the dtype of frozen weights."""

    def adapt(self, base: Any, scope: Scope) -> Any:
        """Returns a copy of a model: steps of 1e-4 would be lost on 16 bits."""
        model = super().adapt(base, scope)
        wide = jax.tree.map(
            lambda weight: weight.astype(jnp.float32), nnx.state(model, nnx.Param)
        )
        nnx.update(model, wide)
        return model


@dataclasses.dataclass(frozen=True)
class Bias(OwnParameters):
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
        if not any(p.endswith("/bias") for p, _ in variables_of(model, nnx.Param)):
            raise ValueError(
                f"Bias trains biases: a {type(model).__name__} has none. Leave the "
                "method out."
            )
        where = "encoder/" if kinds.is_sam(model) else ""
        freeze(model, f"{scope.trainable}|{where}.*/bias")
        return model


@dataclasses.dataclass(frozen=True)
class Partial(OwnParameters):
    """The last block and the norm behind it train, besides a classifier's head."""

    title: ClassVar[str] = "Partial-1"

    lr: float = 1e-3
    """Peak learning rate."""

    def adapt(self, base: Any, scope: Scope) -> Any:
        """Returns a copy of a model, as lists of blocks, whose last block trains.

        Raises:
          ValueError: the model is a SAM.
        """
        if kinds.is_sam(base):
            raise ValueError(
                "Partial-1 trains the block before a head or a vocabulary, and behind "
                "the last one of a Sam is its neck. Leave the method out."
            )
        model = models.unstack(base)
        besides = scope.trainable if kinds.is_decoder(model) else "head"
        freeze(model, f"{besides}|norm|{_last_block(model)}")
        return model


def _last_block(model: Any) -> str:
    """Returns the path of the block before the head, where blocks are lists."""
    blocks, path = model.blocks, "blocks"
    while isinstance(blocks, nnx.List):
        path, blocks = f"{path}/{len(blocks) - 1}", blocks[-1]
    return f"{path}/shifted" if isinstance(blocks, Pair) else path
