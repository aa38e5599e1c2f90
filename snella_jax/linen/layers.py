"""The layers of a Linen module that can be adapted, and those that a regex means."""

import dataclasses
import logging
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from snella_jax.adapters.tree import Key, layer_path, name_of, site
from snella_jax.core.config import Rule
from snella_jax.core.layout import Layout, einsum_layout
from snella_jax.core.paths import chosen, listed, matches_or_holds
from snella_jax.core.update import no_rows
from snella_jax.core.weight import Site
from snella_jax.linen.trace import ADAPTABLE, Call

log = logging.getLogger("snella_jax")
STOCK = {cls.__call__ for cls in ADAPTABLE}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer with a weight that can be adapted.

    Attributes:
      key: key of the weight in `params`.
      kind: the class of the layer.
      module: a copy that is not bound, if the layer is one of Flax's, or of a subclass.
      shape: shape of the weight as the layer sees it.
      whole: shape of the weight in `params`.
      axes: axes along which lifts (`nn.scan`, `nn.vmap`) take `whole` apart, as given
        to them, outermost first; None if that is not known.
      equation: equation of an einsum.
      layout: layout that was given for it, or None.
      problem: reason why it cannot be adapted, or "".
    """

    key: Key
    kind: type
    module: nn.Module | None
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    axes: tuple[int, ...] | None
    equation: str | None = None
    layout: Layout | None = None
    problem: str = ""

    @property
    def path(self) -> str:
        """Path of the weight, as regexes have it."""
        return layer_path(self.key)

    @property
    def own(self) -> bool:
        """True if it is none of Flax's, or has a call of its own."""
        return self.kind.__call__ not in STOCK

    def site(self, rule: Rule, must_move: bool) -> Site:
        """Returns the site of its weight.

        Raises:
          ValueError: the rule does not fit, or the layer cannot be adapted.
        """
        try:
            layout = self.layout or self._layout()
            self._check(rule)
            axes = self._stack_axes()
        except ValueError as error:
            raise ValueError(f"{self.path} cannot be adapted: {error}") from error
        return site(self.path, self.whole, layout, rule, must_move, axes)

    def _check(self, rule: Rule) -> None:
        if self.problem:
            raise ValueError(self.problem)
        if rule.path == "parallel" and self.own:
            raise ValueError(
                f"{self.kind.__name__} has a call of its own, which need not "
                'be linear in the weight: expected path="merged".'
            )
        if rule.sketch > 1 and not self._multiplies_rows():
            raise ValueError(no_rows(rule.sketch, self.kind.__name__, "nn.Dense"))
        if rule.drop_path and not self._starts_with_examples():
            raise ValueError(
                f"drop_path={rule.drop_path} drops along axis 0 of the output, which "
                "here belongs to the weight and not to the examples."
            )

    def _stack_axes(self) -> tuple[int, ...]:
        if self.axes is None:
            raise ValueError(
                f"its weight of shape {self.whole} is {self.shape} where the layer "
                "uses it, and nothing says which axes are the stack's: expected "
                "nn.scan or nn.vmap, or blocks that are stacked along axis 0."
            )
        return positions(self.axes, len(self.shape))

    def _layout(self) -> Layout:
        match self.module:
            case nn.Dense():
                return Layout(self.shape[:1], self.shape[1:])
            case nn.DenseGeneral(axis=axis, batch_dims=batch):
                slices, axes = len(_sequence(batch)), len(_sequence(axis))
                ends = slices, slices + axes
                parts = self.shape[ends[0] : ends[1]], self.shape[ends[1] :]
                return Layout(*parts, self.shape[: ends[0]])
            case nn.Conv(mask=mask):
                if mask is not None:
                    raise ValueError(
                        "a convolution with a mask has weights that are not used."
                    )
                return Layout(self.shape[:-1], self.shape[-1:])
        return einsum_layout(self.equation, self.shape)

    def _multiplies_rows(self) -> bool:
        """Returns True if it multiplies the last axes of its input by its weight."""
        layer = self.module
        if self.own or not isinstance(layer, nn.Dense | nn.DenseGeneral):
            return False
        if isinstance(layer, nn.DenseGeneral):
            axes = _sequence(layer.axis)
            if _sequence(layer.batch_dims) or axes != tuple(range(-len(axes), 0)):
                return False
        return layer.dot_general is None and layer.dot_general_cls is None

    def _starts_with_examples(self) -> bool:
        if isinstance(self.module, nn.DenseGeneral):
            return not _sequence(self.module.batch_dims)
        if isinstance(self.module, nn.Einsum):
            operands, result = (self.equation or "->").split("->")
            return result[:1] not in operands.split(",")[1].replace(".", "")
        return True


def positions(axes: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """Returns where the stack's axes end up around `ndim` others.

    Args:
      axes: axes as they are given to lifts, outermost first.
      ndim: axes of what the innermost lift sees.

    >>> positions((1,), 2), positions((-1,), 2), positions((0, 1), 2)
    ((1,), (2,), (0, 2))
    """
    labels: list[int | None] = [None] * ndim
    for index, axis in reversed(list(enumerate(axes))):
        labels.insert(axis if axis >= 0 else len(labels) + 1 + axis, index)
    return tuple(labels.index(index) for index in range(len(axes)))


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers and weights that a traced call of a module met.

    Attributes:
      known: the layers that can be adapted, by path.
      others: kind of layer of any other parameter that multiplies the input, by key.
      unused: kernels that the call did not meet.
    """

    known: dict[str, Layer]
    others: dict[Key, str]
    unused: list[Key]

    def chosen(self, targets: str, trainable: str) -> list[Layer]:
        """Returns the layers that the regex `targets` matches in full.

        The path of a layer that is none of Flax's stands for its weights, too.

        Raises:
          ValueError: it matches none, or a weight that cannot be adapted and that
            `trainable` does not match.
        """
        missing = [
            f"{name_of(key)} of {kind}"
            for key, kind in self.others.items()
            if _matches(targets, key) or re.fullmatch(targets, name_of(key))
            if not matches_or_holds(trainable, name_of(key))
        ]
        if missing:
            raise ValueError(
                f"targets={targets!r} matches weights that their layers multiply the "
                f"input by, and of which nothing says what their axes are: "
                f"{listed(missing)}\nPass their layouts, layouts={{regex of the path: "
                "snella.Layout(inputs=(...), outputs=(...))}, or take them out of the "
                "targets."
            )
        unused = [name_of(key) for key in self.unused if _matches(targets, key)]
        if unused:
            log.warning(
                "targets=%r matches weights that this call of the module does not use, "
                "and that get no adapter: %s",
                targets,
                listed(unused),
            )
        found = [x for x in self.known.values() if _matches(targets, x.key)]
        return found or [self.known[path] for path in chosen(self.known, targets)]


def _matches(regex: str, key: Key) -> bool:
    return any(re.fullmatch(regex, p) for p in (layer_path(key), name_of(key[:-1])))


def layers_of(
    module: nn.Module,
    variables: Mapping[str, Any],
    inputs: tuple,
    kwargs: dict[str, Any],
    layouts: Mapping[str, Layout] | None,
) -> Layers:
    """Traces a call of the module, and returns the layers that it met.

    Args:
      module: not bound.
      variables: without boxes.
      inputs, kwargs: inputs of the call.
      layouts: axes of weights by regex of their path (with `/kernel` or without), where
        the layer does not say them.

    Raises:
      ValueError: a regex of `layouts` matches no parameter of a layer.
    """
    call = Call(module, variables, inputs, kwargs)
    layouts = layouts or {}
    used = {key: _given(layouts, key) for key in call.seen}
    if unused := sorted(layouts.keys() - set(used.values())):
        raise ValueError(
            f"layouts: {', '.join(map(repr, unused))} matches no parameter of a layer "
            "(a regex has to match a whole path). There are: "
            f"{listed([name_of(key) for key in used])}"
        )
    known = {
        layer_path(key): _layer(call, key, None if regex is None else layouts[regex])
        for key, regex in used.items()
        if regex is not None or (call.seen[key].layer and key[-1] == "kernel")
    }
    others = {
        key: call.seen[key].kind.__name__ if key in call.seen else "no layer"
        for key in call.flow.multiplied
        if layer_path(key) not in known and not call.passed_over(key)
    }
    met = call.seen.keys() | call.flow.multiplied.keys()
    unused = [key for key in call.weights if key[-1] == "kernel" and key not in met]
    return Layers(known, others, unused)


def _layer(call: Call, key: Key, layout: Layout | None) -> Layer:
    seen = call.seen[key]
    return Layer(
        key,
        seen.kind,
        seen.layer,
        seen.shape,
        jnp.shape(call.weights[key]),
        call.axes(key),
        seen.equation,
        layout,
        call.problem(key),
    )


def _given(layouts: Mapping[str, Layout], key: Key) -> str | None:
    """Returns the regex among `layouts` for this weight, or None."""
    names = layer_path(key), name_of(key)
    return next((r for r in layouts if any(re.fullmatch(r, n) for n in names)), None)


def _sequence(value: Any) -> tuple:
    return (value,) if isinstance(value, int) else tuple(value)
