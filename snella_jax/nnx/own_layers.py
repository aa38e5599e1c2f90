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

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from flax import nnx
from flax.errors import TraceContextError
from jaxtyping import Array

from snella_jax.core.dense import adapted_call, summed
from snella_jax.nnx.layers import ADAPTABLE, AdaptedLayer, adapters_of
from snella_jax.nnx.surgery import plain_class
from snella_jax.nnx.variables import Frozen
from snella_jax.ops.dtypes import widened
from snella_jax.ops.recompute import Arrays

# Methods with underscores that may compute with a weight.
OPERATORS = ("__call__", "__matmul__", "__rmatmul__", "__getitem__")


class AdaptedOwn(AdaptedLayer):
    """Base class of adapted layers whose axes `layouts` told."""

    @staticmethod
    def methods(plain: type, weights: tuple[str, ...]) -> dict[str, Any]:
        """Returns the methods of the layer's class, computing with `w0 + delta`."""
        return adapted_methods(plain, weights)


def adapted_methods(plain: type, weights: tuple[str, ...]) -> dict[str, Any]:
    """Returns methods and properties of a class that compute with adapted weights.

    Those whose code names a weight are recomputed in the backward pass. Any other may
    still read one (by a name it computes, in a function it calls), and is given sums.
    """
    own = _attributes(plain)
    readers = _readers(own, set(weights))
    return {name: _adapted(first, name in readers) for name, (first, *_) in own.items()}


def called(layer: Any, call: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Calls a function of the plain layer with `w0 + delta` as its weights.

    Raises:
      ValueError: a weight is that of a whole stack, or as `run`.
    """
    adapters = adapters_of(layer)
    weights = {name: vars(layer)[name][...] for name in adapters}
    for name, adapter in adapters.items():
        adapter.check_called(weights[name])
    given = Arrays((args, kwargs), _is_graph)
    if isinstance(layer, ADAPTABLE):
        weights = widened(weights, given.arrays, layer.dtype)
    made = given

    def op(arrays: list[Array], weights: dict[str, Array]) -> list[Array]:
        nonlocal made
        args, kwargs = given.filled(arrays)
        made = Arrays(run(layer, call, weights, *args, **kwargs))
        return made.taken()

    updates = {name: adapter.site.update for name, adapter in adapters.items()}
    factors = {name: adapter.factors() for name, adapter in adapters.items()}
    budgets = {name: adapter.budget[...] for name, adapter in adapters.items()}
    arrays = adapted_call(op, updates)(given.arrays, weights, factors, budgets)
    result, state = made.filled(arrays)
    if state:
        nnx.update(layer, state)
    return result


def with_sums(layer: Any, use: Callable[[Any], Any]) -> Any:
    """Calls a function of the plain layer whose weights are sums.

    Unlike `called` it takes any function as it is: nothing is traced or made twice.
    """
    sums = {}
    for name, adapter in adapters_of(layer).items():
        weight = adapter.on(name, vars(layer)[name][...])
        sums[name] = nnx.Param(
            summed(weight.w0, weight.delta()).astype(weight.w0.dtype)
        )
    plain = stand_in(layer, **sums)
    before = dict(vars(plain))
    result = use(plain)
    changed = {k: v for k, v in vars(plain).items() if before.get(k) is not v}
    vars(layer).update({k: v for k, v in changed.items() if k not in sums})
    return layer if result is plain else result


def run(
    layer: Any,
    call: Callable,
    weights: dict[str, Array],
    *args: Any,
    **kwargs: Any,
) -> tuple[Any, nnx.State]:
    """Calls a function of the plain layer with other weights.

    Returns:
      The result of the call, and the state that it changed: random streams, running
      statistics, caches, what it has sown.

    Raises:
      ValueError: it changes the state of something that it was given.
    """
    params = {name: nnx.Param(value) for name, value in weights.items()}
    plain = nnx.clone(stand_in(layer, **params))
    before = {id(_value(v)) for _, v in _moving(plain)}
    try:
        result = call(plain, *args, **kwargs)
    except TraceContextError as error:
        raise ValueError(
            f"{type(plain).__name__} has an adapter, and its call changes state "
            f"outside it ({error}). The call is recomputed in the backward "
            "pass and would change it twice: take the layer out of the targets."
        ) from error
    new = [(p, v) for p, v in _moving(plain) if id(_value(v)) not in before]
    return result, nnx.from_flat_state(new)


def stand_in(layer: Any, **changes: Any) -> Any:
    """Returns the plain layer without adapters, with some attributes replaced."""
    plain = object.__new__(plain_class(type(layer)))
    ours = {id(adapter) for adapter in adapters_of(layer).values()}
    own = {k: v for k, v in vars(layer).items() if id(v) not in ours}
    vars(plain).update(own, **changes)
    return plain


def _moving(layer: nnx.Module) -> Any:
    return nnx.to_flat_state(nnx.state(layer, nnx.Not(nnx.Any(nnx.Param, Frozen))))


def _value(leaf: Any) -> Any:
    """Returns what a variable holds; modules may hold bare arrays, too."""
    return leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf


def _adapted(value: Any, reads: bool) -> Any:
    """Wraps a method or property of a layer that has the updates in its weights."""
    if isinstance(value, property | functools.cached_property):
        get: Any = value.fget if isinstance(value, property) else value.func

        def read(self: Any) -> Any:
            return called(self, get, (), {}) if reads else with_sums(self, get)

        setter, deleter = (getattr(value, name, None) for name in ("fset", "fdel"))
        return property(read, setter, deleter, value.__doc__)

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        return value.__get__(layer, type(layer))(*args, **kwargs)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if reads:
            return called(self, call, args, kwargs)
        return with_sums(self, lambda layer: call(layer, *args, **kwargs))

    return functools.update_wrapper(method, value, updated=())


def _attributes(cls: type) -> dict[str, list[Any]]:
    """Returns methods and properties of a class, those that they override behind them.

    Without what modules have by themselves.
    """
    found: dict[str, list[Any]] = {}
    for base in cls.__mro__:
        if base in nnx.Module.__mro__:
            continue
        for name, value in vars(base).items():
            special = name.startswith("__") or hasattr(nnx.Module, name)
            if (not special or name in OPERATORS) and _is_method(value):
                found.setdefault(name, []).append(value)
    return found


def _is_method(value: Any) -> bool:
    if isinstance(
        value, property | functools.cached_property | functools.partialmethod
    ):
        return True
    kinds = staticmethod | classmethod | type
    bound = hasattr(type(value), "__get__")
    return bound and callable(value) and not isinstance(value, kinds)


def _readers(own: dict[str, list[Any]], weights: set[str]) -> set[str]:
    """Returns the names of methods that name a weight, or that use one which does."""
    words = {name: _words(versions) for name, versions in own.items()}
    found: set[str] = set()
    while more := {n for n in words if words[n] & (weights | found)} - found:
        found |= more
    return found


def _words(versions: list[Any]) -> set[str]:
    """Collects the names and strings in the code of a method, and what it overrides."""
    words: set[str] = set()
    for value in versions:
        words |= _words_in(value)
        if "super" not in words:
            break
    return words


def _words_in(value: Any) -> set[str]:
    """Collects those in a function's code, nested functions included."""
    for name in ("fget", "func"):  # of properties and partial methods
        value = getattr(value, name, value)
    pending = [getattr(inspect.unwrap(value), "__code__", None)]
    words: set[str] = set()
    while pending:
        if (code := pending.pop()) is None:
            continue
        words |= {*code.co_names, *(c for c in code.co_consts if isinstance(c, str))}
        pending += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return words


def _is_graph(value: Any) -> bool:
    return isinstance(value, nnx.Module | nnx.Variable)
