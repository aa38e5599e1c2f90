"""An adapted Linen module as `Tuning` trains it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.core
import jax
from jaxtyping import PRNGKeyArray

from snella_jax.adapters.tree import Tree, join
from snella_jax.core.weight import AdaptedWeight
from snella_jax.linen.binding import Adapters
from snella_jax.tuning.parts import Dtype, Parts


class Bound:
    """A Linen module with its adapters and variables: a function of its inputs.

    Attributes:
      adapters: those of the module.
      params: adapted parameters.
      carried: other collections (`batch_stats`), as the last call left them.
    """

    def __init__(
        self,
        adapters: Adapters,
        params: Tree,
        carried: Mapping[str, Any],
        keys: Mapping[str, PRNGKeyArray] | None = None,
    ):
        """Binds them.

        Args:
          adapters, params, carried: as the attributes.
          keys: key of each random stream, for a step; None to evaluate, which changes
            nothing.
        """
        self.adapters, self.params, self.carried = adapters, params, dict(carried)
        self._keys, self._calls = keys, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module: arguments of its call, and those of `module.apply`.

        In a step collections are updated, and each call has random keys of its own;
        `rngs=` adds others.
        """
        variables = {"params": self.params, **self.carried}
        if self._keys is None:
            return self.adapters.apply(variables, *args, **kwargs)
        if "mutable" in kwargs:
            raise ValueError(
                "mutable= in a loss of Tuning.step: every collection but the "
                "parameters is updated already."
            )
        fresh = {
            name: jax.random.fold_in(key, self._calls)
            for name, key in self._keys.items()
        }
        kwargs["rngs"] = fresh | (kwargs.get("rngs") or {})
        self._calls += 1
        output, moved = self.adapters.apply(
            variables, *args, mutable=list(self.carried), **kwargs
        )
        self.carried |= moved
        return output


@dataclasses.dataclass(frozen=True, eq=False)
class LinenModel:
    """Adapters of a Linen module; static, equal to itself alone.

    Attributes:
      adapters: as `linen.adapt` returned them.
      streams: names of the random streams that the module draws from in training.
    """

    adapters: Adapters
    streams: tuple[str, ...]

    def split(self, params: Tree, variables: Mapping[str, Any]) -> Parts:
        """Splits adapted parameters, and takes the other collections of variables."""
        trainable, budgets, frozen = self.adapters.partition(params)
        carried = {name: tree for name, tree in variables.items() if name != "params"}
        carried = flax.core.unfreeze(carried)  # as a call returns them
        return Parts(trainable, budgets, carried, frozen)

    def model(self, parts: Parts) -> Bound:
        """Returns the module with its adapters, to evaluate."""
        return Bound(self.adapters, _params(parts), parts.changing)

    def training_model(self, parts: Parts, key: PRNGKeyArray) -> Bound:
        """Returns the module of one step, with a key for each stream."""
        params, own = _params(parts), jax.random.split(key, len(self.streams) + 1)
        if any(site.rule.sketch > 1 for site in self.adapters.sites.values()):
            params = self.adapters.seed(params, own[-1])
        keys = dict(zip(self.streams, own[:-1], strict=True))
        return Bound(self.adapters, params, parts.changing, keys)

    def changed(self, model: Bound) -> dict[str, Any]:
        """Returns the collections that the loss updated."""
        return model.carried

    def weights(self, parts: Parts) -> list[AdaptedWeight]:
        """Lists every adapted weight."""
        return self.adapters.weights(_params(parts))

    def merged(
        self, parts: Parts, unmoved_budgets: bool, dtype: Dtype
    ) -> dict[str, Any]:
        """Returns plain variables, for `module.apply`."""
        params = _params(parts)
        plain = self.adapters.merge(
            params, unmoved_budgets=unmoved_budgets, dtype=dtype
        )
        return {"params": plain, **parts.changing}

    def save(self, parts: Parts, folder: str | Path, base: str | None) -> None:
        """Writes the adapters, and batch statistics."""
        stats = parts.changing.get("batch_stats")
        self.adapters.save(_params(parts), folder, base=base, batch_stats=stats)


def streams_of(names: str | Sequence[str], adapters: Adapters) -> tuple[str, ...]:
    """Returns names of streams as a tuple, with that of adapters that drop.

    Raises:
      TypeError: one name alone, whose letters would be taken for names.
    """
    if isinstance(names, str):
        raise TypeError(f"streams={names!r}: expected a tuple of names, ({names!r},).")
    rules = [site.rule for site in adapters.sites.values()]
    drops = any(rule.dropout or rule.drop_path for rule in rules)
    return tuple(dict.fromkeys([*names, *["dropout"] * drops]))


def _params(parts: Parts) -> Tree:
    return join(parts.trainable, parts.budgets, parts.frozen)
