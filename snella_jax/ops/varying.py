"""Types inside `jax.shard_map`, where an array varies over some of the mesh's axes."""

from typing import Any

import jax


def varying_alike(*operands: Any) -> tuple[Any, ...]:
    """Makes all operands vary over the axes over which one of them does.

    JAX does this by itself where two arrays meet, but not for what a loop carries or a
    custom backward pass is given. Outside `jax.shard_map` nothing changes.

    >>> import jax.numpy as jnp
    >>> varying_alike(jnp.zeros(2), {"b": None})
    (Array([0., 0.], dtype=float32), {'b': None})
    """
    axes = frozenset().union(*map(_varying, jax.tree.leaves(operands)))

    def spread(leaf):
        missing = tuple(axes - _varying(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(spread, operands) if axes else operands


def _varying(leaf: Any) -> frozenset[str]:
    return jax.typeof(leaf).mat.varying
