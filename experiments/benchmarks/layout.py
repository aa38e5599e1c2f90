"""Layout of a LLaMA's training step on a mesh of `data`, `fsdp` and `tensor`.

Texts are split along `data` and `fsdp`. Every matrix is split along `fsdp` and `tensor`
(fully sharded data parallelism, and Megatron's tensor parallelism, Shoeybi et al.,
arXiv 1909.08053): the outputs of those that open a block's hidden features along
`tensor`, and the inputs of those that close them. Norms are whole on each device.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from experiments.training import sharding
from snella_jax.core.paths import join, path_of
from snella_jax.models.llama.model import Llama
from snella_jax.nnx.surgery import become, mixed_class
from snella_jax.nnx.variables import Factor, variables_of

Factors = Literal["whole", "follow", "split"]

AXES = ("data", "fsdp", "tensor")
TEXTS = PartitionSpec(("data", "fsdp"))
COLUMNS, ROWS = ("fsdp", "tensor"), ("tensor", "fsdp")
MATRICES = {  # axes of inputs and outputs, of an embedding of tokens and features
    **dict.fromkeys(("q", "k", "v", "gate", "up", "head"), COLUMNS),
    **dict.fromkeys(("o", "down", "embed"), ROWS),
}
FACTORS = ("a", "b", "magnitude")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Devices of a step, and how it lies on them.

    Attributes:
      mesh: the devices, with the axes `AXES`.
      factors: layout of factors and their optimizer state: "whole" on each device;
        "follow": rows as the inputs or outputs of their matrix; "split": rows along
        `fsdp` and `tensor`, gathered where they are used.
    """

    mesh: Mesh
    factors: Factors = "split"

    def __str__(self) -> str:
        """Returns the axes as `make` reads them."""
        return ",".join(f"{name}={self.mesh.shape[name]}" for name in AXES)

    def of_arguments(self, arguments: tuple) -> tuple:
        """Returns the shardings of a training step's arguments.

        Args:
          arguments: trainable, opt_state, budgets, frozen, batch, key: arrays or
            shapes.
        """
        *state, batch, _ = arguments
        placed = [jax.tree_util.tree_map_with_path(self._of, tree) for tree in state]
        return *placed, jax.tree.map(lambda _: self._at(TEXTS), batch), self.whole

    @property
    def whole(self) -> NamedSharding:
        """Sharding of what every device has whole."""
        return self._at(PartitionSpec())

    def pin(self, model: Llama) -> None:
        """Fixes what lies how inside the step, in place.

        Left to choose, XLA may split the features between blocks as the embedding's,
        and move activations to where the rows of split factors are.
        """
        become(model.embed, mixed_class(Pinned, type(model.embed)))
        model.embed.output = self._at(TEXTS)
        blocks = model.blocks if isinstance(model.blocks, nnx.List) else [model.blocks]
        for block in blocks:
            become(block, mixed_class(PinnedBlock, type(block)))
            block.output = self._at(TEXTS)
            block.used = self.whole if self.factors == "split" else None

    def _at(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def _of(self, key_path: tuple, leaf: Any) -> NamedSharding:
        """Returns the sharding of a parameter, or of what an optimizer keeps of it."""
        path = join(path_of(key_path)).split("/")  # the importance's names are joined
        layer = next((name for name in reversed(path) if name in MATRICES), None)
        if layer is None:
            return self.whole
        inputs, outputs = MATRICES[layer]
        last: tuple[Any, ...] = ()
        if path[-1] in ("kernel", "embedding"):
            last = inputs, outputs
        elif path[-1] in FACTORS and self.factors != "whole":
            rows = inputs if path[-1] == "a" else outputs
            rows = rows if self.factors == "follow" else ("fsdp", "tensor")
            last = (rows,) if path[-1] == "magnitude" else (rows, None)
        return self._at(PartitionSpec(*(None,) * (leaf.ndim - len(last)), *last))


def make(
    text: str | None, devices: Sequence[Any], batch: int, factors: Factors = "split"
) -> Layout:
    """Returns the layout that `data=1,fsdp=4,tensor=4` means; for None all on `fsdp`.

    >>> str(make("fsdp=1", jax.devices()[:1], batch=8))
    'data=1,fsdp=1,tensor=1'

    Args:
      text: axes and their sizes; 1 where one is not named.
      devices: what the mesh is made of.
      batch: texts in a step.
      factors: as in `Layout`.

    Raises:
      ValueError: no such axis, no such number, not as many devices, or a batch that
        cannot be split evenly.
    """
    text = f"fsdp={len(devices)}" if text is None else text
    sizes = sharding.sizes(text, AXES)
    count = math.prod(sizes.values())
    if count != len(devices):
        raise ValueError(f"mesh={text!r}: expected a mesh of chips={len(devices)}.")
    if batch % (parts := sizes["data"] * sizes["fsdp"]):
        raise ValueError(
            f"mesh={text!r}: expected data * fsdp = {parts} to divide batch={batch}."
        )
    kinds = (AxisType.Auto,) * len(AXES)
    shape = tuple(sizes.values())
    mesh = jax.make_mesh(shape, AXES, axis_types=kinds, devices=list(devices))
    return Layout(mesh, factors)


class Pinned(nnx.Module):
    """Mixed into a module: its output has a given sharding."""

    output: NamedSharding

    def __call__(self, *args: Any) -> Array:
        y: Array = super().__call__(*args)  # pyright: ignore[reportAttributeAccessIssue]
        return jax.lax.with_sharding_constraint(y, self.output)


class PinnedBlock(Pinned):
    """Mixed into a block: its factors, too, have a given sharding where it uses them.

    Attributes:
      used: that of the factors; None for that in which they are kept.
    """

    used: NamedSharding | None

    def __call__(self, *args: Any) -> Array:
        if self.used is not None:
            for _, factor in variables_of(self, Factor):
                here = jax.lax.with_sharding_constraint(factor[...], self.used)
                factor.set_value(here)
        return super().__call__(*args)
