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

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

from experiments.methods import adapter, lora, sparse
from experiments.methods.linear_layer import linear_layers
from experiments.methods.method import Ranked, by_block
from experiments.methods.sensitivity import Rule, Scored, Scores, top
from experiments.training.session import Places, Scope
from snella_jax.models import unstack
from snella_jax.nnx.surgery import become, freeze, mixed_class


@dataclasses.dataclass(frozen=True)
class Spt(Ranked, Scored):
    """A method that gives sensitive matrices a module of their own."""

    rule: ClassVar[Rule] = "squares"
    module: ClassVar[Literal["lora", "adapter"]]

    share: float = 0.005
    """Fraction of the targeted weights that are sensitive."""
    ease: float = 10.0
    """A matrix gets a module of its own from 1 / ease as many sensitive weights on as
    the module has parameters."""

    def check(self, name: str) -> None:
        """Raises a `ValueError` on settings that would fail in the midst of a run."""
        super().check(name)
        if not (0 < self.share <= 1 and 0 < self.ease < math.inf):
            raise ValueError(
                f"{name}.share={self.share}, {name}.ease={self.ease}: expected "
                "0 < share <= 1 and ease > 0."
            )

    def choose(self, scores: Scores) -> Places:
        """Returns flat places of the sensitive weights by layer, block by block."""
        return sensitive(scores, self.share)

    def adapt(self, base: Any, scope: Scope) -> Any:
        """Returns a copy of a model, as lists of blocks, with what was located in it.

        Raises:
          ValueError: `trainable` matches nothing, or a target is no `nnx.Linear`.
        """
        model = nnx.clone(base)
        freeze(model, scope.trainable)
        model = unstack(model)
        key = scope.rngs().params()
        layers = linear_layers(model, "|".join(scope.places))
        for index, (path, layer) in enumerate(layers.items()):
            found, own = scope.places[path], jax.random.fold_in(key, index)
            if len(found) >= self._size(*layer.kernel.shape) / self.ease:
                self._structure(layer, own)
            elif len(found):
                sparse.loosen(layer, found)
        return model

    def merged(self, model: Any) -> Any:
        """Returns a copy with branches and single weights merged; adapters stay."""
        return sparse.merge(lora.merge(model))

    def _size(self, n: int, m: int) -> int:
        """Returns the number of parameters of a module at an `[n, m]` kernel."""
        if self.module == "lora":
            return self.rank * (n + m)
        return self.rank * 2 * m + self.rank + m

    def _structure(self, layer: Any, key: PRNGKeyArray) -> None:
        if self.module == "lora":
            lora.join(layer, self.rank, key)
        else:
            width = layer.out_features
            layer.bottleneck = adapter.Bottleneck((), width, self.rank, key)
            become(layer, mixed_class(adapter.Sequential, type(layer)))


@dataclasses.dataclass(frozen=True)
class SptAdapter(Spt):
    """Adapters behind sensitive matrices, single weights elsewhere."""

    title: ClassVar[str] = "SPT-Adapter"
    module: ClassVar[Literal["lora", "adapter"]] = "adapter"


@dataclasses.dataclass(frozen=True)
class SptLora(Spt):
    """LoRA at sensitive matrices, single weights elsewhere."""

    title: ClassVar[str] = "SPT-LoRA"
    module: ClassVar[Literal["lora", "adapter"]] = "lora"


def sensitive(scores: Scores, share: float) -> Places:
    """Returns where the largest of all scores are, by layer, of stacked ones by block.

    >>> found = sensitive({"a": np.array([[1, 9]]), "b": np.array([[8, 2]])}, 0.5)
    >>> {path: places.tolist() for path, places in found.items()}
    {'a': [1], 'b': [0]}
    """
    masks = top(by_block(scores), share)
    return {path: np.flatnonzero(mask) for path, mask in masks.items()}
