"""Layouts: which axes of a weight are inputs, outputs, or hold several matrices.

Factors are always stored for `[n, m]` matrices, one set for each matrix of the weight:
`a[*slices, P, n, r/P]`. A `Layout` unfolds them over the weight's own axes and puts the
update where the weight wants it, so that nothing as large as the weight is reshaped (a
reshape would gather a weight whose head axis is sharded). The exception is a fused
weight, its parts side by side in one axis: sharded along it, its update is gathered.

    >>> heads = Layout(inputs=(8,), outputs=(2, 4))  # a [D, H, d] projection
    >>> heads.n, heads.m, heads.shape
    (8, 8, (8, 2, 4))
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from snella_jax.kernels import Factors

A = TypeVar("A", Array, np.ndarray)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The axes of one weight.

    Attributes:
      inputs: sizes of the axes that a matmul contracts; their product is `n`.
      outputs: sizes of the axes that remain, of one matrix; their product is `m`.
      slices: sizes of the axes along which each index is a matrix of its own (the
        experts of an einsum, the parts of a fused qkv).
      order: the weight's axes as positions in `slices + inputs + outputs`; None where
        the weight has them in that order.
      fused: True if the slices lie side by side in the first output axis (a fused qkv)
        rather than on axes of their own.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    slices: tuple[int, ...] = ()
    order: tuple[int, ...] | None = None
    fused: bool = False

    @property
    def n(self) -> int:
        """Inputs of one matrix."""
        return math.prod(self.inputs)

    @property
    def m(self) -> int:
        """Outputs of one matrix."""
        return math.prod(self.outputs)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        if self.fused:
            first, *rest = self.outputs
            return (*self.inputs, math.prod(self.slices) * first, *rest)
        sizes = self.slices + self.inputs + self.outputs
        return sizes if self.order is None else tuple(sizes[i] for i in self.order)

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return len(self.shape)

    def split(self, parts: int) -> "Layout":
        """Reads the same weight as `parts` matrices, side by side.

        Each takes an equal run of the first output axis (query, key and value of a
        fused qkv).

        Raises:
          ValueError: the first output axis is no multiple of `parts`, or the weight has
            slices already.
        """
        first, *rest = self.outputs
        side_by_side = first > parts or not rest
        if self.slices or first % parts or (side_by_side and self.order is not None):
            raise ValueError(
                f"split={parts} does not fit a weight of shape {self.shape}: it cuts "
                f"the first output axis, of size {first}, into equal parts."
            )
        if side_by_side:
            outputs = (first // parts, *rest)
            return dataclasses.replace(
                self, outputs=outputs, slices=(parts,), fused=True
            )
        # The parts have an axis of their own: it moves from the outputs to the slices.
        k = len(self.inputs)
        order = self.order or range(k + len(self.outputs))
        moved = tuple(0 if i == k else i + (i < k) for i in order)
        return Layout(self.inputs, tuple(rest), (parts,), moved)

    def joined(self) -> "Layout":
        """Undoes `split`.

        >>> qkv = Layout((8,), (3, 2, 4))
        >>> qkv.split(3).joined() == qkv, Layout((8,), (24,)).split(3).joined().shape
        (True, (8, 24))
        """
        (parts,) = self.slices
        if self.fused:
            outputs = (parts * self.outputs[0], *self.outputs[1:])
            return Layout(self.inputs, outputs, (), self.order)
        k = len(self.inputs)
        order = tuple(k if i == 0 else i - (i <= k) for i in self.order or ())
        plain = order == tuple(range(len(order)))
        return Layout(self.inputs, (parts, *self.outputs), (), None if plain else order)

    def unfold(self, factors: Factors) -> Factors:
        """Spreads `n` and `m` of one matrix's factors over the weight's axes."""
        a, b = factors["a"], factors["b"]
        return factors | {
            "a": a.reshape(a.shape[0], *self.inputs, a.shape[-1]),
            "b": b.reshape(b.shape[0], *self.outputs, b.shape[-1]),
        }

    def matrices(self, weight: Float[A, " *weight"]) -> Float[A, "*slices n m"]:
        """Takes a weight apart into its matrices, which `place` puts together.

        On the host where it is a NumPy array.
        """
        if self.order is not None:
            back = sorted(range(len(self.order)), key=self.order.__getitem__)
            weight = weight.transpose(back)
        if self.fused:
            weight = weight.reshape(*self.inputs, *self.slices, *self.outputs)
            axes = list(range(weight.ndim))
            weight = weight.transpose([axes.pop(len(self.inputs)), *axes])
        return weight.reshape(*self.slices, self.n, self.m)

    def places(self) -> list[np.ndarray]:
        """Returns what an index along each axis of the weight adds to a number's place.

        The sum over the axes is its place in `matrices`, flat.

        >>> [axis.tolist() for axis in Layout((2,), (3,), order=(1, 0)).places()]
        [[0, 1, 2], [0, 3]]
        """
        sizes = self.slices + self.inputs + self.outputs
        axes = [
            np.arange(size) * math.prod(sizes[i + 1 :]) for i, size in enumerate(sizes)
        ]
        if self.fused:
            parts = axes.pop(0)
            first = len(self.inputs)
            axes[first] = np.add.outer(parts, axes[first]).reshape(-1)
        return axes if self.order is None else [axes[i] for i in self.order]

    def place(self, delta: Float[Array, "..."]) -> Float[Array, " *weight"]:
        """Puts the update into the weight's shape."""
        if self.fused:
            delta = jnp.moveaxis(delta, 0, len(self.inputs)).reshape(self.shape)
        return delta if self.order is None else jnp.transpose(delta, self.order)


def einsum_layout(equation: str | None, shape: Sequence[int]) -> Layout:
    """Returns the layout of an einsum's weight of this shape.

    Raises:
      ValueError: the equation is None, or the einsum is no matmul.
    """
    if equation is None:
        raise ValueError(
            "An einsum is adapted only if its equation is fixed when built."
        )
    operands, result = equation.replace("...", "").split("->")
    inputs, weight = operands.split(",")
    slices = [c for c in weight if c in inputs and c in result]
    summed = [c for c in weight if c in inputs and c not in result]
    outputs = [c for c in weight if c not in inputs and c in result]
    letters = slices + summed + outputs
    if sorted(letters) != sorted(weight) or not summed or not outputs:
        raise ValueError(
            f"The einsum {equation!r} is no matmul: every axis of its weight must be "
            "in its input or its result, with at least one in each alone."
        )
    size = dict(zip(weight, shape, strict=True))
    order = tuple(letters.index(c) for c in weight)
    return Layout(
        tuple(size[c] for c in summed),
        tuple(size[c] for c in outputs),
        tuple(size[c] for c in slices),
        None if order == tuple(range(len(order))) else order,
    )
