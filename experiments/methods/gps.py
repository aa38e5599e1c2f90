"""GPS (Zhang et al., arXiv 2312.10136): each neuron's inputs with the largest gradient.

For every output of a targeted kernel the weights of `per_neuron` inputs train, those
whose summed gradient of a supervised contrastive loss is the largest. Simplified: only
targeted kernels are selected from, by one view of each image; the biases stay, which
in the authors' code train, but for those of norms; and only the selected weights have
an optimizer's state, where that code masks the gradients of all. Merged, it costs
nothing at inference; locating costs the gradient of every targeted kernel once.
"""

from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Int

from experiments.methods.first_stage import Places
from experiments.methods.sensitivity import Scores
from experiments.methods.sparse import linear_layers, loosen
from snella_jax.nnx.surgery import freeze


def adapt(model: nnx.Module, places: Places, trainable: str) -> Any:
    """A copy of `model` in which the weights at some places train.

    Args:
      model: not adapted.
      places: of `selected`.
      trainable: regex of what trains besides.

    Raises:
      ValueError: `trainable` matches nothing, or a target is no `nnx.Linear`.
    """
    model = nnx.clone(model)
    for path, layer in linear_layers(model, "|".join(places)).items():
        loosen(layer, places[path])
    freeze(model, trainable)
    return model


def selected(scores: Scores, per_neuron: int) -> Places:
    """Where the largest scores of every output are.

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
    """Flat places of the largest scores in each column of `[*stack, n, m]`.

    >>> largest(np.array([[1, 5], [2, 4], [0, 6]]), 1)
    array([2, 5])
    """
    *stack, _, outputs = scores.shape
    rows = np.argpartition(scores, -per_neuron, axis=-2)[..., -per_neuron:, :]
    return (rows * outputs + np.arange(outputs)).reshape(*stack, -1)
