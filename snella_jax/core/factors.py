"""The factors in a tree of parameters: mappings with both `a` and `b`."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from snella_jax.core.paths import path_of

Pairs = dict[str, dict[str, Array]]  # path of a matrix -> {"a": ..., "b": ...}


def factor_paths(tree: Any) -> set[str]:
    """Returns the paths of the mappings with both `a` and `b`: the adapters."""
    return set(factors(tree))


def factors(tree: Any) -> Pairs:
    """Returns `a` and `b` of every mapping that has such a pair, by its path."""
    found: Pairs = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *parent, name = path_of(key_path) or ("",)
        if name in ("a", "b"):
            found.setdefault("/".join(parent), {})[name] = leaf
    return {path: pair for path, pair in found.items() if _is_pair(**pair)}


def factor_leaves(tree: Any) -> dict[tuple[str, ...], Any]:
    """Returns `a` and `b` of adapters, and of LoRA's `[*stack, n, r]`, by path.

    LoRA's go by the name of what holds them, `lora`: unstacked they have two axes, as
    two stacked vectors have.

    >>> import jax.numpy as jnp
    >>> pair = {"a": jnp.ones((6, 2)), "b": jnp.ones((4, 2))}
    >>> list(factor_leaves({"fc": {"lora": pair}, "affine": pair}))
    [('fc', 'lora', 'a'), ('fc', 'lora', 'b')]
    """
    adapters, found = factor_paths(tree), {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *parent, name = path_of(key_path) or ("",)
        holds = "/".join(parent) in adapters or parent[-1:] == ["lora"]
        if holds and name in ("a", "b"):
            found[*parent, name] = leaf
    return found


def _is_pair(a: Any = None, b: Any = None) -> bool:
    """Returns True for `[*lead, P, n, r/P]` and `[*lead, P, m, r/P]`."""
    if np.ndim(a) < 3 or np.ndim(b) != np.ndim(a):
        return False
    (*lead_a, _, columns_a), (*lead_b, _, columns_b) = np.shape(a), np.shape(b)
    return lead_a == lead_b and columns_a == columns_b
