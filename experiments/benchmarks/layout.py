"""Layout of a LLaMA's training step on a mesh of `data`, `fsdp` and `tensor`.

Texts are split along `data` and `fsdp`. Every matrix is split along `fsdp` and `tensor`
(fully sharded data parallelism, and Megatron's tensor parallelism, Shoeybi et al.,
arXiv 1909.08053): the outputs of those that open a block's hidden features along
`tensor`, and the inputs of those that close them. Norms are whole on each device.
"""

import dataclasses
import functools
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
        return *placed, jax.tree.map(lambda _: self.texts, batch), self.whole

    @property
    def whole(self) -> NamedSharding:
        """Sharding of what every device has whole."""
        return self._at(PartitionSpec())

    @property
    def texts(self) -> NamedSharding:
        """Sharding of what has a row for each text."""
        return self._at(TEXTS)

    def pin(self, model: Llama) -> None:
        """Fixes what lies how inside the step, in place.

        Left to choose, XLA may split the features between blocks as the embedding's,
        and move activations to where the rows of split factors are.
        """
        blocks = model.blocks if isinstance(model.blocks, nnx.List) else [model.blocks]
        for node in (model.embed, *blocks):
            become(node, mixed_class(Pinned, type(node)))
            vars(node)["layout"] = self

    def _at(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def _of(self, key_path: tuple, leaf: Any) -> NamedSharding:
        # The importance's names are joined.
        return self.of_state(join(path_of(key_path)), leaf.ndim)

    def of_state(self, path: str, ndim: int) -> NamedSharding:
        """Returns the sharding of a parameter, or of what an optimizer keeps of it.

        Args:
          path: ends in the names of its layer and its own.
          ndim: number of its axes.
        """
        *modules, name = path.split("/")
        layer = next((own for own in reversed(modules) if own in MATRICES), None)
        if layer is None:
            return self.whole
        inputs, outputs = MATRICES[layer]
        last: tuple[Any, ...] = ()
        if name in ("kernel", "embedding"):
            last = inputs, outputs
        elif name in FACTORS and self.factors != "whole":
            rows = inputs if name == "a" else outputs
            rows = rows if self.factors == "follow" else ("fsdp", "tensor")
            last = (rows,) if name == "magnitude" else (rows, None)
        return self._at(PartitionSpec(*(None,) * (ndim - len(last)), *last))


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
    """Mixed into the embedding or a block: its output is split by texts alone.

    Factors of layout "split" are whole where it uses them. Their gradient is summed as
    their matrix lies, or XLA moves that of the matrix instead (16 H100: 2.1 GiB more).
    """

    layout: Layout

    def __call__(self, *args: Any) -> Any:
        if self.layout.factors == "split":
            following = dataclasses.replace(self.layout, factors="follow")
            for path, factor in variables_of(self, Factor):
                of_gradient = following.of_state(path, factor.ndim)
                here = _gathered(factor[...], self.layout.whole, of_gradient)
                factor.set_value(here)
        y: Any = super().__call__(*args)  # pyright: ignore[reportAttributeAccessIssue]
        return jax.lax.with_sharding_constraint(y, self.layout.texts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(x: Array, used: NamedSharding, of_gradient: NamedSharding) -> Array:
    """Lays out an array in one way, and its gradient in another."""
    return jax.lax.with_sharding_constraint(x, used)


def _gathered_forward(x, used, of_gradient):
    return _gathered(x, used, of_gradient), None


def _gathered_backward(_, of_gradient, residuals, cotangent):
    return (jax.lax.with_sharding_constraint(cotangent, of_gradient),)


_gathered.defvjp(_gathered_forward, _gathered_backward)
