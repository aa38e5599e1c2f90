"""Computations whose split over a mesh's `Explicit` axes is left to the compiler."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array


def lying_as(weight: Array, make: Callable[..., tuple[Array, Any]]) -> Callable:
    """Makes a function's first result lie as a weight, whose type says how.

    Inside, the compiler splits it as that result is, its gradient too; with types alone
    it would be whole on each device. Elsewhere it is the function itself.

    Args:
      weight: array on any mesh or none.
      make: returns an array of the weight's shape, and a tree of small ones.
    """
    where = jax.typeof(weight).sharding
    explicit = _axes(where.mesh, AxisType.Explicit)
    if not explicit or _axes(where.mesh, AxisType.Manual):
        return make
    whole = NamedSharding(where.mesh, PartitionSpec())

    def run(*args: Any) -> tuple[Array, Any]:
        small = jax.eval_shape(make, *args)[1]
        shardings = where, jax.tree.map(lambda _: whole, small)
        how: Any = {"axes": explicit, "out_sharding": shardings}
        free: Any = jax.sharding.auto_axes(make, **how)
        return free(*args)

    return run


def _axes(mesh: Any, kind: AxisType) -> tuple[str, ...]:
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, own in pairs if own == kind)
