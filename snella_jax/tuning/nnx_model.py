"""An adapted NNX model as `Tuning` trains it."""

import dataclasses
import logging
from pathlib import Path

from flax import nnx
from jaxtyping import PRNGKeyArray

from snella_jax.core.paths import join
from snella_jax.core.weight import AdaptedWeight
from snella_jax.nnx.adapt import merge, seed
from snella_jax.nnx.saving import save
from snella_jax.nnx.selection import weights_of
from snella_jax.nnx.variables import Budget
from snella_jax.tuning.parts import Dtype, Parts

log = logging.getLogger("snella_jax")
CHANGING = (nnx.RngState, nnx.BatchStat)


@dataclasses.dataclass(frozen=True)
class NnxModel:
    """An adapted NNX model without its arrays; static.

    Attributes:
      graphdef: all of it that is no array.
    """

    graphdef: nnx.GraphDef

    @classmethod
    def split(cls, model: nnx.Module) -> tuple["NnxModel", Parts]:
        """Splits an adapted model."""
        _log_what_is_off(model)
        graphdef, *states = nnx.split(model, nnx.Param, Budget, CHANGING, ...)
        return cls(graphdef), Parts(*states)

    def model(self, parts: Parts) -> nnx.Module:
        """Returns the adapted model."""
        return nnx.merge(self.graphdef, *parts, copy=True)

    def training_model(self, parts: Parts, key: PRNGKeyArray) -> nnx.Module:
        """Returns the model of one step; it may change."""
        model = self.model(parts)
        seed(model, key)
        return model

    def changed(self, model: nnx.Module) -> nnx.State:
        """Returns the changing state of a model that was called."""
        return nnx.state(model, CHANGING)

    def weights(self, parts: Parts) -> list[AdaptedWeight]:
        """Lists every adapted weight."""
        return weights_of(self.model(parts))

    def merged(self, parts: Parts, unmoved_budgets: bool, dtype: Dtype) -> nnx.Module:
        """Returns the plain model."""
        model = self.model(parts)
        return merge(model, unmoved_budgets=unmoved_budgets, dtype=dtype)

    def save(self, parts: Parts, folder: str | Path, base: str | None) -> None:
        """Writes the adapters."""
        save(self.model(parts), folder, base=base)


def _log_what_is_off(model: nnx.Module) -> None:
    """Logs the layers that a call of `model.eval()` has switched off."""
    off = [
        join(path)
        for path, node in nnx.iter_graph(model)
        if (isinstance(node, nnx.Dropout) and node.rate and node.deterministic)
        or (isinstance(node, nnx.BatchNorm) and node.use_running_average)
    ]
    if off:
        log.warning(
            "%s: in evaluation mode, so that training drops nothing and leaves running "
            "statistics as they are; call model.train() before Tuning.create if it "
            "should not",
            ", ".join(off),
        )
