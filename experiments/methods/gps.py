"""GPS (Zhang et al., arXiv 2312.10136): each neuron's inputs with the largest gradient.

For every output of a targeted kernel the weights of `per_neuron` inputs train, those
whose summed gradient of a supervised contrastive loss is the largest. Simplified: only
targeted kernels are selected from, by one view of each image; the biases stay, which
in the authors' code train, but for those of norms; and only the selected weights have
an optimizer's state, where that code masks the gradients of all. Ours: without
classes to contrast, in a decoder or a SAM, the loss is that of training. Merged, it
costs nothing at inference; locating costs the gradient of every targeted kernel once.
"""

import dataclasses
from typing import Any, ClassVar

import numpy as np
from flax import nnx
from jaxtyping import Int

from experiments.methods import sparse
from experiments.methods.linear_layer import linear_layers
from experiments.methods.method import check_counts
from experiments.methods.sensitivity import Rule, Scored, Scores
from experiments.training.session import Places, Scope
from snella_jax.nnx.surgery import freeze


@dataclasses.dataclass(frozen=True)
class Gps(Scored):
    """GPS: every neuron's inputs with the largest gradient train."""

    title: ClassVar[str] = "GPS"
    rule: ClassVar[Rule] = "contrastive"

    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Weight decay of AdamW; the selected weights have none in any case."""
    per_neuron: int = 1
    """Number of inputs of every output of the targeted kernels."""

    def check(self, name: str) -> None:
        """Raises a `ValueError` on settings that would fail in the midst of a run."""
        super().check(name)
        check_counts(name, per_neuron=self.per_neuron)

    def choose(self, scores: Scores) -> Places:
        """Returns flat places by layer; raises as `selected`."""
        return selected(scores, self.per_neuron)

    def adapt(self, base: Any, scope: Scope) -> Any:
        """Returns a copy of a model in which the selected weights train.

        Raises:
          ValueError: `trainable` matches nothing, or a target is no `nnx.Linear`.
        """
        model = nnx.clone(base)
        for path, layer in linear_layers(model, "|".join(scope.places)).items():
            sparse.loosen(layer, scope.places[path])
        freeze(model, scope.trainable)
        return model

    def merged(self, model: Any) -> Any:
        """Returns a plain copy with the values added."""
        return sparse.merge(model)


def selected(scores: Scores, per_neuron: int) -> Places:
    """Returns where the largest scores of every output are.

    Raises:
      ValueError: `per_neuron` is more than the inputs of one.
    """
    for path, own in scores.items():
        if not 1 <= per_neuron <= own.shape[-2]:
            raise ValueError(
                f"per_neuron={per_neuron}: {path} has {own.shape[-2]} inputs, expected "
                "1 to as many."
            )
    return {path: largest(own, per_neuron) for path, own in scores.items()}


def largest(scores: np.ndarray, per_neuron: int) -> Int[np.ndarray, "*stack k"]:
    """Returns flat places of the largest scores in each column of `[*stack, n, m]`.

    >>> largest(np.array([[1, 5], [2, 4], [0, 6]]), 1)
    array([2, 5])
    """
    *stack, _, outputs = scores.shape
    rows = np.argpartition(scores, -per_neuron, axis=-2)[..., -per_neuron:, :]
    return (rows * outputs + np.arange(outputs)).reshape(*stack, -1)
