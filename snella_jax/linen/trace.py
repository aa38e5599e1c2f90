"""One abstract call of a Linen module: its layers, and what becomes of their weights.

Nothing is computed. Around every call of a layer the traced program gets a region, and
every parameter that the layer finds there a mark; what the program does with them says
what a layer's name cannot.
"""

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

from snella_jax.adapters.tree import Key, arrays_of, flat, nested
from snella_jax.core.names import is_added
from snella_jax.linen.dataflow import NOTHING, Dataflow, mark, region

ADAPTABLE = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv)
# Their tables and scales may meet the input in a product (`nn.Embed.attend`).
PASSED_OVER = (
    nn.Embed,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.InstanceNorm,
    nn.BatchNorm,
)
WITNESS = "snella_witness"


@dataclasses.dataclass(frozen=True)
class Seen:
    """A parameter as a layer finds it.

    Attributes:
      layer: a copy of the layer that is not bound, if it is one of Flax's that can be
        adapted, or of a subclass; None otherwise.
      kind: the class of the layer.
      shape: shape of the parameter.
      equation: equation of an einsum.
      region: number of the call.
    """

    layer: nn.Module | None
    kind: type
    shape: tuple[int, ...]
    equation: str | None
    region: int


class Call:
    """A traced call of a module.

    Attributes:
      weights: the parameters by key.
      seen: by key of a parameter, how its layer finds it.
      flow: uses of the parameters.
    """

    def __init__(
        self, module: nn.Module, variables: Mapping[str, Any], inputs: Any, kwargs: Any
    ):
        self._module, self._inputs, self._kwargs = module, inputs, kwargs
        self._params = flat(variables["params"])
        self._state = {k: v for k, v in variables.items() if k != "params"}
        self.weights: dict[Key, Array] = arrays_of(self._params)
        # The others are flags, which stay what they are.
        leaves = jax.tree.leaves((self._state, inputs, kwargs))
        self._arrays = {i: x for i, x in enumerate(leaves) if hasattr(x, "dtype")}
        self._marks: list[tuple[Key, Seen]] = []
        self._regions = itertools.count()
        self.flow = self._traced()
        self.seen: dict[Key, Seen] = {}
        self._inside: dict[Key, dict[int, type]] = {}
        self._changed: set[Key] = set()
        for number, (key, seen) in enumerate(self._marks):
            self._read(number, key, seen)

    def problem(self, key: Key) -> str:
        """Says why a layer's weight cannot have an adapter; empty if it can."""
        if key in self._changed:
            return (
                "its weight is changed on the way to it (by nn.WeightNorm, "
                "nn.SpectralNorm or nn.map_variables), so the merged model would be "
                "another one than the adapted."
            )
        own = ADAPTABLE if self.seen[key].layer else nn.Module
        calls = {n for n, kind in self._inside[key].items() if issubclass(kind, own)}
        if any(not around & calls for around in self.flow.multiplied.get(key, [])):
            return (
                "its weight multiplies the input outside of the layer's own methods, "
                "too, where it would have no adapter."
            )
        return ""

    def passed_over(self, key: Key) -> bool:
        """Returns True if a parameter is no weight, though it is in a product."""
        seen = self.seen.get(key)
        shape = jnp.shape(self.weights[key]) if seen is None else seen.shape
        return (
            len(shape) < 2
            or key in self.flow.looked_up
            or is_added(key[-1])
            or (seen is not None and issubclass(seen.kind, PASSED_OVER))
        )

    def axes(self, key: Key) -> tuple[int, ...] | None:
        """Returns the axes along which lifts take a weight apart, as given to them.

        Outermost first; None where nothing says it.
        """
        whole, inside = jnp.shape(self.weights[key]), self.seen[key].shape
        stack = len(whole) - len(inside)
        front = tuple(range(stack))
        fitting = [
            places
            for places in itertools.combinations(range(len(whole)), max(stack, 0))
            if tuple(n for i, n in enumerate(whole) if i not in places) == inside
        ]
        if stack < 2 and fitting == [front]:
            return front
        told = self._witnessed.get(key[:-1], ())
        if fitting and len(told) == stack:
            return told
        return (0,) * stack if fitting == [front] else None

    def _traced(self) -> Dataflow:
        """Traces the call and what becomes of the parameters in it."""
        run = functools.partial(self._run, self._see, self._params)
        program = jax.make_jaxpr(run)(list(self.weights.values()), self._arrays)
        state = len(jax.tree.leaves(self._state))
        rest = [NOTHING if i < state else None for i in self._arrays]
        return Dataflow.of(program, [*self.weights, *rest])

    def _run(
        self, see: Any, params: dict[Key, Any], weights: Any, arrays: dict[int, Array]
    ) -> Any:
        """Runs the call; `see` intercepts those of the module's layers."""
        leaves, structure = jax.tree.flatten((self._state, self._inputs, self._kwargs))
        mixed = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        state, inputs, kwargs = jax.tree.unflatten(structure, mixed)
        params = params | dict(zip(self.weights, weights, strict=True))
        variables = {**state, "params": nested(params)}
        with nn.intercept_methods(see):
            return self._module.apply(variables, *inputs, **kwargs)

    def _see(self, call: Any, args: tuple, options: dict, context: Any) -> Any:
        layer = context.module
        if context.method_name == "setup" or layer.scope is None:
            return call(*args, **options)
        adaptable = isinstance(layer, ADAPTABLE)
        usual = adaptable and context.method_name == "__call__"
        # `getattr` would be intercepted where a module has a `__getattr__` (`ToLinen`).
        equation = vars(layer).get("einsum_str")
        if usual and isinstance(layer, nn.Einsum) and equation is None:
            equation = dict(enumerate(args)).get(1, options.get("einsum_str"))
        equation = equation and equation.replace(" ", "")
        number = next(self._regions)
        for name, value in layer.variables.get("params", {}).items():
            value = nn.meta.unbox(value)
            if hasattr(value, "dtype"):
                copy = layer.clone(parent=None, name=None) if usual else None
                seen = Seen(copy, type(layer), value.shape, equation, number)
                mark(value, len(self._marks))
                self._marks.append(((*layer.path, name), seen))
        with region(number):
            return call(*args, **options)

    def _read(self, number: int, key: Key, seen: Seen) -> None:
        """Reads what a mark says of a parameter."""
        origin = self.flow.marked.get(number)
        if key not in self.weights or (origin and key not in origin.sources):
            return  # of a module that is called with parameters of its own
        known = self.seen.get(key)
        if known is None or (known.layer is None and seen.layer is not None):
            self.seen[key] = seen
        self._inside.setdefault(key, {})[seen.region] = seen.kind
        if origin and (origin.moved != key or origin.turned()):
            self._changed.add(key)

    @functools.cached_property
    def _witnessed(self) -> dict[Key, tuple[int, ...]]:
        """Axes along which the parameters of each module are taken apart."""
        found: dict[Key, tuple[int, ...]] = {}

        def see(call: Any, args: tuple, options: dict, context: Any) -> Any:
            if context.module.scope is not None:
                params = context.module.variables.get("params", {})
                if isinstance(witness := params.get(WITNESS), _Witness):
                    found[witness.owner] = witness.axes
            return call(*args, **options)

        owners = {key[:-1] for key in self.seen}
        planted = {(*owner, WITNESS): _Witness(owner, ()) for owner in owners}
        run = functools.partial(self._run, see, self._params | planted)
        with warnings.catch_warnings():  # of `nnx.bridge.ToLinen`
            unknown = rf"(?s)Found unknown module paths.*{WITNESS}"
            warnings.filterwarnings("ignore", unknown)
            jax.eval_shape(run, list(self.weights.values()), self._arrays)
        return found


class _Witness(struct.PyTreeNode, nn.meta.AxisMetadata):
    """No parameter, but a box that sees which axes lifts take away where it is.

    Attributes:
      owner: key of the module that it was put into.
      axes: those that were taken away, in their order.
    """

    owner: Key = struct.field(pytree_node=False)
    axes: tuple[int, ...] = struct.field(pytree_node=False)

    def unbox(self) -> None:
        """Returns nothing, for it holds nothing."""

    def replace_boxed(self, val: Any) -> "_Witness":
        """Returns itself, for it holds nothing."""
        return self

    def add_axis(self, index: int, params: dict) -> "_Witness":
        """Undoes `remove_axis`."""
        return self.replace(axes=self.axes[:-1])

    def remove_axis(self, index: int, params: dict) -> "_Witness":
        """Notes an axis that a lift takes away before it calls what it lifts."""
        return self.replace(axes=(*self.axes, index))
