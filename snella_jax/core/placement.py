"""Places new adapters on the devices of the weights that they belong to.

A factor that began on one device and came out of the first step on all of a mesh would
compile the step a second time.
"""

from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

from snella_jax.core.specs import adapter_spec
from snella_jax.core.weight import Site, Start


def beside(
    site: Site, w0: Any, start: Start, names: PartitionSpec | None = None
) -> Start:
    """Places factors and counts where the weight has them, as committed as it is.

    The rows of `a` are split as the weight's inputs and those of `b` as its outputs,
    stacks and slices as the weight's, which is how XLA splits their gradients; where
    one axis of a factor stands for several that are split, and under `Explicit` axes,
    whose types forbid it, a factor is whole on each device. Counts are, always.

    Args:
      site: site of the weight.
      w0: the weight. One that is abstract or on no particular device says nothing, and
        all stays where it is.
      start: factors and counts, as `weight.start` draws them.
      names: the mesh's axes that each of the weight's is split along, as Flax's
        metadata have it: of a weight that is traced, which itself says nothing.
    """
    if isinstance(w0, Tracer):
        return _constrained(site, start, names)
    if not is_placed(w0):
        return start
    factors, budget, since = start
    placed = {}
    for name, value in factors.items():
        spec = PartitionSpec()
        if isinstance(w0.sharding, NamedSharding):
            spec = adapter_spec(site, w0.sharding.spec, name)
        placed[name] = _put(value, _named(w0.sharding, spec, np.ndim(value)))
    return placed, everywhere(budget, w0), everywhere(since, w0)


def _constrained(site: Site, start: Start, names: PartitionSpec | None) -> Start:
    """Does so under `jax.jit`, as far as the mesh of `jax.set_mesh` has the names."""
    mesh = jax.sharding.get_abstract_mesh()
    known = {None, *mesh.axis_names}
    if not names or mesh.empty or not mesh.are_all_axes_auto or {*names} - known:
        return start
    factors, budget, since = start
    placed = {
        name: jax.lax.with_sharding_constraint(value, adapter_spec(site, names, name))
        for name, value in factors.items()
    }
    return placed, budget, since


def everywhere(value: Any, other: Any) -> Any:
    """Places a value on every device of another array, if that is committed to some."""
    if not is_placed(other):
        return value
    return _put(value, _named(other.sharding, PartitionSpec(), np.ndim(value)))


def like(value: Any, other: Any) -> Any:
    """Places a new value where the old one lies, if that is committed there."""
    return _put(value, other.sharding) if is_placed(other) else value


def is_placed(value: Any) -> bool:
    """Returns True of an array that is committed to its devices, and not abstract."""
    known = isinstance(value, jax.Array) and not isinstance(value, Tracer)
    return known and value.committed


def _put(value: Any, sharding: Sharding | None) -> Any:
    if sharding is None:
        return value
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    # device_put (jax 0.10.2) makes arrays of local ones that Orbax cannot save.
    return jax.jit(lambda x: x, out_shardings=sharding)(value)


def _named(sharding: Sharding, spec: PartitionSpec, ndim: int) -> Sharding | None:
    """Returns a sharding by a spec on the same devices; None for several without mesh.

    Written as `jax.jit` writes those of its outputs, or the two would be different.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding if len(sharding.device_set) == 1 else None
    mesh = sharding.mesh
    if AxisType.Explicit in mesh.axis_types:
        return NamedSharding(mesh, PartitionSpec(*[None] * ndim))
    axes = [*spec]
    while axes and axes[-1] is None:
        axes.pop()
    return NamedSharding(mesh, PartitionSpec(*axes))
