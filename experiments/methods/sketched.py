"""Sketched weight gradients of methods without adapters, as `snella_jax.ops.sketch`.

What is multiplied by a matrix is kept for that matrix's gradient: LoRA's and DoRA's
input for that of `a`, full fine-tuning's for that of a kernel. With a sketch a few of
its rows are, those that any layer with the same input keeps. The gradients of the input
and of all else stay exact, and so does evaluation.
"""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from experiments.methods import linear_layer
from snella_jax.nnx.layers import Seeded
from snella_jax.nnx.surgery import become, mixed_class
from snella_jax.ops.matmul import matmul
from snella_jax.ops.readers import kept_once
from snella_jax.ops.sketch import Kind, Sketch


@dataclasses.dataclass(frozen=True)
class Sketched:
    """Mixed into a method whose targeted layers may keep a few rows of their inputs."""

    sketch: int = 1
    """Rows (tokens) of a layer's input to one that is kept for its weight's gradient:
    less memory and time, a noisier gradient."""
    sketch_kind: Kind = "sample"
    """Rows that are kept. sample: one of every run of them; strided: sums with random
    signs; crs: all, of which the largest count on the way back (saves time alone)."""
    keep_rows: tuple[int, ...] = ()
    """Positions of tokens that are always kept, such as 0 for a class token."""

    @property
    def rows(self) -> Sketch:
        """The rows that are kept; raises a `ValueError` if there are no such."""
        return Sketch(self.sketch, self.sketch_kind, self.keep_rows)

    def check(self, name: str) -> None:
        """Raises a `ValueError` on settings that would fail in the midst of a run."""
        super().check(name)  # pyright: ignore[reportAttributeAccessIssue]
        try:
            _ = self.rows
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


class Rows(Seeded):
    """The part of a layer that sketches its input.

    Attributes:
      sketch: rows that are kept.
    """

    def __init__(self, sketch: Sketch, stack: tuple[int, ...]):
        super().__init__()
        self.sketch = sketch
        self._stack = stack

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the stack's axes, of the whole."""
        return self._stack

    @property
    def needs_key(self) -> bool:
        """True: the rows are drawn."""
        return True

    @property
    def drawing(self) -> str:
        """Names the sketch."""
        return f"A layer with sketch={self.sketch.factor}"

    def product(
        self, x: Float[Array, "*B n"], w: Float[Array, "n m"]
    ) -> Float[Array, "*B m"]:
        """Returns `x @ w`, in training with the gradient of `w` from the rows.

        Args:
          x: the input as the layer was given it: others that read it share the rows.
          w: matrix in the dtype to compute in.

        Raises:
          ValueError: training without a key.
        """
        cast, axis = x.astype(w.dtype), x.ndim - 2
        key = self.training_key()
        if key is None or axis < 0:
            return matmul(cast, w)
        key, rows = kept_once(self.sketch, key, x, cast, axis)
        return _product(cast, w, rows, key, self.sketch)


class SketchedLinear(linear_layer.OtherProduct):
    """Mixed into `nnx.Linear`: the gradient of its kernel comes from the rows."""

    rows: Rows

    def product(
        self, x: Float[Array, "... n"], dtype: DTypeLike
    ) -> Float[Array, "... m"]:
        """Returns `x @ kernel`."""
        return self.rows.product(x, self.kernel[...].astype(dtype))


def sketch_kernels(model: nnx.Module, targets: str, sketch: Sketch) -> None:
    """Sketches the gradients of the targeted kernels, in place.

    Raises:
      ValueError: the regex matches nothing, or a target that is no `nnx.Linear`.
    """
    for layer in linear_layer.linear_layers(model, targets).values():
        layer.rows = Rows(sketch, layer.kernel.shape[:-2])
        become(layer, mixed_class(SketchedLinear, type(layer)))


def plain(model: Any) -> Any:
    """Returns a copy whose layers are no longer sketched, and thawed."""

    def kernel(layer: Any) -> Array:
        return layer.kernel[...]

    return linear_layer.merged(model, SketchedLinear, kernel, "rows")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _product(x: Array, w: Array, rows: Array, key: PRNGKeyArray, sketch: Sketch):
    return matmul(x, w)


def _forward(x, w, rows, key, sketch):
    return matmul(x, w), (w, rows, key)


def _backward(sketch, kept, g):
    w, rows, key = kept
    few_x, few_g = sketch.of_both(key, rows, g, g.ndim - 2)
    _, back = jax.vjp(lambda w: matmul(few_x, w), w)
    return matmul(g, w.T), *back(few_g), None, None


_product.defvjp(_forward, _backward)
