"""The base of all methods: a frozen dataclass of settings that knows what they do."""

import abc
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.training.competition import Competition
from experiments.training.recipe import Recipe
from experiments.training.rounds import Rounds
from experiments.training.session import Scope
from snella_jax.nnx.selection import has_adapters
from snella_jax.nnx.targets import select

# Paths of what may be stacked, with that of the stack.
STACKS = r"((?:encoder/)?blocks(?:/(?:\d+|windowed|whole))?)/(.*)"


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC):
    """A fine-tuning method with its settings: adapt, train, merge.

    A method is a subclass, itself a frozen dataclass, and a line in
    `registry.METHODS`. Its fields are its settings, `--METHOD.FIELD` on the command
    line; their docstrings are the help texts, and that of the class says in a sentence
    how it fine-tunes.

    Attributes:
      title: name in tables, before the rank.
      knobs: fields that the plain `--help` leaves out.
      needs_vit: True if only a plain ViT can be adapted.
      low_rank: True if its adapter is a LoRA, which PEFT has, too.
    """

    title: ClassVar[str]
    knobs: ClassVar[tuple[str, ...]] = ()
    needs_vit: ClassVar[bool] = False
    low_rank: ClassVar[bool] = False

    lr: float
    """Peak learning rate."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW."""

    @abc.abstractmethod
    def adapt(self, base: Any, scope: Scope) -> Any:
        """Returns a copy of a model that trains this way.

        Everything that does not train is no `nnx.Param` in it.

        Raises:
          ValueError: the model has nothing that `scope` names, or does not fit.
        """

    def watch(self) -> tuple[optax.GradientTransformation, ...]:
        """Returns transformations that see the raw gradient; none by default."""
        return ()

    def competition(self, model: Any, scope: Scope) -> Competition | None:
        """Returns how budgets of an adapted model move; None if they never do."""
        return None

    def merged(self, model: Any) -> Any:
        """Returns the trained model as it is tested; by default as it is."""
        return model

    def adapter(self, model: Any) -> Any:
        """Returns the trained model with adapters of the library; None if it has none.

        `snella.save` writes them.
        """
        return model if has_adapters(model) else None

    def moved(self, base: Any, merged: Any, scope: Scope) -> int:
        """Returns how many weights of the targeted kernels training changed."""
        before = {p: x.kernel[...] for p, x in select(base, scope.targets).items()}
        if base.config.stacked and not merged.config.stacked:
            before = by_block(before)
        after = select(merged, "|".join(before))
        return sum(int(jnp.sum(w != after[p].kernel[...])) for p, w in before.items())

    def kept(self, base: Any, merged: Any) -> int:
        """Returns the cost at inference: parameters beside the base's own.

        0 if everything merges into the base's weights.
        """
        return _size(merged) - _size(base)

    @property
    def rates(self) -> tuple[tuple[str, float], ...]:
        """Regexes of what trains at another rate, and the factors; see `Recipe`."""
        return ()

    @property
    def searched(self) -> dict[str, float]:
        """Settings that a search can choose, with their values."""
        return {"lr": self.lr, "weight_decay": self.weight_decay}

    @property
    def has_density(self) -> bool:
        """True if there is a `target_density` for a search to choose."""
        return False

    def check(self, name: str) -> None:
        """Raises a `ValueError` on settings that would fail in the midst of a run.

        Args:
          name: name of the method in the registry, for the message.
        """
        if not (0 < self.lr < math.inf and 0 <= self.weight_decay < math.inf):
            raise ValueError(
                f"{name}.lr={self.lr}, {name}.weight_decay={self.weight_decay}: "
                "expected lr > 0 and weight_decay >= 0."
            )

    def check_run(self, name: str, scope: Scope, recipe: Recipe) -> None:
        """Raises a `ValueError` on settings that fail `check`, or do not fit a run."""
        self.check(name)

    def check_rounds(self, name: str, scope: Scope, rounds: Rounds) -> None:
        """Raises a `ValueError` if a run has too few rounds for the method."""
        return None


@dataclasses.dataclass(frozen=True)
class Ranked(Method):
    """A method with factors or bottlenecks of some rank."""

    lr: float = 1e-2
    """Peak learning rate."""
    rank: int = 8
    """Columns of the factors."""

    def check(self, name: str) -> None:
        """Raises a `ValueError` on settings that would fail in the midst of a run."""
        super().check(name)
        check_counts(name, rank=self.rank)


def check_counts(name: str, **counts: int) -> None:
    """Raises a `ValueError` that names a setting below 1."""
    for field, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}.{field}={value}: expected at least 1.")


def by_block(values: Mapping[str, Any]) -> dict[str, Any]:
    """Splits arrays of stacked blocks, and names them as `models.unstack` does.

    >>> by_block({"blocks/attn/query": jnp.zeros((2, 8, 8))}).keys()
    dict_keys(['blocks/0/attn/query', 'blocks/1/attn/query'])
    """
    found = {}
    for path, own in values.items():
        stacked = re.fullmatch(STACKS, path) if own.ndim > 2 else None
        if stacked is None:
            found[path] = own
        else:
            blocks, rest = stacked.groups()
            found |= {f"{blocks}/{i}/{rest}": row for i, row in enumerate(own)}
    return found


def _size(model: Any) -> int:
    leaves = jax.tree.leaves(nnx.state(model, nnx.Variable))
    return sum(x.size for x in leaves if jnp.issubdtype(x.dtype, jnp.floating))
