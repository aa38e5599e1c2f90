"""Adapts layers that are not Flax's: their methods compute with `w0 + delta`.

>>> import jax.numpy as jnp
>>> import snella_jax as snella
>>> class Own(nnx.Module):
...     def __init__(self):
...         self.w = nnx.Param(jnp.ones((6, 8)))
...     def __call__(self, x):
...         return x @ self.w[...]
>>> class Net(nnx.Module):
...     def __init__(self):
...         self.up = Own()
...     def __call__(self, x):
...         return self.up(x)
>>> config = snella.SnellaConfig(rank=4, targets="up/w", trainable="")
>>> layouts = {"up/w": snella.Layout((6,), (8,))}
>>> model = snella.adapt(Net(), config, rngs=nnx.Rngs(0), layouts=layouts)
>>> model.up.w_adapter.a.shape, model(jnp.ones((2, 6))).shape
((2, 6, 2), (2, 8))
"""

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from snella_jax.dense import Update, adapted_call
from snella_jax.layers import AdaptedLayer, moved


class AdaptedOwn(AdaptedLayer):
    """Mixed into the class of a layer with weights that `layouts` told the axes of."""

    @staticmethod
    def methods(plain: type, weights: tuple[str, ...]) -> dict[str, Any]:
        """Wraps the methods and properties that read one of these weights."""
        own = dict(_attributes(plain))
        return {name: _adapted(own[name]) for name in _readers(own, set(weights))}

    def adapted(self, call: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Calls a function of the plain layer with `w0 + delta` as its weights.

        Raises:
          ValueError: a weight is that of a whole stack, or as `run`.
        """
        adapters = self.adapters()
        weights = {name: getattr(self, name)[...] for name in adapters}
        for name, adapter in adapters.items():
            adapter.check_called(weights[name])
        leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=_is_module)
        arrays = {i: x for i, x in enumerate(leaves) if _is_array(x)}

        def op(arrays: dict[int, jax.Array], weights: dict[str, jax.Array]) -> Any:
            given = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
            args, kwargs = jax.tree.unflatten(tree, given)
            return self.run(call, weights, *args, **kwargs)

        updates = {
            name: Update(adapter.site.kernel, adapter.rule.gate, adapter.site.layout)
            for name, adapter in adapters.items()
        }
        factors = {name: adapter.factors() for name, adapter in adapters.items()}
        budgets = {name: adapter.budget[...] for name, adapter in adapters.items()}
        result = adapted_call(op, updates)(arrays, weights, factors, budgets)
        return moved(self, *result)


def _adapted(value: Any) -> Any:
    """Wraps a method or a property: its layer has the updates in its weights."""
    if isinstance(value, property):
        return property(
            lambda self: self.adapted(value.fget, (), {}), doc=value.__doc__
        )

    def method(self: AdaptedOwn, *args: Any, **kwargs: Any) -> Any:
        return self.adapted(value, args, kwargs)

    method.__name__, method.__doc__ = value.__name__, value.__doc__
    return method


def _attributes(cls: type) -> Iterator[tuple[str, Any]]:
    """Methods and properties of a module's class, without those of `nnx.Module`."""
    for base in reversed(cls.__mro__):
        if not issubclass(base, nnx.Module) or base is nnx.Module:
            continue
        for name, value in vars(base).items():
            special = name.startswith("__") and name != "__call__"
            if not special and (isinstance(value, property) or _is_method(value)):
                yield name, value


def _is_method(value: Any) -> bool:
    kinds = staticmethod | classmethod | type
    return callable(value) and not isinstance(value, kinds)


def _readers(own: dict[str, Any], weights: set[str]) -> set[str]:
    """Names of the methods that read a weight, or that use one which does."""
    words = {name: _words(value) for name, value in own.items()}
    found: set[str] = set()
    while more := {n for n in words if words[n] & (weights | found)} - found:
        found |= more
    return found


def _words(value: Any) -> set[str]:
    """Every name and string in a function's code, nested functions included."""
    function: Any = value.fget if isinstance(value, property) else value
    pending = [inspect.unwrap(function).__code__]
    words: set[str] = set()
    while pending:
        code = pending.pop()
        words |= {*code.co_names, *(c for c in code.co_consts if isinstance(c, str))}
        pending += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return words


def _is_module(value: Any) -> bool:
    return isinstance(value, nnx.Module | nnx.Variable)


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray)
