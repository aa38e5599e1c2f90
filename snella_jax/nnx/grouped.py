"""One pass for several LoRAs on one base: every example takes factors of its own.

LoRA's update of a product, `(x a) b`, is small beside `x W0`, which examples share
whatever their adapters are. So a batch goes through the base once, by `jax.vmap` over
its examples, and each of them picks its rows of the stacked factors.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from snella_jax.core.paths import join
from snella_jax.nnx.adapt import remove
from snella_jax.nnx.layers import Seeded, adapters_of, multiplies_rows
from snella_jax.nnx.selection import adapted_layers
from snella_jax.nnx.surgery import become, mixed_class
from snella_jax.nnx.variables import Frozen, variables_of


@dataclasses.dataclass(frozen=True)
class Shared:
    """An array that all models have; by its number."""

    number: int

    def stacked(self, arrays: Sequence[Array]) -> Array:
        """Returns it."""
        return arrays[self.number]

    def taken(self, stacked: Array, row: Int[Array, ""]) -> Array:
        """Returns it, whatever the example."""
        del row
        return stacked


@dataclasses.dataclass(frozen=True)
class Own:
    """An array that is another one in each model, as it trained; by their numbers."""

    numbers: tuple[int, ...]

    def stacked(self, arrays: Sequence[Array]) -> Array:
        """Returns those of all models, along axis 0."""
        return jnp.stack([arrays[number] for number in self.numbers])

    def taken(self, stacked: Array, row: Int[Array, ""]) -> Array:
        """Returns that of the example's model."""
        return stacked[row]


@dataclasses.dataclass(frozen=True)
class Factors:
    """A factor of all models for one weight, which the layer itself takes a row of.

    The rows of an example are not gathered until then: not for all layers at once. The
    parts of a fused weight are one LoRA of the sum of their ranks.

    Attributes:
      numbers: array of each model; None for one without an adapter here.
      stack: sizes of the stack's axes.
      size: inputs or outputs of the weight.
      rank: the largest of all models.
      up: True for `b`, False for `a`.
    """

    numbers: tuple[int | None, ...]
    stack: tuple[int, ...]
    size: int
    rank: int
    up: bool

    def stacked(self, arrays: Sequence[Array]) -> Array:
        """Returns `[*stack, K, n, r]`, of `b` `[*stack, K, r, m]`."""
        one = [None if n is None else arrays[n] for n in self.numbers]
        return jnp.stack([self._whole(factor) for factor in one], -3)

    def taken(self, stacked: Array, row: Int[Array, ""]) -> Array:
        """Returns all rows."""
        del row
        return stacked

    def _whole(self, factor: Array | None) -> Array:
        """Returns one for the whole weight, with zeros up to the largest rank."""
        if factor is None:
            shape = (self.rank, self.size) if self.up else (self.size, self.rank)
            return jnp.zeros((*self.stack, *shape))
        parts = factor.reshape(*self.stack, -1, *factor.shape[-2:])
        axes = "...pmr,pq->...prqm" if self.up else "...pnr->...npr"
        own = (jnp.eye(parts.shape[-3]),) if self.up else ()
        joined = jnp.einsum(axes, parts, *own)
        rank = factor.shape[-1] * parts.shape[-3]
        shape = (rank, self.size) if self.up else (self.size, rank)
        missing = [(0, self.rank - rank), (0, 0)][:: 1 if self.up else -1]
        return jnp.pad(
            joined.reshape(*self.stack, *shape), [(0, 0)] * len(self.stack) + missing
        )


@dataclasses.dataclass(frozen=True)
class Row:
    """The number of an example's model, once for each block of a stack."""

    stack: tuple[int, ...]

    def stacked(self, arrays: Sequence[Array]) -> Any:
        """Returns nothing."""
        del arrays
        return ()

    def taken(self, stacked: Any, row: Int[Array, ""]) -> Array:
        """Returns `[*stack]`."""
        del stacked
        return jnp.broadcast_to(row, self.stack)


Leaf = Shared | Own | Factors | Row


class LowRank(nnx.Module):
    """Factors of several LoRAs of a layer, and the number of that which is added.

    Attributes:
      a, b: `[*stack, K, n, r]` and `[*stack, K, r, m]`.
      row: int32 `[*stack]`.
    """

    def __init__(self, a: Any, b: Any, row: Any):
        self.a, self.b, self.row = Frozen(a), Frozen(b), Frozen(row)


class Grouped(nnx.Module):
    """A linear layer that adds the update of one of several LoRAs to its product."""

    low_rank: LowRank
    kernel: nnx.Variable
    precision: Any

    def __call__(self, inputs: Array, *args: Any, **kwargs: Any) -> Array:
        """Computes what the layer does, with the update."""
        y = super().__call__(inputs, *args, **kwargs)  # pyright: ignore
        row = self.low_rank.row[...]
        a, b = (
            factor[...][row].astype(y.dtype)
            for factor in (self.low_rank.a, self.low_rank.b)
        )
        axes = len(self.axis) if isinstance(self, nnx.LinearGeneral) else 1
        x = inputs.reshape(*inputs.shape[: inputs.ndim - axes], len(a)).astype(y.dtype)
        product = functools.partial(jnp.matmul, precision=self.precision)
        return y + product(product(x, a), b).reshape(y.shape)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The model of a group without its arrays; static.

    Attributes:
      graphdef, treedef: the base's, with `Grouped` layers.
      leaves: where its arrays come from.
      shared, own: number of elements that models share, and that each has of its own
        besides factors.
    """

    graphdef: nnx.GraphDef
    treedef: Any
    leaves: tuple[Leaf, ...]
    shared: int
    own: int


def run(
    models: Sequence[nnx.Module], rows: Int[np.ndarray, " B"], inputs: tuple[Any, ...]
) -> Any:
    """Runs `models[rows[i]]` on example `i` in one pass; returns None if it cannot.

    It can where adapters are LoRAs of linear layers, and nothing is drawn and no
    statistics are taken. Models have to share a base, the very arrays: what they do not
    share has equal shapes, and is no larger when each example has its own.

    Args:
      models: with or without adapters.
      rows: numbers of models.
      inputs: inputs of the models, with the examples along axis 0 of every array.
    """
    plan, arrays = _planned(models)
    if plan is None or len(rows) * plan.own > plan.shared:
        return None
    return _run(plan, arrays, jnp.asarray(rows), inputs)


def _planned(models: Sequence[nnx.Module]) -> tuple[Plan | None, list[Array]]:
    """Returns the plan of a group, and its arrays, each once."""
    graphdefs, states = zip(*map(nnx.split, models), strict=True)
    flat, treedefs = zip(*map(jax.tree.flatten, states), strict=True)
    arrays = {id(leaf): leaf for leaves in flat for leaf in leaves}
    numbers = {key: number for number, key in enumerate(arrays)}
    places = tuple(tuple(numbers[id(leaf)] for leaf in leaves) for leaves in flat)
    kinds = tuple(map(jax.typeof, arrays.values()))
    return _plan(graphdefs, treedefs, places, kinds), list(arrays.values())


@functools.partial(jax.jit, static_argnums=0)
def _run(plan: Plan, arrays: list[Array], rows: Array, inputs: tuple) -> Any:
    stacked = [leaf.stacked(arrays) for leaf in plan.leaves]

    def one(row: Array, inputs: tuple) -> Any:
        pairs = zip(plan.leaves, stacked, strict=True)
        leaves = [leaf.taken(own, row) for leaf, own in pairs]
        state = jax.tree.unflatten(plan.treedef, leaves)
        alone = jax.tree.map(lambda x: jnp.expand_dims(x, 0), inputs)
        outputs = nnx.merge(plan.graphdef, state)(*alone)
        return jax.tree.map(lambda y: y[0] if y.ndim else y, outputs)

    return jax.vmap(one)(rows, inputs)


@dataclasses.dataclass(frozen=True)
class _Lora:
    """A LoRA of one layer.

    Attributes:
      stack: sizes of the stack's axes.
      n, m: inputs and outputs of the whole weight.
      rank: that of all parts together.
      numbers: those of its factors.
    """

    stack: tuple[int, ...]
    n: int
    m: int
    rank: int
    numbers: dict[str, int]


@dataclasses.dataclass(frozen=True)
class _Member:
    """A model of a group, taken apart.

    Attributes:
      plain: without adapters; numbers stand for its arrays.
      loras: by path of the layer.
    """

    plain: nnx.Module
    loras: dict[str, _Lora]


@functools.cache
def _plan(
    graphdefs: tuple[nnx.GraphDef, ...],
    treedefs: tuple[Any, ...],
    places: tuple[tuple[int, ...], ...],
    kinds: tuple[Any, ...],
) -> Plan | None:
    """Plans the pass of a group; None if its models cannot share one.

    Args:
      graphdefs, treedefs: those of the models and of their states.
      places: for every leaf of every state the number of its array.
      kinds: shape, dtype and sharding of the arrays.
    """
    meshes = [kind.sharding.mesh for kind in kinds]
    if any(not (mesh.empty or mesh.are_all_axes_auto) for mesh in meshes):
        return None  # a gather would have to say how its result lies
    members = []
    for graphdef, treedef, numbers in zip(graphdefs, treedefs, places, strict=True):
        model = nnx.merge(graphdef, jax.tree.unflatten(treedef, numbers))
        if (member := _taken_apart(model, len(numbers), kinds)) is None:
            return None
        members.append(member)
    if len({nnx.graphdef(member.plain) for member in members}) > 1:
        return None
    base = members[0].plain
    sizes = _fill(base, members, kinds)
    if sizes is None:
        return None
    _attach(base, [member.loras for member in members])
    graphdef, state = nnx.split(base)
    leaves, treedef = jax.tree.flatten(state)
    return Plan(graphdef, treedef, tuple(leaves), *sizes)


def _taken_apart(
    model: nnx.Module, leaves: int, kinds: Sequence[Any]
) -> _Member | None:
    """Takes the adapters off a model, in place; None if it cannot be in a group.

    Args:
      model: numbers stand for its arrays, equal ones for the same array.
      leaves: number of these.
      kinds: shapes of the arrays.
    """
    variables = list(variables_of(model, nnx.Variable))
    if len(variables) != leaves or _draws(model):  # an array may be no variable
        return None
    found = {path: adapters_of(layer) for path, layer in adapted_layers(model)}
    remove(model)
    layers, loras = _layers(model), {}
    for path, adapters in found.items():
        if set(adapters) != {"kernel"} or not multiplies_rows(layers[path], own=False):
            return None
        adapter, site = adapters["kernel"], adapters["kernel"].site
        numbers = {name: getattr(adapter, name).get_value() for name in adapter.names}
        axes = len(kinds[numbers["a"]].shape)  # more in an ensemble
        in_front = site.axes == site.front and axes == len(site.lead) + 3
        if not site.rule.low_rank or not in_front:
            return None
        parts, layout = math.prod(site.layout.slices), site.layout
        sizes = layout.n, parts * layout.m, parts * site.rule.rank
        loras[path] = _Lora(site.stack, *sizes, numbers)
    return _Member(model, loras)


def _layers(model: nnx.Module) -> dict[str, Any]:
    return {join(path): node for path, node in nnx.iter_graph(model)}


def _draws(model: nnx.Module) -> bool:
    """Returns True if a call draws at random, or takes statistics of its batch."""
    for _, node in nnx.iter_graph(model):
        if isinstance(node, Seeded):
            if node.needs_key and not node.deterministic:
                return True
        elif False in (
            getattr(node, name, None)
            for name in ("deterministic", "use_running_average")
        ):
            return True
    return False


def _fill(
    base: nnx.Module, members: Sequence[_Member], kinds: Sequence[Any]
) -> tuple[int, int] | None:
    """Says in each variable of the base where it comes from, in place.

    Returns:
      The numbers of elements that models share, and that each has of its own; None if
      the shapes of these are not the same.
    """
    values = [
        {p: v.get_value() for p, v in variables_of(member.plain, nnx.Variable)}
        for member in members
    ]
    sizes = [0, 0]
    for path, variable in variables_of(base, nnx.Variable):
        numbers = tuple(own[path] for own in values)
        alike = len(set(numbers)) == 1
        if len({kinds[number] for number in numbers}) > 1:
            return None
        sizes[not alike] += kinds[numbers[0]].size
        variable.set_value(Shared(numbers[0]) if alike else Own(numbers))
    return sizes[0], sizes[1]


def _attach(base: nnx.Module, loras: Sequence[Mapping[str, _Lora]]) -> None:
    """Gives layers the factors of all models, in place."""
    layers = _layers(base)
    for path in sorted(set().union(*loras)):
        ones = [own.get(path) for own in loras]
        there = [one for one in ones if one is not None]
        stack, rank = there[0].stack, max(one.rank for one in there)

        def of(name: str, size: int, ones=ones, stack=stack, rank=rank) -> Factors:
            numbers = tuple(None if one is None else one.numbers[name] for one in ones)
            return Factors(numbers, stack, size, rank, up=name == "b")

        become(layers[path], mixed_class(Grouped, type(layers[path])))
        a, b = of("a", there[0].n), of("b", there[0].m)
        layers[path].low_rank = LowRank(a, b, Row(stack))
