"""Adapters in a tree of parameters: nested dicts, of Linen or of no framework.

An adapter sits beside its weight: `{"fc": {"kernel": ..., "adapter": {"a": ...}}}` (and
as `w_adapter` beside a weight `w` that is not called `kernel`). Paths in regexes and
files are those of the layer, without `/kernel`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta
from flax.traverse_util import empty_node, flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec
from jaxtyping import Array, DTypeLike, PRNGKeyArray

from snella_jax.adapters import file_format
from snella_jax.adapters.base import Base
from snella_jax.adapters.fitting import any_of
from snella_jax.core.config import Rule, SnellaConfig, check_overrides
from snella_jax.core.dense import summed
from snella_jax.core.factors import factor_paths
from snella_jax.core.layout import Layout
from snella_jax.core.paths import check_trainable, listed, matches_or_holds
from snella_jax.core.placement import beside, like
from snella_jax.core.specs import adapter_spec, names_in
from snella_jax.core.weight import AdaptedWeight, Site, start
from snella_jax.files.hosts import native
from snella_jax.ops.dtypes import check_floating

Tree = dict[str, Any]
Key = tuple[str, ...]
COUNTS = ("budget", "allocated_at")
KEY = "key"  # of an adapter that draws rows, for one step


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The adapted weights of a tree, and what else trains: static.

    Attributes:
      sites: sites by key of the weight, `("fc", "kernel")`.
      trainable: regex of what trains besides the factors.
      names: specs that the base's boxes (`nn.Partitioned`) had, by key.
    """

    sites: Mapping[Key, Site] = dataclasses.field(hash=False)
    trainable: str
    names: Mapping[Key, PartitionSpec] = dataclasses.field(
        default_factory=dict, hash=False
    )

    def partition(self, params: Tree) -> tuple[Tree, Tree, Tree]:
        """Splits adapted parameters into `trainable`, `budgets` and `frozen`.

        The first is for the optimizer, the second for `reallocate`, as in
        `snella.partition`; `join` puts them together again.
        """
        trainable, budgets, frozen = {}, {}, {}
        adapters = {adapter_key(key): site for key, site in self.sites.items()}
        for key, leaf in flat(params).items():
            site = adapters.get(key[:-1])
            if site is None:
                trains = matches_or_holds(self.trainable, name_of(key))
                (trainable if trains else frozen)[key] = leaf
            elif key[-1] in COUNTS:
                budgets[key] = leaf
            else:
                learnt = getattr(site.kernel, "learn_piece_coeff", True)
                fixed = key[-1] == KEY or (key[-1] == "piece_coeff" and not learnt)
                (frozen if fixed else trainable)[key] = leaf
        return nested(trainable), nested(budgets), nested(frozen)

    def weights(self, params: Tree) -> list[AdaptedWeight]:
        """Lists every adapted weight, for `snella.sparsity` and `snella.describe`."""
        leaves = flat(params)
        own: dict[Key, dict[str, Any]] = {}
        for key, leaf in leaves.items():
            own.setdefault(key[:-1], {})[key[-1]] = leaf
        found = []
        for key, site in self.sites.items():
            factors = dict(own[adapter_key(key)])
            counts = [factors.pop(count) for count in COUNTS]
            factors.pop(KEY, None)
            weight = layer_path(key), site, leaves[key], factors, *counts
            found.append(AdaptedWeight(*weight))
        return found

    def specs(self, params: Tree) -> Tree:
        """Returns a `PartitionSpec` for every leaf of adapted parameters, or of a part.

        What the names of the base's boxes say (`nn.get_partition_spec`): where they are
        logical ones, `nn.logical_to_mesh` makes axes of a mesh of them. Adapters follow
        their weights, and what had no box is not split.
        """
        adapters = {adapter_key(key): key for key in self.sites}
        found = {}
        for key in arrays_of(flat(params)):
            weight = adapters.get(key[:-1], key)
            spec = self.names.get(weight, PartitionSpec())
            if weight != key:
                spec = adapter_spec(self.sites[weight], spec, key[-1])
            found[key] = spec
        return nested(found)

    def summed(self, params: Tree) -> Tree:
        """Returns plain parameters with `w0 + delta` as weights; differentiable.

        For an apply function that knows nothing of adapters. Its backward pass keeps
        every update and every sum: as much memory as the adapted weights take twice.
        `adapted_dense` at the matmul, Linen's and NNX's bindings keep none of it.
        """
        return self._with(params, lambda w: summed(w.w0, w.delta()).astype(w.w0.dtype))

    def merge(
        self,
        params: Tree,
        *,
        unmoved_budgets: bool = False,
        dtype: DTypeLike | None = None,
    ) -> Tree:
        """Returns plain parameters for good: `summed`, with `snella.merge`'s checks.

        Args:
          params: adapted parameters.
          unmoved_budgets, dtype: as in `snella.merge`.

        Raises:
          BudgetsNeverMoved: they should have, unless `unmoved_budgets`.
          ValueError: no floating-point dtype.
        """
        check_floating(dtype)
        plain = self._with(params, lambda w: w.merged(unmoved_budgets, dtype))
        if dtype is None:
            return plain
        leaves = arrays_of(flat(plain))
        cast = {k: jnp.asarray(x, dtype) for k, x in leaves.items() if _is_float(x)}
        return nested(flat(plain) | cast)

    def unload(self, params: Tree) -> Tree:
        """Returns plain parameters without the adapters; what else trained stays."""
        return self._with(params, lambda weight: weight.w0)

    def save(
        self,
        params: Tree,
        folder: str | Path,
        *,
        base: str | None = None,
        batch_stats: Tree | None = None,
    ) -> None:
        """Writes the adapters and what else trained, as `snella.save` does.

        Args:
          params: adapted parameters.
          folder: folder to write.
          base: name of the base model.
          batch_stats: running statistics that training has changed.

        Raises:
          ValueError, FileExistsError: as `snella.save`.
        """
        leaves = by_name(flat(self.unload(params)))
        trained = {
            name: leaf
            for name, leaf in leaves.items()
            if matches_or_holds(self.trainable, name)
        }
        stats = by_name(flat(batch_stats or {}))
        weights = self.weights(params)
        file_format.write(folder, weights, trained, stats, Base(leaves), base)

    def _with(self, params: Tree, value: Callable[[AdaptedWeight], Array]) -> Tree:
        adapters = set(map(adapter_key, self.sites))
        new = {k: x for k, x in flat(params).items() if k[:-1] not in adapters}
        weights = zip(self.sites, self.weights(params), strict=True)
        return nested(new | {key: value(weight) for key, weight in weights})


def join(*parts: Tree) -> Tree:
    """Joins what `partition` split."""
    return nested(functools.reduce(dict.__or__, map(flat, parts)))


def site(
    path: str,
    shape: tuple[int, ...],
    layout: Layout,
    rule: Rule,
    must_move: bool,
    axes: tuple[int, ...] | None = None,
) -> Site:
    """Returns the site of a weight of this shape.

    Args:
      path, shape: path and shape of the weight.
      layout: its axes, without the stack.
      rule, must_move: as in `Site`.
      axes: axes of the stack; None for all that are in front of the layout's.

    Raises:
      ValueError: the layout does not fit the shape, or `split` the layout.
    """
    layout = layout.split(rule.split) if rule.split > 1 else layout
    if axes is None:
        axes = tuple(range(len(shape) - len(layout.shape)))
    found = Site(rule, layout, tuple(shape[axis] for axis in axes), must_move, axes)
    if found.shape != shape:
        raise ValueError(
            f"{path} has shape {shape}: expected {layout.shape} behind the axes of the "
            "stack."
        )
    return found


def place(
    params: Tree, sites: Mapping[Key, Site], config: SnellaConfig, key: PRNGKeyArray
) -> tuple[Adapters, Tree]:
    """Draws adapters for these weights, and casts frozen ones to `config.frozen_dtype`.

    Raises:
      ValueError: an override or `config.trainable` matches nothing, or an adapted
        weight; there is an adapter, or something in its place.
      TypeError: the key is none.
    """
    check_key(key)
    names = names_in(flat(params))
    leaves = _plain(params)
    arrays = by_name(leaves)
    check_overrides(config, map(layer_path, sites))
    check_trainable(config.trainable, map(name_of, sites))
    trainable = {name for name in arrays if matches_or_holds(config.trainable, name)}
    if config.trainable and not trainable:
        raise ValueError(
            f"trainable={config.trainable!r} matches nothing; pass trainable='' if "
            f"only the adapters train. There are: {listed(arrays)}"
        )
    if config.frozen_dtype is not None:
        for name, leaf in arrays_of(leaves).items():
            if _is_float(leaf) and name_of(name) not in trainable:
                leaves[name] = jnp.asarray(leaf, config.frozen_dtype)
    by_path = {layer_path(key): site for key, site in sites.items()}
    for own, drawn in zip(sites, start(by_path, config, key).values(), strict=True):
        factors, *counts = beside(sites[own], leaves[own], drawn)
        _put(leaves, own, factors | dict(zip(COUNTS, counts, strict=True)))
    return Adapters(dict(sites), config.trainable, names), nested(leaves)


def fill(
    params: Tree, weights: Mapping[str, AdaptedWeight], trained: Mapping[str, Any]
) -> tuple[Adapters, Tree]:
    """Puts adapters from a file, and what else trained, into parameters.

    Raises:
      ValueError: there is an adapter, or something in its place.
    """
    names = names_in(flat(params))
    leaves = _plain(params)
    keys = {layer_path(key): key for key in leaves}
    sites = {keys[path]: weight.site for path, weight in weights.items()}
    for key in leaves:
        if name_of(key) in trained:
            leaves[key] = like(jnp.asarray(trained[name_of(key)]), leaves[key])
    for path, weight in weights.items():
        own = weight.factors, weight.budget, weight.allocated_at
        factors, *counts = beside(weight.site, weight.w0, own)
        _put(leaves, keys[path], factors | dict(zip(COUNTS, counts, strict=True)))
    return Adapters(sites, any_of(trained), names), nested(leaves)


def check_key(key: Any) -> None:
    """Raises a `TypeError` if a random key is none, such as a number."""
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed and not (jnp.ndim(key) == 1 and dtype == jnp.uint32):
        raise TypeError(f"key={key!r} is no random key: expected jax.random.key(0).")


def _plain(params: Tree) -> dict[Key, Any]:
    if adapters := factor_paths(params):
        raise ValueError(
            f"The parameters have adapters already: {listed(sorted(adapters))}\n"
            "Merge them first."
        )
    return unboxed(flat(params))


def unboxed(leaves: Mapping[Key, Any]) -> dict[Key, Any]:
    """Replaces boxes (`nn.Partitioned`) by their arrays, in the order of the leaves."""
    boxes = {k: x for k, x in leaves.items() if isinstance(x, meta.AxisMetadata)}
    return {**leaves, **{k: native(meta.unbox(box)) for k, box in boxes.items()}}


def flat(params: Tree) -> dict[Key, Any]:
    """Returns leaves by key, in the machine's byte order; empty dicts are leaves, too.

    Raises:
      TypeError: a list or a tuple, which adapters cannot sit in.
    """
    leaves = flatten_dict(params, keep_empty_nodes=True)
    for key, leaf in leaves.items():
        if isinstance(leaf, list | tuple):
            raise TypeError(
                f"{name_of(key)} is a {type(leaf).__name__}: expected nested dicts of "
                "arrays; make it one with dict(enumerate(...)), its keys as str."
            )
    return {key: native(leaf) for key, leaf in leaves.items()}


def nested(leaves: Mapping[Key, Any]) -> Tree:
    """Nests what `flat` flattened."""
    return unflatten_dict(dict(leaves))


def arrays_of(leaves: Mapping[Key, Any]) -> dict[Key, Any]:
    """Leaves out the empty dicts."""
    return {key: leaf for key, leaf in leaves.items() if leaf is not empty_node}


def by_name(leaves: Mapping[Key, Any]) -> dict[str, Any]:
    """Returns the arrays by "/"-joined name.

    Raises:
      ValueError: two have one name.
    """
    arrays = arrays_of(leaves)
    found = {name_of(key): leaf for key, leaf in arrays.items()}
    if len(found) < len(arrays):
        raise ValueError(f"Two parameters have one name: {listed(map(str, arrays))}")
    return found


def name_of(key: Key) -> str:
    """Joins a key to a path, as regexes and files have it."""
    return "/".join(map(str, key))


def layer_path(key: Key) -> str:
    """Returns the path of the layer that holds a weight."""
    return name_of(key[:-1] if key[-1] == "kernel" else key)


def adapter_key(key: Key) -> Key:
    """Returns the key of the adapter of a weight."""
    *parent, name = key
    return (*parent, "adapter" if name == "kernel" else f"{name}_adapter")


def _put(leaves: dict[Key, Any], key: Key, values: Mapping[str, Any]) -> None:
    place = adapter_key(key)
    if any(other[: len(place)] == place for other in leaves):
        raise ValueError(
            f"There is something at {name_of(place)}, where the adapter of "
            f"{name_of(key)} goes: an adapter (merge it first), or a layer to rename."
        )
    leaves |= {(*place, name): jnp.asarray(value) for name, value in values.items()}


def _is_float(leaf: Any) -> bool:
    """Returns False for None, too, which a dict of parameters may hold."""
    return leaf is not None and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
