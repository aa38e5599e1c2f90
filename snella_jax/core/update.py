"""How the update of one weight is made and added: what its rule says, and its axes."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from jaxtyping import Array

from snella_jax.core.delta import Found, delta_and_found
from snella_jax.core.fused import Implementation, check_implementation, fused_call
from snella_jax.core.gates import check_gate
from snella_jax.core.layout import Layout
from snella_jax.kernels import Factors, Kernel
from snella_jax.ops.sketch import EVERY_ROW, Sketch
from snella_jax.ops.threshold import check_budget

Path = Literal["merged", "parallel"]


@dataclasses.dataclass(frozen=True)
class Update:
    """How the update of one weight is made and added: static, equal by value.

    Attributes:
      kernel: makes the dense update.
      gate: value of a surviving weight, see `sparsify`.
      layout: axes of the weight; None for an `[n, m]` matrix.
      path: "merged" or "parallel", see `adapted_dense`.
      dropout: rate on the input of the update.
      drop_path: rate at which an example loses its whole update.
      sketch: rows of the input that are kept for the way back, in training.
      implementation: "auto", "xla" or "pallas", see `adapted_dense`.

    Raises:
      ValueError: an unknown gate, path or implementation, or a rate or sketch that
        the path cannot take.
    """

    kernel: Kernel
    gate: str = "product"
    layout: Layout | None = None
    path: Path = "merged"
    dropout: float = 0.0
    drop_path: float = 0.0
    sketch: Sketch = EVERY_ROW
    implementation: Implementation = "auto"

    def __post_init__(self):
        check_gate(self.gate)
        check_implementation(self.implementation)
        check_path(self.path, self.dropout, self.drop_path, self.sketch)

    def row_axis(self, x: Array) -> int:
        """Returns the axis of the rows of an input; -1 where it is one row alone."""
        return x.ndim - 1 - (1 if self.layout is None else len(self.layout.inputs))

    def sketches(self, x: Array) -> bool:
        """Returns True if training keeps a sketch of this input."""
        return self.sketch.factor > 1 and self.row_axis(x) >= 0

    def check(self, w0: Array, factors: Factors, budget: int | Array) -> None:
        """Raises a `ValueError` if weight, factors or budget do not fit."""
        check_budget(budget)
        matrices = () if self.layout is None else self.layout.slices
        if np.shape(budget) != matrices:
            raise ValueError(
                f"budget has shape {np.shape(budget)}: expected {matrices}, a number "
                "for each matrix."
            )
        _check_shapes(w0, factors, self.layout)

    def delta(
        self, factors: Factors, budget: Array, found: Found | None
    ) -> tuple[Array, Found]:
        """Returns the sparse update and what it is made again with, as `found`."""
        how = self.kernel, self.gate, self.layout
        return delta_and_found(factors, budget, found, *how)

    def fused(
        self,
        op: Any,
        x: Array,
        w0: Array,
        factors: Factors,
        sharding: Any,
        sketching: bool,
    ) -> Callable[..., Any] | None:
        """Returns `op` with its product fused, or None where no kernel is to be used.

        Args:
          op, x, w0, factors: as in `fused_call`.
          sharding: that of the update, or None.
          sketching: True if a sketch is kept for the way back.
        """
        if self.implementation != "pallas":
            return None
        return fused_call(
            op,
            x,
            w0,
            factors,
            sketch=self.sketch if sketching else None,
            kernel=self.kernel,
            gate=self.gate,
            layout=self.layout,
            path=self.path,
            sharding=sharding,
        )


def check_path(
    path: str, dropout: float, drop_path: float, sketch: Sketch = EVERY_ROW
) -> None:
    """Raises a `ValueError` for an unknown path or what it cannot take."""
    if path not in ("merged", "parallel"):
        raise ValueError(f"No path is called {path!r}: expected merged, parallel.")
    for name, rate in (("dropout", dropout), ("drop_path", drop_path)):
        if not 0 <= rate < 1:
            raise ValueError(f"{name}={rate}: expected 0 <= rate < 1.")
        if rate and path == "merged":
            raise ValueError(
                f'{name}={rate} needs path="parallel": after merging there is no '
                "separate update to drop."
            )
    if sketch.factor > 1 and path == "parallel":
        raise ValueError(
            f'sketch={sketch.factor} needs path="merged": the parallel path keeps its '
            "input for the products of the base and of the update, dropout between."
        )


def no_rows(sketch: int, layer: str, expected: str) -> str:
    """Says that a kind of layer cannot have a sketch, and what to do."""
    return (
        f"sketch={sketch} needs a layer that multiplies the last axes of its input by "
        f"its weight, row by row, and {layer} need not: expected {expected}, or "
        '{"sketch": 1} for its path in `overrides`.'
    )


def _check_shapes(w0: Array, factors: Factors, layout: Layout | None) -> None:
    if layout is None and w0.ndim != 2:
        raise ValueError(
            f"w0 has shape {w0.shape}: expected [n, m]. adapted() takes a Layout."
        )
    layout = layout or Layout(w0.shape[:1], w0.shape[1:])
    given = {name: factors[name].shape for name in ("a", "b")}
    lead = len(layout.slices)
    pieces, columns = given["a"][lead : lead + 1], given["a"][-1:]
    expected = {
        "a": (*layout.slices, *pieces, layout.n, *columns),
        "b": (*layout.slices, *pieces, layout.m, *columns),
    }
    if w0.shape != layout.shape or given != expected:
        raise ValueError(
            f"w0 has shape {w0.shape} and the factors {given}: expected {layout.shape} "
            f"and {expected}."
        )
