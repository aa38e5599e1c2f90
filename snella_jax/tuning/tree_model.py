"""Adapted parameters without a framework as `Tuning` trains them."""

import dataclasses
from pathlib import Path

from jaxtyping import PRNGKeyArray

from snella_jax.adapters.tree import Adapters, Tree, join
from snella_jax.core.weight import AdaptedWeight
from snella_jax.tuning.parts import Dtype, Parts


@dataclasses.dataclass(frozen=True, eq=False)
class TreeModel:
    """Adapters of a tree of parameters; static, equal to itself alone.

    Attributes:
      adapters: as `pytree.adapt` returned them.
    """

    adapters: Adapters

    def split(self, params: Tree) -> Parts:
        """Splits adapted parameters."""
        trainable, budgets, frozen = self.adapters.partition(params)
        return Parts(trainable, budgets, {}, frozen)

    def model(self, parts: Parts) -> Tree:
        """Returns plain parameters with `w0 + delta` as weights."""
        return self.adapters.summed(_params(parts))

    def training_model(self, parts: Parts, key: PRNGKeyArray) -> Tree:
        """Returns the same: nothing of a tree is drawn."""
        del key
        return self.model(parts)

    def changed(self, model: Tree) -> Tree:
        """Returns nothing, as nothing of a tree changes when it is used."""
        del model
        return {}

    def weights(self, parts: Parts) -> list[AdaptedWeight]:
        """Lists every adapted weight."""
        return self.adapters.weights(_params(parts))

    def merged(self, parts: Parts, unmoved_budgets: bool, dtype: Dtype) -> Tree:
        """Returns plain parameters."""
        return self.adapters.merge(
            _params(parts), unmoved_budgets=unmoved_budgets, dtype=dtype
        )

    def save(self, parts: Parts, folder: str | Path, base: str | None) -> None:
        """Writes the adapters."""
        self.adapters.save(_params(parts), folder, base=base)


def _params(parts: Parts) -> Tree:
    return join(parts.trainable, parts.budgets, parts.frozen)
