"""Placement of a run's arrays, on one device or on a mesh of them.

The axis `data` splits every batch. The axis `model` splits every kernel by its outputs,
where it divides them; factors, optimizer state and all else are whole on each device.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from snella_jax.core.paths import path_of

AXES = ("data", "model")


def make(text: str | None = None) -> Mesh:
    """Returns the mesh that `data=4,model=2` means; for None all devices along `data`.

    Raises:
      ValueError: no such axis, no such number, more devices than there are, or a
        process without devices or images of its own.
    """
    devices = jax.devices()
    size = sizes(f"data={len(devices)}" if text is None else text, AXES)
    count = int(np.prod(list(size.values())))
    if count > len(devices):
        raise ValueError(
            f"mesh={text!r} takes {count} devices: there are {len(devices)}."
        )
    processes = jax.process_count()
    if processes > 1 and (count < len(devices) or size["data"] % processes):
        raise ValueError(
            f"mesh={text!r}: {processes} processes with {len(devices)} devices need "
            f"all of these, and data to be a multiple of {processes}."
        )
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(
        tuple(size.values()), AXES, axis_types=kinds, devices=devices[:count]
    )


def sizes(text: str, axes: Sequence[str]) -> dict[str, int]:
    """Returns the size of every axis; 1 of those that a text does not name.

    >>> sizes("model=2", AXES)
    {'data': 1, 'model': 2}

    Raises:
      ValueError: no such axis or no such number.
    """
    found = dict.fromkeys(axes, 1)
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in found or not size.isdecimal() or int(size) < 1:
            each = [f"{axis}=N" for axis in axes]
            raise ValueError(
                f"mesh={text!r}: expected {', '.join(each)} or {','.join(each)}."
            )
        found[name] = int(size)
    return found


def describe(mesh: Mesh) -> str:
    """Returns devices and axes, to print."""
    kind = mesh.devices.flat[0].device_kind
    if mesh.size == 1:
        return kind
    return f"{mesh.size} x {kind} ({', '.join(f'{n}={mesh.shape[n]}' for n in AXES)})"


def of_batches(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of batches, by their examples."""
    return NamedSharding(mesh, PartitionSpec("data"))


def whole(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device has whole."""
    return NamedSharding(mesh, PartitionSpec())


def rows_here(array: jax.Array) -> np.ndarray:
    """Returns the rows of a batch that lie on devices of this process."""
    shards = {str(shard.index): shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(data) for data in shards.values()])


def place(tree: Any, mesh: Mesh) -> Any:
    """Returns a tree with its arrays where they belong, by their names and shapes."""

    def sharding(key_path, leaf):
        split = mesh.shape["model"]
        name = (path_of(key_path) or ("",))[-1]
        if name != "kernel" or split == 1 or leaf.shape[-1] % split:
            return whole(mesh)
        axes = [None] * (leaf.ndim - 1)
        return NamedSharding(mesh, PartitionSpec(*axes, "model"))

    where = jax.tree_util.tree_map_with_path(sharding, tree)
    if jax.process_count() == 1:
        return jax.device_put(tree, where)
    # device_put (jax 0.10.2) makes arrays of local ones that Orbax cannot save.
    return jax.jit(lambda tree: tree, out_shardings=where)(tree)
