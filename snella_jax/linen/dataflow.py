"""Finds the arguments that a traced function multiplies its input by, and where.

A name or a shape cannot tell a matrix of weights from a table of embeddings, a learned
token or a scale. The traced program can: the one meets what depends on the input in a
matmul or a convolution, the others are looked up, added, or multiplied elementwise.

    >>> import jax, jax.numpy as jnp
    >>> def forward(w, table, x):
    ...     return (table[x] + 1) @ w.T
    >>> w, table, x = jnp.ones((3, 2)), jnp.ones((5, 2)), jnp.zeros(4, int)
    >>> flow = Dataflow.of(jax.make_jaxpr(forward)(w, table, x), ["w", "table", None])
    >>> sorted(flow.multiplied), sorted(flow.looked_up)
    (['w'], ['table'])
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jaxtyping import Array

PRODUCTS = (
    "dot_general",
    "conv_general_dilated",
    "ragged_dot_general",
    "scaled_matmul",
    "pallas_call",
)
# What leaves a weight the weight it was: in another shape, dtype, or in parts.
MOVES = (
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "copy_p",
    "device_put",
    "expand_dims",
    "mesh_cast",
    "name",
    "optimization_barrier",
    "pcast",
    "pvary",
    "reduce_precision",
    "reshape",
    "reshard",
    "rev",
    "sharding_constraint",
    "slice",
    "split",
    "squeeze",
    "stop_gradient",
    "transpose",
)
PICKS = ("gather", "dynamic_slice")  # a weight, or rows that the input names
REGION = re.compile(r"snella<(\d+)>")


def region(index: int) -> contextlib.AbstractContextManager:
    """Marks what is traced inside it as belonging to the region of this number."""
    return jax.named_scope(f"snella<{index}>")


def mark(value: Array, index: int) -> None:
    """Marks a value in the program that is being traced, see `Dataflow.marked`."""
    checkpoint_name(value, f"snella<{index}>")


@dataclasses.dataclass(frozen=True)
class Origin:
    """Origin of a value of a traced program.

    Attributes:
      sources: the weights that it was made of, since the last product.
      moved: the one that it still is, moved or cast; None if it is none.
      axes: axes that are left of it, in their order; None where that is not known.
      live: True if it depends on the input.
      picks: True if it is made of booleans, as one-hot rows are.
    """

    sources: frozenset[Any] = frozenset()
    moved: Any = None
    axes: tuple[int, ...] | None = None
    live: bool = False
    picks: bool = False

    def joined(self, other: "Origin") -> "Origin":
        """Returns what holds of a value that may be either."""
        return Origin(
            self.sources | other.sources,
            self.moved if self.moved == other.moved else None,
            self.axes if self.axes == other.axes else None,
            self.live or other.live,
            self.picks and other.picks,
        )

    def turned(self) -> bool:
        """Returns True if its axes are known to have another order than the weight."""
        return self.axes is not None and list(self.axes) != sorted(self.axes)


NOTHING = Origin()


@dataclasses.dataclass
class Dataflow:
    """Uses of the weights among the arguments of a program.

    Attributes:
      multiplied: regions around each product of a weight with what depends on the
        input, by weight.
      looked_up: weights of which the input chose rows.
      marked: origins of what was marked, by the number of the mark.
    """

    multiplied: dict[Any, list[frozenset[int]]]
    looked_up: set[Any]
    marked: dict[int, Origin]

    @classmethod
    def of(cls, program: ClosedJaxpr, arguments: Sequence[Any]) -> "Dataflow":
        """Analyses a program, each argument of which is a weight, an input or neither.

        Args:
          program: program made by `jax.make_jaxpr`.
          arguments: the weight's name; None for an input; `NOTHING` for what is
            neither, such as running statistics.
        """
        flow = cls({}, set(), {})
        ndims = [len(shaped.shape) for shaped in program.in_avals]
        origins = list(map(_argument, arguments, ndims))
        flow._run(program.jaxpr, origins, frozenset())
        return flow

    def _run(
        self, jaxpr: Jaxpr, arguments: Sequence[Origin], regions: frozenset[int]
    ) -> list[Origin]:
        known = dict(zip(jaxpr.invars, arguments, strict=True))

        def origin(atom: Any) -> Origin:
            return NOTHING if isinstance(atom, Literal) else known.get(atom, NOTHING)

        for eqn in jaxpr.eqns:
            around = regions | _regions(eqn)
            found = self._equation(eqn, [origin(atom) for atom in eqn.invars], around)
            known.update(zip(eqn.outvars, found, strict=True))
        return [origin(atom) for atom in jaxpr.outvars]

    def _equation(
        self, eqn: JaxprEqn, operands: list[Origin], regions: frozenset[int]
    ) -> list[Origin]:
        name, outputs = eqn.primitive.name, len(eqn.outvars)
        whole = functools.reduce(_combined, operands, NOTHING)
        if name in PRODUCTS:
            self._product(operands, regions)
            return [Origin(live=whole.live)] * outputs
        if name == "name" and (mark := REGION.fullmatch(eqn.params["name"])):
            self.marked[int(mark[1])] = operands[0]
        if name in MOVES:
            found = [_moved(eqn, operand) for operand in operands]
            return found if len(found) == outputs else found[:1] * outputs
        if name in PICKS:
            return [self._picked(eqn, *operands)]
        if name in ("while", "cond", "scan"):
            return getattr(self, f"_{name}")(eqn, operands, regions)
        for inner in _programs(eqn):
            if len(inner.invars) == len(operands):
                return self._run(inner, operands, regions)
        return [whole] * outputs

    def _product(self, operands: list[Origin], regions: frozenset[int]) -> None:
        for index, weight in enumerate(operands):
            others = operands[:index] + operands[index + 1 :]
            live = [other for other in others if other.live]
            if weight.live or not live:
                continue
            if all(other.picks for other in live):
                self.looked_up |= weight.sources
                continue
            for key in weight.sources:
                self.multiplied.setdefault(key, []).append(regions)

    def _picked(self, eqn: JaxprEqn, operand: Origin, *indices: Origin) -> Origin:
        if not any(index.live for index in indices):
            return operand
        sizes = eqn.params["slice_sizes"]
        if sum(size > 1 for size in sizes) > 1:  # a matrix of several, as of experts
            return operand
        if not operand.live:
            self.looked_up |= operand.sources
        return Origin(live=True)

    def _scan(
        self, eqn: JaxprEqn, operands: list[Origin], regions: frozenset[int]
    ) -> list[Origin]:
        body = eqn.params["jaxpr"].jaxpr
        # What is scanned has an axis more outside; how JAX says which varies.
        last = len(operands) - _scanned(eqn.invars, body.invars)
        first = last - (len(eqn.outvars) - _scanned(eqn.outvars, body.outvars))
        rows = [dataclasses.replace(o, axes=o.axes and o.axes[1:]) for o in operands]
        own = operands[:last] + rows[last:]
        return self._loop(body, own, slice(first, last), regions)

    def _while(
        self, eqn: JaxprEqn, operands: list[Origin], regions: frozenset[int]
    ) -> list[Origin]:
        skipped = eqn.params["cond_nconsts"]
        body, first = eqn.params["body_jaxpr"].jaxpr, eqn.params["body_nconsts"]
        own = operands[skipped:]
        return self._loop(body, own, slice(first, len(own)), regions)

    def _loop(
        self,
        body: Jaxpr,
        operands: list[Origin],
        carry: slice,
        regions: frozenset[int],
    ) -> list[Origin]:
        count = carry.stop - carry.start
        while True:
            results = self._run(body, operands, regions)
            pairs = zip(operands[carry], results[:count], strict=True)
            joined = [before.joined(after) for before, after in pairs]
            if joined == operands[carry]:
                return joined + results[count:]
            operands = [*operands[: carry.start], *joined, *operands[carry.stop :]]

    def _cond(
        self, eqn: JaxprEqn, operands: list[Origin], regions: frozenset[int]
    ) -> list[Origin]:
        branches = [
            self._run(branch.jaxpr, operands[1:], regions)
            for branch in eqn.params["branches"]
        ]
        made = [
            functools.reduce(Origin.joined, ends)
            for ends in zip(*branches, strict=True)
        ]
        live = operands[0].live
        return [dataclasses.replace(o, live=o.live or live) for o in made]


def _scanned(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """Counts the operands or results of a scan that are stacked over its steps."""
    pairs = zip(outside, inside, strict=True)
    return sum(len(x.aval.shape) > len(y.aval.shape) for x, y in pairs)


def _argument(argument: Any, ndim: int) -> Origin:
    if argument is None:
        return Origin(live=True)
    if isinstance(argument, Origin):
        return argument
    return Origin(frozenset([argument]), argument, tuple(range(ndim)))


def _moved(eqn: JaxprEqn, operand: Origin) -> Origin:
    before: Any = eqn.invars[0].aval
    after: Any = eqn.outvars[0].aval
    axes = operand.axes if before.shape == after.shape else None
    if operand.axes is not None and eqn.primitive.name == "transpose":
        axes = tuple(operand.axes[i] for i in eqn.params["permutation"])
    picks = operand.picks or before.dtype == bool  # compared, as one-hot rows are
    return dataclasses.replace(operand, axes=axes, picks=picks)


def _combined(one: Origin, other: Origin) -> Origin:
    """Returns the origin of what is computed from both."""
    return Origin(one.sources | other.sources, live=one.live or other.live)


def _regions(eqn: JaxprEqn) -> frozenset[int]:
    return frozenset(map(int, REGION.findall(str(eqn.source_info.name_stack))))


def _programs(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """Yields the programs that an equation runs."""
    for value in eqn.params.values():
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
