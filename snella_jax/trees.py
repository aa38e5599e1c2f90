"""Adapters in a tree of parameters: nested dicts, of Linen or of nobody's framework.

An adapter sits beside its weight: `{"fc": {"kernel": ..., "adapter": {"a": ...}}}` (and
as `w_adapter` beside a weight `w` that is not called `kernel`). Paths in regexes and
files are those of the layer, without `/kernel`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, PRNGKeyArray

from snella_jax import adapter_file
from snella_jax.config import Rule, SnellaConfig
from snella_jax.fitting import anyone
from snella_jax.layout import Layout
from snella_jax.rules import check_overrides, listed, matches_or_holds
from snella_jax.weight import AdaptedWeight, Site, start

Tree = dict[str, Any]
COUNTS = ("budget", "allocated_at")


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Which weights of a tree are adapted, and what trains: static.

    Attributes:
      sites: by name of the weight, `fc/kernel`.
      trainable: regex of what trains besides the factors.
    """

    sites: Mapping[str, Site] = dataclasses.field(hash=False)
    trainable: str

    def partition(self, params: Tree) -> tuple[Tree, Tree, Tree]:
        """`trainable`, `budgets` and `frozen` of adapted parameters.

        As `snella.partition`: the first for the optimizer, the second for
        `reallocate`; `join` puts them together again.
        """
        trainable, budgets, frozen = {}, {}, {}
        fixed = {
            f"{_adapter(name)}/piece_coeff"
            for name, site in self.sites.items()
            if not getattr(site.kernel, "learn_piece_coeff", True)
        }
        adapters = tuple(f"{_adapter(name)}/" for name in self.sites)
        for name, leaf in flat(params).items():
            if not name.startswith(adapters):
                trains = matches_or_holds(self.trainable, name)
                (trainable if trains else frozen)[name] = leaf
            elif name.endswith(COUNTS):
                budgets[name] = leaf
            else:
                (frozen if name in fixed else trainable)[name] = leaf
        return nested(trainable), nested(budgets), nested(frozen)

    def weights(self, params: Tree) -> list[AdaptedWeight]:
        """Every adapted weight: for `snella.sparsity` and `snella.describe`."""
        leaves = flat(params)
        found = []
        for name, site in self.sites.items():
            prefix = f"{_adapter(name)}/"
            own = {
                k.removeprefix(prefix): v
                for k, v in leaves.items()
                if k.startswith(prefix)
            }
            counts = [own.pop(count) for count in COUNTS]
            found.append(
                AdaptedWeight(layer_path(name), site, leaves[name], own, *counts)
            )
        return found

    def summed(self, params: Tree) -> Tree:
        """Plain parameters, `w0 + delta` for every adapted weight; differentiable.

        For an apply function that knows nothing of adapters. Its backward pass keeps
        every update and every sum: as much memory as the adapted weights take twice.
        `adapted_dense` at the matmul, Linen's and NNX's bindings keep none of it.
        """
        return self._with(params, lambda w: (w.w0 + w.delta()).astype(w.w0.dtype))

    def merge(self, params: Tree, *, unmoved_budgets: bool = False) -> Tree:
        """Plain parameters for good: as `summed`, with the checks of `snella.merge`.

        Raises:
          BudgetsNeverMoved: they should have, unless `unmoved_budgets`.
        """
        return self._with(params, lambda w: w.merged(unmoved_budgets))

    def unload(self, params: Tree) -> Tree:
        """Plain parameters without the adapters; what else trained stays."""
        return self._with(params, lambda weight: weight.w0)

    def save(
        self,
        params: Tree,
        folder: str | Path,
        *,
        base: str | None = None,
        batch_stats: Tree | None = None,
    ) -> None:
        """Writes the adapters and what else trained, as `snella.save` does.

        Args:
          params: adapted.
          folder: to be made.
          base: what the base model is called.
          batch_stats: running statistics that training has changed.

        Raises:
          ValueError, FileExistsError: as `snella.save`.
        """
        trained = {
            name: leaf
            for name, leaf in flat(self.unload(params)).items()
            if matches_or_holds(self.trainable, name)
        }
        trained |= flat(batch_stats or {})
        adapter_file.write(folder, self.weights(params), trained, base)

    def _with(self, params: Tree, value: Callable[[AdaptedWeight], Array]) -> Tree:
        prefixes = tuple(f"{_adapter(name)}/" for name in self.sites)
        leaves = flat(params)
        new = {k: leaf for k, leaf in leaves.items() if not k.startswith(prefixes)}
        weights = zip(self.sites, self.weights(params), strict=True)
        return nested(new | {name: value(weight) for name, weight in weights})


def join(*parts: Tree) -> Tree:
    """What `partition` took apart."""
    return nested(functools.reduce(dict.__or__, map(flat, parts)))


def site(
    path: str, shape: tuple[int, ...], layout: Layout, rule: Rule, must_move: bool
) -> Site:
    """The site of a weight of this shape.

    Raises:
      ValueError: the layout does not fit the shape, or `split` the layout.
    """
    layout = layout.split(rule.split) if rule.split > 1 else layout
    stack = shape[: len(shape) - len(layout.shape)]
    if shape != stack + layout.shape:
        raise ValueError(
            f"{path} has shape {shape}: expected {layout.shape} behind the axes of the "
            "stack; stack blocks along axis 0."
        )
    return Site(rule, layout, stack, must_move)


def place(
    params: Tree, sites: Mapping[str, Site], config: SnellaConfig, key: PRNGKeyArray
) -> tuple[Adapters, Tree]:
    """Fresh adapters for these weights, and the frozen ones in `config.frozen_dtype`.

    Raises:
      ValueError: an override or `config.trainable` matches nothing.
    """
    check_overrides(config, map(layer_path, sites))
    leaves = flat(params)
    trainable = {name for name in leaves if matches_or_holds(config.trainable, name)}
    if config.trainable and not trainable:
        raise ValueError(
            f"trainable={config.trainable!r} matches nothing; pass trainable='' if "
            f"only the adapters train. There are: {listed(leaves)}"
        )
    dtype = config.frozen_dtype
    for name, leaf in leaves.items():
        floats = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        if dtype is not None and floats and name not in trainable:
            leaves[name] = jnp.asarray(leaf, dtype)
    by_path = {layer_path(name): site for name, site in sites.items()}
    starts = start(by_path, config, key)
    for name in sites:
        factors, *counts = starts[layer_path(name)]
        leaves |= _leaves(name, factors | dict(zip(COUNTS, counts, strict=True)))
    return Adapters(dict(sites), config.trainable), nested(leaves)


def fill(
    params: Tree, weights: Mapping[str, AdaptedWeight], trained: Mapping[str, Any]
) -> tuple[Adapters, Tree]:
    """Adapters from a file, and parameters with them and what else trained."""
    leaves = flat(params)
    names = {layer_path(name): name for name in leaves}
    leaves |= {name: jnp.asarray(value) for name, value in trained.items()}
    for path, weight in weights.items():
        counts = zip(COUNTS, (weight.budget, weight.allocated_at), strict=True)
        leaves |= _leaves(names[path], weight.factors | dict(counts))
    sites = {names[path]: weight.site for path, weight in weights.items()}
    return Adapters(sites, anyone(trained)), nested(leaves)


def flat(params: Tree) -> dict[str, Any]:
    """Leaves by "/"-joined name."""
    return flatten_dict(params, sep="/")


def nested(leaves: Mapping[str, Any]) -> Tree:
    """What `flat` took apart."""
    return unflatten_dict(leaves, sep="/")


def layer_path(name: str) -> str:
    """Of the layer that holds a weight."""
    return "/".join(name.split("/")[:-1]) if name.split("/")[-1] == "kernel" else name


def _adapter(name: str) -> str:
    """Where the adapter of a weight sits."""
    path = layer_path(name)
    return f"{name}_adapter" if path == name else f"{path}/adapter".lstrip("/")


def _leaves(name: str, values: Mapping[str, Any]) -> dict[str, Array]:
    return {f"{_adapter(name)}/{key}": jnp.asarray(v) for key, v in values.items()}
