"""Places models and batches on a mesh of devices."""

from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "model")


def automatic(mesh: Mesh) -> Mesh:
    """Returns the mesh with axes along which the compiler splits computations.

    Raises:
      ValueError: it has other axes than `AXES`.
    """
    if others := set(mesh.axis_names) - set(AXES):
        raise ValueError(
            f"The mesh has the axes {', '.join(sorted(others))}: expected "
            f"{', '.join(AXES)}."
        )
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)


def placed(model: Any, mesh: Mesh | None) -> Any:
    """Returns a model on a mesh; as it is without one.

    The axis `model` splits weights by their last axis, where it divides them; the axis
    `data` has them whole.
    """
    if mesh is None:
        return model
    parts = mesh.shape.get("model", 1)

    def sharding(leaf: Any) -> NamedSharding:
        splits = parts > 1 and leaf.ndim > 1 and leaf.shape[-1] % parts == 0
        axes = [None] * (leaf.ndim - 1) + ["model"] if splits else []
        return NamedSharding(mesh, PartitionSpec(*axes))

    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.device_put(state, jax.tree.map(sharding, state)))


def split(batch: Any, mesh: Mesh | None) -> Any:
    """Returns arrays split by their rows over the axis `data`; as they are without one.

    Raises:
      ValueError: it does not divide their number.
    """
    if mesh is None:
        return batch
    parts = mesh.shape.get("data", 1)
    if any(len(leaf) % parts for leaf in jax.tree.leaves(batch)):
        raise ValueError(
            f"{len(jax.tree.leaves(batch)[0])} pictures on a mesh with data={parts}: "
            "expected a multiple."
        )
    axis = "data" if "data" in mesh.shape else None
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(axis)))
