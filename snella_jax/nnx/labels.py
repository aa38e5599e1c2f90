"""Labels for the leaves that train and those that are frozen, as trees for optax."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from snella_jax.core.factors import factor_paths
from snella_jax.core.paths import join, listed, matches_or_holds, path_of
from snella_jax.nnx.variables import Frozen


def labels(params: Any, trainable: str) -> Any:
    """Labels every leaf "adapter", "trainable" or "frozen", for `optax.partition`.

    A leaf is "adapter" in a mapping with both `a` and `b` (unless it is `Frozen` or an
    integer), "trainable" if the regex matches its path or a parent's in full, and
    "frozen" otherwise. `stop_gradients` saves the gradient of the frozen ones.

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
    """Stops the gradient through the leaves labelled "frozen"."""
    return jax.tree.map(
        lambda p, label: jax.lax.stop_gradient(p) if label == "frozen" else p,
        params,
        labels,
    )
