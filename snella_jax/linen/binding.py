"""Adapts a Linen module: adapters in `params`, found by intercepted calls."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from snella_jax.adapters import file_format, tree
from snella_jax.adapters.base import Base
from snella_jax.adapters.fitting import fit
from snella_jax.adapters.tree import Key, Tree, by_name, flat, join, name_of, nested
from snella_jax.core.binding import check_binding
from snella_jax.core.config import Rule, SnellaConfig
from snella_jax.core.layout import Layout
from snella_jax.core.weight import Site
from snella_jax.files.hosts import native
from snella_jax.linen.call import Held, Place, called
from snella_jax.linen.layers import Layer, layers_of
from snella_jax.ops.readers import new_keys

__all__ = ["Adapters", "adapt", "join", "load"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters(tree.Adapters):
    """The adapters of a Linen module, and its call with them in `params`.

    Attributes:
      module: module as it was written.
      places: ways of adapters to their layers, by key of the weight.
    """

    module: nn.Module
    places: Mapping[Key, Place] = dataclasses.field(hash=False)

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Calls `module.apply` with `w0 + delta` as weights: its arguments and results.

        Only this call uses the adapters: `module.apply` itself computes with the
        weights of the base and gives the factors no gradient. A rule that drops
        something does so if the layer has an rng `dropout`, which `nn.scan` has to
        split; one with a sketch does where `seed` has put keys into the parameters.
        """
        new_keys()
        variables = {**variables, "params": self._held(variables["params"])}
        with nn.intercept_methods(functools.partial(called, self.sites)):
            return self.module.apply(variables, *args, **kwargs)

    def seed(self, params: Tree, key: PRNGKeyArray) -> Tree:
        """Returns parameters in which every adapter with a sketch has a key for a step.

        A key beside the factors reaches scanned layers, too. Without one the layer is
        the exact one, as for evaluation. Call it in the step, on the joined parameters,
        with a fresh key every step::

            params = adapters.seed(linen.join(trainable, budgets, frozen), key)
            adapters.apply({"params": params}, x)

        Raises:
          ValueError: parameters without these adapters.
          TypeError: no random key.
        """
        tree.check_key(key)
        leaves = flat(params)
        for index, (own, site) in enumerate(self.sites.items()):
            place = tree.adapter_key(own)
            if (*place, "a") not in leaves:
                raise ValueError(
                    f"There is no adapter of {name_of(own)}: expected the parameters "
                    "that linen.adapt returned, joined again if they were split."
                )
            if site.rule.sketch > 1:
                fresh = jax.random.fold_in(key, index)
                stack = site.stack
                keys = jax.random.split(fresh, stack) if stack else fresh
                leaves[(*place, tree.KEY)] = keys
        return nested(leaves)

    def _held(self, params: Tree) -> Tree:
        """Returns parameters with each adapter as a `Held`."""
        found = {tree.adapter_key(key): (key, {}) for key in self.places}
        leaves = {}
        for key, leaf in flat(params).items():
            if key[:-1] in found:
                found[key[:-1]][1][key[-1]] = leaf
            else:
                leaves[key] = leaf
        for at, (key, values) in found.items():
            if values:
                leaves[at] = Held.of(values, key, self.places[key])
        return nested(leaves)


def adapt(
    module: nn.Module,
    variables: Mapping[str, Any],
    config: SnellaConfig,
    *inputs: Any,
    key: PRNGKeyArray,
    layouts: Mapping[str, Layout] | None = None,
    **kwargs: Any,
) -> tuple[Adapters, Tree]:
    """Adapts a Linen module: returns its adapters, and its parameters with them.

    `nn.Dense`, `nn.DenseGeneral` (so Flax's attention), `nn.Einsum`, `nn.Conv` and
    their subclasses get an adapter if `config.targets` matches their path, such as
    `Transformer/encoderblock_0/MlpBlock_0/Dense_0`. Layers inside `nn.scan` or
    `nn.vmap`, along any axis, get one set of factors for each index. Any other layer
    with weights is adapted if `layouts` gives their axes: its methods are called with
    `w0 + delta`, and called again in the backward pass.

    Args:
      module: an unbound module.
      variables: returned by `module.init`, or loaded. The names of boxes
        (`nn.Partitioned`) go into `Adapters.specs`.
      config: targets, rules and densities.
      inputs, kwargs: inputs of the module, to find its layers by; nothing is computed.
      key: draws the factors.
      layouts: for a regex of paths of weights (`layers_0/attn/w`, a `kernel` with or
        without its name), the axes of those weights as the layer sees them, without
        stacks.

    Raises:
      ValueError: as in `snella.adapt`; the axes of a matched weight that multiplies the
        input are unknown; `nn.WeightNorm` or `nn.map_variables` changes a weight on its
        way to its layer; a weight is also used outside its layer's methods; the
        variables have no `params`.
      TypeError: a model of another binding, or no random key.
    """
    _check(module, variables)
    variables = jax.tree.map(native, variables)
    plain = nn.meta.unbox(variables)
    layers = layers_of(module, plain, inputs, kwargs, layouts)
    chosen = layers.chosen(config.targets, config.trainable)
    sites = {x.key: x.site(config.rule(x.path), config.must_move) for x in chosen}
    adapters, params = tree.place(variables["params"], sites, config, key)
    return _adapters(module, adapters, chosen), params


def load(
    module: nn.Module,
    variables: Mapping[str, Any],
    folder: str | Path,
    *inputs: Any,
    rename: Mapping[str, str] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    allow_base_mismatch: bool = False,
    **kwargs: Any,
) -> tuple[Adapters, dict[str, Any]]:
    """Loads adapters from a folder; returns them, and variables with what else trained.

    Any binding may have written them: `rename` says which weights are which.

    Args:
      module, variables, inputs, kwargs, layouts: as in `adapt`.
      folder: folder of an adapter.
      rename, allow_base_mismatch: as in `snella.load`.

    Raises:
      FileNotFoundError, CheckpointError: as `snella.load`.
      TypeError: a model of another binding.
    """
    _check(module, variables)
    variables = jax.tree.map(native, variables)
    plain = nn.meta.unbox(variables)
    known = layers_of(module, plain, inputs, kwargs, layouts).known
    base, stats = (flat(plain.get(c, {})) for c in ("params", "batch_stats"))

    def locate(path: str, rule: Rule, must_move: bool) -> tuple[Site, Array]:
        if path not in known:
            raise ValueError(
                "this module has no such layer that can be adapted (one that is none "
                "of Flax's needs layouts)"
            )
        return known[path].site(rule, must_move), base[known[path].key]

    named, own = by_name(base), by_name(stats)
    weights, trained, moved = fit(
        file_format.read(folder),
        locate,
        Base(named, own),
        own,
        rename=rename,
        allow_base_mismatch=allow_base_mismatch,
    )
    adapters, params = tree.fill(variables["params"], weights, trained)
    loaded = {**plain, "params": params}
    if moved:
        values = {k: jnp.asarray(moved.get(name_of(k), x)) for k, x in stats.items()}
        loaded["batch_stats"] = nested(values)
    return _adapters(module, adapters, [known[path] for path in weights]), loaded


def _check(module: Any, variables: Any) -> None:
    """Raises an error unless these are a Linen module and variables of one."""
    check_binding(module, "Linen")
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise ValueError(
            'The variables have no "params": expected what module.init returns, or '
            '{"params": params} for parameters alone.'
        )


def _adapters(module: nn.Module, plain: tree.Adapters, layers: list[Layer]) -> Adapters:
    own = {
        field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)
    }
    places = {x.key: Place(x.axes or (), x.module is None) for x in layers}
    return Adapters(**own, module=module, places=places)
