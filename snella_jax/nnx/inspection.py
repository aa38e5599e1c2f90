"""The matrices of an adapted model: as data, and as a table."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TextIO

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from snella_jax.core.weight import AdaptedWeight
from snella_jax.files.hosts import to_host
from snella_jax.nnx.coverage import coverage
from snella_jax.nnx.selection import has_adapters, weights_of
from snella_jax.nnx.variables import Budget, DropKey, variables_of


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One adapted matrix of `[n, m]`.

    Attributes:
      name: path of its weight, with its index where that has several (stacked blocks,
        the parts of a fused qkv), as in `Reallocation.names`.
      shape: `(n, m)`.
      rank: columns of its factors.
      kernel: the kernel's name.
      gate: name of the gate, see `sparsify`.
      path: "merged" or "parallel".
      budget: weights that may move.
      moved: weights whose update is not 0: fewer than the budget where magnitudes tie
        with the threshold.
      norm: Frobenius norm of the update.
      base_norm: Frobenius norm of the weight it is added to.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    kernel: str
    gate: str
    path: str
    budget: int
    moved: int
    norm: float
    base_norm: float

    @property
    def density(self) -> float:
        """Fraction of the weights that the update changes."""
        return self.moved / math.prod(self.shape)

    @property
    def change(self) -> float:
        """`||delta|| / ||W0||`; infinite where the base is 0."""
        return self.norm / self.base_norm if self.base_norm else math.inf


def sparsity(model: nnx.Module | Sequence[AdaptedWeight]) -> tuple[Matrix, ...]:
    """Measures every adapted matrix of a model, in the order of `reallocate`.

    Makes every update once, one matrix at a time.

    Args:
      model: an adapted model, or the adapted weights of a tree (`Adapters.weights`).

    Raises:
      ValueError: the model has no adapters.

    >>> import snella_jax as snella
    >>> class Net(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.fc1 = nnx.Linear(6, 8, rngs=rngs)
    >>> config = snella.SnellaConfig(
    ...     rank=4, targets="fc1", trainable="", allocation="fixed", target_density=0.25
    ... )
    >>> model = snella.adapt(Net(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    >>> [(m.name, m.shape, m.budget, m.density) for m in snella.sparsity(model)]
    [('fc1', (6, 8), 12, 0.25)]
    """
    weights = weights_of(model) if isinstance(model, nnx.Module) else model
    return tuple(m for weight in weights for m in matrices_of(weight))


def describe(
    model: nnx.Module | Sequence[AdaptedWeight], file: TextIO | None = None
) -> None:
    """Prints a table of the matrices, how many parameters train, and the coverage.

    Of a model without adapters the matrices that it has, by path of their weights.

    >>> class Net(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.fc1 = nnx.Linear(6, 9, rngs=rngs)
    ...         self.head = nnx.Linear(9, 2, rngs=rngs)
    >>> describe(Net(nnx.Rngs(0)))
    weight  matrices  shape
    fc1            1  6 x 9
    head           1  9 x 2
    trainable params: 83 || all params: 83 || trainable%: 100.0000
    0 of 2 matrices, 0.0% of the weights adapted; not adapted: fc1, head

    Args:
      model: any NNX model, or the adapted weights of a tree, without count and
        coverage.
      file: stream to print to; None for standard output.
    """
    if not isinstance(model, nnx.Module):
        _print_table(_adapted_rows(sparsity(model)), file)
        return
    found = coverage(model)
    if has_adapters(model):
        _print_table(_adapted_rows(sparsity(model)), file)
    else:
        rows = [(w.path, f"{w.count:,}", _by(w.shape)) for w in found.held]
        _print_table([("weight", "matrices", "shape"), *rows], file)
    trainable, total = parameters(model)
    share = trainable / max(total, 1)
    print(
        f"trainable params: {trainable:,} || all params: {total:,} || "
        f"trainable%: {100 * share:.4f}",
        file=file,
    )
    print(found, file=file)


def _adapted_rows(matrices: Sequence[Matrix]) -> list[tuple[str, ...]]:
    header = ("matrix", "shape", "rank", "budget", "density", "|delta|", "change")
    rows = [
        (
            m.name,
            _by(m.shape),
            str(m.rank),
            f"{m.budget:,}",
            f"{m.density:.2%}",
            f"{m.norm:.3g}",
            f"{m.change:.2%}",
        )
        for m in matrices
    ]
    weights = sum(math.prod(m.shape) for m in matrices)
    budget, moved = (
        sum(getattr(m, name) for m in matrices) for name in ("budget", "moved")
    )
    whole = f"{budget:,}", f"{moved / weights:.2%}"
    return [header, *rows, (f"all {len(matrices)}", "", "", *whole, "", "")]


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _print_table(rows: Sequence[tuple[str, ...]], file: TextIO | None) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.rjust(n) for cell, n in zip(row, widths, strict=True)]
        print(row[0].ljust(widths[0]), *cells[1:], sep="  ", file=file)


def parameters(model: nnx.Module) -> tuple[int, int]:
    """Counts the parameters that train, and all there are, adapters included.

    Budgets, random streams and batch statistics are no parameters.
    """
    trainable = sum(_size(v) for _, v in variables_of(model, nnx.Param))
    other = (Budget, DropKey, nnx.RngState, nnx.BatchStat)
    total = sum(
        _size(v)
        for _, v in variables_of(model, nnx.Variable)
        if not isinstance(v, other)
    )
    return trainable, total


def _size(variable: nnx.Variable) -> int:
    """Counts the numbers of a variable, which may hold a tree, or None."""
    leaves = jax.tree.leaves(variable.get_value())
    return sum(math.prod(np.shape(leaf)) for leaf in leaves)


def matrices_of(weight: AdaptedWeight) -> list[Matrix]:
    """Measures every matrix of one adapted weight."""
    site, rule = weight.site, weight.site.rule
    budgets = to_host(weight.budget)
    moved, norms = map(to_host, weight.per_matrix(_measured))
    parts = weight.matrices().astype(np.float32)
    base_norms = np.linalg.norm(parts, axis=(-2, -1))
    return [
        Matrix(
            name=name,
            shape=(site.layout.n, site.layout.m),
            rank=rule.rank,
            kernel=type(rule.kernel).__name__,
            gate=rule.gate,
            path=rule.path,
            budget=int(budgets[index]),
            moved=int(moved[index]),
            norm=float(norms[index]),
            base_norm=float(base_norms[index]),
        )
        for name, index in zip(weight.names, np.ndindex(site.lead), strict=True)
    ]


def _measured(delta: Array) -> tuple[Array, Array]:
    """Counts the weights that are not 0, and takes the norm."""
    return jnp.count_nonzero(delta), jnp.sqrt(jnp.square(delta).sum())
