"""The mask of weight decay, by the names of the leaves of a tree of parameters."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from snella_jax.core.factors import factor_leaves
from snella_jax.core.paths import path_of

# Layers that hold no matrix, whatever their leaves are called; in lower case.
NORMS = r".*norm.*|(ln|bn|gn)(\d.*|_.*)?"
# Tables of positions.
POSITIONS = r"wpe|(.*_)?pos(ition(al|s)?)?(_?(emb|enc).*|_.*)?|.*bias.*"


def decay_mask(params: Any) -> Any:
    """Marks the leaves that weight decay is for: matrices, by what they are called.

    For `optax.adamw(..., mask=snella.decay_mask)`. True for factors (`a` and `b` of an
    adapter or of a `lora`, `lora_a`, `lora_b`) and leaves called `kernel`, `embedding`,
    `w` or `weight`; False for what a `norm` holds, for a table of positions, and for a
    `weight` that has the shape of its bias and so only scales. Ranks do not count: in
    stacked blocks a bias has two axes and `alpha` one.

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
    """Returns True if a `w` or `weight` scales: a norm's, or a vector like its bias."""
    *parent, name = path
    bias = (*parent, "b" if name == "w" else "bias")
    if any(re.fullmatch(NORMS, part.lower()) for part in parent[-1:]):
        return True
    return len(shapes[path]) < 2 or shapes[path] == shapes.get(bias)
