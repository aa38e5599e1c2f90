"""Tensors of PyTorch's models, and where their numbers lie in ours."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from snella_jax.models.checkpoints.mapping import TensorRule


class Row(NamedTuple):
    """A variable of a model, or one row of a stack.

    Attributes:
      path: path of the variable.
      at: its index in the stack; () for the whole variable.
    """

    path: str
    at: tuple[int, ...] = ()


class Axes(NamedTuple):
    """Places of a matrix of ours in a weight of PyTorch's.

    Attributes:
      outputs: `[m]`, index along the weight's first axis of each of our outputs.
      inputs: `[n]`, index along its other axes, flat, of each of our inputs.
    """

    outputs: Int[np.ndarray, " m"]
    inputs: Int[np.ndarray, " n"]


@dataclass(frozen=True)
class TorchTensor:
    """A tensor of a PyTorch model, by our rows that hold its numbers.

    Attributes:
      rule: makes the rows' arrays of the tensor.
      rows: rows that they go to.
    """

    rule: TensorRule
    rows: Sequence[Row]

    def axes(self, shape: tuple[int, ...]) -> list[Axes]:
        """Returns where the matrices of ours lie in a weight of this shape.

        >>> from snella_jax.models.checkpoints.torch_rules import thirds
        >>> rows = [Row(f"attn/{name}/kernel") for name in "qkv"]
        >>> fused = TorchTensor(TensorRule("", (), thirds), rows)
        >>> [own.outputs.tolist() for own in fused.axes((6, 4))]
        [[0, 1], [2, 3], [4, 5]]

        Raises:
          ValueError: the tensor is no such weight: a vector, or of another shape.
        """
        if len(shape) < 2:
            raise ValueError(f"expected the weight of a layer, not {list(shape)}")
        count, *others = shape
        outputs = np.arange(count).reshape(-1, *[1] * len(others))
        inputs = np.arange(np.prod(others)).reshape(1, *others)
        made = (self.rule.make(np.broadcast_to(x, shape)) for x in (outputs, inputs))
        return [
            Axes(out.reshape(-1, out.shape[-1])[0], into[..., 0].reshape(-1))
            for out, into in zip(*made, strict=True)
        ]
