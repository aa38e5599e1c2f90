"""Calls of Linen layers with `w0 + delta` as their weights.

Adapters reach a layer in `params`, beside its weights, each as a `Held`: through
`nn.scan`, `nn.vmap` and `nn.remat` like any other parameter. Flax's layers make their
product with it; the call of any other layer is recomputed in the backward pass.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from flax.core import lift
from flax.linen.transforms import lift_direct_transform
from jaxtyping import Array, PRNGKeyArray

from snella_jax.adapters.tree import COUNTS, KEY, Key, name_of
from snella_jax.core.dense import adapted_call, updated
from snella_jax.core.weight import Site
from snella_jax.kernels import Factors
from snella_jax.linen.layers import STOCK, positions
from snella_jax.linen.trace import ADAPTABLE
from snella_jax.ops.dtypes import widened
from snella_jax.ops.matmul import dot_general
from snella_jax.ops.readers import kept_once
from snella_jax.ops.recompute import Arrays


@dataclasses.dataclass(frozen=True)
class Place:
    """Way of an adapter to its layer.

    Attributes:
      axes: axes along which lifts take it apart, as given to them, outermost first.
      own: True if a layer that is none of Flax's uses the weight.
    """

    axes: tuple[int, ...] = ()
    own: bool = False


class Held(struct.PyTreeNode):
    """An adapter on its way to its layer.

    Attributes:
      values: factors, counts and perhaps a key; their stacks where lifts expect them.
      key: key of the weight in `params`.
      place: way to the layer.
    """

    values: dict[str, Array]
    key: Key = struct.field(pytree_node=False)
    place: Place = struct.field(pytree_node=False)

    @classmethod
    def of(cls, values: Mapping[str, Array], key: Key, place: Place) -> "Held":
        """Holds an adapter with its stack in front."""
        moved = {name: _moved(value, place.axes) for name, value in values.items()}
        return cls(moved, key, place)

    @property
    def name(self) -> str:
        """Name of the weight."""
        return name_of(self.key)

    def parts(self) -> tuple[Factors, Array]:
        """Returns the factors and the budget, as the layer needs them."""
        own = {k: self._of(k) for k in self.values if k != KEY}
        budget, _ = (own.pop(name) for name in COUNTS)
        return own, budget

    @property
    def random_key(self) -> PRNGKeyArray | None:
        """Key of the layer for this step, if there is one."""
        return self._of(KEY) if KEY in self.values else None

    def _of(self, name: str) -> Array:
        return jnp.squeeze(self.values[name], tuple(range(_spare(self.place.axes))))


def _moved(value: Array, axes: tuple[int, ...]) -> Array:
    """Moves the stack of a leaf to where lifts along these axes expect it."""
    if not any(axes):
        return value
    stack, spare = len(axes), _spare(axes)
    value = jnp.expand_dims(value, tuple(range(stack, stack + spare)))
    to = positions(axes, value.ndim - stack)
    return jnp.moveaxis(value, tuple(range(stack)), to)


def _spare(axes: tuple[int, ...]) -> int:
    """Counts the axes of size 1 that a scalar needs for a stack to stand there."""
    return max((axis if axis >= 0 else -axis - 1 for axis in axes), default=0)


def called(
    sites: Mapping[Key, Site], call: Any, args: tuple, kwargs: dict, context: Any
) -> Any:
    """Calls a layer's method with adapted weights; for `nn.intercept_methods`.

    Args:
      sites: sites of the adapted weights.
      call, args, kwargs, context: as in every interceptor.
    """
    layer = context.module
    if context.method_name == "setup" or layer.scope is None:
        return call(*args, **kwargs)
    adaptable = isinstance(layer, ADAPTABLE)
    own = layer.variables.get("params", {}).values()
    held = {
        x.name: x for x in own if isinstance(x, Held) and (adaptable or x.place.own)
    }
    if not held:
        return call(*args, **kwargs)
    if context.method_name == "__call__" and type(layer).__call__ in STOCK:
        (adapter,) = held.values()
        return _product(layer, sites[adapter.key], adapter, *args, **kwargs)
    return _whole(context, sites, held, args, kwargs)


def _product(
    layer: Any, site: Site, held: Held, x: Array, *args: Any, **kwargs: Any
) -> Array:
    """Calls the layer on a copy with another weight, as `nnx.flax_layers` does."""
    own = {
        name: nn.meta.unbox(value)
        for name, value in layer.variables["params"].items()
        if not isinstance(value, Held)
    }
    weight = own.pop("kernel")
    factors, budget = held.parts()
    ours = {}
    if getattr(layer, "dot_general", False) is None and layer.dot_general_cls is None:
        ours["dot_general"] = dot_general

    def op(x: Array, w: Array, **changes: Any) -> Array:
        plain = layer.clone(parent=None, name=None, **ours, **changes)
        params = {"kernel": w} if changes else {"kernel": w, **own}
        return plain.apply({"params": params}, x, *args, **kwargs)

    rule, update = site.rule, site.update
    key, rows = held.random_key, None
    if (rule.dropout or rule.drop_path) and layer.has_rng("dropout"):
        key = layer.make_rng("dropout")
    dtype = layer.dtype or jnp.result_type(x, weight, *own.values())
    cast = jnp.asarray(x, dtype)
    if key is not None and update.sketches(cast):
        key, rows = kept_once(update.sketch, key, x, cast, update.row_axis(cast))
    without_bias = functools.partial(op, use_bias=False)
    run = updated(op, update, without_bias)
    return run(cast, weight, factors, budget, key, rows=rows)


def _whole(
    context: Any,
    sites: Mapping[Key, Site],
    held: dict[str, Held],
    args: tuple,
    kwargs: dict,
) -> Any:
    """Calls any method of a layer, recomputed in the backward pass; keeps its state."""
    method = context.orig_method.func  # without interceptors, which have run
    updates = {name: sites[adapter.key].update for name, adapter in held.items()}
    parts = {name: adapter.parts() for name, adapter in held.items()}
    factors, budgets = ({k: both[i] for k, both in parts.items()} for i in (0, 1))

    def computed(layer: nn.Module, args: tuple, kwargs: dict) -> Any:
        return method(layer, *args, **kwargs)

    def lifted(core: Any, scopes: Any, *inputs: Any) -> Any:
        def run(
            scope_of: Any, packed: Any, groups: Any, rngs: Any, *inputs: Any
        ) -> tuple[Any, Any]:
            (variables,) = groups
            given = Arrays(inputs)
            weights = _weights(variables, held)
            if isinstance(context.module, ADAPTABLE):
                weights = widened(weights, given.arrays, context.module.dtype)
            results = given

            def op(arrays: list[Array], weights: dict[str, Array]) -> Any:
                nonlocal results
                own = tuple(_exchanged(v, weights) for v in variables)
                scopes = scope_of((own,), rngs)
                result = core(scopes, *given.filled(arrays))
                results = Arrays((result, packed(scopes)))
                return results.taken()

            arrays = adapted_call(op, updates)(given.arrays, weights, factors, budgets)
            return results.filled(arrays)

        return lift.pack(run, (True,), (True,), (True,))(scopes, *inputs)

    return lift_direct_transform(lifted, (computed,), context.module, args, kwargs)


def _weights(tree: Any, held: Mapping[str, Held]) -> dict[str, Array]:
    """Finds the weights beside these adapters, wherever in a tree."""
    found = {}
    children = tree.values() if isinstance(tree, Mapping) else tree
    for child in children:
        if isinstance(child, Held) and child.name in held:
            found[child.name] = nn.meta.unbox(tree[child.key[-1]])
        elif isinstance(child, Mapping | tuple):
            found |= _weights(child, held)
    return found


def _exchanged(tree: Any, weights: Mapping[str, Array]) -> Any:
    """Puts weights into a tree in the place of their adapters."""
    if not isinstance(tree, Mapping):
        return tree
    new = {}
    for name, child in tree.items():
        if isinstance(child, Held) and child.name in weights:
            new[child.key[-1]] = weights[child.name]
        else:
            new.setdefault(name, _exchanged(child, weights))
    return new
