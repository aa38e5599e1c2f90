"""Finds the weights of an NNX model that can be adapted, and those a regex selects."""

import dataclasses
import re
from collections.abc import Container, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from snella_jax.core.config import Rule
from snella_jax.core.layout import Layout
from snella_jax.core.names import is_added, is_multiplied
from snella_jax.core.paths import chosen, join, listed
from snella_jax.core.weight import Site
from snella_jax.nnx.layers import ADAPTABLE, adapters_of, check_layer, layout_of
from snella_jax.nnx.own_layers import AdaptedOwn
from snella_jax.nnx.selection import adapted_layers, has_adapters
from snella_jax.nnx.variables import variables_held, variables_of

Layouts = Mapping[str, Layout]


@dataclasses.dataclass(frozen=True)
class Target:
    """A weight that can be adapted.

    Attributes:
      layer: the module that holds it.
      name: name of its attribute there.
      layout: its axes, as the user gave them; None where the layer says it.
    """

    layer: Any
    name: str = "kernel"
    layout: Layout | None = None

    @property
    def weight(self) -> nnx.Variable:
        """The variable."""
        return getattr(self.layer, self.name)

    def variable(self, path: str) -> str:
        """Returns the path of the variable, for a target at this path."""
        return f"{path}/kernel".lstrip("/") if self.name == "kernel" else path

    def site(self, path: str, rule: Rule, must_move: bool) -> Site:
        """Returns where and how it is adapted.

        Raises:
          ValueError: the rule does not fit the layer.
        """
        try:
            layout = layout_of(self.layer) if self.layout is None else self.layout
            layout = layout.split(rule.split) if rule.split > 1 else layout
            axes = self._stack(layout)
            check_layer(self.layer, rule, self.layout is not None)
        except ValueError as error:
            raise ValueError(f"{path} cannot be adapted: {error}") from error
        stack = tuple(self.weight.shape[axis] for axis in axes)
        return Site(rule, layout, stack, must_move, axes)

    def _stack(self, layout: Layout) -> tuple[int, ...]:
        """Finds the stack's axes: those in front of the layout's, or one anywhere."""
        shape = self.weight.shape
        extra = len(shape) - layout.ndim
        if shape[max(extra, 0) :] == layout.shape and extra != 1:
            return tuple(range(extra))
        found = [
            axis
            for axis in range(len(shape) if extra == 1 else 0)
            if shape[:axis] + shape[axis + 1 :] == layout.shape
        ]
        bias = getattr(self.layer, "bias", None)
        if len(found) > 1 and bias is not None:  # stacked along the same axis
            found = [a for a in found if bias.shape[a:][:1] == (shape[a],)] or found
        if not found:
            raise ValueError(
                f"its weight has shape {shape}: expected {layout.shape} with the axes "
                "of a stack in front of it, or with one axis of a stack anywhere."
            )
        return (found[0],)


def targets_of(model: nnx.Module, layouts: Layouts | None = None) -> dict[str, Target]:
    """Lists every weight that can be adapted, by path.

    The path of a weight that is called `kernel` is that of its layer.

    Args:
      model: without adapters.
      layouts: axes of weights of layers that are none of Flax's, by regex of their
        path (with `/kernel` or without). What has fewer axes, a bias say, is passed
        over.

    Raises:
      ValueError: a regex of `layouts` that matches no weight, or one that is in a list
        or a dict; the message lists those there are.
    """
    layouts = layouts or {}
    found: dict[str, Target] = {}
    used = set()
    for whole, layer, weight in variables_held(model):
        *_, name = whole.split("/")
        short = _parent(whole) if name == "kernel" else whole
        axes = getattr(weight, "ndim", 0)  # of a variable that is no array
        fitting = (r for r, layout in layouts.items() if axes >= layout.ndim)
        given = next((r for r in fitting if _matches(r, whole, short)), None)
        if getattr(layer, name, None) is not weight:  # in a list or a dict
            continue
        if given is not None:
            used.add(given)
            found[short] = Target(layer, name, layouts[given])
        elif name == "kernel" and isinstance(layer, ADAPTABLE):
            found[short] = Target(layer)
    if unused := sorted(layouts.keys() - used):
        raise ValueError(
            f"layouts: {', '.join(map(repr, unused))} matches no weight that is an "
            "attribute of a module (regexes match a whole path). There are: "
            f"{listed([path for path, _ in variables_of(model, nnx.Param)])}"
        )
    return found


def layouts_of(model: nnx.Module) -> dict[str, Layout]:
    """Returns the layouts that an adapted model was given, by regex of one path."""
    given = {}
    for path, layer in adapted_layers(model):
        if isinstance(layer, AdaptedOwn):
            for name, adapter in adapters_of(layer).items():
                layout = adapter.site.layout
                split = adapter.rule.split > 1
                whole = f"{path}/{name}".lstrip("/")
                given[re.escape(whole)] = layout.joined() if split else layout
    return given


def select(model: nnx.Module, regex: str) -> dict[str, Any]:
    """Selects the layers of Flax's whose path the regex matches in full, by path.

    Raises:
      ValueError: the model has adapters, or as in `chosen_targets`.
    """
    return {path: target.layer for path, target in chosen_targets(model, regex).items()}


def chosen_targets(
    model: nnx.Module, regex: str, layouts: Layouts | None = None
) -> dict[str, Target]:
    """Selects the targets whose path, or whose layer's path, the regex matches.

    Raises:
      ValueError: there is none, the model has adapters, or the regex matches a weight
        that cannot be adapted as it is and would be left out, or one that no gradient
        reaches. Messages list them.
    """
    if has_adapters(model):
        raise ValueError("The model has adapters already: merge() it first.")
    targets = targets_of(model, layouts)
    known = {id(target.weight) for target in targets.values()}
    missed = [
        f"{path} {list(weight.shape)}"
        for path, layer, weight in variables_held(model)
        if isinstance(weight, nnx.Param)
        and id(weight) not in known
        and _matches(regex, path, _parent(path))
        and is_weight(path, weight.shape, weight.dtype, layer)
    ]
    if missed:
        raise ValueError(
            f"targets={regex!r} matches weights of which nothing says what their axes "
            f"are: {listed(missed)}\nPass their layouts, layouts={{regex of the path: "
            "snella.Layout(inputs=(...), outputs=(...))}, or take them out of the "
            "targets."
        )
    found = {
        path: target
        for path, target in targets.items()
        if _matches(regex, path, path if target.name == "kernel" else _parent(path))
    }
    found = found or {path: targets[path] for path in chosen(targets, regex)}
    _check_gradients(model, found, regex)
    return found


def _check_gradients(model: nnx.Module, found: Container[str], regex: str) -> None:
    """Raises a `ValueError` for targets of which a model says that nothing trains them.

    In its `no_gradient`: why, by path.
    """
    for above, node in nnx.iter_graph(model):
        for path, why in getattr(type(node), "no_gradient", {}).items():
            whole = join((*above, path))
            if whole in found:
                raise ValueError(
                    f"targets={regex!r} matches {whole}, whose gradient is always 0: "
                    f"{why}. Take it out of the targets; {type(node).__name__}."
                    "default_targets has what can be adapted."
                )


def is_weight(path: str, shape: tuple[int, ...], dtype: Any, layer: Any) -> bool:
    """Returns True if a parameter looks like a matrix that multiplies activations.

    By its axes (two that are longer than 1) and by names. A loose parameter of a module
    that holds layers (a learned token, say) has to be called a weight to be one.
    """
    wide = sum(size > 1 for size in shape) > 1 and jnp.issubdtype(dtype, jnp.floating)
    kind = type(layer).__name__.lower()
    names = [name for name in path.split("/") if not name.isdigit()]
    name = names[-1] if names else ""
    looks_up = "embed" in kind and "patch" not in kind
    if is_added(name) or "norm" in kind or looks_up or not wide:
        return False
    return is_multiplied(name) or not _holds_layers(layer)


def _holds_layers(module: Any) -> bool:
    return any(
        isinstance(node, nnx.Module) and node is not module and _widest(node) > 1
        for _, node in nnx.iter_graph(module)
    )


def _widest(module: nnx.Module) -> int:
    own = (v for v in vars(module).values() if isinstance(v, nnx.Param))
    return max((getattr(v, "ndim", 0) for v in own), default=0)  # one may be no array


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _matches(regex: str, *paths: str) -> bool:
    return any(re.fullmatch(regex, path) for path in paths)
