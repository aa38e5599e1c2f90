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
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from snella_jax import adapter_file
from snella_jax.base import Base
from snella_jax.config import Rule, SnellaConfig
from snella_jax.fitting import any_of, fit
from snella_jax.layout import Layout
from snella_jax.rules import chosen
from snella_jax.trees import (
    Adapters,
    Key,
    Tree,
    arrays_of,
    by_name,
    fill,
    flat,
    join,
    layer_path,
    place,
    site,
)
from snella_jax.weight import Site

__all__ = ["Adapters", "adapt", "join", "load"]


def adapt(
    params: Tree,
    config: SnellaConfig,
    *,
    key: PRNGKeyArray,
    layouts: Mapping[str, Layout] | None = None,
) -> tuple[Adapters, Tree]:
    """Parameters with adapters for the weights that `config.targets` matches.

    Args:
      params: nested dicts of arrays.
      config: what to adapt and how. `path="parallel"` and what drops need a layer, and
        are refused.
      key: draws the factors.
      layouts: for a regex of paths, the axes of a weight where they are not `[n, m]`;
        axes in front of a layout's are a stack.

    Raises:
      ValueError: a rule that matches nothing or needs a layer, a weight whose axes are
        not known, or something where an adapter goes.
      TypeError: lists among the parameters.
    """
    matrices = _Matrices(params, layouts)
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
    """Parameters with the adapters in a folder.

    Args:
      params: plain.
      folder: of an adapter, of whatever binding.
      rename: as of `snella.load`.
      layouts: as of `adapt`.
      allow_base_mismatch: as of `snella.load`.

    Raises:
      FileNotFoundError, CheckpointError: as `snella.load`.
    """
    matrices = _Matrices(params, layouts)

    def locate(path: str, rule: Rule, must_move: bool) -> tuple[Site, Array]:
        if path not in matrices.keys:
            raise ValueError("there is no such matrix")
        found = matrices.site(path, rule, must_move)
        return found, matrices.leaves[matrices.keys[path]]

    leaves = by_name(flat(params))
    weights, trained, stats = fit(
        adapter_file.read(folder),
        locate,
        Base(leaves),
        leaves,
        rename=rename,
        allow_base_mismatch=allow_base_mismatch,
    )
    adapters, tree = fill(params, weights, trained | stats)
    # Statistics are leaves like others here, but do not train.
    return dataclasses.replace(adapters, trainable=any_of(trained)), tree


class _Matrices:
    """The leaves of a tree that can be adapted, by path of their layer."""

    def __init__(self, params: Tree, layouts: Mapping[str, Layout] | None):
        self.layouts = layouts or {}
        self.leaves = arrays_of(flat(params))
        by_name(self.leaves)  # or two layers would be one
        self.keys = {layer_path(key): key for key in self.leaves if self._layout(key)}

    def site(self, path: str, rule: Rule, must_move: bool) -> Site:
        """Of the weight of a layer; errors as of `adapt`."""
        if rule.path == "parallel":
            raise ValueError(
                f"{path}: path='parallel' needs a layer: see snella.linen."
            )
        key = self.keys[path]
        layout = self._layout(key)
        assert layout is not None
        return site(path, jnp.shape(self.leaves[key]), layout, rule, must_move)

    def _layout(self, key: Key) -> Layout | None:
        """The axes of a leaf, if it is a matrix or `layouts` knows it."""
        path, shape = layer_path(key), jnp.shape(self.leaves[key])
        for regex, layout in self.layouts.items():
            if re.fullmatch(regex, path):
                return layout
        return Layout(shape[:1], shape[1:]) if len(shape) == 2 else None
