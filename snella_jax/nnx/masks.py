"""Which leaves train, which are frozen and which decay, as trees for optax."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from snella_jax.core.paths import (
    factor_leaves,
    factor_paths,
    join,
    listed,
    matches_or_holds,
    path_of,
)
from snella_jax.nnx.variables import Frozen


def labels(params: Any, trainable: str) -> Any:
    """ "adapter", "trainable" or "frozen" for every leaf, for `optax.partition`.

    A leaf is "adapter" in a mapping with both `a` and `b` (unless it is `Frozen` or an
    integer), "trainable" where the regex matches its path or a parent's in full, and
    "frozen" otherwise. `stop_gradients` spares the gradient of the frozen ones.

    >>> a, b, w = (jax.numpy.zeros(s) for s in ((2, 3, 4), (2, 5, 4), (3, 5)))
    >>> params = {"fc1": {"kernel": w, "adapter": {"a": a, "b": b}}, "head": w}
    >>> labels(params, "head")["fc1"]
    {'adapter': {'a': 'adapter', 'b': 'adapter'}, 'kernel': 'frozen'}

    Args:
      params: one tree of all parameters: nested dicts, or an `nnx.State`. (Integer
        budgets have no gradient: to differentiate, take them out first.)
      trainable: regex over "/"-joined paths, as in `SnellaConfig`; "" for none.

    Raises:
      ValueError: there is no adapter, or the regex matches nothing.
    """
    adapters = factor_paths(params)
    leaves = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    fixed = {join(path_of(path)) for path, v in leaves if isinstance(v, Frozen)}

    def label(key_path, leaf):
        *parent, name = path_of(key_path)
        path = join((*parent, name))
        if join(parent) in adapters:
            trains = path not in fixed and jnp.issubdtype(
                jnp.result_type(leaf), jnp.floating
            )
            return "adapter" if trains else "frozen"
        return "trainable" if matches_or_holds(trainable, path) else "frozen"

    found = jax.tree_util.tree_map_with_path(label, params)
    if not adapters or (trainable and "trainable" not in jax.tree.leaves(found)):
        paths = [join(path_of(path)) for path, _ in leaves]
        missing = f"match of trainable={trainable!r}" if adapters else "adapter"
        raise ValueError(f"There is no {missing} among {listed(paths)}")
    return found


def stop_gradients(params: Any, labels: Any) -> Any:
    """`params` with no gradient through the leaves labelled "frozen"."""
    return jax.tree.map(
        lambda p, label: jax.lax.stop_gradient(p) if label == "frozen" else p,
        params,
        labels,
    )


# Layers that hold no matrix, whatever their leaves are called; in lower case.
NORMS = r".*norm.*|(ln|bn|gn)(\d.*|_.*)?"


POSITIONS = r"wpe|(.*_)?pos(ition(al|s)?)?(_?(emb|enc).*|_.*)?|.*bias.*"


def decay_mask(params: Any) -> Any:
    """True for the leaves that weight decay is for: matrices, by what they are called.

    Factors (`a` and `b` of an adapter or of a `lora`, `lora_a`, `lora_b`), and what is
    called `kernel`, `embedding`, `w` or `weight`. Not what a `norm` holds, or a table
    of positions; nor a `weight` that has the shape of its bias, so only scales. Never
    by rank: in stacked blocks a bias has two axes and `alpha` one. For
    `optax.adamw(..., mask=snella.decay_mask)`.

    >>> decay_mask({"head": {"kernel": 0.0, "bias": 0.0}, "cls_token": 0.0})
    {'cls_token': False, 'head': {'bias': False, 'kernel': True}}
    """
    pairs, shapes = factor_leaves(params), _shapes(params)

    def decays(key_path, _):
        path = path_of(key_path) or ("",)
        *parent, name = path
        if path in pairs or name in ("kernel", "lora_a", "lora_b"):
            return True
        if name not in ("embedding", "w", "weight"):
            return False
        if any(re.fullmatch(POSITIONS, part.lower()) for part in parent):
            return False
        return name == "embedding" or not _scales(path, shapes)

    return jax.tree_util.tree_map_with_path(decays, params)


def _shapes(params: Any) -> dict[tuple[str, ...], tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {path_of(key_path): np.shape(leaf) for key_path, leaf in leaves}


def _scales(path: tuple[str, ...], shapes: Mapping[tuple, tuple[int, ...]]) -> bool:
    """Whether a `w` or `weight` scales: a norm's, or a vector as its bias is one."""
    *parent, name = path
    bias = (*parent, "b" if name == "w" else "bias")
    if any(re.fullmatch(NORMS, part.lower()) for part in parent[-1:]):
        return True
    return len(shapes[path]) < 2 or shapes[path] == shapes.get(bias)
