"""The arrays of an adapted model, by what training does to them."""

from pathlib import Path
from typing import Any, NamedTuple, Protocol

from jaxtyping import DTypeLike, PRNGKeyArray

from snella_jax.core.weight import AdaptedWeight

Dtype = DTypeLike | None


class Parts(NamedTuple):
    """The arrays of an adapted model.

    Attributes:
      trainable: factors, and what `config.trainable` named.
      budgets: int32, moved by `reallocate`.
      changing: random streams and batch statistics, which a call of the model moves.
      frozen: the rest.
    """

    trainable: Any
    budgets: Any
    changing: Any
    frozen: Any


class Binding(Protocol):
    """An adapted model without its arrays; static and hashable."""

    def model(self, parts: Parts) -> Any:
        """Returns the adapted model, to evaluate."""
        ...

    def training_model(self, parts: Parts, key: PRNGKeyArray) -> Any:
        """Returns the model of one step, given to the loss; it may change."""
        ...

    def changed(self, model: Any) -> Any:
        """Returns the changing state of a training model after the loss."""
        ...

    def weights(self, parts: Parts) -> list[AdaptedWeight]:
        """Lists every adapted weight."""
        ...

    def merged(self, parts: Parts, unmoved_budgets: bool, dtype: Dtype) -> Any:
        """Returns the plain model; raises `BudgetsNeverMoved` as `snella.merge`."""
        ...

    def save(self, parts: Parts, folder: str | Path, base: str | None) -> None:
        """Writes the adapters to a folder."""
        ...
