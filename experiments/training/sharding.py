"""Placement of a run's arrays, on one device or on a mesh of them.

The axes `data` and `fsdp` split every batch by its examples. Every matrix of the base
is split along `fsdp` and `tensor` (fully sharded data parallelism, and Megatron's
tensor parallelism, Shoeybi et al., arXiv 1909.08053): its outputs along `tensor`, or
its inputs where it closes a block's hidden features. Factors, with their optimizer
state and importance, are split by their rows along both; all else is whole on each
device.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from snella_jax.core.paths import path_of

AXES = ("data", "fsdp", "tensor")
EXAMPLES = ("data", "fsdp")  # axes that split a batch
COLUMNS, ROWS = ("fsdp", "tensor"), ("tensor", "fsdp")  # of inputs and outputs
CLOSING = ("o", "down", "out", "proj", "fc2", "embed")
MATRICES = ("kernel", "embedding")
FACTORS = ("a", "b", "magnitude")

OLD_NAMES = {"model": "tensor"}

Factors = Literal["whole", "follow", "split", "local"]


def make(text: str | None = None) -> Mesh:
    """Returns the mesh that `data=4,tensor=2` means; for None all devices along `data`.

    Raises:
      ValueError: no such axis, no such number, more devices than there are, or a
        process without devices or images of its own.
    """
    devices = jax.devices()
    size = sizes(f"data={len(devices)}" if text is None else text)
    count = int(np.prod(list(size.values())))
    if count > len(devices):
        raise ValueError(
            f"mesh={text!r} takes {count} devices: there are {len(devices)}."
        )
    processes = jax.process_count()
    rows = size["data"] * size["fsdp"]
    if processes > 1 and (count < len(devices) or rows % processes):
        raise ValueError(
            f"mesh={text!r}: {processes} processes with {len(devices)} devices need "
            f"all of these, and data times fsdp to be a multiple of {processes}."
        )
    return of_sizes(size, devices[:count])


def of_sizes(size: dict[str, int], devices: Sequence[Any]) -> Mesh:
    """Returns a mesh of these devices, which the compiler splits computations over."""
    kinds = (AxisType.Auto,) * len(AXES)
    shape = tuple(size[axis] for axis in AXES)
    return jax.make_mesh(shape, AXES, axis_types=kinds, devices=list(devices))


def sizes(text: str) -> dict[str, int]:
    """Returns the size of every axis; 1 of those that a text does not name.

    `model` is another name of `tensor`.

    >>> sizes("model=2")
    {'data': 1, 'fsdp': 1, 'tensor': 2}

    Raises:
      ValueError: no such axis or no such number, or an axis that is named twice.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        name = OLD_NAMES.get(name, name)
        if name not in AXES or name in found or not size.isdecimal() or int(size) < 1:
            each = [f"{axis}=N" for axis in AXES]
            raise ValueError(
                f"mesh={text!r}: expected {', '.join(each)} or several of them, as "
                f"{','.join(each)}."
            )
        found[name] = int(size)
    return {axis: found.get(axis, 1) for axis in AXES}


def describe(mesh: Mesh) -> str:
    """Returns devices and axes, to print."""
    kind = mesh.devices.flat[0].device_kind
    if mesh.size == 1:
        return kind
    return f"{mesh.size} x {kind} ({', '.join(f'{n}={mesh.shape[n]}' for n in AXES)})"


def named_as_now(description: str) -> str:
    """Returns what `describe` returned when `tensor` was `model`, as it does now.

    >>> named_as_now("4 x cpu (data=2, model=2)")
    '4 x cpu (data=2, fsdp=1, tensor=2)'
    """
    return description.replace(", model=", ", fsdp=1, tensor=")


def rows_of(mesh: Mesh) -> int:
    """Returns into how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def splits_weights(mesh: Mesh) -> bool:
    """Returns True if no device has the whole base."""
    return mesh.shape["fsdp"] * mesh.shape["tensor"] > 1


def of_batches(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of batches, by their examples."""
    return NamedSharding(mesh, PartitionSpec(EXAMPLES))


def whole(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device has whole."""
    return NamedSharding(mesh, PartitionSpec())


def rows_here(array: jax.Array) -> np.ndarray:
    """Returns the rows of a batch that lie on devices of this process."""
    shards = {str(shard.index): shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(data) for data in shards.values()])


def of_parameter(
    path: Sequence[str], shape: Sequence[int], mesh: Mesh, factors: Factors = "split"
) -> NamedSharding:
    """Returns the sharding of a parameter, or of what an optimizer keeps of it.

    An axis of an array that the mesh's do not divide is whole.

    Args:
      path: ends in the names of its layer and its own.
      shape: its shape.
      mesh: the devices.
      factors: layout of factors: "whole" on each device; "follow": rows as the inputs
        or outputs of their matrix; "split": so, and along the other of `fsdp` and
        `tensor`; "local": as "split", see `blocks`.
    """
    *modules, name = path
    layer = next((own for own in reversed(modules) if not is_adapter(own)), "")
    inputs, outputs = ROWS if layer in CLOSING else COLUMNS
    last: tuple[Any, ...] = ()
    if name in MATRICES and len(shape) > 1:
        last = inputs, outputs
    elif name in FACTORS and factors != "whole" and modules:
        # The matrix's own axis first: a device then has rows of its own part of it.
        own, other = (inputs, outputs) if name == "a" else (outputs, inputs)
        rows = own if factors == "follow" else (own, other)
        last = (rows,) if name == "magnitude" else (rows, None)
    last = last[-len(shape) :] if shape else ()
    sizes = shape[len(shape) - len(last) :]
    fitting = (_dividing(*pair, mesh) for pair in zip(last, sizes, strict=True))
    axes = [*(None,) * (len(shape) - len(last)), *fitting]
    while axes and axes[-1] is None:  # as `jax.jit` writes that of an output
        axes.pop()
    return NamedSharding(mesh, PartitionSpec(*axes))


def place(tree: Any, mesh: Mesh) -> Any:
    """Returns a tree with its arrays where they belong, by their names and shapes."""

    def sharding(key_path, leaf):
        return of_parameter(names_of(key_path), leaf.shape, mesh)

    where = jax.tree_util.tree_map_with_path(sharding, tree)
    if jax.process_count() == 1:
        return jax.device_put(tree, where)
    # device_put (jax 0.10.2) makes arrays of local ones that Orbax cannot save.
    return jax.jit(lambda tree: tree, out_shardings=where)(tree)


def names_of(key_path: tuple) -> list[str]:
    """Returns the names along a key path; those that the importance joined, apart."""
    return [name for part in path_of(key_path) for name in part.split("/")]


def is_adapter(module: str) -> bool:
    """Returns True if a module of this name holds the factors of a kernel."""
    return module == "adapter" or module.endswith("_adapter")


def _dividing(axes: Any, size: int, mesh: Mesh) -> Any:
    """Returns the axes of the mesh that split an axis of this size evenly; or None."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    split = [axis for axis in names if mesh.shape[axis] > 1]
    while split and size % int(np.prod([mesh.shape[axis] for axis in split])):
        split.pop()
    return tuple(split) if len(split) > 1 else (split[0] if split else None)
