"""SPT (He et al., arXiv 2303.08566): modules where it matters, else single weights.

Of all targeted weights the share with the largest summed squared gradients is
sensitive. A matrix that has at least 1 / `ease` as many of them as a LoRA branch (or an
adapter behind it) has parameters gets one; of the others the sensitive weights train.
Simplified: biases and norms are left out of it, the modules have no drop-path (0.1 in
the authors' code), and the share is fixed beforehand, where that code sweeps it for a
number of parameters. SPT-LoRA costs nothing at inference once merged, SPT-Adapter two
thin matmuls behind every matrix that got one; locating costs the gradient of every
targeted kernel once.
"""

import re
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from experiments.methods import adapter, lora, sparse
from experiments.methods.first_stage import Places
from experiments.methods.sensitivity import Scores, top
from experiments.methods.sparse import linear_layers
from snella_jax.models import Model, unstack
from snella_jax.nnx.surgery import become, freeze, mixed_class


def adapt(
    model: Model,
    places: Places,
    module: Literal["lora", "adapter"],
    trainable: str,
    rank: int,
    ease: float,
    rngs: nnx.Rngs,
) -> Any:
    """A copy of a model, as lists of blocks, with what was located in it.

    Args:
      model: not adapted.
      places: of `sensitive`.
      module: what sensitive matrices get.
      trainable: regex of what trains besides.
      rank: of the modules.
      ease: of becoming a sensitive matrix.

    Raises:
      ValueError: `trainable` matches nothing, or a target is no `nnx.Linear`.
    """
    adapted = nnx.clone(model)
    freeze(adapted, trainable)
    adapted = unstack(adapted)
    key = rngs.params()
    layers = linear_layers(adapted, "|".join(places))
    for index, (path, layer) in enumerate(layers.items()):
        found, own = places[path], jax.random.fold_in(key, index)
        n, m = layer.kernel.shape
        size = rank * (n + m) if module == "lora" else rank * 2 * m + rank + m
        if len(found) >= size / ease:
            _structure(layer, module, rank, own)
        elif len(found):
            sparse.loosen(layer, found)
    return adapted


def merge(model: Any) -> Any:
    """A copy with branches and single weights in the kernels; adapters stay."""
    return sparse.merge(lora.merge(model))


def sensitive(scores: Scores, share: float) -> Places:
    """Where the largest of all scores are, by layer, of stacked ones by block.

    >>> found = sensitive({"a": np.array([[1, 9]]), "b": np.array([[8, 2]])}, 0.5)
    >>> {path: places.tolist() for path, places in found.items()}
    {'a': [1], 'b': [0]}
    """
    masks = top(by_block(scores), share)
    return {path: np.flatnonzero(mask) for path, mask in masks.items()}


def _structure(layer: Any, module: str, rank: int, key: Any) -> None:
    if module == "lora":
        lora.join(layer, rank, key)
    else:
        layer.bottleneck = adapter.Bottleneck((), layer.out_features, rank, key)
        become(layer, mixed_class(adapter.Sequential, type(layer)))


def by_block(scores: Scores) -> Scores:
    """Of stacked blocks, those of each, by the paths that `unstack` gives them."""
    found = {}
    for path, own in scores.items():
        stacked = (
            re.fullmatch(r"(blocks(?:/\d+)?)/(.*)", path) if own.ndim > 2 else None
        )
        if stacked is None:
            found[path] = own
        else:
            blocks, rest = stacked.groups()
            found |= {f"{blocks}/{i}/{rest}": row for i, row in enumerate(own)}
    return found
