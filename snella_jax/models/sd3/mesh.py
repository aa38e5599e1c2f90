"""Places models and batches on a mesh of devices."""

import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor", "model")
EXAMPLES, WEIGHTS = AXES[:2], AXES[2:]


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

    The axis `tensor`, or `model`, splits weights by their last axis, and `fsdp` by the
    one before it, where they divide them; along `data` they are whole.
    """
    if mesh is None:
        return model

    def sharding(leaf: Any) -> NamedSharding:
        axes: list[Any] = [None] * leaf.ndim
        if leaf.ndim > 1:
            axes[-1] = _dividing(WEIGHTS, leaf.shape[-1], mesh)
            axes[-2] = _dividing(("fsdp",), leaf.shape[-2], mesh)
        return NamedSharding(mesh, PartitionSpec(*axes))

    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.device_put(state, jax.tree.map(sharding, state)))


def split(batch: Any, mesh: Mesh | None) -> Any:
    """Returns arrays split by their rows over `data` and `fsdp`; as is without a mesh.

    Raises:
      ValueError: these do not divide their number.
    """
    if mesh is None:
        return batch
    axes = tuple(axis for axis in EXAMPLES if axis in mesh.shape)
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if any(len(leaf) % parts for leaf in jax.tree.leaves(batch)):
        raise ValueError(
            f"{len(jax.tree.leaves(batch)[0])} pictures on a mesh with "
            f"{', '.join(f'{axis}={mesh.shape[axis]}' for axis in axes)}: expected a "
            "multiple."
        )
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(axes or None)))


def _dividing(axes: tuple[str, ...], size: int, mesh: Mesh) -> Any:
    """Returns those of the mesh's axes that split this size evenly; None if none do."""
    found = tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)
    split = math.prod(mesh.shape[axis] for axis in found)
    return found if found and size % split == 0 else None
