"""Layout of a training step on a mesh of `data`, `fsdp` and `tensor`, not yet there.

It is the trainer's own, see `experiments.training.sharding`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from experiments.training import blocks, sharding
from experiments.training.sharding import Factors


@dataclasses.dataclass(frozen=True)
class Layout:
    """Devices of a step, and how it lies on them.

    Attributes:
      mesh: the devices, with the axes `sharding.AXES`.
      factors: as in `sharding.of_parameter`.
    """

    mesh: Mesh
    factors: Factors = "split"

    def __str__(self) -> str:
        """Returns the axes as `make` reads them."""
        return ",".join(f"{name}={self.mesh.shape[name]}" for name in sharding.AXES)

    def of_arguments(self, arguments: tuple) -> tuple:
        """Returns the shardings of a training step's arguments.

        Args:
          arguments: trainable, opt_state, budgets, frozen, batch, key: arrays or
            shapes.
        """
        *state, batch, _ = arguments
        placed = [jax.tree_util.tree_map_with_path(self._of, tree) for tree in state]
        rows = sharding.of_batches(self.mesh)
        return *placed, jax.tree.map(lambda _: rows, batch), self.whole

    @property
    def whole(self) -> NamedSharding:
        """Sharding of what every device has whole."""
        return sharding.whole(self.mesh)

    def pin(self, model: nnx.Module) -> None:
        """Fixes what lies how inside the step, in place."""
        blocks.pin(model, self.mesh, self.factors)

    def _of(self, key_path: tuple, leaf: Any) -> NamedSharding:
        names = sharding.names_of(key_path)
        return sharding.of_parameter(names, leaf.shape, self.mesh, self.factors)


def make(
    text: str | None, devices: Sequence[Any], batch: int, factors: Factors = "split"
) -> Layout:
    """Returns the layout that `data=1,fsdp=4,tensor=4` means; for None all on `fsdp`.

    >>> str(make("fsdp=1", jax.devices()[:1], batch=8))
    'data=1,fsdp=1,tensor=1'

    Args:
      text: axes and their sizes; 1 where one is not named.
      devices: what the mesh is made of.
      batch: examples in a step.
      factors: as in `Layout`.

    Raises:
      ValueError: no such axis, no such number, not as many devices, a batch that
        cannot be split evenly, or `factors` "local" on a mesh with an axis `tensor`.
    """
    text = f"fsdp={len(devices)}" if text is None else text
    sizes = sharding.sizes(text)
    count = math.prod(sizes.values())
    if count != len(devices):
        raise ValueError(f"mesh={text!r}: expected a mesh of chips={len(devices)}.")
    if batch % (parts := sizes["data"] * sizes["fsdp"]):
        raise ValueError(
            f"mesh={text!r}: expected data * fsdp = {parts} to divide batch={batch}."
        )
    if factors == "local" and sizes["tensor"] > 1:
        raise ValueError(
            f"mesh={text!r} and factors=local: expected a mesh of data and fsdp alone."
        )
    return Layout(sharding.of_sizes(sizes, devices), factors)
