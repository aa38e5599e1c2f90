"""Flax NNX layers with an adapter inside: variables, layouts, and what fits a layer.

An adapted layer is an instance of a subclass of its own class: it keeps its variables,
their names and its arithmetic, and gains an `adapter`. Its weight and all else that
does not train are `Frozen`, its factors are `Factor`, its budgets `Budget`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from snella_jax.core.config import Rule
from snella_jax.core.layout import Layout, einsum_layout
from snella_jax.core.update import no_rows
from snella_jax.core.weight import AdaptedWeight, Site, Start
from snella_jax.kernels import Factors
from snella_jax.nnx.variables import Budget, DropKey, Factor, Frozen

ADAPTABLE = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv)
STOCK = {cls.__call__ for cls in ADAPTABLE}


class Seeded(nnx.Module):
    """A part of a layer that draws in training, with a key that `seed` gives it.

    Attributes:
      key: `DropKey` of the stack's shape, or None.
      deterministic: switched by `model.train()`, `model.eval()` and `nnx.view`.
    """

    def __init__(self):
        self.deterministic = False
        self.key: DropKey | None = nnx.data(None)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Switches modes for `nnx.view`.

        Args:
          deterministic: True to switch dropout, drop-path and sketches off; None leaves
            them.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the stack's axes here: of the whole, or of what a scan passes on."""
        raise NotImplementedError

    @property
    def needs_key(self) -> bool:
        """True if training draws anything."""
        raise NotImplementedError

    @property
    def drawing(self) -> str:
        """Names the part and what it draws, for the message on a missing key."""
        raise NotImplementedError

    def training_key(self) -> PRNGKeyArray | None:
        """Returns this step's key if training draws anything, else None.

        Raises:
          ValueError: training needs a key and `seed` gave none.
        """
        if not self.needs_key or self.deterministic:
            return None
        if self.key is None:
            raise ValueError(
                f"{self.drawing} was called in training without a "
                "key. Call snella.seed(model, key) with a fresh key in every step, or "
                "model.eval() before evaluating."
            )
        return self.key[...]


class Adapter(Seeded):
    """Factors and budgets of one weight, for `[*lead]` matrices of `[n, m]`.

    Attributes:
      site: its rule and its axes, of which `lead`.
      a, b, alpha, ...: `Factor` of shape `[*lead, *shape of the factor]`.
      budget: `Budget`, int32 `[*lead]`.
      allocated_at: `Budget`, int32 `[*lead]`: the optimizer step of the last
        reallocation, 0 for never, -1 where budgets are fixed.

    Raises:
      ValueError: a factor has the name of another attribute.
    """

    def __init__(self, site: Site, start: Start):
        super().__init__()
        self.site = site
        factors, budget, allocated_at = start
        fixed = not getattr(site.kernel, "learn_piece_coeff", True)
        for name, value in factors.items():
            if hasattr(self, name):
                raise ValueError(
                    f"{site.kernel} has a factor named {name!r}: expected another "
                    "name, as modules of NNX have an attribute of that name."
                )
            kind = Frozen if fixed and name == "piece_coeff" else Factor
            setattr(self, name, kind(jnp.asarray(value)))
        self.names = tuple(sorted(factors))
        self.budget = Budget(jnp.asarray(budget))
        self.allocated_at = Budget(jnp.asarray(allocated_at))

    @property
    def rule(self) -> Rule:
        """Rank, kernel, gate and path of the update."""
        return self.site.rule

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the stack's axes here: of the whole, or of what a scan passes on."""
        return self.budget.shape[: self.budget.ndim - len(self.site.layout.slices)]

    @property
    def needs_key(self) -> bool:
        """True if training drops or sketches something."""
        return self.rule.needs_key

    @property
    def drawing(self) -> str:
        """Names the rates and the sketch of its rule."""
        settings = ("dropout", "drop_path", "sketch")
        own = (f"{name}={getattr(self.rule, name)}" for name in settings)
        return f"An adapter with {', '.join(own)}"

    def factors(self) -> Factors:
        """Returns the factors as arrays, with their leading axes."""
        return {name: getattr(self, name)[...] for name in self.names}

    def on(self, path: str, w0: Array) -> AdaptedWeight:
        """Returns the weight at this path, with these factors and budgets."""
        counts = self.budget[...], self.allocated_at[...]
        site, extra = self.site, self.budget.ndim - len(self.site.lead)
        if extra > 0:  # an ensemble: adapted under nnx.vmap
            axes = (*range(extra), *(axis + extra for axis in site.axes))
            site = dataclasses.replace(site, stack=self.stack, axes=axes)
        return AdaptedWeight(path, site, w0, self.factors(), *counts)

    def check_called(self, weight: Array) -> None:
        """Raises a `ValueError` if a call gets the weight of a whole stack."""
        expected = self.site.layout.shape
        if weight.shape != expected:
            raise ValueError(
                f"An adapted layer was called with a weight of shape {weight.shape}: "
                f"expected {expected}. Call stacked layers under nnx.scan or nnx.vmap. "
                "Where that says its axes by the kind of variable, frozen weights and "
                "budgets are no nnx.Param: nnx.StateAxes({(nnx.Param, snella.Frozen, "
                "snella.Budget): 0, ...: None})."
            )


class AdaptedLayer(nnx.Module):
    """Base class of adapted layers, which compute with `w0 + delta`.

    It has no attributes, for the layer may use any name itself. The adapter of a weight
    `kernel` is called `adapter`, that of a weight `w` is called `w_adapter`.
    """


def adapters_of(layer: AdaptedLayer) -> dict[str, Adapter]:
    """Returns the adapters of a layer, by name of their weight."""
    names = sorted(k for k, v in vars(layer).items() if isinstance(v, Adapter))
    return {weight_of(name): getattr(layer, name) for name in names}


def weight_of(adapter: str) -> str:
    """Returns the name of the weight beside an adapter of this name.

    >>> weight_of("adapter"), weight_of("w_adapter")
    ('kernel', 'w')
    """
    return "kernel" if adapter == "adapter" else adapter.removesuffix("_adapter")


def adapter_of(weight: str) -> str:
    """Returns the name of the adapter beside a weight of this name."""
    return "adapter" if weight == "kernel" else f"{weight}_adapter"


def check_layer(layer: Any, rule: Rule, own: bool = False) -> None:
    """Raises a `ValueError` if a layer cannot have this rule.

    Args:
      layer: any.
      rule: rank, kernel, gate and path of the update.
      own: True if `layouts` told the axes of its weight.
    """
    if rule.path == "parallel" and (own or type(layer).__call__ not in STOCK):
        raise ValueError(
            f"{type(layer).__name__} has a call of its own, which need not be linear "
            'in the weight: expected path="merged".'
        )
    if rule.sketch > 1 and not multiplies_rows(layer, own):
        raise ValueError(no_rows(rule.sketch, type(layer).__name__, "nnx.Linear"))
    if rule.drop_path and not _starts_with_examples(layer):
        raise ValueError(
            f"drop_path={rule.drop_path} drops along axis 0 of the output, which here "
            "belongs to the weight and not to the examples."
        )


def multiplies_rows(layer: Any, own: bool) -> bool:
    """Returns True if a layer multiplies the last axes of its input by its weight.

    Args:
      layer: any.
      own: True if `layouts` told the axes of its weight.
    """
    if (
        own
        or type(layer).__call__ not in STOCK
        or isinstance(layer, nnx.Conv | nnx.Einsum)
    ):
        return False
    if isinstance(layer, nnx.LinearGeneral):
        last = tuple(range(-len(layer.in_features), 0))
        if layer.batch_axis or tuple(layer.axis) != last:
            return False
    usual = layer.dot_general in (None, jax.lax.dot_general)
    return usual and getattr(layer, "dot_general_cls", None) is None


def _starts_with_examples(layer: Any) -> bool:
    if isinstance(layer, nnx.LinearGeneral):
        return not layer.batch_axis
    if isinstance(layer, nnx.Einsum):
        operands, result = layer.einsum_str.split("->")
        return result[0] not in operands.split(",")[1].replace(".", "")
    return True


def layout_of(layer: nnx.Module) -> Layout:
    """Returns the axes of a layer's weight, without the stack in front of them.

    Raises:
      ValueError: an einsum whose equation is only known at the call, or that sums over
        an axis of its weight alone.
    """
    match layer:
        case nnx.Linear():
            return Layout((layer.in_features,), (layer.out_features,))
        case nnx.LinearGeneral():
            slices = tuple(layer.batch_axis.values())
            return Layout(layer.in_features, layer.out_features, slices)
        case nnx.Conv():
            *window, out = layer.kernel_shape
            if layer.mask is not None:
                raise ValueError(
                    "a convolution with a mask has weights that are not used."
                )
            return Layout(tuple(window), (out,))
        case nnx.Einsum():
            return einsum_layout(layer.einsum_str, layer.kernel_shape)
    raise TypeError(f"{type(layer).__name__} has no weight that can be adapted.")
