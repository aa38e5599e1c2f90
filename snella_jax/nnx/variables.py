"""Kinds of NNX variables: frozen weights, factors, budgets, dropout keys."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from snella_jax.core.paths import join


def variables_of(model: nnx.Module, kind: type) -> Iterator[tuple[str, Any]]:
    """Yields path and variable of every variable of a kind, each once."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, kind):
            yield join(path), node


def variables_held(model: nnx.Module) -> Iterator[tuple[str, Any, nnx.Variable]]:
    """Yields path, holder and variable of every variable, once for each holder."""
    for path, holder, value in _held(model):
        if isinstance(value, nnx.Variable):
            yield path, holder, value


def arrays_held(model: nnx.Module) -> dict[str, jax.Array | np.ndarray]:
    """Returns the arrays by path that a model has as attributes, in no variable."""
    kinds = (jax.Array, np.ndarray)
    return {path: value for path, _, value in _held(model) if isinstance(value, kinds)}


def array_of(path: str, variable: nnx.Variable) -> jax.Array:
    """Returns the array of a variable.

    Raises:
      TypeError: it holds a tree of arrays, which no file here has a place for.
    """
    value = variable.get_value()
    if not hasattr(value, "shape"):
        raise TypeError(
            f"{path} holds a {type(value).__name__}: expected one array in a variable "
            "that is saved; make each of its arrays an nnx.Param."
        )
    return value


def _held(model: nnx.Module) -> Iterator[tuple[str, Any, Any]]:
    for path, holder in nnx.iter_graph(model):
        match holder:
            case nnx.Module():
                held = vars(holder).items()
            case Mapping():
                held = holder.items()
            case list() | tuple():
                held = enumerate(holder)
            case _:
                continue
        for name, value in held:
            yield join((*path, name)), holder, value


class Frozen(nnx.Variable):
    """A weight of the base model that does not train: not an `nnx.Param`."""


class Factor(nnx.Param):
    """A factor or a kernel's scalar: an `nnx.Param`, so it trains by default."""


class Budget(nnx.Variable):
    """int32 per matrix: number of surviving weights, or step of reallocation."""


class DropKey(nnx.Variable):
    """A key per layer for this step's dropout and drop-path; `seed` puts it there."""
