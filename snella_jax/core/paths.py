"""Paths of weights and factors in trees of parameters, and regexes for them."""

import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.export
import numpy as np
from jaxtyping import Array


def chosen(paths: Iterable[str], targets: str) -> list[str]:
    """The paths that the regex matches in full.

    Raises:
      ValueError: there is none; the message lists them all.
    """
    paths = list(paths)
    found = [path for path in paths if re.fullmatch(targets, path)]
    if not found:
        raise ValueError(
            f"targets={targets!r} matches no layer that can be adapted (a regex has to "
            f"match a whole path, as r'.*/fc' does). There are: {listed(paths)}"
        )
    return found


def check_trainable(trainable: str, kernels: Iterable[str]) -> None:
    """Raises a `ValueError` where an adapted kernel would train itself, too."""
    both = [name for name in kernels if matches_or_holds(trainable, name)]
    if both:
        raise ValueError(
            f"trainable={trainable!r} matches adapted weights: {listed(both)}\n"
            "A weight trains or has an adapter: take them out of one of the two."
        )


def matches_or_holds(regex: str, path: str) -> bool:
    """Whether the regex matches the path, or that of a module above it, in full."""
    names = path.split("/")
    parents = ("/".join(names[: i + 1]) for i in range(len(names)))
    return bool(regex) and any(re.fullmatch(regex, parent) for parent in parents)


def join(path: Any) -> str:
    """A path as regexes see it."""
    return "/".join(map(str, path))


def listed(paths: Any) -> str:
    """Paths for an error message, a line each."""
    return "\n  ".join(["", *paths]) if paths else "none"


Smoothed = dict[str, dict[str, Array]]  # path of a matrix -> {"a": ..., "b": ...}


def path_of(key_path: tuple) -> tuple[str, ...]:
    """The names along a key path, without the `.value` of an `nnx.Variable`."""
    if key_path and key_path[-1] == jax.tree_util.GetAttrKey("value"):
        key_path = key_path[:-1]
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in key_path)


def factor_paths(tree: Any) -> set[str]:
    """Paths of the mappings with both `a` and `b`: the adapters of a parameter tree."""
    return set(factors(tree))


def factors(tree: Any) -> Smoothed:
    """`a` and `b` of every mapping that has such a pair, by the mapping's path."""
    found: Smoothed = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *parent, name = path_of(key_path) or ("",)
        if name in ("a", "b"):
            found.setdefault("/".join(parent), {})[name] = leaf
    return {path: pair for path, pair in found.items() if _is_pair(**pair)}


def factor_leaves(tree: Any) -> dict[tuple[str, ...], Any]:
    """`a` and `b` of adapters, and of LoRA's branches, `[*stack, n, r]`, by path.

    LoRA's go by the name of what holds them, `lora`: unstacked they have two axes, as
    two stacked vectors have.

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
    """Whether these are `[*lead, P, n, r/P]` and `[*lead, P, m, r/P]`."""
    if np.ndim(a) < 3 or np.ndim(b) != np.ndim(a):
        return False
    (*lead_a, _, columns_a), (*lead_b, _, columns_b) = np.shape(a), np.shape(b)
    return lead_a == lead_b and columns_a == columns_b
