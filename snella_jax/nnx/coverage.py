"""Coverage: the matrices of a model, and which of them have an adapter."""

import dataclasses
import math
import re
from typing import Any

from flax import nnx

from snella_jax.nnx.layers import ADAPTABLE, Adapter, layout_of
from snella_jax.nnx.selection import adapted_variables
from snella_jax.nnx.targets import chosen_targets, is_weight
from snella_jax.nnx.variables import Factor, Frozen, variables_held

NUMBER = re.compile(r"(?<![^/])\d+(?![^/])")


@dataclasses.dataclass(frozen=True)
class Held:
    """A weight of a model that multiplies activations.

    Attributes:
      path: its layer's path, or its own if it is not called `kernel`.
      shape: `(n, m)` of one of its matrices; the weight's own, if nothing says which of
        its axes are inputs.
      count: matrices that it holds (stacked blocks, experts).
      weights: numbers in it.
      adapted: True if it has an adapter.
    """

    path: str
    shape: tuple[int, ...]
    count: int
    weights: int
    adapted: bool


@dataclasses.dataclass(frozen=True)
class Coverage:
    """The matrices of a model, as `coverage` finds them; a line as a `str`.

    Attributes:
      held: all of them.
    """

    held: tuple[Held, ...]

    @property
    def share(self) -> float:
        """Fraction of the matrices' weights that adapters reach, rounded down."""
        reached = sum(each.weights for each in self.held if each.adapted)
        return 1000 * reached // max(sum(each.weights for each in self.held), 1) / 1000

    @property
    def left(self) -> tuple[str, ...]:
        """What has no adapter: a module, where nothing in it has one, or a layer.

        `*` stands for the numbers of blocks in a list, where it is so in all of them.
        """
        modules = {m for each in self.held for m in _above(each.path)}
        reached = {m for each in self.held if each.adapted for m in _above(each.path)}
        names = dict.fromkeys(
            next((m for m in _above(each.path) if m not in reached), each.path)
            for each in self.held
            if not each.adapted
        )
        partly = {NUMBER.sub("*", m) for m in modules if m not in names}
        starred = ((NUMBER.sub("*", name), name) for name in names)
        return tuple(dict.fromkeys(n if s in partly else s for s, n in starred))

    def __str__(self) -> str:
        """Returns the counts, the share and what is left."""
        reached = sum(each.count for each in self.held if each.adapted)
        left = f"; not adapted: {', '.join(self.left)}" if self.left else ""
        return (
            f"{reached:,} of {sum(each.count for each in self.held):,} matrices, "
            f"{self.share:.1%} of the weights adapted{left}"
        )


def coverage(model: nnx.Module, targets: str | None = None) -> Coverage:
    """Finds the matrices of a model, and which of them have an adapter.

    A matrix is a weight that multiplies activations: that of a layer that can be
    adapted, or one that looks like it by axes and name (embeddings, norms, biases and
    tokens do not).

    Args:
      model: an adapted model or a plain one; it may be abstract.
      targets: of a plain model, regex of what would be adapted; None for nothing.

    Raises:
      ValueError: as `adapt`, for targets.

    >>> class Net(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.fc1 = nnx.Linear(6, 9, rngs=rngs)
    ...         self.head = nnx.Linear(9, 2, rngs=rngs)
    >>> str(coverage(Net(nnx.Rngs(0)), targets="fc1"))
    '1 of 2 matrices, 75.0% of the weights adapted; not adapted: head'
    """
    if targets is None:
        sites = {id(v): adapter for _, adapter, v in adapted_variables(model)}
    else:
        found = chosen_targets(model, targets).values()
        sites = {id(target.weight): None for target in found}
    held = {}
    for path, layer, weight in variables_held(model):
        if isinstance(layer, Adapter) or not _is_matrix(path, layer, weight):
            continue
        *parent, name = path.split("/")
        shape = _shape(layer, name, sites.get(id(weight)), weight)
        held[id(weight)] = Held(
            path="/".join(parent) if parent and name == "kernel" else path,
            shape=shape,
            count=weight.size // math.prod(shape),
            weights=weight.size,
            adapted=id(weight) in sites,
        )
    return Coverage(tuple(held.values()))


def _above(path: str) -> list[str]:
    """Returns the modules that hold a path, the outermost first, and itself."""
    names = path.split("/")
    return ["/".join(names[: i + 1]) for i in range(len(names))]


def _is_matrix(path: str, layer: Any, weight: nnx.Variable) -> bool:
    if isinstance(weight, Factor) or not isinstance(weight, nnx.Param | Frozen):
        return False
    if not getattr(weight, "ndim", 0):  # a number, or no array
        return False
    if path.split("/")[-1] == "kernel" and isinstance(layer, ADAPTABLE):
        return True
    return is_weight(path, weight.shape, weight.dtype, layer)


def _shape(
    layer: Any, name: str, adapter: Adapter | None, weight: nnx.Variable
) -> tuple[int, ...]:
    """Returns `(n, m)`, or the weight's own shape where nothing says it."""
    if adapter is not None:
        return adapter.site.layout.n, adapter.site.layout.m
    if name == "kernel" and isinstance(layer, ADAPTABLE):
        try:
            layout = layout_of(layer)
        except ValueError:  # an einsum or a convolution that cannot be adapted
            return weight.shape
        return layout.n, layout.m
    return weight.shape
