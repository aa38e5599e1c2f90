"""Adapters for nested dicts of parameters and any function that takes them.

>>> import jax
>>> import jax.numpy as jnp
>>> import snella_jax as snella
>>> params = {"fc": {"kernel": jnp.ones((6, 8))}, "head": jnp.ones((8, 2))}
>>> config = snella.SnellaConfig(rank=4, targets="fc", trainable="head")
>>> adapters, params = adapt(params, config, key=jax.random.key(0))
>>> trainable, budgets, frozen = adapters.partition(params)
>>> sorted(trainable), sorted(trainable["fc"]["adapter"]), sorted(frozen)
(['fc', 'head'], ['a', 'alpha', 'b', 'beta', 'piece_coeff'], ['fc'])
>>> plain = adapters.summed(join(trainable, budgets, frozen))  # for any apply(...)
>>> plain["fc"]["kernel"].shape, sorted(plain["fc"])
((6, 8), ['kernel'])
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from snella_jax.adapters import file_format
from snella_jax.adapters.base import Base
from snella_jax.adapters.fitting import any_of, fit
from snella_jax.adapters.tree import (
    Adapters,
    Key,
    Tree,
    arrays_of,
    by_name,
    fill,
    flat,
    join,
    layer_path,
    name_of,
    nested,
    place,
    site,
    unboxed,
)
from snella_jax.core.binding import check_binding
from snella_jax.core.config import Rule, SnellaConfig
from snella_jax.core.fused import fall_back
from snella_jax.core.layout import Layout
from snella_jax.core.names import is_added
from snella_jax.core.paths import chosen, listed, matches_or_holds, names_along
from snella_jax.core.weight import Site

__all__ = ["Adapters", "adapt", "flattened", "join", "load"]


def adapt(
    params: Tree,
    config: SnellaConfig,
    *,
    key: PRNGKeyArray,
    layouts: Mapping[str, Layout] | None = None,
) -> tuple[Adapters, Tree]:
    """Adapts the weights in a tree of parameters that `config.targets` matches.

    Args:
      params: nested dicts of arrays; `flattened` makes them of other trees. Of boxes
        (`nn.Partitioned`) the names go into `Adapters.specs`.
      config: targets, rules and densities. `path="parallel"`, what drops and a sketch
        need a layer, and are refused.
      key: draws the factors.
      layouts: for a regex of paths, the axes of a weight where they are not `[n, m]`;
        axes in front of a layout's are a stack.

    Raises:
      ValueError: a rule matches nothing or needs a layer, the axes of a matched weight
        are unknown, or there is something where an adapter goes.
      TypeError: a model of another binding, lists among the parameters, or no random
        key.
    """
    check_binding(params, "pytree")
    matrices = _Matrices(params, layouts)
    matrices.check_known(config.targets, config.trainable)
    sites = {
        matrices.keys[path]: matrices.site(path, config.rule(path), config.must_move)
        for path in chosen(matrices.keys, config.targets)
    }
    return place(params, sites, config, key)


def load(
    params: Tree,
    folder: str | Path,
    *,
    rename: Mapping[str, str] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    allow_base_mismatch: bool = False,
) -> tuple[Adapters, Tree]:
    """Loads adapters from a folder into a tree of parameters.

    Args:
      params: plain parameters.
      folder: folder of an adapter; any binding may have written it.
      rename: as in `snella.load`.
      layouts: as in `adapt`.
      allow_base_mismatch: as in `snella.load`.

    Raises:
      FileNotFoundError, CheckpointError: as `snella.load`.
      TypeError: a model of another binding.
    """
    check_binding(params, "pytree")
    matrices = _Matrices(params, layouts)

    def locate(path: str, rule: Rule, must_move: bool) -> tuple[Site, Array]:
        if path not in matrices.keys:
            raise ValueError("there is no such matrix")
        found = matrices.site(path, rule, must_move)
        return found, matrices.leaves[matrices.keys[path]]

    leaves = by_name(matrices.leaves)
    weights, trained, stats = fit(
        file_format.read(folder),
        locate,
        Base(leaves),
        leaves,
        rename=rename,
        allow_base_mismatch=allow_base_mismatch,
    )
    adapters, tree = fill(params, weights, trained | stats)
    # Statistics are leaves like others here, but do not train.
    return dataclasses.replace(adapters, trainable=any_of(trained)), tree


def flattened(tree: Any) -> tuple[Tree, Callable[[Tree], Any]]:
    """Flattens the arrays of any pytree to nested dicts; also returns the way back.

    For an equinox module, a list of layers or a named tuple. What they hold besides
    arrays stays as it is. The way back takes plain parameters (`Adapters.summed`,
    `merge`).

    Raises:
      ValueError: two arrays have one path.

    >>> layers = [{"w": jnp.ones((2, 3))}, {"w": jnp.ones((3, 2)), "act": jnp.tanh}]
    >>> params, restored = flattened(layers)
    >>> params["1"]["w"].shape, restored(params)[1]["act"] is jnp.tanh
    ((3, 2), True)
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    keys = {
        i: names_along(path)
        for i, (path, leaf) in enumerate(leaves)
        if isinstance(leaf, jax.Array | np.ndarray)
    }
    params = {key: leaves[i][1] for i, key in keys.items()}
    if len(params) < len(keys):
        raise ValueError(f"Two arrays have one path: {listed(map(name_of, params))}")

    def restored(params: Tree) -> Any:
        found = flat(params)
        return structure.unflatten(
            found[keys[i]] if i in keys else leaf for i, (_, leaf) in enumerate(leaves)
        )

    return nested(params), restored


class _Matrices:
    """The leaves of a tree that can be adapted, by path of their layer."""

    def __init__(self, params: Tree, layouts: Mapping[str, Layout] | None):
        self.layouts = layouts or {}
        self.leaves = unboxed(arrays_of(flat(params)))
        by_name(self.leaves)  # or two layers would be one
        self.keys = {layer_path(key): key for key in self.leaves if self._layout(key)}
        used = {self._regex(key) for key in self.leaves}
        if unused := sorted(self.layouts.keys() - used):
            raise ValueError(
                f"layouts: {', '.join(map(repr, unused))} matches no array (a regex "
                f"has to match a whole path). There are: "
                f"{listed(map(name_of, self.leaves))}"
            )

    def check_known(self, targets: str, trainable: str) -> None:
        """Raises a `ValueError` for weights that are matched, and are no matrices.

        Their names tell whether they are weights, for nothing else is known of them.
        """
        missed = [
            f"{name_of(key)} {list(np.shape(leaf))}"
            for key, leaf in self.leaves.items()
            if layer_path(key) not in self.keys
            and any(re.fullmatch(targets, p) for p in (layer_path(key), name_of(key)))
            and _is_weight(key, leaf)
            and not matches_or_holds(trainable, name_of(key))
        ]
        if missed:
            raise ValueError(
                f"targets={targets!r} matches weights of which nothing says what their "
                f"axes are: {listed(missed)}\nPass their layouts, layouts={{regex of "
                "the path: snella.Layout(inputs=(...), outputs=(...))}, or take them "
                "out of the targets."
            )

    def site(self, path: str, rule: Rule, must_move: bool) -> Site:
        """Returns the site of the weight of a layer; errors as in `adapt`."""
        if rule.path == "parallel":
            raise ValueError(
                f"{path}: path='parallel' needs a layer: see snella.linen."
            )
        if rule.sketch > 1:
            raise ValueError(
                f"{path}: sketch={rule.sketch} needs a layer, of whose input it keeps "
                "less: see snella.linen, or adapted_dense(..., sketch=, key=)."
            )
        if rule.implementation == "pallas":
            fall_back("weights of a pytree, which are merged")
        key = self.keys[path]
        layout = self._layout(key)
        assert layout is not None
        return site(path, np.shape(self.leaves[key]), layout, rule, must_move)

    def _layout(self, key: Key) -> Layout | None:
        """Returns the axes of a leaf that is a matrix or in `layouts`, else None."""
        if (regex := self._regex(key)) is not None:
            return self.layouts[regex]
        shape = np.shape(self.leaves[key])
        return Layout(shape[:1], shape[1:]) if len(shape) == 2 else None

    def _regex(self, key: Key) -> str | None:
        """Returns the first regex of `layouts` that matches a path, or its layer's."""
        paths = layer_path(key), name_of(key)
        fits = (r for r in self.layouts if any(re.fullmatch(r, p) for p in paths))
        return next(fits, None)


def _is_weight(key: Key, leaf: Any) -> bool:
    wide = sum(size > 1 for size in np.shape(leaf)) > 1
    floats = wide and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return floats and not is_added(str(key[-1]))
