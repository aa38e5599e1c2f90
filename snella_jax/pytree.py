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

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from snella_jax import adapter_file
from snella_jax.config import Rule, SnellaConfig
from snella_jax.fitting import fit
from snella_jax.layout import Layout
from snella_jax.rules import chosen
from snella_jax.trees import Adapters, Tree, fill, flat, join, layer_path, place, site
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
      ValueError: a rule that matches nothing, a weight whose axes are not known, or a
        rule that needs a layer.
    """
    leaves = flat(params)
    known = {
        layer_path(name): name for name in leaves if _layout(name, leaves, layouts)
    }
    sites = {
        known[path]: _site(
            known[path], leaves, layouts, config.rule(path), config.must_move
        )
        for path in chosen(known, config.targets)
    }
    return place(params, sites, config, key)


def load(
    params: Tree,
    folder: str | Path,
    *,
    rename: Mapping[str, str] | None = None,
    layouts: Mapping[str, Layout] | None = None,
) -> tuple[Adapters, Tree]:
    """Parameters with the adapters in a folder.

    Args:
      params: plain.
      folder: of an adapter, of whatever binding.
      rename: as of `snella.load`.
      layouts: as of `adapt`.

    Raises:
      FileNotFoundError, CheckpointError: as `snella.load`.
    """
    leaves = flat(params)
    names = {layer_path(name): name for name in leaves}

    def locate(path: str, rule: Rule, must_move: bool) -> tuple[Site, Array]:
        name = names.get(path, "")
        if not _layout(name, leaves, layouts):
            raise ValueError("there is no such matrix")
        return _site(name, leaves, layouts, rule, must_move), leaves[name]

    shapes = {name: jnp.shape(leaf) for name, leaf in leaves.items()}
    weights, trained = fit(adapter_file.read(folder), locate, shapes, rename=rename)
    return fill(params, weights, trained)


def _layout(
    name: str, leaves: Mapping[str, Any], layouts: Mapping[str, Layout] | None
) -> Layout | None:
    """The axes of a leaf, if it is a matrix or `layouts` knows it."""
    path = layer_path(name)
    for regex, layout in (layouts or {}).items():
        if re.fullmatch(regex, path):
            return layout
    shape = jnp.shape(leaves.get(name, 0))
    return Layout(shape[:1], shape[1:]) if len(shape) == 2 else None


def _site(
    name: str,
    leaves: Mapping[str, Any],
    layouts: Mapping[str, Layout] | None,
    rule: Rule,
    must_move: bool,
) -> Site:
    if rule.path == "parallel":
        raise ValueError(f"{name}: path='parallel' needs a layer, see snella.linen.")
    layout = _layout(name, leaves, layouts)
    assert layout is not None
    return site(layer_path(name), jnp.shape(leaves[name]), layout, rule, must_move)
